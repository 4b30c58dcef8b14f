"""Perplexity against a loop that scores one token at a time, and its interval, inputs and errors."""

from __future__ import annotations

import math

import datasets
import numpy as np
import peft
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MarianConfig,
    MarianMTModel,
)

from gnomon.errors import DataError, MethodError, ModelError
from gnomon.evals import Perplexity, perplexity
from gnomon.evals.perplexity import _interval

VOCAB = 50


def llama(positions: int = 64, **options) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=positions, initializer_range=0.5, **options,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config)


def tokens(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCAB, (n,), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def by_hand(model, stream: torch.Tensor, context: int, stride: int) -> tuple[float, int]:
    """The definition: every token once, given the tokens before it in the first window that has it."""
    total, count, scored_to = 0.0, 0, 1
    for begin in range(0, len(stream), stride):
        end = min(begin + context, len(stream))
        for position in range(max(scored_to, begin + 1), end):
            logits = model(stream[None, begin:position]).logits[0, -1].double()
            total -= (logits - logits.logsumexp(0))[stream[position]].item()
            count += 1
        scored_to = end
        if end == len(stream):
            break
    return total, count


@pytest.mark.parametrize(("n", "context", "stride"), [(50, 16, 16), (50, 16, 8), (50, 16, 1), (16, 16, 5), (7, 16, 9)])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_stream_agrees_with_the_loop(n, context, stride, batch_size):
    model, stream = llama().double(), tokens(n)
    total, count = by_hand(model, stream, context, stride)
    result = perplexity(model, stream, context=context, stride=stride, batch_size=batch_size)
    assert result.tokens == count
    assert result.nll == pytest.approx(total / count, abs=1e-6)
    assert result.value == pytest.approx(math.exp(total / count), rel=1e-6)
    assert result.window_nll.sum() == pytest.approx(total, rel=1e-6)


def test_a_family_without_logits_to_keep_or_with_learned_positions():
    config = GPT2Config(vocab_size=VOCAB, n_positions=24, n_embd=16, n_layer=2, n_head=2)
    model = GPT2LMHeadModel(config).double().eval()
    stream = tokens(60)
    total, count = by_hand(model, stream, 24, 10)
    result = perplexity(model, stream, stride=10)  # the model's own 24 positions
    assert (result.tokens, result.nll) == (count, pytest.approx(total / count, abs=1e-6))


def test_windows_weigh_by_their_tokens_not_alike():
    model = llama()
    rows = [tokens(40, 1), tokens(3, 2)]
    whole = perplexity(model, rows)
    parts = [perplexity(model, row) for row in rows]
    assert whole.nll == pytest.approx(sum(p.nll * p.tokens for p in parts) / 41, rel=1e-6)
    assert whole.nll != pytest.approx(np.mean([p.nll for p in parts]), rel=1e-3)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_padding_is_not_scored_and_its_side_does_not_matter(side, batch_size):
    model = llama()
    rows = [tokens(n, n) for n in (5, 12, 9)]
    ids, mask = torch.zeros(3, 12, dtype=torch.long), torch.zeros(3, 12, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(12 - len(row), 12)
        ids[i, where], mask[i, where] = row, 1
    plain = perplexity(model, rows)
    padded = perplexity(model, {"input_ids": ids, "attention_mask": mask}, batch_size=batch_size)
    assert padded.tokens == plain.tokens == 4 + 11 + 8
    np.testing.assert_allclose(padded.window_nll, plain.window_nll, rtol=1e-5)


def test_labels_of_minus_100_are_context_only():
    model, ids = llama(), tokens(20)[None]
    labels = ids.clone()
    labels[:, :15] = -100
    result = perplexity(model, {"input_ids": ids, "labels": labels})
    with torch.no_grad():
        logs = model(ids).logits.log_softmax(-1)[0]
    assert result.tokens == 5
    assert result.nll == pytest.approx(-np.mean([logs[i - 1, ids[0, i]].item() for i in range(15, 20)]), rel=1e-5)


def test_all_forms_of_the_same_data_agree():
    model = llama()
    ids = torch.stack([tokens(12, s) for s in range(5)])
    expected = perplexity(model, ids).nll
    table = datasets.Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    forms = {
        "list of lists": ids.tolist(),
        "list of tensors": list(ids),
        "numpy": ids.numpy(),
        "int32": ids.int(),
        "mapping": {"input_ids": ids.tolist()},
        "dataset": table,
        "torch dataset": table.with_format("torch"),
        "loader": DataLoader(table.with_format("torch"), batch_size=2),
        "loader of tensors": DataLoader(ids, batch_size=2),
        "generator": ({"input_ids": row} for row in ids),
    }
    for name, form in forms.items():
        assert perplexity(model, form).nll == pytest.approx(expected, rel=1e-6), name
    stream = tokens(30)
    assert perplexity(model, stream.tolist()).nll == perplexity(model, stream).nll


def test_rows_without_a_token_to_score_do_not_count():
    model = llama()
    kept = perplexity(model, [tokens(9)])
    assert perplexity(model, [[], tokens(9), [3]]).window_tokens.tolist() == kept.window_tokens.tolist() == [8]


def test_the_interval_covers_the_true_mean_about_as_often_as_it_says():
    generator = np.random.default_rng(0)
    hits = 0

    for _ in range(200):
        counts = generator.integers(5, 40, size=60)
        low, high = _interval(counts * generator.gamma(4.0, 0.5, size=60), counts, 0.9)
        hits += low <= 2.0 <= high
    assert 165 <= hits <= 195


def test_the_interval_contains_the_value_and_is_the_same_every_time():
    first, second = (perplexity(llama(), tokens(400), context=20) for _ in range(2))
    assert first.low < first.value < first.high
    assert (first.low, first.high) == (second.low, second.high)
    narrow = perplexity(llama(), tokens(400), context=20, confidence=0.5)
    assert narrow.high - narrow.low < first.high - first.low
    one = perplexity(llama(), tokens(20))
    assert math.isnan(one.low)
    assert set(one.summary()) == {"perplexity", "nll", "tokens"}
    assert all(math.isfinite(x) for x in first.summary().values())


def test_paired_difference_is_tighter_than_two_intervals():
    stream = tokens(1000)
    model, close = llama(), llama()
    with torch.no_grad():
        close.lm_head.weight.mul_(0.98)
    a, b = (perplexity(m, stream, context=25) for m in (model, close))
    gap, low, high = a.paired_difference(b)
    assert gap == pytest.approx(a.nll - b.nll, abs=1e-12)
    assert low < gap < high
    assert high - low < 0.2 * (math.log(a.high) - math.log(a.low))
    assert b.paired_difference(a)[0] == pytest.approx(-gap)
    assert a.paired_difference(a) == (0.0, 0.0, 0.0)
    with pytest.raises(MethodError, match="not on the same windows: 40 windows with 960 scored tokens against 50"):
        a.paired_difference(perplexity(model, stream, context=20))


def test_the_model_is_left_as_it_was():
    model = llama().train()
    model.model.layers[0].eval()
    flags = [m.training for m in model.modules()]
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    perplexity(model, tokens(30))
    assert [m.training for m in model.modules()] == flags
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(p.grad is None for p in model.parameters())
    model(tokens(10)[None], labels=tokens(10)[None]).loss.backward()  # no inference tensor was left in a buffer


def test_dropout_is_off_even_for_a_model_in_training():
    model = llama(attention_dropout=0.5).train()
    assert perplexity(model, tokens(30)).nll == perplexity(model, tokens(30)).nll


def test_half_precision_logits_are_normalised_in_float32():
    model, stream = llama().to(torch.bfloat16), tokens(40)
    with torch.no_grad():
        logits = model(stream[None]).logits[0].float()
    expected = torch.nn.functional.cross_entropy(logits[:-1], stream[1:]).item()
    assert perplexity(model, stream).nll == pytest.approx(expected, abs=2e-6)


def test_a_peft_model_counts_its_adapter():
    stream = tokens(40)
    base = perplexity(llama(), stream).nll
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapted = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    with_adapter = perplexity(adapted, stream).nll
    assert with_adapter != pytest.approx(base, abs=1e-4)
    assert with_adapter == pytest.approx(perplexity(adapted.merge_and_unload(), stream).nll, rel=1e-5)


def test_progress_counts_windows_to_the_end():
    seen: list[tuple[int, int]] = []
    perplexity(
        llama(),
        tokens(100),
        context=10,
        batch_size=4,
        on_progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(4, 10), (8, 10), (10, 10)]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch.zeros(0, dtype=torch.long), "no token to score"),
        ([], "no token to score"),
        (torch.tensor([3]), "2 tokens or more"),
        ({"input_ids": [[1, 2]], "labels": [[-100, -100]]}, "no token to score"),
        (torch.tensor([1, VOCAB]), r"Token id 50 is not in the model's vocabulary \(0 to 49\)"),
        (torch.tensor([1, -1]), "Token id -1"),
        ("some text", "Tokenise first"),
        ({"text": ["a"]}, "No 'input_ids' among text"),
        ({"input_ids": [[1, 2], [1]]}, "ragged"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1]]}, r"attention_mask has shape \(1, 1\)"),
        (torch.tensor([0.5, 1.5]), "must be integers"),
        (torch.zeros(2, 2, 2, dtype=torch.long), r"\(2, 2, 2\)"),
        (3, "Cannot read token ids from a int"),
    ],
)
def test_data_that_cannot_be_scored_says_why(data, message):
    with pytest.raises(DataError, match=message):
        perplexity(llama(), data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 1}, "context is 1"),
        ({"stride": 0}, "stride is 0"),
        ({"context": 8, "stride": 9}, r"stride is 9; it must be from 1 to context \(8\)"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"confidence": 95}, "confidence is 95"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(MethodError, match=message):
        perplexity(llama(), tokens(30), **options)


def test_models_that_have_no_causal_logits_are_refused_by_name():
    small = {"vocab_size": VOCAB, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = BertForMaskedLM(BertConfig(**small, intermediate_size=8))
    headless = LlamaModel(LlamaConfig(**small, intermediate_size=8))
    marian = MarianMTModel(
        MarianConfig(
            vocab_size=VOCAB, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=8, decoder_ffn_dim=8, pad_token_id=0,
        )
    )  # fmt: skip
    for model, message in (
        (bert, "BertForMaskedLM is a masked language model"),
        (headless, "LlamaModel has no language-model head"),
        (marian, "MarianMTModel is an encoder-decoder"),
    ):
        with pytest.raises(ModelError, match=message):
            perplexity(model, tokens(10))


def test_a_context_beyond_the_models_positions_is_refused_unless_the_model_was_extended():
    model = llama(positions=16)
    with pytest.raises(ModelError, match="context is 32, but LlamaForCausalLM has 16 positions"):
        perplexity(model, tokens(40), context=32)
    model.config.max_position_embeddings = 32
    assert isinstance(perplexity(model, tokens(40), context=32), Perplexity)
