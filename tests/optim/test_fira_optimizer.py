"""Fira as an optimizer: groups, refusals, checkpoints, 8-bit moments, layer-wise steps, diagnostics, PEFT."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from gnomon import catalog
from gnomon.common.memory import tensor_bytes
from gnomon.common.models import tiny
from gnomon.errors import MethodError, ModelError, NoEffectWarning
from gnomon.optim import Fira, FiraRMSProp, GaLoreAdamW, low_rank_groups

sys.path.insert(0, str(Path(__file__).parent))
from fira_definition import gradients, run

BATCH = torch.randint(0, 256, (4, 16), generator=torch.Generator().manual_seed(0))


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int = 3) -> None:
    for _ in range(count):
        model(input_ids=BATCH, labels=BATCH).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def small(**options: Any) -> Any:
    return tiny("llama", hidden_size=32, num_layers=2, **options)


def weight(m: int = 6, n: int = 9) -> nn.Parameter:
    return nn.Parameter(torch.zeros(m, n))


def test_card_names_entry_and_groups() -> None:
    card = catalog.get("fira")
    assert catalog.load("fira") is Fira
    assert catalog.resolve(card.recipe["groups"]) is low_rank_groups
    for claim in card.claims:
        assert catalog.resolve(claim.run).arms


def test_groups_of_a_model() -> None:
    model = small()
    projected, rest = low_rank_groups(model, 4, alpha=0.25, update_proj_gap=50)
    assert len(projected["params"]) == 14
    assert {k: projected[k] for k in ("rank", "alpha", "update_proj_gap", "proj_type")} == {
        "rank": 4, "alpha": 0.25, "update_proj_gap": 50, "proj_type": "std",
    }  # fmt: skip
    assert len(projected["params"]) + len(rest["params"]) == len(list(model.parameters()))
    assert low_rank_groups(model)[0]["rank"] == 8
    only = low_rank_groups(nn.ModuleDict({"mlp": nn.Linear(4, 4, bias=False)}), 2)
    assert len(only) == 1


def test_galore_groups_work_as_they_are() -> None:
    p = weight()
    (group,) = Fira([{"params": [p], "rank": 2, "update_proj_gap": 7, "scale": 0.3, "proj_type": "std"}]).param_groups
    assert group["alpha"] == 0.3
    assert "scale" not in group
    (group,) = Fira([{"params": [p], "rank": None}]).param_groups
    assert "rank" not in group


def test_lora_factors_are_projected() -> None:
    model = get_peft_model(small(), LoraConfig(r=8, target_modules=["q_proj", "up_proj"]))
    groups = low_rank_groups(model, 4)
    names = [name for name, _ in groups[0]["params"]]
    assert len(groups) == 1
    assert len(names) == 8
    assert all("lora_" in name for name in names)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    steps(model, Fira(groups, lr=0.01), 2)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == set(names)


def test_state_is_the_formula_and_stays_it() -> None:
    shapes, rank = [(40, 24), (24, 40), (32, 32)], 5
    params = [weight(m, n) for m, n in shapes]
    for optimizer_class, scalars in ((Fira, 1), (GaLoreAdamW, 0)):
        optimizer = optimizer_class([{"params": params, "rank": rank}])
        for step in range(3):
            for i, p in enumerate(params):
                p.grad = gradients(*p.shape, 1, torch.float32, seed=10 * step + i)[0]
            optimizer.step()
        numbers = sum(min(s) * rank + 2 * max(s) * rank + scalars for s in shapes)
        assert tensor_bytes(dict(optimizer.state)) == 4 * numbers
        stored = sum(
            t.untyped_storage().nbytes() for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t)
        )
        assert stored == 4 * numbers


def test_state_keeps_its_dtype_when_loaded() -> None:
    W, grads = torch.zeros(80, 90, dtype=torch.bfloat16), gradients(80, 90, 4, torch.bfloat16)
    group = {"rank": 60, "update_proj_gap": 2}
    _, optimizer = run(Fira, W, grads, group, bits=8)
    loaded = Fira([{"params": [nn.Parameter(W.clone())], **group}])
    loaded.load_state_dict(optimizer.state_dict())
    (state,), (other,) = optimizer.state.values(), loaded.state.values()
    assert state.keys() == other.keys()
    for name, value in state.items():
        assert type(value) is type(other[name])
        if torch.is_tensor(value):
            assert value.dtype == other[name].dtype, name
            assert torch.equal(value, other[name])
    assert state["exp_avg_codes"].dtype == torch.uint8
    assert state["residual_norm"].dtype == torch.float32


@pytest.mark.parametrize("optimizer_class", [Fira, GaLoreAdamW, FiraRMSProp])
def test_eight_bits(optimizer_class: type) -> None:
    W, grads = torch.zeros(96, 128), gradients(96, 128, 6, torch.float32)
    group = {"rank": 64, "update_proj_gap": 3, "align": "rotate"}
    options = {"momentum": 0.5} if optimizer_class is FiraRMSProp else {}
    exact, full = run(optimizer_class, W, grads, group, lr=0.01, **options)
    seen, optimizer = run(optimizer_class, W, grads, group, lr=0.01, bits=8, **options)
    assert (seen - exact).norm() < 0.1 * exact.norm()
    (state,) = optimizer.state.values()
    count = 64 * 128
    moments = 2
    assert sum(v.numel() for k, v in state.items() if k.endswith("_codes")) == moments * count
    assert tensor_bytes(state) < tensor_bytes(next(iter(full.state.values()))) - moments * 2.9 * count
    assert state["proj"].dtype == torch.float32
    plain, _ = run(optimizer_class, W, grads, {}, lr=0.01, bits=8, **options)
    whole, _ = run(optimizer_class, W, grads, {}, lr=0.01, **options)
    assert (plain - whole).norm() < 0.1 * whole.norm()


def test_small_moments_stay_exact_in_eight_bits() -> None:
    W, grads = torch.zeros(20, 30), gradients(20, 30, 3, torch.float32)
    assert torch.equal(*(run(Fira, W, grads, {"rank": 3}, bits=bits)[0] for bits in (8, 32)))


def test_resumed_randomised_refresh_is_bit_for_bit() -> None:
    W, grads = torch.zeros(40, 50), gradients(40, 50, 9, torch.float32)
    group = {"rank": 4, "update_proj_gap": 2, "refresh": "randomized"}
    whole, _ = run(Fira, W, grads, group, lr=0.01)
    half, optimizer = run(Fira, W, grads[:5], group, lr=0.01)
    resumed = nn.Parameter(half.clone())
    other = Fira([{"params": [resumed], **group}])
    other.load_state_dict(optimizer.state_dict())
    for grad in grads[5:]:
        resumed.grad = grad
        other.step()
    assert torch.equal(resumed, whole)
    assert not torch.equal(run(Fira, W, grads, group, lr=0.01, seed=1)[0], whole)


@pytest.mark.parametrize("optimizer_class", [Fira, GaLoreAdamW, FiraRMSProp])
def test_stepping_in_the_backward_pass(optimizer_class: type) -> None:
    model, other = small(), small()
    layerwise = optimizer_class(low_rank_groups(model, 4, update_proj_gap=2), lr=0.01)
    stop = layerwise.step_in_backward()
    for _ in range(3):
        model(input_ids=BATCH, labels=BATCH).loss.backward()
        assert all(p.grad is None for p in model.parameters())
        layerwise.step()
    steps(other, optimizer_class(low_rank_groups(other, 4, update_proj_gap=2), lr=0.01))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    layerwise.load_state_dict(layerwise.state_dict())  # groups are new objects now
    layerwise.param_groups[0]["lr"] = layerwise.param_groups[1]["lr"] = 0.0
    before = [p.detach().clone() for p in model.parameters()]
    model(input_ids=BATCH, labels=BATCH).loss.backward()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    layerwise.step()
    stop()
    model(input_ids=BATCH, labels=BATCH).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_stepping_in_the_backward_pass_refuses_accumulation() -> None:
    model = small()
    optimizer = Fira(low_rank_groups(model, 4))
    with pytest.raises(MethodError, match=r"gradient_accumulation_steps = 2: stepping inside the backward pass"):
        optimizer.step_in_backward(gradient_accumulation_steps=2)
    optimizer.step_in_backward()
    with pytest.raises(MethodError, match="steps inside the backward pass already"):
        optimizer.step_in_backward()
    model(input_ids=BATCH, labels=BATCH).loss.backward()
    with pytest.raises(MethodError, match=r"A second backward pass reached .* before step\(\)"):
        model(input_ids=BATCH, labels=BATCH).loss.backward()
    optimizer.zero_grad()
    model(input_ids=BATCH, labels=BATCH).loss.backward()


def test_stepping_in_the_backward_pass_refuses_several_ranks(monkeypatch) -> None:
    optimizer = Fira([weight()])
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_: 4)
    with pytest.raises(MethodError, match=r"gradients that the 4 ranks have not averaged yet"):
        optimizer.step_in_backward()


def test_diagnostics() -> None:
    model = small()
    optimizer = Fira(low_rank_groups(model, 4), lr=0.01)
    assert optimizer.diagnostics() == {}
    steps(model, optimizer, 2)
    found = optimizer.diagnostics(columns=True)
    assert len(found) == 14
    facts = found["model.layers.0.mlp.down_proj.weight"]
    assert facts["columns"].shape == (88,)
    assert facts["phi"] == pytest.approx(float(facts["columns"].mean()))
    assert facts["limiter"] >= 1.0
    assert facts["residual_norm"] > 0
    assert "columns" not in next(iter(optimizer.diagnostics().values()))


def test_half_precision_weights_take_norms_in_float32() -> None:
    W, grads = torch.zeros(24, 40, dtype=torch.bfloat16), gradients(24, 40, 4, torch.bfloat16)
    seen, optimizer = run(Fira, W, grads, {"rank": 4, "alpha": 0.25}, lr=0.01)
    (state,) = optimizer.state.values()
    assert seen.dtype == state["exp_avg"].dtype == state["proj"].dtype == torch.bfloat16
    assert state["residual_norm"].dtype == torch.float32
    exact, _ = run(Fira, W.float(), [g.float() for g in grads], {"rank": 4, "alpha": 0.25}, lr=0.01)
    assert (seen.float() - exact).norm() < 0.05 * exact.norm()
    with pytest.raises(MethodError, match=r"'0 of group 0' is in float16, which cannot hold the squares"):
        Fira([nn.Parameter(torch.zeros(2, 2, dtype=torch.float16))])


def test_rank_above_the_matrix_warns_once_and_is_cut() -> None:
    params = [weight(), weight(9, 6), weight(7, 7)]
    with pytest.warns(
        UserWarning, match=r"rank = 8 is above the smaller dimension of parameter '0 of group 0'"
    ) as seen:
        optimizer = Fira([{"params": params[:2], "rank": 8}, {"params": params[2:], "rank": 8}])
    assert len(seen) == 1
    for p in params:
        p.grad = gradients(*p.shape, 1, torch.float32)[0]
    optimizer.step()
    assert [optimizer.state[p]["proj"].shape for p in params] == [(6, 6), (6, 6), (7, 7)]


def test_weight_decay_has_no_effect_in_the_rmsprop_form() -> None:
    with pytest.warns(NoEffectWarning, match=r"weight_decay = 0.1 has no effect"):
        run(FiraRMSProp, torch.ones(4, 4), [], {}, weight_decay=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for group in ({}, {"rank": 2}):
            G = gradients(4, 4, 2, torch.float32)
            pair = [run(FiraRMSProp, torch.ones(4, 4), G, group, weight_decay=d)[0] for d in (0.0, 0.5)]
            assert torch.equal(*pair)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("refresh", ["exact", "randomized"])
def test_gradients_that_are_not_finite_are_named_at_a_refresh(value: float, refresh: str) -> None:
    p = weight(30, 40)
    optimizer = Fira([{"params": [("layers.3.mlp.up.weight", p)], "rank": 2, "update_proj_gap": 2, "refresh": refresh}])
    for step in range(3):
        p.grad = gradients(30, 40, 1, torch.float32, seed=step)[0]
        if step == 2:
            p.grad[1, 2] = value
            before = p.detach().clone()
            with pytest.raises(MethodError, match=r"parameter 'layers.3.mlp.up.weight' cannot be .* at step 2.*NaN"):
                optimizer.step()
            assert torch.equal(p, before)
        else:
            optimizer.step()


@pytest.mark.parametrize(
    ("group", "options", "message"),
    [
        ({"rank": 0}, {}, r"rank = 0; it must be a whole number of at least 1"),
        ({"rank": 2.5}, {}, r"rank = 2.5; it must be a whole number"),
        ({"rank": 2, "update_proj_gap": 0}, {}, r"update_proj_gap = 0"),
        ({"rank": 2, "alpha": 0.0}, {}, r"alpha = 0.0; the scale of the projected update must be above 0"),
        ({"rank": 2, "proj_type": "full"}, {}, r"proj_type = 'full' does not work with Fira.*or GaLoreAdamW"),
        ({"rank": 2, "proj_type": "standard"}, {}, r"proj_type = 'standard'"),
        ({"rank": 2, "align": "rotated"}, {}, r"align = 'rotated'. Did you mean 'rotate'"),
        ({"rank": 2, "refresh": "exakt"}, {}, r"refresh = 'exakt'. Did you mean 'exact'"),
        ({}, {"residual": "author"}, r"residual = 'author'. Did you mean 'authors'"),
        ({}, {"gamma": 0.9}, r"gamma = 0.9; the limiter's growth factor must be 1 or more"),
        ({}, {"bits": 16}, r"bits = 16"),
        ({}, {"betas": (0.9, 1.5)}, r"betas\[1\] = 1.5"),
    ],
)
def test_messages_of_the_constructor(group: dict, options: dict, message: str) -> None:
    with pytest.raises(MethodError, match=message):
        Fira([{"params": [weight()], **group}], **options)


def test_messages_of_the_rmsprop_form() -> None:
    for options, message in (
        ({"momentum": 1.0}, r"momentum = 1.0"),
        ({"smoothing": -0.1}, r"smoothing = -0.1"),
        ({"centered": True, "bits": 8}, r"centered = True with bits = 8"),
    ):
        with pytest.raises(MethodError, match=message):
            FiraRMSProp([weight()], **options)


@pytest.mark.parametrize("shape", [(5,), (2, 3, 4), (2, 3, 4, 5)])
def test_tensors_that_are_no_matrices_are_named(shape: tuple[int, ...]) -> None:
    p = nn.Parameter(torch.zeros(shape))
    for params, name in (([("conv.weight", p)], "conv.weight"), ([p], "0 of group 1")):
        groups = [{"params": [("head", weight())] if "conv" in name else [weight()]}, {"params": params, "rank": 2}]
        with pytest.raises(MethodError, match=rf"'{name}' has the shape .* a group with a rank takes matrices only"):
            Fira(groups)
    optimizer = Fira([weight()])
    with pytest.raises(MethodError, match="matrices only"):
        optimizer.add_param_group({"params": [p], "rank": 2})
    assert len(optimizer.param_groups) == 1  # the refused group is gone


def test_messages_of_the_groups() -> None:
    model = small()
    with pytest.raises(ModelError, match=r"target_modules = \['atention'\]: no linear layers match"):
        low_rank_groups(model, 4, target_modules=["atention"])
    with pytest.raises(MethodError, match=r"rank = -1"):
        low_rank_groups(model, -1)
    with pytest.raises(MethodError, match=r"update_proj_gap = 0"):
        low_rank_groups(model, 4, update_proj_gap=0)
    groups = low_rank_groups(model, 4, proj_type="full")
    GaLoreAdamW(groups)


def test_layers_above_512_take_the_randomised_refresh(monkeypatch) -> None:
    from gnomon.common import projection

    calls = []
    honest = projection.dominant_basis
    monkeypatch.setattr(projection, "dominant_basis", lambda *a, **k: calls.append(k["start"]) or honest(*a, **k))
    run(Fira, torch.zeros(512, 600), gradients(512, 600, 1, torch.float32), {"rank": 4})
    assert calls == []
    group = {"rank": 4, "update_proj_gap": 2}
    _, optimizer = run(Fira, torch.zeros(520, 600), gradients(520, 600, 3, torch.float32), group)
    assert [start is None for start in calls] == [True, False]  # from nothing, then from the old projector
    (state,) = optimizer.state.values()
    assert torch.allclose(state["proj"].T @ state["proj"], torch.eye(4), atol=1e-5)
