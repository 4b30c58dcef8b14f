"""The statistics against their definitions, and the block-by-block walk against plain hooks on the whole model."""

from __future__ import annotations

import datasets
import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gnomon.common.calibration import LayerInputs, as_batches, walk_blocks
from gnomon.common.layers import decoder_blocks, linear_layers, set_weight, weight_of
from gnomon.common.models import tiny
from gnomon.errors import DataError, MethodError, ModelError

FAMILIES = ["llama", "qwen", "mistral", "gpt2", "gpt_neox", "olmo2", "gemma2"]


def ids(n: int = 5, tokens: int = 16, seed: int = 0, vocab: int = 256) -> Tensor:
    return torch.randint(0, vocab, (n, tokens), generator=torch.Generator().manual_seed(seed))


def definition(sequences: list[Tensor]) -> dict[str, Tensor]:
    """The statistics from their definitions, one sequence after the other, in float64."""
    rows = [s.double() for s in sequences]
    n, tokens = len(rows), sum(len(r) for r in rows)
    return {
        "mean_sum": sum(r.sum(0) for r in rows) / n,
        "mean_square": sum((r**2).sum(0) for r in rows) / n,
        "abs_sums": sum(r.abs().sum(0) for r in rows),
        "variance": sum(len(r) * r.var(0, unbiased=False) for r in rows) / tokens,
        "gram": sum(r.T @ r for r in rows),
    }


def assert_statistics(found: LayerInputs, sequences: list[Tensor], rtol: float = 1e-5) -> None:
    assert found.sequences == len(sequences)
    assert found.tokens == sum(len(s) for s in sequences)
    for name, value in definition(sequences).items():
        scale = value.abs().max().item() + 1e-9
        torch.testing.assert_close(
            getattr(found, name).double(),
            value,
            rtol=rtol,
            atol=rtol * scale,
            msg=lambda m, n=name: f"{n}: {m}",
        )


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 4), tokens=st.integers(1, 7), width=st.integers(1, 6), seed=st.integers(0, 99))
def test_statistics_equal_their_definition(n: int, tokens: int, width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, tokens, width, generator=generator) + 1
    mask = torch.rand(n, tokens, generator=generator) < 0.7
    mask[0, 0] = True
    kept = [row[m] for row, m in zip(x, mask, strict=True) if m.any()]
    assert_statistics(LayerInputs.from_tensor(x, mask), kept)


def test_padding_does_not_enter_even_when_it_is_nan() -> None:
    x = torch.randn(2, 5, 3)
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]])
    x[0, 3:] = float("nan")
    x[1, 0] = float("inf")
    assert_statistics(LayerInputs.from_tensor(x, mask), [x[0, :3], x[1, 1:]])


def test_batches_and_merging_give_the_whole() -> None:
    x = torch.randn(6, 8, 5, dtype=torch.float64)
    whole = LayerInputs.from_tensor(x)
    parts = LayerInputs.from_tensor(x[:2])
    parts.update(x[2:3])
    parts.merge(LayerInputs.from_tensor(x[3:]))
    assert (parts.sequences, parts.tokens) == (6, 48)
    for name in ("sums", "squares", "abs_sums", "variance", "gram"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=1e-12, atol=1e-12)


def test_variance_ignores_differences_between_sequences() -> None:
    x = torch.stack([torch.full((4, 2), 1.0), torch.full((4, 2), 5.0)])
    assert LayerInputs.from_tensor(x).variance.tolist() == [0.0, 0.0]


def test_half_precision_does_not_overflow_and_double_stays_double() -> None:
    x = torch.full((1, 1000, 2), 300.0, dtype=torch.float16)
    inputs = LayerInputs.from_tensor(x)
    assert inputs.squares.tolist() == [9e7, 9e7]
    assert inputs.gram is not None
    assert inputs.gram.dtype == torch.float32
    assert LayerInputs.from_tensor(x.double()).gram.dtype == torch.float64  # type: ignore[union-attr]


def test_gram_is_optional_and_two_dimensions_are_one_sequence() -> None:
    assert LayerInputs.from_tensor(torch.ones(3, 4), gram=False).gram is None
    assert_statistics(LayerInputs.from_tensor(torch.arange(12.0).reshape(3, 4)), [torch.arange(12.0).reshape(3, 4)])


def test_bad_inputs_are_named() -> None:
    inputs = LayerInputs(3)
    with pytest.raises(MethodError, match=r"Layer 'a\.b': its inputs hold NaN or infinite values \(1 of 3"):
        inputs.update(torch.tensor([[[1.0, float("nan"), 0.0]]]), name="a.b")
    with pytest.raises(MethodError, match="do not end in the 3 features"):
        inputs.update(torch.ones(1, 2, 4))
    with pytest.raises(MethodError, match=r"The mask must be \(1, 2\)"):
        inputs.update(torch.ones(1, 2, 3), torch.ones(1, 3))
    with pytest.raises(MethodError, match="Give \\(sequences, tokens, in\\)"):
        LayerInputs.from_tensor(torch.ones(3))
    with pytest.raises(MethodError, match="Cannot merge statistics of 4 features"):
        inputs.merge(LayerInputs(4))


def test_every_form_of_data_gives_the_same_batches() -> None:
    data = ids()
    rows = [{"input_ids": row.tolist(), "text": "x"} for row in data]
    loader = torch.utils.data.DataLoader(
        rows, batch_size=2, collate_fn=lambda b: {"input_ids": torch.tensor([r["input_ids"] for r in b])}
    )

    forms = [data, {"input_ids": data}, rows, loader, datasets.Dataset.from_list(rows), list(data)]
    for form in forms:
        batches = as_batches(form, batch_size=3)
        assert [len(b["input_ids"]) for b in batches] == [3, 2]
        assert torch.equal(torch.cat([b["input_ids"] for b in batches]), data)
        assert all(set(b) == {"input_ids"} for b in batches)


def test_rows_of_unequal_length_are_padded_and_masked() -> None:
    (batch,) = as_batches([{"input_ids": [1, 2, 3]}, {"input_ids": [4]}, {"input_ids": []}])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch.zeros(0, 8, dtype=torch.long), "The calibration set is empty"),
        ([], "The calibration set is empty"),
        (
            {"input_ids": torch.ones(1, 2).long(), "attention_mask": torch.zeros(1, 2)},
            "The calibration set is empty",
        ),
        (torch.zeros(8, dtype=torch.long), "Cut the stream into windows first"),
        (torch.zeros(2, 8), "Token ids are integers"),
        (["some text"], "Calibration item 1 is text. Tokenize it first"),
        ("some text", "Calibration data is a str"),
        ([{"text": "x"}], "Calibration item 1 has no 'input_ids', only text"),
        ({"input_ids": torch.ones(1, 2).long(), "attention_mask": torch.ones(1, 3)}, "They must be equal"),
        (7, "Calibration data is a int"),
    ],
)
def test_bad_calibration_data(data: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        as_batches(data)


def plain_hooks(model: nn.Module, data: Tensor, mask: Tensor | None = None) -> dict[str, list[Tensor]]:
    """All inputs of all linears of the blocks, from plain hooks on the model, one sequence at a time."""
    found: dict[str, list[Tensor]] = {}
    inside = {id(m) for m in decoder_blocks(model).modules()}
    handles = [
        layer.register_forward_pre_hook(lambda _m, args, n=name: found.setdefault(n, []).append(args[0][0]))
        for name, layer in linear_layers(model).items()
        if id(layer) in inside
    ]
    training = model.training
    model.eval()
    with torch.no_grad():
        for i, row in enumerate(data):
            length = len(row) if mask is None else int(mask[i].sum())
            model(row[None, :length], use_cache=False)
    model.train(training)
    for handle in handles:
        handle.remove()
    return found


def collect(model: nn.Module, data: object, **options: object) -> dict[str, LayerInputs]:
    found: dict[str, LayerInputs] = {}
    walk_blocks(model, data, lambda i, name, block, inputs: found.update(inputs), **options)  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padded", [False, True])
def test_the_walk_sees_what_hooks_on_the_whole_model_see(family: str, padded: bool) -> None:
    model = tiny(family, num_layers=2)
    data = ids()
    mask = torch.ones_like(data)
    if padded:
        mask[0, 9:] = 0
        mask[3, 4:] = 0
    expected = plain_hooks(model, data, mask if padded else None)
    found = collect(model, {"input_ids": data, "attention_mask": mask}, batch_size=2)
    assert list(found) == list(expected)
    for name, sequences in expected.items():
        assert_statistics(found[name], sequences)


def test_blocks_with_different_masks_get_their_own() -> None:
    model = tiny("gemma2", num_layers=3, sliding_window=4)
    data = ids(tokens=24)
    expected = plain_hooks(model, data)
    for name, found in collect(model, data).items():
        assert_statistics(found, expected[name])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_sequential_blocks_see_the_changed_blocks_before_them(family: str) -> None:
    model, changed = tiny(family, num_layers=3), tiny(family, num_layers=3)
    data = ids()
    dense = plain_hooks(model, data)

    def halve(_index: int, _name: str, block: nn.Module, _inputs: object) -> None:
        for layer in linear_layers(block).values():
            set_weight(layer, 0.5 * weight_of(layer))

    for block in decoder_blocks(changed):
        halve(0, "", block, None)
    after = plain_hooks(changed, data)
    found: dict[str, LayerInputs] = {}

    def visit(index: int, name: str, block: nn.Module, inputs: dict[str, LayerInputs]) -> None:
        found.update(inputs)
        halve(index, name, block, inputs)

    walk_blocks(model, data, visit, batch_size=3)
    prefixes = [name for name, m in model.named_modules() if any(m is b for b in decoder_blocks(model))]
    # the first linear of a block reads what the block before it gave; later ones are still fed by the unchanged block
    for prefix in prefixes[1:]:
        first = next(name for name in after if name.startswith(prefix + "."))
        assert_statistics(found[first], after[first])

    unchanged: dict[str, LayerInputs] = {}
    model = tiny(family, num_layers=3)

    def visit_apart(index: int, name: str, block: nn.Module, inputs: dict[str, LayerInputs]) -> None:
        unchanged.update(inputs)
        halve(index, name, block, inputs)

    walk_blocks(model, data, visit_apart, sequential=False)
    for name, sequences in dense.items():
        assert_statistics(unchanged[name], sequences)


def test_layers_reading_one_tensor_share_one_object() -> None:
    found = collect(tiny("llama", num_layers=1), ids())
    names = {name.rpartition(".")[2]: inputs for name, inputs in found.items()}
    assert names["q_proj"] is names["k_proj"] is names["v_proj"]
    assert names["gate_proj"] is names["up_proj"]
    assert len({id(inputs) for inputs in found.values()}) == 4


def test_peft_models_keep_their_own_names() -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    model = peft.get_peft_model(tiny("llama", num_layers=2), config)
    found = collect(model, ids())
    assert "base_model.model.model.layers.0.self_attn.q_proj.base_layer" in found
    assert set(found) <= set(linear_layers(model))
    plain = collect(tiny("llama", num_layers=2), ids())
    for name, inputs in plain.items():
        theirs = found.get(f"base_model.model.{name}.base_layer", found.get(f"base_model.model.{name}"))
        assert theirs is not None
        torch.testing.assert_close(theirs.sums, inputs.sums)
    key = "base_model.model.model.layers.0.self_attn."
    assert found[key + "q_proj.base_layer"] is found[key + "k_proj"]


def test_bfloat16_model() -> None:
    model = tiny("llama", num_layers=1).to(torch.bfloat16)
    for inputs in collect(model, ids()).values():
        assert inputs.sums.dtype == torch.float64
        assert inputs.gram is not None
        assert inputs.gram.dtype == torch.float32


def test_the_model_is_left_as_it_was() -> None:
    model = tiny("gpt2", num_layers=2, attn_pdrop=0.1)
    model.train()
    decoder_blocks(model)[1].eval()
    modes = [m.training for m in model.modules()]
    state = torch.random.get_rng_state()
    seen: list[tuple[bool, bool]] = []
    walk_blocks(model, ids(), lambda i, n, b, x: seen.append((b.training, torch.is_grad_enabled())))
    assert seen == [(False, False)] * 2
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(m._forward_pre_hooks or "forward" in m.__dict__ for m in model.modules())


def test_the_model_is_left_as_it_was_after_an_error() -> None:
    model = tiny("llama", num_layers=2)
    layer = decoder_blocks(model)[1].mlp.gate_proj
    with torch.no_grad():
        layer.weight.fill_(float("inf"))
    with pytest.raises(MethodError, match=r"Layer 'model\.layers\.1\.mlp\.down_proj': its inputs hold NaN"):
        collect(model, ids())
    assert model.training
    assert not any(m._forward_pre_hooks or "forward" in m.__dict__ for m in model.modules())


class Experts(nn.Module):
    """Two experts, the second never used; tokens are routed as a flat list."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(width, width), nn.Linear(width, width)])

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        out = torch.zeros_like(flat)
        out[::2] = self.experts[0](flat[::2])
        return out.reshape(x.shape)


def test_experts_without_tokens_are_left_out_and_routed_tokens_counted() -> None:
    model = tiny("llama", num_layers=1)
    model.model.layers[0].mlp = Experts(64)
    found = collect(model, ids(4, 16), batch_size=2)
    assert "model.layers.0.mlp.experts.1" not in found
    inputs = found["model.layers.0.mlp.experts.0"]
    assert (inputs.sequences, inputs.tokens) == (4, 32)


def test_bad_walks() -> None:
    model = tiny("llama", max_positions=16)
    with pytest.raises(DataError, match="holds token id 300; the model knows 0 to 255"):
        collect(model, torch.full((1, 4), 300))
    with pytest.raises(DataError, match="17 tokens long, the model's context is 16"):
        collect(model, ids(1, 17))
    with pytest.raises(ModelError, match="No list of transformer blocks"):
        collect(nn.Linear(2, 2), ids())
    with pytest.raises(MethodError, match="batch_size = 0"):
        collect(model, ids(), batch_size=0)
