"""Run optimizers on two gloo ranks and compare with one rank; started twice by test_optimizers.py.

    python two_ranks.py RANK STORE OUTPUT SLUG:CLASS...

Works in float64, so that what differs is a mistake and not the order of a sum.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parent))
from optimizer_members import build, tiny_model

STEPS = 5


def batches(steps: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 64, (4, 12), generator=generator) for _ in range(steps)]


def train(model: Any, optimizer: torch.optim.Optimizer, part: slice) -> None:
    for batch in batches(STEPS):
        mine = batch[part]
        model(input_ids=mine, labels=mine).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def difference(weights: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> float:
    return max(float((weights[name] - reference[name]).abs().max()) for name in reference)


def whole(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
        for name, p in model.named_parameters()
    }


def compare(member: str, rank: int) -> dict[str, Any]:
    part = slice(2 * rank, 2 * rank + 2)
    single = tiny_model(torch.float64)
    start = whole(single)
    train(single, build(member, single), slice(0, 4))
    reference = whole(single)

    replicated = tiny_model(torch.float64)
    train(DistributedDataParallel(replicated), build(member, replicated), part)

    sharded = tiny_model(torch.float64)
    mesh = init_device_mesh("cpu", (2,))
    for block in sharded.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    optimizer = build(member, sharded)
    train(sharded, optimizer, part)
    return {
        "moved": difference(reference, start),
        "ddp": difference(whole(replicated), reference),
        "fsdp2": difference(whole(sharded), reference),
        "sharded": all(hasattr(p, "placements") for p in sharded.parameters()),
    }


def main() -> None:
    rank, store, output, members = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    found = {member: compare(member, rank) for member in members}
    if rank == 0:
        Path(output).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
