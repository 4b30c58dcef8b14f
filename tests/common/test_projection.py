"""Sides, bases, products and the in-place update of projected weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gnomon.common.models import tiny
from gnomon.common.projected_groups import check_hyperparameters, split_parameters
from gnomon.common.projection import FULL, LEFT, RIGHT, add_low_rank_, back, gradient_basis, project, rotate, side_of
from gnomon.errors import MethodError, ModelError


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_sides() -> None:
    table = {"std": (RIGHT, RIGHT, LEFT), "reverse_std": (LEFT, LEFT, RIGHT), "left": (LEFT,) * 3}
    table |= {"right": (RIGHT,) * 3, "full": (FULL,) * 3}
    for name, sides in table.items():
        assert tuple(side_of(shape, name) for shape in ((5, 3), (4, 4), (3, 5))) == sides
    with pytest.raises(MethodError, match=r"proj_type = 'lefd'. Did you mean 'left'"):
        side_of((2, 2), "lefd")


@pytest.mark.parametrize("side", [LEFT, RIGHT, FULL])
@pytest.mark.parametrize("refresh", ["exact", "randomized"])
@pytest.mark.parametrize("shape", [(40, 60), (60, 40)])
def test_projection_and_back_is_the_best_approximation(side: int, refresh: str, shape: tuple[int, int]) -> None:
    low = normal(shape[0], 4) @ normal(4, shape[1], seed=1)
    basis = gradient_basis(low, 4, side, refresh=refresh)
    assert torch.allclose(back(project(low, basis, side), basis, side), low, atol=1e-6)
    for part in basis:
        assert part.is_contiguous()
        assert part.untyped_storage().nbytes() == part.numel() * part.element_size()
    G = low + 0.01 * normal(*shape, seed=2)
    basis = gradient_basis(G, 4, side, refresh=refresh)
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    best = (U[:, :4] * S[:4]) @ Vh[:4]
    assert torch.allclose(back(project(G, basis, side), basis, side), best, atol=1e-3)


@pytest.mark.parametrize("side", [LEFT, RIGHT, FULL])
def test_rotation_expresses_the_same_matrix(side: int) -> None:
    G = normal(6, 5)
    old = gradient_basis(G, 5, side) if side != LEFT else gradient_basis(G.T @ G, 5, side)
    G = G if side != LEFT else G.T @ G
    new = [torch.linalg.qr(part if part.shape[0] >= part.shape[1] else part.T).Q for part in old]
    new = [n @ torch.linalg.qr(normal(n.shape[1], n.shape[1], seed=3)).Q for n in new]
    new = [n if n.shape == o.shape else n.T for n, o in zip(new, old, strict=True)]
    M = project(G, old, side)
    assert torch.allclose(back(rotate(M, old, new, side), new, side), back(M, old, side), atol=1e-10)


@pytest.mark.parametrize("side", [LEFT, RIGHT, FULL])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_update_in_place(side: int, dtype: torch.dtype) -> None:
    W, G = normal(6, 5).to(dtype), normal(6, 5, seed=1).to(dtype)
    basis = gradient_basis(G, 2, side)
    R = project(G, basis, side)
    v = normal(6, 1, seed=4).to(dtype) if side == RIGHT else normal(5, seed=4).to(dtype)
    expected = W - 0.1 * (0.25 * back(R, basis, side) + 2.0 * G * v)
    seen = W.clone()
    add_low_rank_(seen, R, basis, side, alpha=0.25, step_size=0.1, dense=(G, v, 2.0))
    assert torch.allclose(seen, expected, atol={torch.float64: 1e-12, torch.float32: 1e-6}.get(dtype, 3e-2))
    add_low_rank_(W, R, basis, side, alpha=0.25, step_size=0.1)
    assert not torch.equal(W, seen)


@pytest.mark.parametrize("refresh", ["exact", "randomized"])
def test_gradients_that_are_not_finite(refresh: str) -> None:
    for value in (float("nan"), float("inf")):
        with pytest.raises(MethodError, match="NaN or infinite"):
            gradient_basis(torch.full((60, 40), value), 3, RIGHT, refresh=refresh)


def test_half_precision_is_decomposed_in_float32() -> None:
    G = normal(12, 9).bfloat16()
    (P,) = gradient_basis(G, 3, LEFT)
    assert P.dtype == torch.bfloat16
    assert torch.equal(P, torch.linalg.svd(G.float(), full_matrices=False).U[:, :3].bfloat16())


def test_split_parameters() -> None:
    model = tiny("llama", num_layers=2)
    targets, rest = split_parameters(model, ("attn", "mlp"))
    assert len(targets) == 14
    assert {n.split(".")[-2] for n, _ in rest} == {
        "embed_tokens", "lm_head", "norm", "input_layernorm", "post_attention_layernorm",
    }  # fmt: skip
    assert len(split_parameters(model, "all-linear")[0]) == 15
    assert len(split_parameters(model, r".*\.q_proj")[0]) == 2
    model.model.layers[0].requires_grad_(False)
    assert len(split_parameters(model, ("attn", "mlp"))[0]) == 7
    gpt2, _ = split_parameters(tiny("gpt2", num_layers=1), ("attn", "mlp"))
    assert {n.split(".")[-2] for n, _ in gpt2} == {"c_attn", "c_proj", "c_fc"}
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(ModelError, match=r"all layers that match but are frozen"):
        split_parameters(model, ("attn",))
    with pytest.raises(ModelError, match=r"target_modules = \['atn'\]: no linear layers match.*q_proj"):
        split_parameters(model, ["atn"])
    with pytest.raises(ModelError, match=r"has 0 linear layers \(none"):
        split_parameters(nn.LayerNorm(3), ["attn"])


def test_a_shared_weight_is_in_one_group_only() -> None:
    model = nn.ModuleDict({"mlp": nn.Linear(4, 4, bias=False), "head": nn.Linear(4, 4)})
    model["head"].weight = model["mlp"].weight
    targets, rest = split_parameters(model, ["mlp"])
    assert [n for n, _ in targets] == ["mlp.weight"]
    assert [n for n, _ in rest] == ["head.bias"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, r"lr = -1.0; it must be 0 or more"),
        ({"lr": float("nan")}, r"lr = nan"),
        ({"lr": 1.0, "betas": (0.9, 1.0)}, r"betas\[1\] = 1.0; it must lie in \[0, 1\)"),
        ({"lr": 1.0, "eps": -1e-8}, r"eps = -1e-08"),
        ({"lr": 1.0, "weight_decay": -0.1}, r"weight_decay = -0.1"),
        ({"lr": 1.0, "bits": 4}, r"bits = 4; the moments are kept in 32 \(full precision\) or 8 bits"),
    ],
)
def test_hyperparameter_messages(options: dict, message: str) -> None:
    with pytest.raises(MethodError, match=message):
        check_hyperparameters(**options)
