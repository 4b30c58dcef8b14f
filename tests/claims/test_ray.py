"""Claims measured by Ray workers give the numbers that this process gives."""

from __future__ import annotations

import json
import sys

import pytest

from gnomon import catalog
from gnomon.catalog import Card, ClaimCard, Paper
from gnomon.claims import ledger

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ray")]

MODULE = """
import numpy as np
from gnomon.claims.experiment import experiment

@experiment(arms=("a", "b"), relation="a < b", unit="loss")
def first(arm, seed, scale):
    return {"a": 1.0, "b": 2.0}[arm] + np.random.default_rng(seed).normal(scale=0.1)

@experiment(arms=("a", "b"), relation="a > b", unit="loss", seeds=(3, 4, 5))
def second(arm, seed, scale):
    return first(arm, seed)
"""


def test_two_workers_and_this_process_agree(tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    (tmp_path / "ray_claims.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    claims = tuple(ClaimCard(name, "says", "none", f"ray_claims:{name}") for name in ("first", "second"))
    cards = {"x": Card("x", "X", "test", "nn", "architecture", "ray_claims:first", Paper("none"), claims)}
    monkeypatch.setattr(catalog, "_all", lambda: cards)
    where = {"env_vars": {"PYTHONPATH": str(tmp_path)}}
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=where)
    try:
        there = ledger.run_claims(["x"], ledger=tmp_path / "ray.json", engine="ray")
    finally:
        ray.shutdown()
        sys.modules.pop("ray_claims", None)
    here = ledger.run_claims(["x"])
    by_id = {entry["id"]: entry for entry in there}
    assert set(by_id) == {"first", "second"}
    for entry in here:
        other = by_id[entry["id"]]
        assert other["engine"] == "ray"
        assert (entry["arms"], entry["relations"]) == (other["arms"], other["relations"])
        assert (entry["verdict"], entry["engine"]) == (other["verdict"], "local")
    kept = json.loads((tmp_path / "ray.json").read_text())["entries"]
    assert kept == sorted(there, key=lambda e: e["id"])
