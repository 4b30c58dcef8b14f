"""The claims' own machinery: data found or missed with a word on how to set it, training that repeats itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from gnomon import catalog
from gnomon.claims import checkpoint_averaging as claims
from gnomon.errors import DataError


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    for cached in (claims._captions, claims._pool, claims._runs):
        cached.cache_clear()
    yield
    for cached in (claims._captions, claims._pool, claims._runs):
        cached.cache_clear()


def test_missing_data_says_how_to_set_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("GNOMON_SHARED_DATA", raising=False)
    with pytest.raises(DataError, match="Set the environment variable GNOMON_SHARED_DATA"):
        claims.robustness("ca_std", 0)
    monkeypatch.setenv("GNOMON_SHARED_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"captions_train.jsonl.gz: this file of captions is missing"):
        claims.collapse("own_starts", 0)


def test_a_short_run_repeats_itself_and_leaves_global_randomness_alone(
    monkeypatch: pytest.MonkeyPatch, shared_data: Callable[[str], Path]
) -> None:
    monkeypatch.setenv("GNOMON_SHARED_DATA", str(shared_data("checkpoint-averaging").parent))
    shared_data("vega-mt")
    monkeypatch.setattr(claims, "_EPOCHS", 2)
    before = torch.random.get_rng_state()
    results = []
    for _ in range(2):
        model, taken = claims._Net(3, 3), []
        claims.train_captions(model, 3, lambda taken=taken: taken.append(1), rate=3e-3, rows=160)
        assert len(taken) == 2
        results.append(claims._scores(model))
    assert results[0] == results[1]
    assert results[0]["test"]["de"] > 30, "better than the 20 % of chance"
    assert torch.equal(before, torch.random.get_rng_state())
    train_ids = claims._captions()
    assert len(train_ids.rows) == 6300
    assert len(train_ids.answers["test"]) == 855


def test_the_card_names_experiments() -> None:
    for claim in catalog.get("checkpoint-averaging").claims:
        assert catalog.resolve(claim.run).seeds == (0, 1, 2)
