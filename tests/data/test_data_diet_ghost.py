"""Gradient norms by formulas against one plain backward pass a row, over every layer and way of using it."""

from __future__ import annotations

import gc
import math
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers.pytorch_utils import Conv1D

from gnomon.common.models import tiny
from gnomon.data.data_diet import GradientNorms, el2n, grand
from gnomon.data.data_diet.formulas import lookup_squares, outer_squares
from gnomon.data.data_diet.rows import as_batch
from gnomon.errors import DataError, GnomonWarning, MethodError, ModelError

B, T, V = 5, 7, 11


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def by_hand(model: nn.Module, batch: Any, loss: Any = None) -> Tensor:
    """The definition: for each row alone, backward through plain torch, then the norm over all parameters."""
    model.eval()
    norms = []
    for i in range(len(as_batch(model, batch))):
        one = as_batch(model, batch).row(i)
        inputs = one.inputs
        output = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
        logits, targets = getattr(output, "logits", output), one.targets
        if one.shift:
            logits, targets = logits[:, :-1], targets[:, 1:]
        if loss is not None:
            value = loss(logits, targets).sum()
        elif targets.is_floating_point():
            value = (logits.reshape(-1) - targets.reshape(-1)).square().mean()
        else:
            value = F.cross_entropy(logits.flatten(0, -2), targets.flatten())
        grads = torch.autograd.grad(value, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
        norms.append(math.sqrt(sum(float(g.to_dense().square().sum()) for g in grads if g is not None)))
    return torch.tensor(norms, dtype=torch.float64)


def check(model: nn.Module, batch: Any, formulas: dict[str, str] | None = None, **options: Any) -> GradientNorms:
    torch.manual_seed(0)
    model = model.double()
    norms = GradientNorms(model, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = norms(as_batch(model, batch))
    torch.testing.assert_close(found, by_hand(model, batch, options.get("loss")), rtol=1e-9, atol=1e-12)
    if formulas is not None:
        assert norms.formulas == formulas
    else:
        assert "row by row" not in norms.formulas.values(), norms.formulas
    return norms


def floats(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def whole(*shape: int, high: int = V, seed: int = 0) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


class Pool(nn.Module):
    """Averages over everything between the rows and the features."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1, -2).mean(1) if x.dim() > 2 else x


class Channels(nn.Module):
    """Averages over everything behind the channels."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).mean(2)


MODELS: dict[str, tuple[nn.Module, Tensor]] = {
    "linear": (nn.Linear(6, 3), floats(B, 6)),
    "mlp": (nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 3, bias=False)), floats(B, 6)),
    "sequence": (nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3), Pool()), floats(B, T, 6)),
    "long sequence": (nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3), Pool()), floats(B, 40, 2)),
    "two axes": (nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3), Pool()), floats(B, 3, 4, 6)),
    "conv1d of gpt2": (nn.Sequential(Conv1D(8, 6), nn.GELU(), Conv1D(3, 8), Pool()), floats(B, T, 6)),
    "layer norm": (nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3), Pool()), floats(B, T, 6)),
    "layer norm, two axes": (nn.Sequential(nn.LayerNorm((T, 6)), nn.Flatten(), nn.Linear(T * 6, 3)), floats(B, T, 6)),
    "rms norm": (nn.Sequential(nn.Linear(6, 8), nn.RMSNorm(8, eps=1e-3), nn.Linear(8, 3), Pool()), floats(B, T, 6)),
    "batch norm": (nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)), floats(B, 6)),
    "embedding": (nn.Sequential(nn.Embedding(V, 6), nn.Tanh(), nn.Linear(6, 3), Pool()), whole(B, T)),
    "padding id": (nn.Sequential(nn.Embedding(V, 6, padding_idx=2), nn.Linear(6, 3), Pool()), whole(B, T)),
    "sparse": (nn.Sequential(nn.Embedding(V, 6, sparse=True), nn.Linear(6, 3), Pool()), whole(B, T)),
    "conv": (
        nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(8, 3, 2, 2), Channels()),
        floats(B, 3, 8, 6),
    ),
    "conv: stride, dilation, groups": (
        nn.Sequential(nn.Conv2d(4, 8, (3, 2), stride=(2, 1), dilation=(1, 2), groups=2, bias=False), Channels()),
        floats(B, 4, 9, 8),
    ),
    "conv: depthwise, same, reflect": (
        nn.Sequential(nn.Conv2d(4, 4, 3, padding="same", groups=4, padding_mode="reflect"), Channels()),
        floats(B, 4, 5, 6),
    ),
    "conv, one axis": (
        nn.Sequential(nn.Conv1d(4, 6, 3, stride=2, padding=2, groups=2), nn.ReLU(), nn.Conv1d(6, 3, 2), Channels()),
        floats(B, 4, 9),
    ),
    "cnn with norms": (
        nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.GroupNorm(3, 6), Channels(),
            nn.Linear(6, 3),
        ),
        floats(B, 3, 8, 8),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_every_layer(name: str) -> None:
    model, x = MODELS[name]
    for norm in (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)):
        norm.running_mean.copy_(floats(norm.num_features, seed=1))
        norm.running_var.copy_(floats(norm.num_features, seed=2).square() + 0.5)
    check(model, (x, whole(B, high=3)))


def test_linear_softmax_closed_form() -> None:
    model, x, y = nn.Linear(6, 4).double(), floats(B, 6), whole(B, high=4)
    expected = el2n(model(x), y) * (1 + x.square().sum(1)).sqrt()
    torch.testing.assert_close(grand(model, (x, y)), expected, rtol=1e-12, atol=1e-14)


FAMILIES = ["llama", "qwen", "qwen3", "mistral", "gpt2", "gpt_neox", "gemma2"]


@pytest.mark.parametrize("family", FAMILIES)
def test_language_models(family: str) -> None:
    model = tiny(family, vocab_size=V, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2).double()
    ids = whole(B, T)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    norms = check(model, batch)
    names = {n for n, _ in model.named_parameters()}
    assert set(norms.formulas) == names
    assert ("tied" in norms.formulas.values()) == model.config.tie_word_embeddings


def test_tokens_of_a_row_are_averaged_and_masked_ones_left_out() -> None:
    model = tiny("llama", vocab_size=V, hidden_size=16, num_layers=1).double()
    ids = whole(3, T)
    labels = ids.clone()
    labels[0, :5] = -100
    found = grand(model, {"input_ids": ids, "labels": labels})
    model.eval()
    loss = F.cross_entropy(model(input_ids=ids[:1]).logits[0, 4:-1], ids[0, 5:])
    grads = torch.autograd.grad(loss, list(model.parameters()))
    assert float(found[0]) == pytest.approx(math.sqrt(sum(float(g.square().sum()) for g in grads)), rel=1e-6)


def test_sequence_classifier() -> None:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=V, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, num_labels=3
    )
    model = BertForSequenceClassification(config)
    mask = torch.ones(B, T, dtype=torch.long)
    mask[2, 3:] = 0
    check(model, {"input_ids": whole(B, T), "attention_mask": mask, "labels": whole(B, high=3)})


class Shared(nn.Module):
    """One layer called twice, a tied head, one norm and one bias used in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.norm = nn.Embedding(V, 6), nn.Linear(6, 6), nn.LayerNorm(6)
        self.head = nn.Linear(6, V, bias=False)
        self.head.weight = self.embed.weight
        self.other = nn.Linear(6, 6)
        self.other.bias = self.mix.bias

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.mix(self.embed(ids)))
        x = self.other(torch.tanh(self.norm(self.mix(x))))
        return self.head(x + self.embed((ids + 1) % V))


def test_shared_and_tied_parameters() -> None:
    names = {"embed.weight": "tied", "mix.weight": "linear", "mix.bias": "linear", "norm.weight": "norm"}
    names |= {"norm.bias": "norm", "other.weight": "linear"}
    check(Shared(), as_batch(Shared(), whole(B, T)), names)


class TwoHeads(Shared):
    """A tied head called twice."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.head(x) + torch.tanh(self.head(self.mix(x))) + 0 * self.norm(x).sum() + 0 * self.other(x).sum()


def test_tied_head_called_twice() -> None:
    check(TwoHeads(), as_batch(TwoHeads(), whole(B, T)))


class Odd(nn.Module):
    """Weights used by hand, twice, by a layer of one's own, and not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale, self.unused = nn.Linear(6, 6), nn.Parameter(floats(6)), nn.Linear(2, 2)
        self.by_hand, self.attention = nn.Linear(6, 3), nn.MultiheadAttention(6, 2, batch_first=True)
        self.position = nn.Parameter(floats(T, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x + self.position) * self.scale + F.linear(x, self.layer.weight)
        x, _ = self.attention(x, x, x)
        return F.linear(x.mean(1), self.by_hand.weight, self.by_hand.bias)


def test_other_uses_are_counted_row_by_row() -> None:
    rows = dict.fromkeys(
        ("scale", "position", "layer.weight", "by_hand.weight", "by_hand.bias", "attention.in_proj_weight",
         "attention.in_proj_bias", "attention.out_proj.weight", "attention.out_proj.bias"), "row by row",
    )  # fmt: skip
    model, batch = Odd(), (floats(B, T, 6), whole(B, high=3))
    check(model, batch, {**rows, "layer.bias": "linear"})
    check(model, batch, {**rows, "layer.bias": "linear"}, check=False)  # the graph alone tells


class Scaled(nn.Linear):
    """A linear layer that computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, 3 * self.weight, self.bias)


class Gated(nn.Module):
    """Looks like an RMS norm but is none."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(1 + floats(6)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return self.weight.sigmoid() * x


def test_look_alikes_are_not_trusted() -> None:
    model = nn.Sequential(Scaled(6, 6), Gated(), nn.Linear(6, 3))
    expected = {"0.weight": "row by row", "0.bias": "row by row", "1.weight": "row by row"}
    check(model, (floats(B, 6), whole(B, high=3)), {**expected, "2.weight": "linear", "2.bias": "linear"})


class TimeFirst(nn.Module):
    """Positions before rows, with as many of one as of the other: shapes alone cannot tell."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x.transpose(0, 1)).tanh().mean(0))


def test_the_check_finds_an_axis_in_the_wrong_place() -> None:
    expected = {
        "first.weight": "row by row",
        "first.bias": "row by row",
        "last.weight": "linear",
        "last.bias": "linear",
    }
    model, batch = TimeFirst(), (floats(B, B, 6), whole(B, high=3))
    check(model, batch, expected)
    loose = GradientNorms(model, check=False)(as_batch(model, batch))
    assert float((loose / by_hand(model, batch) - 1).abs().max()) > 1e-3


class Flattened(nn.Module):
    """Positions as rows, as some decoders call their feed-forward layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.batch = nn.Linear(6, 8), nn.LayerNorm(8), nn.BatchNorm1d(8)
        self.down = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(self.batch(self.norm(self.up(x.reshape(-1, 6)))).relu())
        return y.reshape(len(x), -1, 3).mean(1)


def test_positions_as_rows() -> None:
    check(Flattened(), (floats(B, T, 6), whole(B, high=3)))


class Positions(nn.Module):
    """Position embeddings that all rows share, with an axis of one row and without."""

    def __init__(self, axis: bool) -> None:
        super().__init__()
        self.embed, self.place, self.head, self.axis = nn.Embedding(V, 6), nn.Embedding(T, 6), nn.Linear(6, V), axis

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1])
        return self.head((self.embed(ids) + self.place(places[None] if self.axis else places)).tanh())


@pytest.mark.parametrize("axis", [True, False])
def test_shared_positions(axis: bool) -> None:
    rest = {"embed.weight": "embedding", "head.weight": "linear", "head.bias": "linear"}
    names = {"place.weight": "embedding" if axis else "row by row", **rest}
    check(Positions(axis), as_batch(Positions(axis), whole(B, T)), names)


def test_mixture_of_experts_takes_a_backward_pass_a_row() -> None:
    model = tiny("mixtral", vocab_size=V, hidden_size=16, num_layers=1)
    batch = {"input_ids": whole(B, T), "attention_mask": torch.ones(B, T, dtype=torch.long)}
    with pytest.warns(GnomonWarning, match=r"torch\.func cannot run MixtralForCausalLM row by row"):
        found = grand(model, batch)
    torch.testing.assert_close(found.double(), by_hand(model, batch), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("how", ["func", "loop"])
def test_slow_ways_agree(how: Any) -> None:
    model, batch = Flattened().double(), (floats(B, T, 6), whole(B, high=3))
    torch.testing.assert_close(grand(model, batch, how=how), grand(model, batch), rtol=1e-9, atol=1e-12)


def test_float32_to_five_digits_and_bf16_sums_in_float32() -> None:
    model = tiny("llama", vocab_size=64, hidden_size=32, num_layers=2, tie=True)
    batch = {"input_ids": whole(B, 33, high=64)}
    exact = by_hand(tiny("llama", vocab_size=64, hidden_size=32, num_layers=2, tie=True).double(), batch)
    found = grand(model, batch)
    assert found.dtype == torch.float32
    assert float((found.double() / exact - 1).abs().max()) < 1e-5
    low = grand(model.bfloat16(), batch)
    assert low.dtype == torch.float32
    assert float((low.double() / exact - 1).abs().max()) < 0.05


def test_adapters() -> None:
    from peft import LoraConfig, get_peft_model

    base = tiny("llama", vocab_size=V, hidden_size=16, num_layers=1)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    norms = check(model, {"input_ids": whole(B, T)})
    assert set(norms.formulas.values()) == {"linear"}
    assert len(norms.formulas) == 4


def test_hooks_behind_a_layer_do_not_disturb() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 3))
    for layer in model:
        layer.register_forward_hook(lambda module, args, output: 0.3 * output)
    check(model, (floats(B, 6), whole(B, high=3)))


def test_frozen_parameters_do_not_count() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3))
    model[0].weight.requires_grad_(False)
    check(model, (floats(B, 6), whole(B, high=3)), {"0.bias": "linear", "1.weight": "linear", "1.bias": "linear"})


def test_regression_and_losses_of_ones_own() -> None:
    check(nn.Linear(6, 1), (floats(B, 6), floats(B, seed=2)))
    smooth = lambda z, y: F.cross_entropy(z, y, label_smoothing=0.2, reduction="none")  # noqa: E731
    check(nn.Linear(6, 3), (floats(B, 6), whole(B, high=3)), loss=smooth)
    with pytest.raises(MethodError, match="one loss a row"):
        grand(nn.Linear(6, 3).double(), (floats(B, 6), whole(B, high=3)), loss=lambda z, y: F.cross_entropy(z, y))


def test_the_model_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    model[1].eval()
    kept = torch.ones_like(model[0].weight)
    model[0].weight.grad = kept.clone()
    state, statistics = torch.random.get_rng_state(), model[1].running_mean.clone()
    batch = (floats(B, 6), whole(B, high=3))
    first = grand(model, batch)
    torch.testing.assert_close(grand(model, batch), first, rtol=0, atol=0)  # no dropout
    assert [m.training for m in model] == [True, False, True, True]
    assert torch.equal(model[0].weight.grad, kept)
    assert model[3].weight.grad is None
    assert torch.equal(model[1].running_mean, statistics)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(m._forward_hooks for m in model)


def test_nothing_of_a_pass_stays_in_memory() -> None:
    model, x = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double(), floats(B, 6)
    seen: list[weakref.ref[Tensor]] = []
    model[1].register_forward_hook(lambda m, a, output: seen.append(weakref.ref(output)))
    grand(model, (x, whole(B, high=3)))
    gc.collect()
    assert seen
    assert all(reference() is None for reference in seen)


def test_works_under_no_grad_and_without_autocast() -> None:
    model, batch = nn.Linear(6, 3), (floats(B, 6).float(), whole(B, high=3))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = grand(model, batch)
    torch.testing.assert_close(found.double(), by_hand(model, batch), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("length", "m", "n"), [(1, 5, 3), (4, 40, 50), (60, 5, 3), (300, 200, 900), (9, 3, 70)])
def test_both_forms_are_exact(length: int, m: int, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from gnomon.data.data_diet import formulas

    h, d = floats(3, length, m), floats(3, length, n, seed=1)
    expected = torch.einsum("btm,btn->bmn", h, d).square().sum((1, 2))
    torch.testing.assert_close(outer_squares(h, d), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(formulas._by_gram(h, d), expected, rtol=1e-10, atol=1e-10)
    monkeypatch.setattr(formulas, "_BUDGET", 500)
    torch.testing.assert_close(outer_squares(h, d), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(formulas._by_gram(h, d), expected, rtol=1e-10, atol=1e-10)


def test_lookups_sum_per_token() -> None:
    ids, d = whole(4, 9, high=3), floats(4, 9, 5)
    expected = torch.stack([F.one_hot(i).double().T.mm(e).square().sum() for i, e in zip(ids, d, strict=True)])
    torch.testing.assert_close(lookup_squares(ids, d), expected)


def test_models_without_a_norm_are_refused() -> None:
    batch = (floats(B, 6), whole(B, high=3))
    with pytest.raises(ModelError, match="No parameter of Linear is trainable"):
        grand(nn.Linear(6, 3).requires_grad_(False).double(), batch)
    with pytest.raises(ModelError, match="batch norm '0' has no running statistics"):
        grand(nn.Sequential(nn.BatchNorm1d(6, track_running_stats=False), nn.Linear(6, 3)).double(), batch)
    with pytest.raises(ModelError, match=r"returned \(3,\) for 5 rows"):
        grand(nn.Sequential(nn.Linear(6, 3), nn.Flatten(0), nn.Linear(15, 3)).double(), batch)
    with pytest.raises(MethodError, match="how = 'gost' is unknown"):
        grand(nn.Linear(6, 3), batch, how="gost")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="label 3 in row 1"):
        grand(nn.Linear(6, 3).double(), (floats(2, 6), torch.tensor([0, 3])))
    with pytest.raises(DataError, match="no 'labels'"):
        grand(nn.Linear(6, 3), {"x": floats(B, 6)})
    with pytest.raises(DataError, match="has no labels"):
        grand(nn.Linear(6, 3), floats(B, 6))


@pytest.mark.parametrize("options", [{}, {"stride": (2, 1), "dilation": (1, 2)}, {"groups": 2, "padding": (0, 2)}])
def test_convolutions_place_by_place(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from gnomon.data.data_diet import formulas

    monkeypatch.setattr(formulas, "_BUDGET", 1000)
    monkeypatch.setattr(formulas.Patches, "unfolded", None)  # never cut out as a whole
    model = nn.Sequential(nn.Conv2d(16, 16, (3, 2), **options), nn.Tanh(), Channels(), nn.Linear(16, 3))
    check(model, (floats(B, 16, 14, 13), whole(B, high=3)))


class TwiceConvolved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(F.avg_pool2d(self.layer(x).tanh(), 2)).mean((2, 3)))


def test_a_convolution_called_twice_on_different_sizes() -> None:
    check(TwiceConvolved(), (floats(B, 8, 6, 8), whole(B, high=3)))


class Recomputed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first, self.body, self.head, self.reentrant = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3), reentrant

    def forward(self, x: Tensor) -> Tensor:
        body = lambda y: self.body(y).tanh()  # noqa: E731
        return self.head(torch.utils.checkpoint.checkpoint(body, self.first(x), use_reentrant=self.reentrant))


def test_gradient_checkpointing() -> None:
    batch = (floats(B, 6), whole(B, high=3))
    check(Recomputed(False), batch)
    with pytest.raises(
        RuntimeError, match="set use_reentrant=False"
    ):  # torch itself refuses to differentiate it this way
        grand(Recomputed(True).double(), batch)
