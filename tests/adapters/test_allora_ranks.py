"""ALLoRA at the optimizer on two gloo ranks, replicated and sharded, against one rank.

Run as a program it is one of the ranks: ``python test_allora_ranks.py RANK STORE OUTPUT``. In float64.
"""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from gnomon.adapters import ALLoRAConfig, scale_allora_updates
from gnomon.common.models import tiny
from gnomon.errors import ModelError

pytestmark = pytest.mark.slow


def adapted(apply: str = "update") -> Any:
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "max_positions": 32}
    config = ALLoRAConfig(r=3, eta=3.0, apply=apply, target_modules="all-linear", task_type="CAUSAL_LM")
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny("llama", **sizes), config).double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.add_(0.3 * torch.randn(p.shape, dtype=p.dtype))
    return model.train()


def shard(model: Any, mesh: Any) -> None:
    for block in model.base_model.model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def train(model: Any, inner: Any, part: slice) -> dict[str, Tensor]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    scale_allora_updates(optimizer, inner)
    for step in range(3):
        rows = torch.randint(1, 64, (4, 12), generator=torch.Generator().manual_seed(step))[part]
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {
        name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach()
        for name, p in inner.named_parameters()
        if p.requires_grad
    }


def compare(rank: int) -> dict[str, Any]:
    part = slice(2 * rank, 2 * rank + 2)
    single = adapted()
    reference = train(single, single, slice(0, 4))
    replicated, sharded = adapted(), adapted()
    found = {"ddp": train(DistributedDataParallel(replicated), replicated, part)}
    mesh = init_device_mesh("cpu", (2,))
    shard(sharded, mesh)
    found["fsdp2"] = train(sharded, sharded, part)
    start = {name: p.detach() for name, p in adapted().named_parameters()}
    apart = {
        kind: max(float((values[name] - reference[name]).abs().max()) for name in reference)
        for kind, values in found.items()
    }
    alone = adapted("gradient")
    for module in alone.modules():
        if isinstance(module, torch.nn.Linear) and module.weight.requires_grad:
            fully_shard(module, mesh=mesh)
    message = ""
    try:
        alone(input_ids=torch.ones(1, 3, dtype=torch.long))
    except ModelError as error:
        message = str(error)
    return {
        **apart,
        "moved": max(float((reference[name] - start[name]).abs().max()) for name in reference),
        "sharded": all(hasattr(p, "placements") for p in sharded.parameters()),
        "message": message,
    }


def test_two_ranks_equal_one(tmp_path: Path) -> None:
    tail = [str(tmp_path / "store"), str(tmp_path / "found.json")]
    ranks = [
        subprocess.Popen([sys.executable, __file__, str(rank), *tail], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        errors = [rank.communicate(timeout=200)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert all(rank.returncode == 0 for rank in ranks), errors
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["moved"] > 1e-3
    assert found["ddp"] < 1e-9
    assert found["fsdp2"] < 1e-9
    assert found["sharded"]
    assert "A and B are sharded apart from their layer. Shard whole blocks" in found["message"]


def main() -> None:
    rank, store, output = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    found = compare(rank)
    if rank == 0:
        output.write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
