"""NOLA's claims at a size that takes seconds: what is trained, on what, and that no arm changes another."""

from __future__ import annotations

import pytest

from gnomon.claims import adaptation, nola

TINY = {"hidden_size": 16, "num_layers": 1, "pretrain": 3}


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(adaptation.SIZES, "tiny", dict(TINY))
    monkeypatch.setitem(nola._BASES, "tiny", 8)
    monkeypatch.setitem(nola._STEPS, "tiny", 3)
    yield
    nola.adapt.cache_clear()
    adaptation.pretrained.cache_clear()


def test_nola_trains_fewer_numbers_than_a_lora_of_rank_one(monkeypatch: pytest.MonkeyPatch) -> None:
    small = adaptation.SIZES["small"]
    monkeypatch.setitem(adaptation.SIZES, "tiny", {**small, "pretrain": 3})
    monkeypatch.setitem(nola._BASES, "tiny", nola._BASES["small"])
    counts = {method: nola.adapt(method, "names", 0, "tiny").get_nb_trainable_parameters()[0] for method in nola._LR}
    assert counts == {"nola": 1792, "lora": 2464}


def test_an_arm_changes_no_other() -> None:
    first = nola.fewer_than_rank_one.measure("nola", 0, "tiny")
    assert nola.few_bits.measure("float32", 0, "tiny") == first
    assert nola.few_bits.measure("2-bits", 0, "tiny") != first
    assert nola.few_bits.measure("float32", 0, "tiny") == first
    assert nola.fewer_than_rank_one.measure("nola", 0, "tiny") == first
