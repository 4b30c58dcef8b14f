"""GradNormLoRP on two gloo ranks; started twice by test_gradnorm_lorp_distributed.py.

python gradnorm_lorp_two_ranks.py RANK STORE OUTPUT
"""

from __future__ import annotations

import json
import sys
import warnings
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
from gradnorm_lorp_definition import draws, run

from gnomon.errors import MethodError
from gnomon.optim import GradNormLoRP, gradnorm_lorp_groups

GROUP = {"rank": 3, "update_proj_gap": 2, "alpha": 0.25}


def sharded() -> dict[str, float]:
    """Steps on DTensors in every placement, uneven shards too, against the same steps on one rank."""
    mesh = init_device_mesh("cpu", (2,))
    square = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replica", "shard"))
    turned = {"fan_in_fan_out": True}
    cases: list[tuple[str, tuple[int, ...], Any, list[Any], dict[str, Any]]] = [
        ("rows", (9, 14), mesh, [Shard(0)], {}),
        ("rows tall", (15, 8), mesh, [Shard(0)], {}),
        ("fewer rows than ranks", (1, 8), mesh, [Shard(0)], {"rank": 1}),
        ("columns", (9, 15), mesh, [Shard(1)], {}),
        ("columns tall", (15, 9), mesh, [Shard(-1)], {}),
        ("replicated", (9, 14), mesh, [Replicate()], {}),
        ("two axes", (9, 14), square, [Replicate(), Shard(0)], {}),
        ("both sides", (9, 14), mesh, [Shard(0)], {"proj_type": "full"}),
        ("both sides, columns", (9, 14), mesh, [Shard(1)], {"proj_type": "full"}),
        ("other way round", (9, 14), mesh, [Shard(0)], turned),
        ("other way round, columns", (15, 8), mesh, [Shard(1)], turned),
        ("plain", (9, 14), mesh, [Shard(0)], {"rank": None}),
        ("plain, columns", (9, 14), mesh, [Shard(1)], {"rank": None}),
        ("plain, other way round", (9, 15), mesh, [Shard(0)], {"rank": None, **turned}),
        ("vector", (9,), mesh, [Shard(0)], {"rank": None}),
        ("no normalisation", (9, 14), mesh, [Shard(0)], {"weight_norm": False}),
    ]
    found = {}
    for mode in ("weightnorm", "authors"):
        for name, shape, where, placements, changes in cases:
            wide = shape if len(shape) == 2 else (1, *shape)
            W, *grads = (x.view(shape) for x in draws(*wide, 6))
            options = {"lr": 0.01, "weight_decay": 0.1, "mode": mode}
            expected, _ = run(GradNormLoRP, W, grads, {**GROUP, **changes}, **options)
            weight = nn.Parameter(distribute_tensor(W, where, placements))
            optimizer = GradNormLoRP([{"params": [weight], **GROUP, **changes}], **options)
            for grad in grads:
                weight.grad = distribute_tensor(grad, where, placements)
                optimizer.step()
            found[f"{mode}, {name}"] = float((weight.full_tensor() - expected).abs().max())
            if changes.get("rank", 3):
                kept = {k for k, v in optimizer.state[weight].items() if isinstance(v, DTensor)}
                assert kept <= {"direction"}, kept
    return found


def small_model() -> nn.ModuleDict:
    model = nn.ModuleDict({"mlp": nn.Linear(100, 140), "head": nn.Linear(140, 3)}).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    for layer in model.values():
        fully_shard(layer)
    return model


def checkpoint(mode: str, bits: int) -> tuple[float, bool]:
    """Difference between a run and one through torch's distributed state dict; whether codes stayed 8-bit."""
    results = []
    for resume in (False, True):
        model = small_model()

        def make(model: nn.Module = model) -> GradNormLoRP:
            groups = gradnorm_lorp_groups(model, 60, update_proj_gap=2)
            return GradNormLoRP(groups, lr=0.01, mode=mode, bits=bits)  # type: ignore[arg-type]

        optimizer = make()
        for step in range(4):
            x = torch.randn(8, 100, generator=torch.Generator().manual_seed(step)).double()
            model["head"](model["mlp"](x)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if resume and step == 1:
                saved = get_optimizer_state_dict(model, optimizer)
                optimizer = make()
                set_optimizer_state_dict(model, optimizer, saved)
        results.append([p.full_tensor().detach() for p in model.parameters()])
    state = optimizer.state[model["mlp"].weight]
    eight = state.get("exp_avg_codes", torch.zeros(())).dtype == torch.uint8
    return max(float((a - b).abs().max()) for a, b in zip(*results, strict=True)), eight


def messages() -> dict[str, str]:
    found = {}
    try:
        GradNormLoRP([nn.Parameter(torch.zeros(3, 3))]).step_in_backward()
    except MethodError as error:
        found["step_in_backward"] = str(error)
    weight = nn.Parameter(distribute_tensor(torch.zeros(80, 90), init_device_mesh("cpu", (2,)), [Shard(0)]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        GradNormLoRP([("embed", weight)], bits=8)
    found["eight bits"] = " ".join(str(w.message) for w in caught)
    return found


def main() -> None:
    rank, store, output = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    found = {
        "sharded": sharded(),
        "checkpoint": {f"{m}, {b}": checkpoint(m, b) for m in ("weightnorm", "authors") for b in (8, 32)},
        "messages": messages(),
    }
    if rank == 0:
        Path(output).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
