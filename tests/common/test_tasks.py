"""What tasks share: figures out of logs, answers that are missing, logs that are none."""

from __future__ import annotations

import math

import pytest
from inspect_ai import Task
from inspect_ai import eval as run_eval
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.scorer import Score, accuracy, metric, scorer
from inspect_ai.solver import generate

from gnomon.common.figures import Figure
from gnomon.common.tasks import failure_of, log_figures, mean_metrics, named_values, read_log, rescore, scripted_model
from gnomon.errors import ConfigError, DataError


@metric
def own_figures():
    def compute(scores: list) -> dict[str, float]:
        return named_values({"f1": Figure(0.5, 0.1, 0.3, 0.7), "recall": Figure(1.0, 0.0, 1.0, 1.0)})

    return compute


@scorer(metrics=[mean_metrics(["flag", "size"]), own_figures()])
def several():
    async def score(state, target):
        return Score(value={"flag": float(state.output.completion == "yes"), "size": 10.0 * int(state.sample_id)})

    return score


@scorer(metrics=[accuracy()])
def plain():
    async def score(state, target):
        return Score(value=1.0)

    return score


def task(scorer, n=4):
    samples = [Sample(id=str(i), input=f"question {i}", metadata={"cluster": str(i // 2)}) for i in range(n)]
    return Task(dataset=MemoryDataset(samples), solver=[generate()], scorer=scorer)


def run(task, folder, answer=lambda text: "yes" if "0" in text else "no"):
    return run_eval(task, model=scripted_model(answer), log_dir=str(folder), display="none")[0]


def test_figures_of_a_log(tmp_path):
    figures = log_figures(run(task(several()), tmp_path))
    assert figures["flag"].value == 0.25
    assert figures["flag"].low == 0.0, "a share stays within 0 and 1"
    assert figures["size"].high > 15.0 > figures["size"].low, "and a size does not"
    assert figures["f1"] == Figure(0.5, 0.1, 0.3, 0.7, 4)
    assert figures["recall"].value == 1.0
    assert set(figures) == {"flag", "size", "f1", "recall"}
    one = log_figures(run(task(several(), n=1), tmp_path))["flag"]
    assert (one.value, one.n) == (1.0, 1)
    assert math.isnan(one.low), "one sample has no interval"
    assert log_figures(run(task(plain()), tmp_path))["plain"].value == 1.0


def test_failures_and_logs_that_are_none(tmp_path):
    def broken(text):
        raise RuntimeError("the machine\nis on fire")

    log = run(task(plain()), tmp_path, broken)
    assert log.status == "error"
    assert "fire" in failure_of(log)
    good = run(task(plain()), tmp_path)
    assert failure_of(good) == ""
    with pytest.raises(DataError, match="there is no such log"):
        read_log(tmp_path / "no.eval")
    (tmp_path / "x.eval").write_text("no log")
    with pytest.raises(DataError, match=r"x.eval: this is no log of Inspect"):
        read_log(tmp_path / "x.eval")
    good.samples = []
    with pytest.raises(DataError, match="holds no samples"):
        rescore(good, plain())


def test_a_log_cannot_be_read_without_inspect(tmp_path, monkeypatch):
    monkeypatch.setattr("gnomon.common.tasks.inspect_installed", lambda: False)
    with pytest.raises(ConfigError, match="inspect-ai is not installed"):
        read_log(tmp_path / "x.eval")
