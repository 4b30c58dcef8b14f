"""The data behind PRESTO's claims and one small measurement."""

from __future__ import annotations

import numpy as np
import pytest

from gnomon.claims.presto import draw, errors, rare_probability, rarity


def test_the_design_is_the_papers():
    state = np.random.get_state()[1].copy()  # noqa: NPY002 - the legacy state is what is watched
    sample = draw(0, (0.0, 3.0, 5.0))
    assert sample.X.shape == (2500, 10)
    assert np.abs(sample.X).max() <= 1
    assert sample.rare.mean() == pytest.approx(0.01, abs=0.006)
    assert np.bincount(sample.y).min() >= 5
    again, other = draw(0, (0.0, 3.0, 5.0)), draw(1, (0.0, 3.0, 5.0))
    assert np.array_equal(again.y, sample.y)
    assert not np.array_equal(other.X, sample.X)
    assert draw(0, (0.0, 4.0, 6.0)).rare.mean() < sample.rare.mean()
    assert np.array_equal(np.random.get_state()[1], state)  # noqa: NPY002


@pytest.mark.slow
def test_one_seed_of_every_arm():
    found = errors(4, "common")
    assert found["best-on-path"] <= found["presto"] < 0.5 * found["logistic"]
    assert all(1e-6 < value < 1e-3 for value in found.values())
    assert rare_probability("presto", 4) == found["presto"]
    assert rarity("common", 4) == found["presto"] / found["logistic"]
    assert len(rare_probability.seeds) == 12
