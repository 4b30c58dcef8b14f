"""The gradient probe: sums equal those of autograd, nothing is left behind, bad input is told."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gnomon.common.gradient_probe import first_samples, probe_gradients
from gnomon.common.layers import linear_layers
from gnomon.common.models import tiny
from gnomon.errors import MethodError, ModelError

SIZES = {"vocab_size": 64, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "max_positions": 32}


def batch(rows: int = 3, seed: int = 1) -> dict[str, Tensor]:
    ids = torch.randint(1, 64, (rows, 10), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


BATCHES = [batch(3, 1), batch(3, 2), batch(2, 3)]


def chosen(model: nn.Module) -> dict[str, nn.Module]:
    return {name: layer for name, layer in linear_layers(model).items() if "lm_head" not in name}


def by_autograd(model: nn.Module) -> dict[str, Tensor]:
    total = sum(model(**b).loss / len(b["input_ids"]) for b in BATCHES)
    layers = chosen(model)
    grads = torch.autograd.grad(total, [layer.weight for layer in layers.values()])
    conv = {name for name, layer in layers.items() if type(layer).__name__ == "Conv1D"}
    return {name: g.T if name in conv else g for name, g in zip(layers, grads, strict=True)}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("passes", [1, 3, 99])
def test_the_sums_are_those_of_autograd(family: str, passes: int) -> None:
    model = tiny(family, **SIZES).double().eval()
    for module in model.modules():  # the reference runs without dropout
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    expected = by_autograd(model)
    found = list(probe_gradients(model, chosen(model), BATCHES, passes=passes))
    assert [name for name, _ in found] == list(expected)
    for name, gradient in found:
        torch.testing.assert_close(gradient, expected[name])


@pytest.mark.parametrize("reentrant", [False, True])
def test_with_gradient_checkpointing(reentrant: bool) -> None:
    model = tiny("llama", **SIZES).double()
    expected = by_autograd(model)
    model.requires_grad_(False)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for name, gradient in probe_gradients(model, chosen(model), BATCHES):
        torch.testing.assert_close(gradient, expected[name])


def test_nothing_is_left_behind() -> None:
    model = tiny("gpt2", **SIZES).eval()
    model.transformer.h[0].train()
    for i, p in enumerate(model.parameters()):
        p.requires_grad_(i % 2 == 0)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1
    kept = next(model.parameters())
    kept.grad = torch.ones_like(kept)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    flags = [p.requires_grad for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    first = dict(probe_gradients(model, chosen(model), BATCHES, seed=1))
    assert torch.equal(torch.rand(4), expected)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(kept.grad, torch.ones_like(kept))
    assert all(p.grad is None for p in model.parameters() if p is not kept)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    again = dict(probe_gradients(model, chosen(model), BATCHES, seed=1))
    other = dict(probe_gradients(model, chosen(model), BATCHES, seed=2))
    name = next(iter(first))
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], other[name])  # dropout is at work: the probe is in training mode


def test_a_loss_or_a_step_of_ones_own() -> None:
    model = tiny("llama", **SIZES)
    layers = chosen(model)
    plain = dict(probe_gradients(model, layers, BATCHES[:1]))
    doubled = dict(probe_gradients(model, layers, BATCHES[:1], loss=lambda m, b: 2 * m(**b).loss))

    def step() -> None:
        (model(**BATCHES[0]).loss / 3).backward()

    stepped = dict(probe_gradients(model, layers, step, passes=2))
    for name, gradient in plain.items():
        torch.testing.assert_close(doubled[name], 2 * gradient)
        torch.testing.assert_close(stepped[name], gradient)


def test_bfloat16_is_summed_in_float32_and_a_layer_without_gradient_is_none() -> None:
    model = tiny("llama", **SIZES).bfloat16()
    found = dict(probe_gradients(model, {**chosen(model), "unused": nn.Linear(3, 4)}, BATCHES))
    assert found.pop("unused") is None
    assert all(g.dtype == torch.float32 for g in found.values())


def test_only_one_gradient_stands_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama", **SIZES)
    layers = chosen(model)
    most = 0

    def count(weight: Tensor) -> None:
        nonlocal most
        most = max(most, sum(layer.weight.grad is not None for layer in layers.values()))

    hooks = [layer.weight.register_post_accumulate_grad_hook(count) for layer in layers.values()]
    list(probe_gradients(model, layers, BATCHES))
    for hook in hooks:
        hook.remove()
    assert most == 1


def test_the_first_samples() -> None:
    rows = torch.arange(24).reshape(8, 3)
    given = [{"input_ids": rows[:4], "text": list("abcd"), "scale": torch.tensor(2.0)}, {"input_ids": rows[4:]}]
    kept = first_samples(given, 3)
    assert torch.equal(kept[0]["input_ids"], rows[:3])
    assert kept[0]["text"] == list("abc")
    assert float(kept[0]["scale"]) == 2.0
    assert [len(b["input_ids"]) for b in first_samples(given, 6)] == [4, 2]
    assert [len(b["input_ids"]) for b in first_samples(given, None)] == [4, 4]
    assert len(first_samples(iter(given), 4)) == 1


def test_bad_input_is_told() -> None:
    model = tiny("llama", **SIZES)
    layers = chosen(model)

    def run(batches: Any, **options: Any) -> None:
        list(probe_gradients(model, options.pop("layers", layers), batches, **options))

    with pytest.raises(MethodError, match="the loader is empty"):
        run([])
    with pytest.raises(MethodError, match="num_samples = 20, but the batches hold 8 of the 20 rows"):
        first_samples(BATCHES, 20)
    with pytest.raises(MethodError, match="num_samples = 0; a whole number"):
        first_samples(BATCHES, 0)
    with pytest.raises(MethodError, match="a batch is a list"):
        run([[1, 2]])
    with pytest.raises(MethodError, match=r"no loss for a batch with the keys input_ids. Add 'labels'"):
        run([{"input_ids": BATCHES[0]["input_ids"]}])
    with pytest.raises(MethodError, match="holds no rows of tensors"):
        first_samples([{"text": "x"}], 1)
    with pytest.raises(MethodError, match="passes = 0"):
        run(BATCHES, passes=0)
    q = model.model.layers[0].self_attn.q_proj
    with pytest.raises(ModelError, match="b and a share one weight"):
        run(BATCHES, layers={"a": q, "b": q})
    with pytest.raises(ModelError, match=r"no gradient of a weight of torch.float32 in a Linear on meta"):
        run(BATCHES, layers={"a": nn.Linear(2, 2, device="meta")})
    with pytest.raises(MethodError, match=r"the gradient of .*q_proj holds NaN"):
        run(BATCHES, loss=lambda m, b: m(**b).loss * float("nan"))
    assert all(p.requires_grad for p in model.parameters())
