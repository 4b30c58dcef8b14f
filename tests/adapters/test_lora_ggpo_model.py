"""Perturbed models: both back-ends against full matrices, what is restored, micro-batches, checkpointing, refusals."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from gnomon.adapters import GGPO, MGPO, Perturbation, perturbed, sharpness
from gnomon.adapters.lora_ggpo.layers import layer_seed
from gnomon.common.lora import lora_pairs
from gnomon.common.models import tiny
from gnomon.errors import GnomonWarning, MethodError

RULES = {"ggpo": GGPO(0.2, 0.5), "mgpo": MGPO(0.3, 0.8), "flat": GGPO(0.2, 0.0, "cosine", 4)}


def lora(family: str = "llama", dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """A LoRA on every linear layer of a tiny model, moved off its start."""
    base = tiny(family, vocab_size=64, hidden_size=16, num_layers=2, num_heads=2, max_positions=32).to(dtype)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = peft.get_peft_model(
            base, peft.LoraConfig(**{"r": 3, "lora_alpha": 6, "target_modules": "all-linear", **options})
        )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn(p.shape, generator=generator).to(p.dtype))
    return model.train()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, betas=(0.9, 0.99))


def ids(seed: int = 0, rows: int = 4) -> Tensor:
    return torch.randint(1, 64, (rows, 8), generator=torch.Generator().manual_seed(seed))


def loss_of(model: Any, seed: int = 0) -> Tensor:
    loss: Tensor = model(input_ids=ids(seed), labels=ids(seed)).loss
    return loss


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def train(model: Any, rule: Any, backend: Any, steps: int = 4, optimizer: Any = None, **options: Any) -> list[float]:
    optimizer = adamw(model) if optimizer is None else optimizer
    losses = []
    for step in range(steps):
        with perturbed(model, optimizer, rule, backend=backend, **options):
            loss = loss_of(model, step)
            loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    return losses


def by_hand(model: Any, rule: Any, steps: int = 4) -> list[float]:
    """The same training with full matrices added to the base weights, and taken off by copying the old ones back."""
    optimizer = adamw(model)
    pairs = lora_pairs(model)
    average: dict[str, float] = {}
    rows: dict[str, Tensor] = {}
    losses = []
    for step in range(steps):
        kept = {}
        for pair in pairs:
            weight, b, a, s = pair.weight, pair.b.detach(), pair.a.detach(), pair.scaling
            eps = torch.zeros_like(weight)
            if isinstance(rule, MGPO) and step:
                m_b, m_a = (optimizer.state[p]["exp_avg"] for p in (pair.b, pair.a))
                v = s * (m_b @ a + b @ m_a)
                c = min(1 / (average[pair.name] + 1e-12), 10.0)
                eps = -rule.rho * v / (v.norm() + 1e-12) * c
            elif isinstance(rule, GGPO):
                square = (weight + s * b @ a).square().sum(1)
                if pair.name in rows:
                    square = square + rule.beta * rows[pair.name]
                sigma = rule.sigma_at(step)
                generator = torch.Generator().manual_seed(layer_seed(0, 0, step, pair.name))
                normal = torch.empty(weight.shape, dtype=weight.dtype).normal_(generator=generator)
                eps = sigma * (square / weight.shape[1]).sqrt()[:, None] * normal
            kept[pair.name] = weight.detach().clone()
            weight.data += eps
        loss = loss_of(model, step)
        loss.backward()
        for pair in pairs:
            pair.weight.data.copy_(kept[pair.name])
            assert pair.a.grad is not None
            assert pair.b.grad is not None
            slope = pair.scaling * (pair.b.detach() @ pair.a.grad + pair.b.grad @ pair.a.detach())
            rows[pair.name] = slope.square().sum(1)
            old = average.get(pair.name)
            norm = float(slope.norm())
            average[pair.name] = norm if old is None else getattr(rule, "beta", 0) * old + (1 - rule.beta) * norm
        losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.mark.parametrize(("family", "rule"), [("llama", rule) for rule in RULES] + [("gpt2", "ggpo"), ("gpt2", "mgpo")])
def test_both_backends_are_training_with_full_matrices(family: str, rule: str) -> None:
    models = {name: lora(family) for name in ("by hand", "weight", "functional", "plain")}
    losses = {"by hand": by_hand(models["by hand"], RULES[rule])}
    for backend in ("weight", "functional"):
        losses[backend] = train(models[backend], RULES[rule], backend)
        for name, value in weights(models[backend]).items():
            torch.testing.assert_close(value, dict(models["by hand"].named_parameters())[name].data, msg=name)
        assert losses[backend] == pytest.approx(losses["by hand"], rel=1e-9)
    optimizer = adamw(models["plain"])
    for step in range(4):
        loss = loss_of(models["plain"], step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert abs(float(loss) - losses["weight"][-1]) > 1e-4


@pytest.mark.parametrize("backend", ["weight", "functional"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sigma_zero_is_lora_to_the_bit(backend: str, dtype: torch.dtype) -> None:
    model, plain = lora(dtype=dtype), lora(dtype=dtype)
    losses = train(model, GGPO(sigma=0.0), backend)
    optimizer = adamw(plain)
    for step in range(4):
        loss = loss_of(plain, step)
        loss.backward()
        assert float(loss) == losses[step]
        optimizer.step()
        optimizer.zero_grad()
    for name, value in weights(model).items():
        assert torch.equal(value, dict(plain.named_parameters())[name]), name


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("backend", ["weight", "functional"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_base_weights_are_untouched_to_the_bit(rule: str, backend: str, dtype: torch.dtype) -> None:
    model = lora(dtype=dtype)
    before = weights(model)
    pointers = {name: p.data_ptr() for name, p in model.named_parameters()}
    train(model, RULES[rule], backend, steps=3)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != p.requires_grad, name
        assert p.data_ptr() == pointers[name]
    assert not any("forward" in m.__dict__ or m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("backend", ["weight", "functional"])
def test_restored_after_an_exception(rule: str, backend: Any) -> None:
    model = lora()
    optimizer = adamw(model)
    train(model, RULES[rule], backend, steps=2, optimizer=optimizer)
    before, plain = weights(model), float(loss_of(model))
    memory = {k: v.clone() for k, v in perturbed(model, optimizer, RULES[rule], backend=backend).memory.items()}

    def fail(grad: Tensor) -> None:
        raise RuntimeError("in backward")

    kept = perturbed(model, optimizer, RULES[rule], backend=backend)
    with pytest.raises(RuntimeError, match="in backward"), kept:  # noqa: PT012 (the context is what fails)
        loss = loss_of(model)
        assert float(loss) != plain
        loss.register_hook(fail)
        loss.backward()
    broken = model.base_model.model.model.layers[1].self_attn.q_proj.base_layer
    shape = broken.weight.shape
    with pytest.raises(RuntimeError), perturbed(model, optimizer, RULES[rule], backend=backend):
        broken(torch.zeros(1, shape[1] + 1, dtype=torch.float64))
    assert float(loss_of(model)) == plain
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    kept = perturbed(model, optimizer, RULES[rule], backend=backend)
    assert kept.steps == 2
    assert all(torch.equal(v, memory[k]) for k, v in kept.memory.items())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("backend", ["weight", "functional"])
def test_evaluation_and_other_adapters_are_not_perturbed(rule: str, backend: Any) -> None:
    model = lora()
    optimizer = adamw(model)
    train(model, RULES[rule], backend, steps=2, optimizer=optimizer)
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules="all-linear"))
    plain = {"train": float(loss_of(model))}
    with model.disable_adapter():
        plain["base"] = float(loss_of(model))
    model.set_adapter("other")
    plain["other"] = float(loss_of(model))
    model.set_adapter("default")
    tokens = model.eval().generate(ids(rows=1), max_new_tokens=4, do_sample=False, pad_token_id=0)
    model.train()
    with perturbed(model, optimizer, RULES[rule], backend=backend, adapter="default"):
        pass
    with Perturbation(model, optimizer, RULES["ggpo"], backend=backend, adapter="default"):
        assert float(loss_of(model)) != plain["train"]
        with model.disable_adapter():
            assert float(loss_of(model)) == plain["base"]
        model.set_adapter("other")
        assert float(loss_of(model)) == plain["other"]
        model.set_adapter("default")
        model.eval()
        with torch.no_grad():
            assert float(loss_of(model)) == plain["train"]
        again = model.generate(ids(rows=1), max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert torch.equal(again, tokens)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("rule", ["ggpo", "mgpo"])
@pytest.mark.parametrize("backend", ["weight", "functional"])
def test_gradient_checkpointing_recomputes_the_same_perturbation(rule: str, backend: Any, reentrant: bool) -> None:
    model, other = lora(), lora()
    other.enable_input_require_grads()
    other.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert train(model, RULES[rule], backend) == pytest.approx(train(other, RULES[rule], backend), rel=1e-12)
    for name, value in trained(model).items():
        torch.testing.assert_close(dict(other.named_parameters())[name].data, value)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("backend", ["weight", "functional"])
def test_micro_batches_share_one_perturbation(rule: str, backend: Any) -> None:
    """Four micro-batches of one row are the batch of four rows, in every step."""
    model, other = lora(), lora()
    whole = train(model, RULES[rule], backend)
    optimizer = adamw(other)
    for step in range(4):
        total = 0.0
        for part in ids(step).split(1):
            with perturbed(other, optimizer, RULES[rule], backend=backend) as perturbation:
                loss = other(input_ids=part, labels=part).loss / 4
                loss.backward()
            total += float(loss)
        assert total == pytest.approx(whole[step], rel=1e-6)  # the loss itself is in float32
        assert perturbation.steps == step
        optimizer.step()
        optimizer.zero_grad()
    for name, value in trained(model).items():
        torch.testing.assert_close(dict(other.named_parameters())[name].data, value, atol=1e-5, rtol=1e-4)


def test_clipping_after_the_context_does_not_change_the_measured_norms() -> None:
    model, other = lora(), lora()
    kept = []
    for each, clip in ((model, 1e9), (other, 1e-3)):
        optimizer = adamw(each)
        with perturbed(each, optimizer, MGPO()) as perturbation:
            loss_of(each).backward()
        torch.nn.utils.clip_grad_norm_(each.parameters(), clip)
        optimizer.step()
        kept.append(perturbation.memory)
    assert kept[0].keys() == kept[1].keys()
    assert len(kept[0]) == 14
    assert all(float(kept[0][name]) == float(kept[1][name]) > 0 for name in kept[0])


def test_grad_scaler_gradients_are_unscaled_and_skipped_steps_do_not_count() -> None:
    model, other = lora(dtype=torch.float32), lora(dtype=torch.float32)
    train(other, MGPO(), "functional", steps=1, optimizer=(reference := adamw(other)))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = adamw(model)
    for step in range(2):
        with perturbed(model, optimizer, MGPO(), backend="functional", scaler=scaler) as perturbation:
            scaler.scale(loss_of(model) * (float("inf") if step == 0 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert perturbation.steps == step
        assert len(perturbation.memory) == 14 * step
    expected = perturbed(other, reference, MGPO(), backend="functional").memory
    for name, value in perturbation.memory.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=0)


def _sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": _sgd,
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_other_optimizers_with_momentum(name: str) -> None:
    model = lora()
    optimizer = OPTIMIZERS[name]([p for p in model.parameters() if p.requires_grad])
    train(model, MGPO(0.1), "functional", steps=2, optimizer=optimizer)
    pair = lora_pairs(model)[3]
    with perturbed(model, optimizer, MGPO(0.1), backend="functional") as perturbation:
        left, right = perturbation._ready[pair.name]
    key = "momentum_buffer" if name == "sgd" else "exp_avg"
    m_b, m_a = (optimizer.state[p][key] for p in (pair.b, pair.a))
    v = m_b @ pair.a + pair.b @ m_a
    c = min(1 / float(perturbation.memory[pair.name]), 10.0)
    torch.testing.assert_close(left @ right, (-0.1 * c * v / v.norm()).detach())


@pytest.mark.parametrize("bits", [8, 32])
def test_momentum_of_bitsandbytes(bits: int) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    model = lora(dtype=torch.float32, r=48)
    kind = bnb.optim.AdamW8bit if bits == 8 else bnb.optim.AdamW
    optimizer = kind([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for p in optimizer.param_groups[0]["params"][:2]:
        optimizer.state[p]
    train(model, MGPO(), "functional", steps=3, optimizer=optimizer)
    from gnomon.adapters.lora_ggpo.momentum import momentum

    exact = lora(dtype=torch.float32, r=48)
    plain = torch.optim.AdamW([p for p in exact.parameters() if p.requires_grad], lr=0.01)
    train(exact, MGPO(), "functional", steps=3, optimizer=plain)
    pair, same = lora_pairs(model)[0], lora_pairs(exact)[0]
    found = momentum(optimizer, pair.b, "b", True)
    assert found is not None
    expected = plain.state[same.b]["exp_avg"]
    assert float((found - expected).norm() / expected.norm()) < (0.1 if bits == 8 else 1e-3)


def test_perturbing_one_step_in_mixed_precision() -> None:
    for rule in ("ggpo", "mgpo"):
        found = []
        for backend in ("weight", "functional"):
            model = lora(dtype=torch.float32)
            optimizer = adamw(model)
            for step in range(3):
                with torch.autocast("cpu", torch.bfloat16), perturbed(model, optimizer, RULES[rule], backend=backend):
                    loss = loss_of(model, step)
                    loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            found.append(float(loss))
        exact = train(lora(dtype=torch.float32), RULES[rule], "weight", steps=3)[-1]
        assert found == pytest.approx([exact, exact], abs=0.02), rule


def test_state_goes_on_where_it_stopped() -> None:
    for rule in RULES.values():
        model, other = lora(), lora()
        losses = train(model, rule, "weight", steps=4)
        optimizer = adamw(other)
        train(other, rule, "weight", steps=2, optimizer=optimizer)
        state = copy.deepcopy(perturbed(other, optimizer, rule, backend="weight").state_dict())
        fresh = lora()
        fresh.load_state_dict(other.state_dict())
        second = adamw(fresh)
        second.load_state_dict(optimizer.state_dict())
        perturbation = Perturbation(fresh, second, rule, backend="weight")
        perturbation.load_state_dict(state)
        for step in (2, 3):
            with perturbation:
                loss = loss_of(fresh, step)
                loss.backward()
            assert float(loss) == losses[step]
            second.step()
            second.zero_grad()
    with pytest.raises(MethodError, match="the state is of GGPO, not of MGPO"):
        Perturbation(fresh, second, MGPO()).load_state_dict(state)


def test_ranks_share_noise_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for rank in (0, 1):
        monkeypatch.setattr(
            "gnomon.adapters.lora_ggpo.perturbation.ranks", lambda rank=rank: type("R", (), {"process_index": rank})
        )
        for per_rank in (False, True):
            model = lora()
            found[rank, per_rank] = train(model, RULES["ggpo"], "weight", steps=1, per_rank=per_rank)
    assert found[0, False] == found[1, False] == found[0, True] != found[1, True]


def test_other_options_start_anew_and_the_global_generator_is_untouched() -> None:
    model = lora()
    optimizer = adamw(model)
    before = torch.random.get_rng_state()
    for backend in ("weight", "functional"):
        first = train(model, GGPO(0.1), backend, steps=1, optimizer=optimizer)
        assert perturbed(model, optimizer, GGPO(0.1), backend=backend).steps == 1
        assert first != train(model, GGPO(0.1), backend, steps=1, optimizer=optimizer, seed=1)
    assert torch.equal(before, torch.random.get_rng_state())
    assert "perturbation" not in str(optimizer.state_dict().keys())
    copy.deepcopy(optimizer)


def test_sharpness_is_the_mean_rise() -> None:
    model = lora()
    before, training = weights(model), [m.training for m in model.modules()]
    found = sharpness(model, lambda: float(loss_of(model.eval())), sigma=0.3, draws=6, seed=2)
    losses = []
    for n in range(6):
        moved = lora()
        for pair in lora_pairs(moved):
            merged = pair.weight + pair.delta()
            generator = torch.Generator().manual_seed(layer_seed(f"2/{n}", pair.name))
            normal = torch.empty(merged.shape, dtype=merged.dtype).normal_(generator=generator)
            pair.weight.data += 0.3 * merged.detach().norm(dim=1)[:, None] / merged.shape[1] ** 0.5 * normal
        losses.append(float(loss_of(moved)))
    assert found.loss == float(loss_of(model.train()))
    assert found.perturbed == pytest.approx(sum(losses) / 6, rel=1e-9)
    assert found.increase == pytest.approx(found.perturbed - found.loss)
    assert found.standard_error > 0
    assert found.summary()["sharpness"] == found.increase
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert [m.training for m in model.modules()] == training
    with pytest.raises(MethodError, match=r"sigma = 0.0, draws = 4"):
        sharpness(model, lambda: 0.0, sigma=0.0)


def test_momentum_that_is_not_finite_is_counted_and_said_once() -> None:
    model = lora()
    optimizer = adamw(model)
    train(model, MGPO(), "functional", steps=1, optimizer=optimizer)
    optimizer.state[lora_pairs(model)[0].a]["exp_avg"][0, 0] = float("nan")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            with perturbed(model, optimizer, MGPO(), backend="functional") as perturbation:
                loss = loss_of(model)
                loss.backward()
            assert torch.isfinite(loss)
            for p in model.parameters():
                p.grad = None if p is lora_pairs(model)[0].a else p.grad
            optimizer.step()
            optimizer.zero_grad()
    ours = [w for w in caught if issubclass(w.category, GnomonWarning)]
    assert len(ours) == 1
    assert "the momentum of 1 layers is not finite" in str(ours[0].message)
    assert perturbation.skipped == 2


class OwnLinear(nn.Linear):
    """A base layer that is no plain `nn.Linear`, as quantised ones are: the perturbation is added to its output."""


@pytest.mark.parametrize("rule", RULES, ids=RULES)
def test_on_other_base_layers_the_perturbation_has_a_product_of_its_own(rule: str) -> None:
    plain, other = lora(), lora()
    for pair in lora_pairs(other):
        pair.layer.get_base_layer().__class__ = OwnLinear
    expected = train(plain, RULES[rule], "functional")
    found = train(other, RULES[rule], "functional")
    assert found == pytest.approx(expected, rel=1e-10)
    for name, value in trained(plain).items():
        torch.testing.assert_close(trained(other)[name], value, rtol=1e-8, atol=1e-10)
