"""The claims on the authors' tables: what a seed is, the measured numbers, and how to get the tables."""

from __future__ import annotations

import numpy as np
import pytest

from gnomon.claims.experiment import judge
from gnomon.claims.step_law import experts_all_count, groups_of_seed, loss_is_a_bowl, near_the_best_run, within_a_hair
from gnomon.errors import DataError


@pytest.fixture
def tables(shared_data, monkeypatch):
    monkeypatch.setenv("GNOMON_SHARED_DATA", str(shared_data("step-law").parent))


@pytest.mark.parametrize("groups", [11, 12])
def test_three_seeds_are_disjoint_thirds(groups):
    for shuffle in (0, 3):
        out = [set(groups_of_seed(groups, shuffle + i)) for i in range(3)]
        assert set.union(*out) == set(range(groups))
        assert sum(map(len, out)) == groups
    assert groups_of_seed(groups, 0) != groups_of_seed(groups, 3)


@pytest.mark.parametrize("claim", [near_the_best_run, experts_all_count, loss_is_a_bowl])
def test_the_relations_hold_for_every_seed(tables, claim):
    values = {arm: {seed: claim(arm, seed) for seed in range(6)} for arm in claim.arms}
    for relation in claim.relations:
        assert (relation.gaps(values) > 0).all(), relation.text
        assert judge(relation, values).verdict == "reproduced"


def test_the_mean_over_seeds_is_the_mean_over_groups(tables):
    mean = np.mean([near_the_best_run("step-law", seed) for seed in range(3)])
    assert mean == pytest.approx(0.943, abs=1e-3)
    assert mean < 1.5
    assert np.mean([near_the_best_run("deepseek", seed) for seed in range(3)]) > 4 * mean
    assert within_a_hair("step-law", 1) == near_the_best_run("step-law", 1)


@pytest.mark.parametrize("root", [None, "/no/such/folder"])
def test_without_the_tables_the_message_says_how_to_get_them(monkeypatch, root):
    monkeypatch.delenv("GNOMON_SHARED_DATA", raising=False)
    if root:
        monkeypatch.setenv("GNOMON_SHARED_DATA", root)
    with pytest.raises(DataError, match=r"step-law/dense_lr_bs_loss.csv.gz below.*set the environment variable"):
        loss_is_a_bowl("smallest-curvature", 0)
