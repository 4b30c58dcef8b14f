"""SoRA's mathematics, its optimizer and its gates' step against loops written from the equations."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gnomon.adapters.sora import SoRAConfig, SoRALinear, SoRAProximal, apply_sora, prox_authors, prox_soft
from gnomon.adapters.sora.proximal import adam_step, l1_gradient
from gnomon.adapters.sora.tuner import gated_delta
from gnomon.common.models import tiny
from gnomon.errors import GnomonWarning, MethodError, ModelError

REFERENCE = Path(__file__).parents[1] / "reference" / "sora.npz"
SIZES = {"vocab_size": 64, "hidden_size": 16, "num_layers": 1, "num_heads": 2, "max_positions": 32}


def ids(seed: int = 0, rows: int = 2) -> Tensor:
    return torch.randint(1, 64, (rows, 12), generator=torch.Generator().manual_seed(seed))


def adapted(**options: Any) -> Any:
    return apply_sora(tiny("llama", **SIZES), **{"r": 4, "target_modules": "all-linear", **options})


def trained(model: Any) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def gates(model: Any) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if "lora_gate" in name}


def loss(model: Any, seed: int = 0, rows: int = 2) -> Tensor:
    return model(input_ids=ids(seed, rows), labels=ids(seed, rows)).loss


def proximal(model: Any, lr: float = 1e-2, **options: Any) -> SoRAProximal:
    return SoRAProximal(torch.optim.AdamW(trained(model), lr=lr, weight_decay=0.1), model, **options)


# --- the maps


def test_the_two_maps_on_multiples_of_the_threshold() -> None:
    xi = 3e-4
    u = xi * torch.tensor([1.5, 2.5, -1.5, 0.9, 1.0, 2.0], dtype=torch.float64)
    close = {"rtol": 0.0, "atol": 1e-18}
    torch.testing.assert_close(prox_authors(u, xi), xi * torch.tensor([0, 1.5, 0, 0, 1, 1], dtype=u.dtype), **close)
    torch.testing.assert_close(prox_soft(u, xi), xi * torch.tensor([0.5, 1.5, -0.5, 0, 0, 1], dtype=u.dtype), **close)


@given(st.floats(-3, 3), st.floats(0, 2))
def test_soft_is_the_minimiser_of_its_problem(u: float, xi: float) -> None:
    grid = torch.linspace(-3, 3, 6001, dtype=torch.float64)
    best = grid[(0.5 * (grid - u) ** 2 + xi * grid.abs()).argmin()]
    assert abs(float(prox_soft(torch.tensor(u, dtype=torch.float64), xi)) - float(best)) < 1.1e-3


@given(st.floats(-3, 3), st.floats(0.01, 1))
def test_authors_is_their_two_lines(u: float, xi: float) -> None:
    z = u - xi * math.copysign(1, u) if abs(u) > xi else u
    expected = 0.0 if abs(z) < xi else z
    assert float(prox_authors(torch.tensor(u, dtype=torch.float64), xi)) == expected


def test_no_threshold_changes_nothing() -> None:
    u = torch.randn(50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(prox_soft(u, 0.0), u)
    assert torch.equal(prox_authors(u, 0.0), u)


def test_forty_steps_of_the_authors_optimizer() -> None:
    stored = np.load(REFERENCE)
    g = torch.tensor(stored["g0"]).float()
    m, v, generator = torch.zeros_like(g), torch.zeros_like(g), torch.Generator().manual_seed(1)
    for step in range(1, 41):
        gradient = torch.randn(1, 64, generator=generator) * 1e-2
        u, m, v = adam_step(g, gradient, m, v, step, float(stored["lr"]))
        g = prox_authors(u, float(stored["lam"]))
    assert float((g - torch.tensor(stored["gT"])).abs().max()) < 2e-9
    assert g.flatten().nonzero().tolist() == [[19]]
    assert float(g[0, 19]) == pytest.approx(-0.00163998, abs=1e-8)


def test_adam_step_against_scalars() -> None:
    g, m, v, lr, b1, b2, eps = 0.4, 0.0, 0.0, 0.03, 0.8, 0.9, 1e-3
    tensors = [torch.tensor([x], dtype=torch.float64) for x in (g, m, v)]
    for t, gradient in enumerate((0.5, -0.2, 0.1), start=1):
        m, v = b1 * m + (1 - b1) * gradient, b2 * v + (1 - b2) * gradient**2
        g -= lr * math.sqrt(1 - b2**t) / (1 - b1**t) * m / (math.sqrt(v) + eps)
        grad = torch.tensor([gradient], dtype=torch.float64)
        tensors = list(adam_step(tensors[0], grad, tensors[1], tensors[2], t, lr, (b1, b2), eps))
        assert [float(x) for x in tensors] == pytest.approx([g, m, v], rel=1e-14)


def test_more_threshold_never_leaves_more_gates() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(200, generator=generator)
    gradients = [torch.randn(200, generator=generator) for _ in range(60)]

    def left(prox: Any, xi: float) -> int:
        g, m, v = start, torch.zeros(200), torch.zeros(200)
        for step, gradient in enumerate(gradients, start=1):
            u, m, v = adam_step(g, gradient, m, v, step, 1e-3)
            g = prox(u, xi)
        return int((g != 0).sum())

    for prox in (prox_soft, prox_authors):
        counts = [left(prox, xi) for xi in (0.0, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)]
        assert counts == sorted(counts, reverse=True)
        assert counts[0] == 200
        assert counts[-1] == 0


# --- the layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("m", "n", "r"), [(5, 7, 3), (1, 4, 2), (6, 1, 8)])
def test_the_layer_is_its_equation_in_value_and_gradient(m: int, n: int, r: int, dtype: torch.dtype) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(n, m)).to(dtype)
    made = peft.get_peft_model(model, SoRAConfig(r=r, lora_alpha=5, target_modules=["0"]), autocast_adapter_dtype=False)
    layer = made.base_model.model[0]
    a, gate, b = layer.factors("default")
    with torch.no_grad():
        b.normal_(generator=torch.Generator().manual_seed(1))
    x = torch.randn(4, n, dtype=dtype, generator=torch.Generator().manual_seed(2))
    expected = layer.base_layer(x)
    for i in range(r):
        expected = expected + 5 / r * gate[i] * torch.outer(x @ a[i], b[:, i])
    torch.testing.assert_close(layer(x), expected)
    of_loop = torch.autograd.grad((expected**2).sum(), [a, gate, b], retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad((layer(x) ** 2).sum(), [a, gate, b]), of_loop)
    merged = layer.base_layer.weight + gated_delta(b, gate, a, 5 / r)
    torch.testing.assert_close(x @ merged.T + layer.base_layer.bias, expected)


def test_starts_are_the_papers_and_follow_from_the_seed() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first, again, other = adapted(), adapted(), adapted(seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(p, q) for p, q in zip(trained(first), trained(again), strict=True))
    layers = [m for m in first.modules() if isinstance(m, SoRALinear)]
    drawn = torch.cat([p.detach() for p in gates(adapted(r=64)).values()])
    assert abs(float(drawn.mean())) < 0.15
    assert float(drawn.std()) == pytest.approx(1.0, abs=0.1)
    assert len({float(p.detach()[0]) for p in gates(first).values()}) == len(layers)
    assert not torch.equal(*(next(iter(gates(m).values())) for m in (first, other)))
    for layer in layers:
        a, _, b = layer.factors("default")
        bound = 1 / math.sqrt(layer.in_features)  # Kaiming uniform with a = sqrt 5
        assert 0.7 * bound < float(a.detach().abs().max()) <= bound
        assert not b.detach().any()
    assert all(torch.equal(p, torch.ones(4)) for p in gates(adapted(gate_init="ones")).values())


def test_frozen_gates_of_one_without_a_threshold_are_lora_step_for_step() -> None:
    ours = adapted(gate_init="ones", lora_alpha=8.0)
    lora = peft.get_peft_model(
        tiny("llama", **SIZES), peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    for gate in gates(ours).values():
        gate.requires_grad_(False)
    assert len(trained(ours)) == len(trained(lora))
    with torch.no_grad():
        for mine, theirs in zip(trained(ours), trained(lora), strict=True):
            theirs.copy_(mine)
    optimizer = proximal(ours, xi=0.0, lambda1=0.0)
    other = torch.optim.AdamW(trained(lora), lr=1e-2, weight_decay=0.1)
    for step in range(5):
        for model, stepping in ((ours, optimizer), (lora, other)):
            loss(model, step).backward()
            stepping.step()
            stepping.zero_grad()
    for mine, theirs in zip(trained(ours), trained(lora), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


# --- the optimizer


@pytest.mark.parametrize("prox", ["soft", "authors"])
@pytest.mark.parametrize("times_lr", [False, True])
def test_the_optimizer_is_the_loop(prox: Any, times_lr: bool) -> None:
    model, reference = adapted(lora_alpha=4.0), adapted(lora_alpha=4.0)
    xi = 0.02 if not times_lr else 2.0
    optimizer = proximal(model, xi=xi, lambda1=3.0, prox=prox, xi_times_lr=times_lr, gate_lr=3e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    of_gates = gates(reference)
    others = [p for p in trained(reference) if not any(p is gate for gate in of_gates.values())]
    plain = torch.optim.AdamW(others, lr=1e-2, weight_decay=0.1)
    state = {name: (torch.zeros(4), torch.zeros(4)) for name in of_gates}
    for step in range(4):
        loss(model, step).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

        plain.param_groups[0]["lr"] = 1e-2 / (1 + step)
        (loss(reference, step) + 3.0 * sum(g.abs().sum() for g in of_gates.values()) / (4 * 7)).backward()
        plain.step()
        for name, gate in of_gates.items():
            lr = 3e-2 / (1 + step)
            u, m, v = adam_step(gate.detach(), gate.grad, *state[name], step + 1, lr)
            state[name] = (m, v)
            with torch.no_grad():
                gate.copy_({"soft": prox_soft, "authors": prox_authors}[prox](u, xi * lr if times_lr else xi))
        reference.zero_grad()
        for mine, theirs in zip(trained(model), trained(reference), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    assert any((gate == 0).any() for gate in gates(model).values())


def test_neither_the_optimizer_nor_its_decay_moves_a_gate() -> None:
    model = adapted()
    optimizer = SoRAProximal(torch.optim.SGD(trained(model), lr=0.1, weight_decay=5.0, momentum=0.9), model, 0.0, 0.0)
    start = {name: gate.detach().clone() for name, gate in gates(model).items()}
    loss(model).backward()  # B = 0, so the gates' gradients are 0
    optimizer.step()
    assert all(torch.equal(gate, start[name]) for name, gate in gates(model).items())
    assert all("momentum_buffer" not in optimizer.state[gate] for gate in gates(model).values())


def test_gates_at_zero_can_come_back() -> None:
    model = adapted()
    optimizer = proximal(model, lr=1.0, xi=10.0, lambda1=0.0)
    loss(model).backward()
    optimizer.step()
    assert not any(gate.any() for gate in gates(model).values())
    optimizer.xi = 0.0
    optimizer.zero_grad()
    for gate in gates(model).values():
        gate.grad = torch.ones(4)
    optimizer.step()
    assert all(gate.all() for gate in gates(model).values())


def test_the_penalty_stands_inside_a_clipped_norm_when_asked_for() -> None:
    ours, reference = adapted(), adapted()
    optimizer = proximal(ours, lambda1=50.0)
    loss(ours).backward()
    optimizer.penalise()
    optimizer.penalise()  # once a step
    (loss(reference) + 50.0 * sum(g.abs().sum() for g in gates(reference).values()) / 28).backward()
    for mine, theirs in zip(trained(ours), trained(reference), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
    norms = [float(torch.nn.utils.clip_grad_norm_(trained(m), 0.1)) for m in (ours, reference)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    expected = {name: gate.grad.clone() for name, gate in gates(reference).items()}
    optimizer.step()
    for name, gate in gates(ours).items():
        torch.testing.assert_close(gate.grad, expected[name])
    torch.testing.assert_close(l1_gradient(torch.tensor([-2.0, 0.0, 3.0]), 6.0, 3), torch.tensor([-2.0, 0.0, 2.0]))


def test_rate_zero_changes_nothing_and_a_missing_gradient_is_passed_by() -> None:
    model = adapted()
    optimizer = proximal(model, lr=0.0, xi=0.5)
    start = [p.detach().clone() for p in trained(model)]
    loss(model).backward()
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(trained(model), start, strict=True))
    optimizer.param_groups[0]["lr"] = 1e-2
    optimizer.gates.lambda1 = 0.0
    optimizer.zero_grad()
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(trained(model), start, strict=True))


@pytest.mark.parametrize("overflow", [False, True])
def test_a_grad_scaler_is_undone_before_the_map(overflow: bool) -> None:
    plain, scaled = adapted(), adapted()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for model, scaling in ((plain, None), (scaled, scaler)):
        optimizer = proximal(model, xi=0.02, lambda1=5.0)
        for step in range(3):
            value = loss(model, step)
            if scaling is None:
                value.backward()
                optimizer.step()
            else:
                scaling.scale(value).backward()
                if step % 2:
                    optimizer.penalise(scaling.get_scale())
                scaling.step(optimizer)
                scaling.update()
            optimizer.zero_grad()
    for mine, theirs in zip(trained(scaled), trained(plain), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    if overflow:
        before = [p.detach().clone() for p in trained(scaled)]
        scaler.scale(loss(scaled)).backward()
        next(iter(gates(scaled).values())).grad.fill_(float("inf"))
        scaler.step(optimizer)
        assert all(torch.equal(p, q) for p, q in zip(trained(scaled), before, strict=True))


def test_an_optimizer_that_unscales_by_itself() -> None:
    model, reference = adapted(), adapted()
    optimizer, plain = proximal(model, lambda1=5.0), proximal(reference, lambda1=5.0)
    for made, scale in ((optimizer, 64.0), (plain, 1.0)):
        own = model if made is optimizer else reference
        (scale * loss(own)).backward()
        if scale != 1:
            made.optimizer.grad_scale, made.optimizer.found_inf = torch.tensor(scale), torch.tensor(0.0)
        taken = made.gates.take(made.optimizer)
        made.gates.apply(made.optimizer, taken)
    for mine, theirs in zip(gates(model).values(), gates(reference).values(), strict=True):
        torch.testing.assert_close(mine, theirs)
    optimizer.optimizer.found_inf = torch.tensor(1.0)
    loss(model).backward()
    assert optimizer.gates.take(optimizer.optimizer) == []


def test_one_map_a_step_under_accumulation_and_with_a_closure() -> None:
    whole, parts, closed = adapted(), adapted(), adapted()
    made = [proximal(model, xi=0.05, lambda1=2.0) for model in (whole, parts, closed)]
    loss(whole, rows=4).backward()
    made[0].step()
    for part in ids(rows=4).chunk(2):
        (parts(input_ids=part, labels=part).loss / 2).backward()
    made[1].step()

    def closure() -> Tensor:
        made[2].zero_grad()
        value = loss(closed, rows=4)
        value.backward()
        return value

    assert float(made[2].step(closure).detach()) > 0
    for other in (parts, closed):
        for mine, theirs in zip(trained(other), trained(whole), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_the_state_goes_on_where_it_was_saved_and_copies_are_apart() -> None:
    def steps(model: Any, optimizer: Any, numbers: range) -> None:
        for number in numbers:
            loss(model, number).backward()
            optimizer.step()
            optimizer.zero_grad()

    whole, half = adapted(), adapted()
    optimizer, first = proximal(whole, xi=0.01), proximal(half, xi=0.01)
    steps(whole, optimizer, range(6))
    steps(half, first, range(3))
    resumed = adapted()
    resumed.load_state_dict(half.state_dict())
    second = proximal(resumed, xi=0.01)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.param_groups is second.optimizer.param_groups
    assert second.state is second.optimizer.state
    steps(resumed, second, range(3, 6))
    assert all(torch.equal(p, q) for p, q in zip(trained(resumed), trained(whole), strict=True))
    model, twin = copy.deepcopy((whole, optimizer))
    steps(model, twin, range(6, 7))
    assert not torch.equal(trained(model)[0], trained(whole)[0])
    steps(whole, optimizer, range(6, 7))
    assert all(torch.equal(p, q) for p, q in zip(trained(model), trained(whole), strict=True))


def test_a_further_group_goes_to_the_wrapped_optimizer() -> None:
    model = adapted()
    optimizer, extra = proximal(model), torch.nn.Parameter(torch.ones(2))
    optimizer.add_param_group({"params": [extra], "lr": 0.5})
    assert optimizer.optimizer.param_groups[1]["params"][0] is extra
    extra.grad = torch.ones(2)
    optimizer.step()
    assert float(extra.detach()[0]) < 0.6


# --- bad input


def test_a_threshold_that_leaves_nothing_warns_once() -> None:
    model = adapted()
    optimizer = proximal(model, xi=1.0)

    def train() -> None:
        for _ in range(110):
            for gate in gates(model).values():
                gate.grad = torch.zeros(4)
            optimizer.step()

    with pytest.warns(GnomonWarning, match=r"100% of the gates are zero after 50 steps at xi = 1") as caught:
        train()
    assert len([w for w in caught if w.category is GnomonWarning]) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"xi": -1e-4}, r"xi = -0.0001: the threshold is a number of at least 0"),
        ({"xi": float("nan")}, r"xi = nan"),
        ({"lambda1": -1.0}, r"lambda1 = -1.0: the weight of the L1 term"),
        ({"prox": "hard"}, r"prox = 'hard'. Allowed: 'soft'"),
        ({"gate_lr": 0.0}, r"gate_lr = 0.0: a number above 0"),
        ({"betas": (0.9, 1.0)}, r"betas lie from 0 to below 1"),
        ({"eps": 0.0}, r"eps above 0"),
        ({"adapter": "defualt"}, r"no SoRA adapter 'defualt'. Did you mean 'default'"),
    ],
)
def test_options_that_are_not_allowed(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MethodError, match=message):
        proximal(adapted(), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, r"r = 0: the rank is a whole number of at least 1"),
        ({"gate_init": "zeros"}, r"gate_init = 'zeros'. Allowed: 'normal', 'ones'"),
        ({"lora_alpha": 0}, r"lora_alpha = 0: a number above 0"),
        ({"lora_dropout": 1.0}, r"lora_dropout = 1.0: a probability from 0 to below 1"),
        ({"seed": -1}, r"seed = -1: a whole number"),
        ({"seed": True}, r"seed = True"),
    ],
)
def test_configurations_that_are_not_allowed(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MethodError, match=message):
        SoRAConfig(**options)


def test_optimizers_and_models_that_do_not_fit() -> None:
    model = adapted()
    without = [p for name, p in model.named_parameters() if p.requires_grad and "lora_gate" not in name]
    with pytest.raises(
        MethodError, match=r"the gate of model.layers.0.\S+ and 6 further ones are in no parameter group"
    ):
        SoRAProximal(torch.optim.AdamW(without), model)
    with pytest.raises(MethodError, match=r"gate_lr = 0.1 follows the schedule of one learning rate above 0"):
        proximal(model, lr=0.0, gate_lr=0.1)
    with pytest.raises(MethodError, match=r"optimizer is a SoRAProximal. Allowed: a torch.optim.Optimizer"):
        SoRAProximal(proximal(model), model)
    with pytest.raises(MethodError, match=r"xi = -1.0: the threshold"):
        proximal(model).xi = -1.0
    with pytest.raises(ModelError, match=r"this LlamaForCausalLM has no SoRA layers"):
        SoRAProximal(torch.optim.AdamW(trained(model)), tiny("llama", **SIZES))
    model.base_model.set_adapter([])
    with pytest.raises(MethodError, match=r"0 adapters are active \(none\)"):
        proximal(adapted()).gates.__class__(model, 0.1, 0.1)
