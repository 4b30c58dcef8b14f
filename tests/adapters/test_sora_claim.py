"""SoRA's claims at a size that takes seconds: no arm changes another, and what is pruned computes the same."""

from __future__ import annotations

import pytest

from gnomon.claims import adaptation, sora


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(adaptation.SIZES, "tiny", {"hidden_size": 16, "num_layers": 1, "pretrain": 3})
    monkeypatch.setitem(sora._STEPS, "tiny", 4)
    yield
    adaptation.pretrained.cache_clear()
    sora.adapt.cache_clear()


def test_an_arm_changes_no_other_and_pruning_changes_nothing() -> None:
    arms = sora.trade_off.arms
    first = {arm: sora.trade_off.measure(arm, 0, "tiny") for arm in arms}
    again = {arm: sora.trade_off.measure(arm, 0, "tiny") for arm in reversed(arms)}
    assert first == again
    assert len({round(value, 6) for value in first.values()}) >= len(arms) - 1
    (pruned,) = (arm for arm in arms if arm.startswith("pruned"))
    assert first[pruned] == pytest.approx(first["xi-6e-3"], rel=1e-6)


def test_ranks_are_counted_over_the_modules() -> None:
    found = {arm: sora.uneven_ranks.measure(arm, 0, "tiny") for arm in sora.uneven_ranks.arms}
    assert 0 <= found["least"] <= found["greatest"] <= 8
    assert all(0 < value <= 100 for arm, value in found.items() if arm.startswith("kept"))
