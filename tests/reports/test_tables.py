"""Rows of the stage tables: means over seeds, which metrics get a column."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from gnomon.reports.reading import Measured, Run, read_run
from gnomon.reports.tables import arm_names, main_metric, metrics_of, rows_of, split_metrics

from .sample import run_json, write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return read_run(write_run(tmp_path_factory.mktemp("run")))


def with_metrics(run: Run, *several: dict[str, float]) -> Run:
    """A run of one arm whose stages have these metrics."""
    stage = run.arms[0].stages[0]
    stages = tuple(replace(stage, metrics={k: Measured(v) for k, v in found.items()}) for found in several)
    return replace(run, arms=(replace(run.arms[0], stages=stages),))


def test_a_row_is_the_mean_over_the_seeds_and_their_range(run: Run) -> None:
    rows = rows_of(run, "all")
    assert [row.title for row in rows] == ["train", "compress", "evaluate"]
    values = [arm.stages[1].metrics["perplexity"].value for arm in run.arms[:3]]
    found = rows[1].metrics["perplexity"]
    assert found.value == pytest.approx(sum(values) / 3)
    assert (found.low, found.high) == (min(values), max(values))
    seconds = [arm.stages[1].seconds or 0.0 for arm in run.arms[:3]]
    assert rows[1].seconds == pytest.approx(sum(seconds) / 3)
    assert rows[1].seeds == 3
    assert rows_of(run, "no such arm") == []


def test_one_seed_keeps_its_own_interval(run: Run) -> None:
    one = replace(run, arms=run.arms[:1])
    assert rows_of(one, "all")[0].metrics == run.arms[0].stages[0].metrics


def test_seeds_that_stopped_early_are_averaged_as_far_as_they_came(tmp_path: Path) -> None:
    raw = run_json((0, 1))
    raw["arms"] = raw["arms"][:2]
    raw["arms"][1]["stages"] = raw["arms"][1]["stages"][:1]
    raw["arms"][1]["stages"][0]["seconds"] = None
    rows = rows_of(read_run(write_run(tmp_path, raw)), "all")
    assert [row.seeds for row in rows] == [2, 1, 1]
    assert rows[0].seconds == raw["arms"][0]["stages"][0]["seconds"]


def test_a_stage_is_reused_only_if_every_seed_reused_it(run: Run) -> None:
    arms = [replace(arm, stages=(replace(arm.stages[0], skipped=i > 0),)) for i, arm in enumerate(run.arms[:3])]
    assert not rows_of(replace(run, arms=tuple(arms)), "all")[0].skipped
    assert rows_of(replace(run, arms=tuple(arms[1:])), "all")[0].skipped


def test_the_arm_with_everything_stands_first(run: Run) -> None:
    assert arm_names(replace(run, arms=run.arms[::-1]))[0] == "all"


def test_metrics_that_are_the_same_everywhere_get_no_column(run: Run) -> None:
    found = with_metrics(
        run,
        {"m.size": 64.0, "m.a": 1.0, "perplexity": 9.0, "m.b": 1.0, "m.c": 3.0},
        {"m.size": 64.0, "m.a": 1.5, "perplexity": 9.0, "m.b": 1.0, "m.c": 4.0},
    )
    assert metrics_of(found) == ["perplexity", "m.size", "m.a", "m.b", "m.c"]
    assert split_metrics(found) == (["perplexity", "m.a", "m.c"], ["m.size", "m.b"])
    assert split_metrics(found, limit=9) == (metrics_of(found), [])
    assert split_metrics(with_metrics(run, {})) == ([], [])


def test_the_main_metric(run: Run) -> None:
    assert main_metric(run) == "perplexity"
    assert main_metric(with_metrics(run, {"accuracy": 0.5, "x": 1.0})) == "accuracy"
    assert main_metric(with_metrics(run)) == "perplexity"
