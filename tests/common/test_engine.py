"""The same results wherever independent work runs."""

from __future__ import annotations

import os
import sys
from functools import partial

import pytest

from gnomon.common.engine import run_all
from gnomon.errors import ConfigError, DataError

WORK = """
import os
from gnomon.errors import DataError

def scaled(by, x):
    return by * x, os.getpid()

def marks(x):
    import ray

    return ray.cluster_resources().get("mark")

def refuse(x):
    raise DataError(f"no {x}", file="rows.csv", row=x)
"""


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A module that workers can import."""
    (tmp_path / "engine_work.py").write_text(WORK)
    monkeypatch.syspath_prepend(tmp_path)
    import engine_work

    yield engine_work
    del sys.modules["engine_work"]


@pytest.fixture
def two_workers(tmp_path):
    ray = pytest.importorskip("ray")
    where = {"env_vars": {"PYTHONPATH": str(tmp_path)}}
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=where)
    yield ray
    ray.shutdown()


def test_local_results_come_in_order_and_are_told_one_by_one(work):
    told = []
    found = run_all(partial(work.scaled, 3), [1, 2, 3], on_result=lambda i, r: told.append((i, r[0])))
    assert [value for value, _ in found] == [3, 6, 9]
    assert told == [(0, 3), (1, 6), (2, 9)]
    assert {pid for _, pid in found} == {os.getpid()}
    assert run_all(abs, []) == []


def test_an_unknown_engine_is_refused():
    with pytest.raises(ConfigError, match=r"engine = 'rai'. Did you mean 'ray'\?"):
        run_all(abs, [1], engine="rai")


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_ray_gives_the_same_in_the_order_of_the_items_and_raises_what_the_work_raised(work, two_workers):
    told = {}
    found = run_all(partial(work.scaled, 3), list(range(8)), engine="ray", on_result=told.__setitem__)
    assert [value for value, _ in found] == [3 * i for i in range(8)]
    assert told == dict(enumerate(found))
    assert os.getpid() not in {pid for _, pid in found}
    with pytest.raises(DataError, match=r"rows.csv, row 7: no 7"):
        run_all(work.refuse, [7], engine="ray")
    assert two_workers.is_initialized(), "a cluster that was there before stays"


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_a_cluster_started_here_is_stopped():
    ray = pytest.importorskip("ray")
    assert run_all(abs, [-1, 2], engine="ray") == [1, 2]
    assert not ray.is_initialized()


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_the_cluster_at_ray_address_is_used_and_left_running(work, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "resources": {"mark": 3}})
    try:
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        assert run_all(work.marks, [0], engine="ray") == [3.0]
        assert not ray.is_initialized()
        assert run_all(work.marks, [0], engine="ray") == [3.0]
    finally:
        cluster.shutdown()


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_perplexity_of_a_corpus_is_the_same_on_two_workers(two_workers, monkeypatch):
    import numpy as np
    import torch

    from gnomon.common.models import tiny
    from gnomon.evals import perplexity as module_or_function
    from gnomon.evals.perplexity import perplexity

    assert module_or_function is perplexity
    monkeypatch.setattr(sys.modules["gnomon.evals.perplexity"], "BATCHES_PER_TASK", 2)
    model = tiny("llama", num_layers=2)
    tokens = torch.randint(1, 256, (1000,), generator=torch.Generator().manual_seed(0))
    seen = []
    here = perplexity(model, tokens, context=64, stride=32, batch_size=4)
    there = perplexity(
        model, tokens, context=64, stride=32, batch_size=4, engine="ray", on_progress=lambda *x: seen.append(x)
    )
    assert np.array_equal(here.window_nll, there.window_nll)
    assert (here.value, here.low, here.high) == (there.value, there.low, there.high)
    assert seen[-1] == (len(here.window_nll), len(here.window_nll))
    assert len(seen) == 4
