"""The bounded cache: pieces, padding, generation, turns, beams, long positions, refusals."""

from __future__ import annotations

import copy
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, StaticCache

from gnomon.context import LambdaCache, apply_lm_infinite
from gnomon.context.lm_infinite import hooks
from gnomon.errors import MethodError, ModelError

sys.path.insert(0, str(Path(__file__).parent))
from lm_infinite_models import ids, in_pieces, llama, logits

L, G = 6, 3
GREEDY: dict[str, Any] = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}


@pytest.fixture(scope="module")
def model() -> Any:
    return apply_lm_infinite(llama(), L, G)


@pytest.fixture(scope="module")
def models() -> dict[tuple[int, int], Any]:
    return {(w, g): apply_lm_infinite(llama(layers=2), w, g) for w, g in ((1, 2), (2, 0), (4, 9), (6, 3))}


@settings(max_examples=20)
@given(
    cuts=st.sets(st.integers(1, 29), max_size=8),
    which=st.sampled_from([(1, 2), (2, 0), (4, 9), (6, 3)]),
    bounded=st.booleans(),
    padding=st.tuples(st.integers(0, 14), st.integers(0, 14)),
)
def test_any_pieces_and_paddings_equal_each_text_alone(
    models: Any, cuts: set[int], which: tuple[int, int], bounded: bool, padding: tuple[int, int]
) -> None:
    model, text = models[which], ids(tokens=30)
    mask = (torch.arange(30) >= torch.tensor(padding)[:, None]).long()
    cache = LambdaCache(which[1], which[0]) if bounded else DynamicCache()
    found, cache = in_pieces(model, text * mask, sorted(cuts), cache, mask)
    for row, pads in enumerate(padding):
        alone = logits(model, text[row : row + 1, pads:])[0]
        torch.testing.assert_close(found[row, pads:], alone, rtol=0, atol=3e-5)
    assert bool(torch.isfinite(found).all())
    if bounded:
        assert cache.layers[0].keys.shape[2] == sum(which)


@pytest.mark.parametrize("kind", ["ceiling", "cache"])
@pytest.mark.parametrize("bounded", [True, False])
def test_texts_shorter_than_the_sinks(kind: Any, bounded: bool) -> None:
    """G > L, and passes that begin or end before there are G tokens."""
    model, text = apply_lm_infinite(llama(layers=2), 4, 9, sink_distance=kind), ids(2, 20)
    full = logits(model, text)
    for cuts in ([*range(1, 20)], [5, 6, 8], [7, 8, 9, 10, 11], [6, 13]):
        cache = LambdaCache(9, 4) if bounded else DynamicCache()
        torch.testing.assert_close(in_pieces(model, text, cuts, cache)[0], full, rtol=0, atol=3e-5)
    for tokens in (1, 5, 8, 9):
        torch.testing.assert_close(logits(model, text[:, :tokens]), full[:, :tokens], rtol=0, atol=3e-5)


def test_positions_of_padded_rows_may_count_from_the_padding_or_not(model: Any) -> None:
    text, pads = ids(1, 24), 5
    alone = logits(model, text)
    padded = torch.cat([torch.zeros(1, pads, dtype=torch.int64), text], 1)
    mask = (torch.arange(24 + pads) >= pads).long()[None]
    for positions in (None, torch.arange(24 + pads)[None], (mask.cumsum(1) - 1).clamp(min=0), mask.cumsum(1) + 500):
        found = logits(model, padded, attention_mask=mask, position_ids=positions)[:, pads:]
        torch.testing.assert_close(found, alone, rtol=0, atol=3e-5)


def test_padding_on_the_right_changes_no_real_token(model: Any) -> None:
    text = ids(2, 26)
    mask = (torch.arange(26) < torch.tensor([[26], [15]])).long()
    found = logits(model, text * mask, attention_mask=mask, position_ids=(mask.cumsum(1) - 1) * mask)
    torch.testing.assert_close(found[0], logits(model, text[:1])[0], rtol=0, atol=3e-5)
    torch.testing.assert_close(found[1, :15], logits(model, text[1:, :15])[0], rtol=0, atol=3e-5)


def test_the_cache_takes_what_the_formula_says_from_the_first_token_on(model: Any) -> None:
    cache = LambdaCache(G, L)
    assert cache.nbytes == 0
    assert (cache.get_max_length(), cache.get_seq_length(), len(cache)) == (-1, 0, 0)
    formula = 2 * 3 * 2 * 2 * (L + G) * 8 * 4  # k and v, layers, rows, key heads, tokens, head size, bytes
    for start in range(0, 60, 20):
        logits(model, ids(tokens=60)[:, start : start + 20], cache=cache, use_cache=True)
        assert cache.nbytes == formula
        assert cache.get_seq_length() == start + 20
        held = sum(t.untyped_storage().nbytes() for layer in cache.layers for t in (layer.keys, layer.values))
        assert held == formula
    half = copy.deepcopy(model).bfloat16()
    assert half(input_ids=ids(), use_cache=True).cache.nbytes == formula // 2


@pytest.mark.parametrize("key", ["cache", "past_key_values"])
def test_generate_takes_and_makes_the_cache(model: Any, key: str) -> None:
    prompt = ids(2, 9)
    made = model.generate(prompt, max_new_tokens=14, **GREEDY)
    mine = LambdaCache(G, L)
    given_ = model.generate(prompt, max_new_tokens=14, **{key: mine}, **GREEDY)
    kept = model.generate(prompt, max_new_tokens=14, **{key: DynamicCache()}, **GREEDY)
    assert isinstance(made.cache, LambdaCache)
    assert given_.cache is mine
    assert type(kept.cache) is DynamicCache
    full = logits(model, made.sequences)[:, 8:-1]
    for out in (made, given_, kept):
        assert torch.equal(out.sequences, made.sequences)
        torch.testing.assert_close(torch.stack(out.logits, 1), full, rtol=0, atol=3e-5)
    assert (
        model.generate(prompt, max_new_tokens=14, do_sample=False, use_cache=False).tolist() == made.sequences.tolist()
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert model.generate(prompt, max_new_tokens=5, do_sample=True, num_return_sequences=3).shape == (6, 14)


def test_a_padded_batch_generates_what_each_text_does(model: Any) -> None:
    long, short = ids(1, 17), ids(1, 8, seed=7)
    batch = torch.cat([long, torch.cat([torch.zeros(1, 9, dtype=torch.int64), short], 1)])
    mask = torch.ones_like(batch)
    mask[1, :9] = 0
    out = model.generate(batch, attention_mask=mask, max_new_tokens=20, **GREEDY)
    for row, text in enumerate((long, short)):
        alone = model.generate(text, max_new_tokens=20, **GREEDY)
        assert torch.equal(out.sequences[row, 17:], alone.sequences[0, text.shape[1] :])
        torch.testing.assert_close(torch.stack(out.logits, 1)[row], torch.stack(alone.logits, 1)[0], rtol=0, atol=3e-5)


def test_several_turns_go_on_from_one_cache(model: Any) -> None:
    cache, text = LambdaCache(G, L), ids(2, 7)
    for turn in range(4):
        before = text.shape[1]
        out = model.generate(text, cache=cache, max_new_tokens=6, **GREEDY)
        full = logits(model, out.sequences)[:, before - 1 : -1]
        torch.testing.assert_close(torch.stack(out.logits, 1), full, rtol=0, atol=3e-5)
        text = torch.cat([out.sequences, ids(2, 1 + 4 * turn, seed=turn)], 1)


@pytest.mark.parametrize("padded", [False, True])
def test_beams_take_their_past_with_them(model: Any, padded: bool) -> None:
    prompt, mask = ids(2, 12), torch.ones(2, 12, dtype=torch.int64)
    if padded:
        mask[0, :4] = 0
    options = {"attention_mask": mask, "max_new_tokens": 10, "do_sample": False, "num_beams": 3}
    bounded = model.generate(prompt, cache=LambdaCache(G, L), **options)
    assert torch.equal(bounded, model.generate(prompt, cache=DynamicCache(), **options))
    assert torch.equal(bounded, model.generate(prompt, use_cache=False, **options))


def test_rows_are_repeated_and_selected_with_their_padding(model: Any) -> None:
    text = ids(2, 20)
    mask = torch.ones(2, 20, dtype=torch.int64)
    mask[1, :11] = 0
    _, cache = in_pieces(model, text, [8], LambdaCache(G, L), mask)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0, 2]))
    rows = [1, 0, 1]
    after = ids(2, 9, seed=11)[rows]
    longer = torch.cat([mask[rows], torch.ones(3, 9, dtype=torch.int64)], 1)
    found = logits(model, after, cache=cache, attention_mask=longer, use_cache=True)
    expected = logits(model, torch.cat([text[rows], after], 1), attention_mask=longer)[:, 20:]
    torch.testing.assert_close(found, expected, rtol=0, atol=3e-5)


def test_a_cache_is_copied_pickled_and_reset(model: Any) -> None:
    text = ids(2, 30)
    mask = torch.ones(2, 30, dtype=torch.int64)
    mask[0, :3] = 0
    full = logits(model, text, attention_mask=mask)
    _, cache = in_pieces(model, text[:, :20], [15], LambdaCache(G, L), mask)
    for twin in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        found = logits(model, text[:, 20:], cache=twin, use_cache=True, attention_mask=mask)
        torch.testing.assert_close(found, full[:, 20:], rtol=0, atol=3e-5)
        twin.reset()
        assert twin.get_seq_length() == 0
        again, _ = in_pieces(model, text, [4, 5], twin, torch.ones_like(mask))
        torch.testing.assert_close(again, logits(model, text), rtol=0, atol=3e-5)
    assert cache.get_seq_length() == 20
    # without a mask the padding it knows goes on
    found = logits(model, text[:, 20:], cache=cache, use_cache=True)
    torch.testing.assert_close(found, full[:, 20:], rtol=0, atol=3e-5)


@pytest.mark.parametrize("pads", [0, 4])
def test_setting_positions_back_changes_nothing(model: Any, pads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    text = ids(2, 120)
    mask = (torch.arange(120) >= torch.tensor([[0], [pads]])).long()
    full = logits(model, text, attention_mask=mask)
    monkeypatch.setattr(hooks, "REBASE_AT", 10)
    cuts = [7, *range(20, 40), 75, 76, 77, 100]
    found, cache = in_pieces(model, text, cuts, LambdaCache(G, L), mask)
    assert cache.shift > 80
    real = mask.bool()
    torch.testing.assert_close(found[real], full[real], rtol=0, atol=1e-4)
    for layer in cache.layers:
        assert layer.get_seq_length() == 120


def test_long_positions_keep_their_digits_only_when_set_back() -> None:
    """A repeated text: its far future looks like its past, so the logits must repeat too."""
    model = apply_lm_infinite(llama(layers=1), 8, 2)
    pattern = ids(1, 8).repeat(1, 4)

    @torch.no_grad()
    def at(seen: int, rebase: int, monkey: pytest.MonkeyPatch) -> Tensor:
        monkey.setattr(hooks, "REBASE_AT", rebase)
        _, cache = in_pieces(model, pattern, [])
        for layer in cache.layers:
            layer.seen = seen  # as if it had read that much of the repeated text
        cache.layers[0].keys[:, :, 2:] = rotated_to(model, cache.layers[0].keys[:, :, 2:], seen - 32)
        outputs = [model(input_ids=pattern[:, n : n + 1], cache=cache, use_cache=True).logits for n in range(16)]
        return torch.cat(outputs, 1)

    with pytest.MonkeyPatch.context() as monkey:
        near = at(32, 10**9, monkey)
        plain = at(32 + 8 * 10 * 5_000_000, 10**10, monkey)
        back = at(32 + 8 * 10 * 5_000_000, 65536, monkey)
    assert float((plain - near).abs().max()) > 0.05
    torch.testing.assert_close(back, near, rtol=0, atol=1e-3)


def rotated_to(model: Any, keys: Tensor, by: int) -> Tensor:
    from gnomon.context.lm_infinite.rotation import frequencies, turn_by, turned

    return turned(keys, turn_by(torch.tensor([by]), frequencies(model.model.rotary_emb), False, keys.dtype))


def test_what_the_cache_refuses(model: Any) -> None:
    for sinks, window, message in ((-1, 4, "sinks = -1"), (2, 0, "window = 0"), (True, 4, "sinks = True")):
        with pytest.raises(MethodError, match=message):
            LambdaCache(sinks, window)
    with pytest.raises(MethodError, match=r"keeps 3 sinks and 7 tokens.*LambdaCache\(3, 6\)"):
        logits(model, ids(), cache=LambdaCache(G, 7), use_cache=True)
    with pytest.raises(ModelError, match="without lm-infinite"):
        logits(llama(), ids(), cache=LambdaCache(G, L), use_cache=True)
    with pytest.raises(MethodError, match="top_k = 2 looks at the keys between"):
        logits(apply_lm_infinite(llama(), L, G, 2), ids(), cache=LambdaCache(G, L), use_cache=True)
    with pytest.raises(MethodError, match="a StaticCache cannot be used"):
        logits(model, ids(), cache=StaticCache(config=model.config, max_cache_len=40), use_cache=True)
    cache = model(input_ids=ids(), use_cache=True).cache
    cache.crop(0)
    with pytest.raises(MethodError, match="cannot go back"):
        cache.crop(-1)
    assert not cache.is_croppable
    with pytest.raises(ModelError, match="keeps no gradients"):
        model(input_ids=ids(), cache=cache, use_cache=True)


def test_masks_it_refuses(model: Any) -> None:
    text = ids(2, 12)
    with pytest.raises(MethodError, match=r"shape \(2, 1, 12, 12\): lm-infinite makes its own mask"):
        logits(model, text, attention_mask=torch.ones(2, 1, 12, 12))
    with pytest.raises(MethodError, match=r"shape \(2, 11\), expected \(2, 12\)"):
        logits(model, text, attention_mask=torch.ones(2, 11))
    hole = torch.ones(2, 12)
    hole[1, 5] = 0
    with pytest.raises(MethodError, match="padding between the tokens"):
        logits(model, text, attention_mask=hole)
    packed = torch.cat([torch.arange(5), torch.arange(7)])[None].expand(2, -1)
    with pytest.raises(MethodError, match="packed sequences"):
        logits(model, text, position_ids=packed)
    with pytest.raises(MethodError, match=r"position_ids has shape \(2, 5\)"):
        logits(model, text, position_ids=packed[:, :5])
    ended = torch.ones(2, 12)
    ended[0, 8:] = 0
    _, cache = in_pieces(model, text, [6], mask=ended)
    for count in (1, 3):
        more = torch.cat([ended, torch.ones(2, count)], 1)
        with pytest.raises(MethodError, match="padding between the tokens"):
            logits(model, ids(2, count), attention_mask=more, cache=copy.deepcopy(cache), use_cache=True)
    # nothing of a refused pass is left behind
    torch.testing.assert_close(logits(model, text, attention_mask=torch.ones(2, 12)), logits(model, text))


def test_assisted_decoding_keeps_all_keys(model: Any) -> None:
    prompt = ids(1, 20)
    plain = model.generate(prompt, max_new_tokens=12, do_sample=False)
    assistant = apply_lm_infinite(llama(layers=2), L, G)
    assert torch.equal(model.generate(prompt, max_new_tokens=12, do_sample=False, assistant_model=assistant), plain)
    assert torch.equal(model.generate(prompt, max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=3), plain)


def test_a_prompt_read_in_chunks_by_generate(model: Any) -> None:
    prompt = ids(2, 30)
    plain = model.generate(prompt, max_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(prompt, max_new_tokens=8, do_sample=False, prefill_chunk_size=7), plain)


def test_embeddings_and_positional_arguments_are_inputs_too(model: Any) -> None:
    text = ids(2, 15)
    with torch.no_grad():
        expected = model(text).logits
        embeds = model.get_input_embeddings()(text)
        assert torch.equal(model(inputs_embeds=embeds).logits, expected)
        hidden = model.model(text, torch.ones(2, 15)).last_hidden_state
        assert torch.equal(model.lm_head(hidden), expected)
    out = model.generate(inputs_embeds=embeds, max_new_tokens=5, do_sample=False)
    assert torch.equal(out, model.generate(text, max_new_tokens=5, do_sample=False)[:, 15:])
