"""The loss by position, on a real novel and by hand; the claim's pieces; a recipe."""

from __future__ import annotations

import gzip
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from gnomon import catalog
from gnomon.claims import lm_infinite as claim
from gnomon.common.models import tiny
from gnomon.common.text import byte_tokenizer
from gnomon.context import apply_lm_infinite, evaluate_nll_by_position, using_lm_infinite
from gnomon.errors import DataError, MethodError, ModelError
from gnomon.recipes import Recipe

sys.path.insert(0, str(Path(__file__).parent))
from lm_infinite_models import ids, llama, logits


def by_hand(model: Any, rows: Tensor) -> np.ndarray[Any, Any]:
    scores = logits(model, rows)[:, :-1]
    losses = cross_entropy(scores.flatten(0, 1), rows[:, 1:].flatten(), reduction="none").view(len(rows), -1)
    return losses.double().mean(0).numpy()


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("applied", [False, True])
def test_pieces_give_the_losses_of_the_whole(chunk: int, applied: bool) -> None:
    model = llama(layers=2)
    if applied:
        apply_lm_infinite(model, 6, 3)
    model.train()
    rows = ids(5, 25)
    found = evaluate_nll_by_position(model, rows, length=23, edges=(1, 6, 20), batch_size=2, chunk=chunk)
    assert model.training
    expected = by_hand(model.eval(), rows[:, :23])
    np.testing.assert_allclose(found.by_position[1:], expected, atol=1e-5)
    assert np.isnan(found.by_position[0])
    np.testing.assert_allclose(found.nll, [expected[:5].mean(), expected[5:19].mean()], atol=1e-5)
    assert (found.edges, found.texts) == ((1, 6, 20), 5)


def test_a_stream_a_text_and_the_default_bins() -> None:
    model = tiny("llama", vocab_size=257, num_layers=1).eval()
    tokenizer = byte_tokenizer()
    text = "the shadow of the upright tells the hour; " * 4
    told: list[tuple[int, int]] = []
    found = evaluate_nll_by_position(
        model, text, tokenizer, length=40, max_texts=3, batch_size=2, on_progress=lambda *a: told.append(a)
    )
    stream = torch.tensor(tokenizer(text)["input_ids"])
    again = evaluate_nll_by_position(model, stream, length=40, max_texts=3)
    np.testing.assert_allclose(found.nll, again.nll, rtol=1e-6)
    assert found.edges == (1, 2, 4, 8, 16, 32, 40)
    assert told == [(2, 3), (3, 3)]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"length": 1}, MethodError, "length = 1: allowed is a whole number from 2"),
        ({"length": 20, "batch_size": 0}, MethodError, "batch_size = 0"),
        ({"length": 20, "edges": (1, 5, 5)}, MethodError, r"edges = \(1, 5, 5\)"),
        ({"length": 20, "edges": (0, 5)}, MethodError, r"positions from 1 to length = 20"),
        ({"length": 31}, DataError, "the text has 30 tokens, length = 31"),
        ({"length": 4, "text": "abc"}, MethodError, "tokenizer is missing"),
        ({"length": 4, "text": torch.rand(9)}, MethodError, "torch.float32 tensor"),
    ],
)
def test_what_it_refuses(options: dict[str, Any], error: type[Exception], message: str) -> None:
    model, text = llama(layers=1), options.pop("text", ids())
    with pytest.raises(error, match=message):
        evaluate_nll_by_position(model, text, **options)


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(ModelError, match="no language-model head"):
        evaluate_nll_by_position(llama(layers=1).model, ids(), length=20)


def test_a_novel_is_read_past_the_training_length(shared_data: Callable[[str], Path]) -> None:
    """A few hundred steps on windows of 48 characters: flat to 384 with both parts, not with the mask alone."""
    with gzip.open(shared_data("lm-infinite") / "war_and_peace_books1-10.txt.gz", "rt", encoding="utf-8") as file:
        text = file.read()
    vocabulary = {c: i for i, c in enumerate(sorted(set(text)))}
    tokens = torch.tensor([vocabulary[c] for c in text])
    train, held_out = tokens[:-100_000], tokens[-100_000:]
    model = tiny("llama", vocab_size=len(vocabulary), num_layers=2, max_positions=48)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(250):
        starts = torch.randint(0, len(train) - 48, (24,), generator=generator)
        batch = train[starts[:, None] + torch.arange(48)]
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    edges, options = (48, 96, 192, 384), {"length": 384, "max_texts": 48, "batch_size": 48}
    inside = evaluate_nll_by_position(model, held_out[: 384 * 48], length=48, max_texts=384, edges=(24, 48)).nll[0]
    vanilla = evaluate_nll_by_position(model, held_out, edges=edges, **options).nll
    with using_lm_infinite(model) as extended:
        flat = evaluate_nll_by_position(extended, held_out, edges=edges, **options).nll
    with using_lm_infinite(model, sink_distance="true") as masked:
        mask_only = evaluate_nll_by_position(masked, held_out, edges=edges, **options).nll
    assert float(np.abs(flat - inside).max()) < 0.1
    assert vanilla[-1] > inside + 0.3
    assert mask_only.mean() > flat.mean() + 0.05


def test_the_card_names_what_the_claims_measure() -> None:
    card = catalog.get("lm-infinite")
    assert [c.id for c in card.claims] == ["beyond-length", "mask-and-ceiling"]
    assert card.recipe["stages"] == ["extend"]
    for found in card.claims:
        experiment = catalog.resolve(found.run)
        assert set(experiment.seeds) == {0, 1, 2}
        assert "lm_infinite" in experiment.arms


def test_the_claims_arms_differ_in_the_method_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(claim._SIZES, "small", {"hidden": 16, "layers": 1, "length": 12, "steps": 5, "texts": 3})
    claim._trained.cache_clear()
    claim.nll_by_position.cache_clear()
    try:
        curves = {arm: claim.nll_by_position(arm, 0) for arm in ("vanilla", *claim._ARMS)}
        for curve in curves.values():
            assert curve.shape == (16 * 12,)
            np.testing.assert_allclose(curve[1:12], curves["vanilla"][1:12], atol=1e-6)
        assert claim.nll_by_position("inside", 0).shape == (12,)
        assert claim.beyond_length.measure("lm_infinite", 0, "small") == pytest.approx(
            curves["lm_infinite"][12:].mean()
        )
    finally:
        claim._trained.cache_clear()
        claim.nll_by_position.cache_clear()


def test_a_recipe_may_name_it_where_models_are_extended() -> None:
    recipe = Recipe.model_validate(
        {
            "name": "long",
            "model": {"architecture": "llama", "size": "tiny"},
            "data": {"corpus": "python-docs"},
            "stages": [{"extend": {"methods": [{"uses": "lm-infinite", "with": {"local": 64, "sinks": 4}}]}}],
        }
    )
    assert recipe.stages
