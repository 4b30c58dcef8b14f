"""Train adapters on two gloo ranks and compare with one rank; started twice by test_adapters_training.py.

    python adapter_two_ranks.py RANK STORE OUTPUT FOLDER MEMBER...

Works in float64, so that what differs is a mistake and not the order of a sum.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parent))
from adapter_members import adapted, base_model, ids, logits, shaken, trained

STEPS = 3


def fresh(member: str) -> Any:
    return shaken(adapted(member).double()).train()


def train(model: nn.Module, part: slice) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for step in range(STEPS):
        batch = ids(rows=4, seed=step)[part]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
        for name, p in trained(model).items()
    }


def difference(found: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    assert found.keys() == reference.keys()
    return max(float((found[name] - reference[name]).abs().max()) for name in reference)


def shard(model: Any, mesh: Any) -> None:
    for block in model.base_model.model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def compare(member: str, rank: int, folder: Path) -> dict[str, Any]:
    part = slice(2 * rank, 2 * rank + 2)
    single = fresh(member)
    start = whole(single)
    train(single, slice(0, 4))
    reference = whole(single)

    replicated = fresh(member)
    train(DistributedDataParallel(replicated), part)

    sharded = fresh(member)
    shard(sharded, init_device_mesh("cpu", (2,)))
    train(sharded, part)
    found = {
        "moved": difference(reference, start),
        "ddp": difference(whole(replicated), reference),
        "fsdp2": difference(whole(sharded), reference),
        "sharded": all(hasattr(p, "placements") for p in sharded.parameters()),
    }
    state = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        where = folder / member.replace(":", "-")
        sharded.save_pretrained(where, state_dict=state)
        again = peft.PeftModel.from_pretrained(base_model(dtype=torch.float64), str(where)).eval()
        found["reloaded"] = float((logits(again) - logits(single.eval())).abs().max())
    return found


def main() -> None:
    rank, store, output, folder, members = int(sys.argv[1]), sys.argv[2], sys.argv[3], Path(sys.argv[4]), sys.argv[5:]
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    found = {member: compare(member, rank, folder) for member in members}
    if rank == 0:
        Path(output).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
