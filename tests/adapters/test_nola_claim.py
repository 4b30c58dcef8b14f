"""NOLA's claims at a size that takes seconds: what is trained, on what, and that no arm changes another."""

from __future__ import annotations

import pytest

from gnomon.claims import nola

TINY = {"hidden_size": 16, "num_layers": 1, "bases": 8, "pretrain": 3, "adapt": 3}


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(nola._SIZES, "tiny", dict(TINY))
    yield
    nola.adapt.cache_clear()
    nola.pretrain.cache_clear()


def test_nola_trains_fewer_numbers_than_a_lora_of_rank_one() -> None:
    size = nola._SIZES["small"]
    monkey = {**TINY, "hidden_size": size["hidden_size"], "num_layers": size["num_layers"], "bases": size["bases"]}
    nola._SIZES["tiny"].update(monkey)
    counts = {method: nola.adapt(method, "names", 0, "tiny").get_nb_trainable_parameters()[0] for method in nola._LR}
    assert counts == {"nola": 1792, "lora": 2464}


def test_an_arm_changes_no_other() -> None:
    first = nola.fewer_than_rank_one.measure("nola", 0, "tiny")
    assert nola.few_bits.measure("float32", 0, "tiny") == first
    assert nola.few_bits.measure("2-bits", 0, "tiny") != first
    assert nola.few_bits.measure("float32", 0, "tiny") == first
    assert nola.fewer_than_rank_one.measure("nola", 0, "tiny") == first


@pytest.mark.parametrize("text", ["names", "source"])
def test_no_row_stands_in_both_parts(text: str) -> None:
    train, valid = nola._rows(text, "train"), nola._rows(text, "valid")
    assert len(valid) == 1024
    assert len(train) > 2 * len(valid)
    seen = {tuple(row) for row in train.tolist()}
    assert sum(tuple(row) in seen for row in valid.tolist()) < 5
