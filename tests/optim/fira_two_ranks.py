"""Projected optimizers on two gloo ranks; started twice by test_fira_distributed.py.

python fira_two_ranks.py RANK STORE OUTPUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

sys.path.insert(0, str(Path(__file__).parent))
from fira_definition import gradients, run

from gnomon.common import projection
from gnomon.errors import MethodError
from gnomon.optim import Fira, GaLoreAdamW, low_rank_groups

GROUP = {"rank": 3, "update_proj_gap": 2, "alpha": 0.25}


def sharded(rank: int) -> dict[str, float]:
    """Steps on DTensors in every placement, uneven shards too, against the same steps on one rank."""
    mesh = init_device_mesh("cpu", (2,))
    square = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replica", "shard"))
    found = {}
    cases: list[tuple[str, type, tuple[int, int], Any, list[Any], dict[str, Any]]] = [
        ("rows", Fira, (9, 14), mesh, [Shard(0)], {}),
        ("rows tall", Fira, (15, 8), mesh, [Shard(0)], {}),
        ("fewer rows than ranks", Fira, (1, 8), mesh, [Shard(0)], {"rank": 1}),
        ("columns", Fira, (9, 15), mesh, [Shard(1)], {}),
        ("columns tall", Fira, (15, 9), mesh, [Shard(-1)], {}),
        ("replicated", Fira, (9, 14), mesh, [Replicate()], {}),
        ("two axes", Fira, (9, 14), square, [Replicate(), Shard(0)], {}),
        ("both sides", GaLoreAdamW, (9, 14), mesh, [Shard(0)], {"proj_type": "full"}),
        ("both sides, columns", GaLoreAdamW, (9, 14), mesh, [Shard(1)], {"proj_type": "full"}),
        ("reverse", Fira, (9, 14), mesh, [Shard(0)], {"proj_type": "reverse_std"}),
        ("plain", Fira, (9, 14), mesh, [Shard(0)], {"rank": None}),
    ]
    for name, optimizer_class, shape, where, placements, changes in cases:
        W, grads = gradients(*shape, 1, seed=1)[0], gradients(*shape, 5)
        options = {"lr": 0.01, "weight_decay": 0.1}
        expected, _ = run(optimizer_class, W, grads, {**GROUP, **changes}, **options)
        weight = nn.Parameter(distribute_tensor(W, where, placements))
        optimizer = optimizer_class([{"params": [weight], **GROUP, **changes}], **options)
        for grad in grads:
            weight.grad = distribute_tensor(grad, where, placements)
            optimizer.step()
        found[name] = float((weight.full_tensor() - expected).abs().max())
        if changes.get("rank", 3):
            assert not any(isinstance(v, DTensor) for v in optimizer.state[weight].values())
    return found


def one_basis(rank: int, broadcast: bool) -> float:
    """How far two ranks drift apart when one of them finds other signs."""
    honest = projection.gradient_basis
    projection.gradient_basis = lambda *a, **k: [part * (-1) ** rank * (-1) ** len(seen) for part in honest(*a, **k)]
    seen: list[int] = []
    W, grads = gradients(6, 9, 1, seed=1)[0], gradients(6, 9, 6)
    weight = nn.Parameter(W.clone())
    optimizer = Fira([{"params": [weight], **GROUP, "broadcast": broadcast}], lr=0.01)
    for step, grad in enumerate(grads):
        weight.grad = grad
        if step == 2 and rank == 1:
            seen.append(step)  # from here rank 1 agrees with rank 0: its moments changed sides
        optimizer.step()
    projection.gradient_basis = honest
    both = [torch.empty_like(weight) for _ in range(2)]
    dist.all_gather(both, weight.detach())
    return float((both[0] - both[1]).abs().max())


def checkpoint(rank: int) -> float:
    """Difference between a run and one that went through torch's distributed state dict, under FSDP2."""
    results = []
    for resume in (False, True):
        model = nn.ModuleDict({"mlp": nn.Linear(10, 14), "head": nn.Linear(14, 3)}).double()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))
        for layer in model.values():
            fully_shard(layer)
        optimizer = Fira(low_rank_groups(model, 3, update_proj_gap=2), lr=0.01)
        for step in range(4):
            x = torch.randn(8, 10, generator=torch.Generator().manual_seed(step)).double()
            model["head"](model["mlp"](x)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if resume and step == 1:
                saved = get_optimizer_state_dict(model, optimizer)
                optimizer = Fira(low_rank_groups(model, 3, update_proj_gap=2), lr=0.01)
                set_optimizer_state_dict(model, optimizer, saved)
        results.append([p.full_tensor().detach() for p in model.parameters()])
    return max(float((a - b).abs().max()) for a, b in zip(*results, strict=True))


def refusals() -> dict[str, str]:
    found = {}
    try:
        Fira([nn.Parameter(torch.zeros(3, 3))]).step_in_backward()
    except MethodError as error:
        found["step_in_backward"] = str(error)
    return found


def main() -> None:
    rank, store, output = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    found = {
        "sharded": sharded(rank),
        "apart with broadcast": one_basis(rank, True),
        "apart without": one_basis(rank, False),
        "checkpoint": checkpoint(rank),
        "refusals": refusals(),
    }
    if rank == 0:
        Path(output).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
