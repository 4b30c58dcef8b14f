"""Relations are read, verdicts are computed from the numbers alone, the ledger keeps them."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gnomon import catalog
from gnomon.catalog import Card, ClaimCard, Paper
from gnomon.claims import ledger
from gnomon.claims.experiment import VERDICTS, Relation, experiment, judge, worst
from gnomon.errors import ConfigError, DataError


def _values(a, b):
    return {"a": dict(enumerate(a)), "b": dict(enumerate(b))}


@pytest.mark.parametrize(
    ("text", "sign", "factor", "margin"),
    [
        ("a < b", 1, 1.0, 0.0),
        ("  a  >  b ", -1, 1.0, 0.0),
        ("a < b by 0.12", 1, 1.0, 0.12),
        ("a < 0.75 * b", 1, 0.75, 0.0),
        ("a > 2*b by 1e-3", -1, 2.0, 1e-3),
    ],
)
def test_relations_are_read(text, sign, factor, margin):
    found = Relation.parse(text)
    assert (found.left, found.right, found.sign, found.factor, found.margin) == ("a", "b", sign, factor, margin)


@pytest.mark.parametrize("text", ["", "a", "a = b", "a < ", "a < b < c", "a < b by", "a < x * b"])
def test_what_is_no_relation_is_refused(text):
    with pytest.raises(ConfigError, match="is no relation"):
        Relation.parse(text)


@pytest.mark.parametrize(
    ("text", "a", "b", "verdict"),
    [
        ("a < b by 0.5", [1.0, 1.1, 0.9], [2.0, 2.1, 1.9], "reproduced"),
        ("a < b by 1.5", [1.0, 1.1, 0.9], [2.0, 2.1, 1.9], "same direction"),
        ("a < b", [1.0, 3.0, 2.0], [2.0, 2.0, 2.1], "not visible at this scale"),
        ("a < b", [2.0, 2.1, 1.9], [1.0, 1.1, 0.9], "contradicted"),
        ("a > b by 0.5", [2.0, 2.1, 1.9], [1.0, 1.1, 0.9], "reproduced"),
        ("a < 0.75 * b", [1.0, 1.0, 1.0], [1.5, 1.5, 1.5], "reproduced"),
        ("a < 0.5 * b", [1.0, 1.0, 1.0], [1.5, 1.5, 1.5], "same direction"),
        ("a < b", [1.0, 1.0, 1.0], [1.0, 1.0, 1.0], "not visible at this scale"),
    ],
)
def test_the_verdict_follows_from_the_numbers(text, a, b, verdict):
    assert judge(Relation.parse(text), _values(a, b)).verdict == verdict


numbers = st.lists(st.floats(-10, 10, allow_nan=False), min_size=3, max_size=6)


@given(numbers, st.floats(0, 5))
def test_swapping_the_arms_never_keeps_a_clear_verdict(gaps, margin):
    zeros = [0.0] * len(gaps)
    there = judge(Relation.parse(f"a < b by {margin:.4f}"), _values(zeros, gaps)).verdict
    back = judge(Relation.parse(f"b < a by {margin:.4f}"), _values(zeros, gaps)).verdict
    if there in VERDICTS[:2]:
        assert back == "contradicted"


@given(numbers)
def test_the_interval_contains_the_mean_and_stays_in_the_range(gaps):
    found = judge(Relation.parse("a < b"), _values([0.0] * len(gaps), gaps))
    slack = 1e-9
    assert min(gaps) - slack <= found.low <= found.gap + slack
    assert found.gap - slack <= found.high <= max(gaps) + slack


def test_pairs_are_by_seed_not_by_position():
    values = {"a": {0: 1.0, 1: 11.0, 2: 21.0}, "b": {2: 22.0, 1: 12.0, 0: 2.0}}
    assert judge(Relation.parse("a < b by 0.9"), values).verdict == "reproduced"


def test_too_few_seeds_and_values_that_are_no_numbers_are_refused():
    with pytest.raises(ConfigError, match="2 seeds; a verdict needs at least 3"):
        judge(Relation.parse("a < b"), _values([1, 2], [2, 3]))
    with pytest.raises(ConfigError, match="not finite"):
        judge(Relation.parse("a < b"), _values([1, 2, np.nan], [2, 3, 4]))
    with pytest.raises(ConfigError, match="at least three different seeds"):
        experiment(arms=("a", "b"), relation="a < b", unit="x", seeds=(0, 0, 1))
    with pytest.raises(ConfigError, match="names 'c', which is no arm"):
        experiment(arms=("a", "b"), relation="a < c", unit="x")


def test_worst_is_the_furthest_from_reproduced():
    assert worst(["reproduced", "contradicted", "same direction"]) == "contradicted"
    assert worst(["reproduced", "same direction"]) == "same direction"


@experiment(arms=("a", "b"), relation=("a < b by 0.5", "a < b by 5"), unit="apples", paper={"a": 1.5})
def trial(arm, seed, scale):
    """A claim for the tests."""
    return {"a": 1.0, "b": 2.0}[arm] + 0.01 * seed


CLAIM = ClaimCard("c", "a is less", "1.5", "x:y")
CARD = Card("x", "X", "do x", "optim", "optimizer", "math:sqrt", Paper("X"), (CLAIM,))


@pytest.fixture
def one_method(monkeypatch):
    monkeypatch.setattr(catalog, "_all", lambda: {"x": CARD})
    monkeypatch.setattr(catalog, "resolve", lambda target: trial)


def test_an_experiment_checks_arm_and_scale():
    assert trial("b", 1) == pytest.approx(2.01)
    with pytest.raises(ConfigError, match="no arm 'z'; arms: a, b"):
        trial("z", 0)
    with pytest.raises(ConfigError, match="no scale 'huge'"):
        trial("a", 0, "huge")


def test_the_ledger_keeps_one_entry_per_claim_and_scale(one_method, tmp_path):
    book = tmp_path / "claims" / "ledger.json"
    (entry,) = ledger.run_claims(["x"], ledger=book)
    ledger.run_claims(["x"], ledger=book)
    ledger.run_claims(["x"], scale="medium", ledger=book)
    found = ledger.read_ledger(book)["entries"]
    assert [e["scale"] for e in found] == ["medium", "small"]
    assert entry["arms"] == {"a": {"0": 1.0, "1": 1.01, "2": 1.02}, "b": {"0": 2.0, "1": 2.01, "2": 2.02}}
    assert [r["verdict"] for r in entry["relations"]] == ["reproduced", "same direction"]
    assert entry["verdict"] == "same direction"
    assert (entry["paper_figure"], entry["paper"], entry["unit"]) == ("1.5", {"a": 1.5}, "apples")
    json.dumps(entry)


def test_unknown_claims_and_broken_ledgers_are_refused(one_method, tmp_path):
    with pytest.raises(ConfigError, match="x has no claim 'd'"):
        ledger.run_claims(["x"], only="d")
    with pytest.raises(ConfigError, match="at least three"):
        ledger.run_claims(["x"], seeds=[0, 1])
    broken = tmp_path / "ledger.json"
    broken.write_text("{")
    with pytest.raises(DataError, match="no valid JSON"):
        ledger.read_ledger(broken)
    broken.write_text('{"format": 9}')
    with pytest.raises(DataError, match="format 1"):
        ledger.read_ledger(broken)


def test_a_claim_that_is_no_experiment_is_refused(monkeypatch):
    monkeypatch.setattr(catalog, "resolve", lambda target: len)
    with pytest.raises(ConfigError, match="is no experiment"):
        ledger.run_claim(CARD, CARD.claims[0])


def test_among_all_claims_one_without_its_data_is_passed_over(monkeypatch, tmp_path):
    """Asked for by name it is a mistake."""

    @experiment(arms=("a", "b"), relation="a < b", unit="loss")
    def measured(arm, seed, scale):
        return {"a": 1.0, "b": 2.0}[arm]

    @experiment(arms=("a", "b"), relation="a < b", unit="loss")
    def without_data(arm, seed, scale):
        raise DataError("no table. Set GNOMON_SHARED_DATA.")

    found = {"m:measured": measured, "m:without_data": without_data}
    claims = tuple(ClaimCard(name, "says", "none", f"m:{name}") for name in ("without_data", "measured"))
    cards = {"x": Card("x", "X", "test", "nn", "architecture", "m:e", Paper("none"), claims)}
    monkeypatch.setattr(catalog, "_all", lambda: cards)
    monkeypatch.setattr(catalog, "resolve", found.__getitem__)
    entries = ledger.run_claims(ledger=tmp_path / "ledger.json")
    assert [entry["id"] for entry in entries] == ["measured"]
    with pytest.raises(DataError, match="Set GNOMON_SHARED_DATA"):
        ledger.run_claims(["x"])
