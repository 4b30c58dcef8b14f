"""Numbers and findings in plain words."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gnomon.reports import words
from gnomon.reports.reading import Effect, MethodUse, read_run

from .sample import arm, run_json, write_run


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"), (0.0, "0"), (13.0249, "13.02"), (1.0, "1.000"), (0.5, "0.500"), (123.45, "123.5"),
        (51234.4, "51,234"), (0.000123, "1.23e-4"), (-0.42, "−0.420"), (-0.000123, "−1.23e-4"), (2.5e9, "2.50e9"),
        (math.nan, "not finite"), (math.inf, "not finite"),
    ],
)  # fmt: skip
def test_figure(value: float | None, text: str) -> None:
    assert words.figure(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"), (0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (999_499, "999 kB"), (999_600, "1.00 MB"),
        (12_607_488, "12.6 MB"), (1.4e10, "14.0 GB"), (9.996e6, "10.0 MB"), (math.nan, "not finite"),
        (1e300, "1.00e300 B"),
    ],
)  # fmt: skip
def test_bytes(value: float | None, text: str) -> None:
    assert words.bytes_(value).replace("\u00a0", " ") == text


@pytest.mark.parametrize(
    ("value", "text"), [(None, "–"), (12, "12"), (99_999, "99,999"), (3_151_872, "3.15 M"), (7e9, "7.00 B"), (-5, "-5")]
)
def test_count(value: float | None, text: str) -> None:
    assert words.count(value).replace("\u00a0", " ") == text


def test_small_writers() -> None:
    assert words.signed(0.5) == "+0.500"
    assert words.signed(-0.5) == "−0.500"
    assert words.signed(0.0) == "0"
    assert words.between(1.0, None) == ""
    assert words.between(-1.0, 2.0, sign=True) == "−1.000 to +2.000"
    assert words.share(1, 3).replace("\u00a0", " ") == "33 %"
    assert words.share(1, 0) == "" == words.share(None, 2)
    assert words.seconds_(3.44).replace("\u00a0", " ") == "3.4 s"
    assert words.seconds_(125).replace("\u00a0", " ") == "2 min 05 s"
    assert [words.listing(items) for items in ([], ["a"], ["a", "b"], "abc")] == ["", "a", "a and b", "a, b and c"]
    assert words.metric_name("matrix-nuclear-norm.mnn") == "matrix nuclear norm: mnn"
    assert words.metric_parts("matrix-nuclear-norm.mnn_iso") == ("mnn iso", "matrix nuclear norm")
    assert words.metric_parts("perplexity") == ("perplexity", "")
    assert words.options_of(MethodUse("fira", {"rank": 32, "alpha": 1.0})) == "rank 32, alpha 1.0"
    assert words.moment("2025-03-14T09:26:53+00:00") == "2025-03-14 09:26 UTC"
    assert words.moment("2025-03-14T09:26:53") == "2025-03-14 09:26"
    assert words.moment("2025-03-14T09:26:53+02:00") == "2025-03-14 09:26 +0200"
    assert words.moment("yesterday") == "yesterday"


def effect(metric: str = "perplexity", difference: float | None = -0.4, **more: Any) -> Effect:
    span = {"low": -0.6, "high": -0.2} | more
    return Effect("fira", 0, metric, 13.1, 13.5, difference, span["low"], span["high"], "seeds", 3)


@pytest.mark.parametrize(
    ("given", "reading"),
    [
        (effect(), "helps"),
        (effect(difference=0.4, low=0.2, high=0.6), "hurts"),
        (effect("accuracy", 0.4, low=0.2, high=0.6), "helps"),
        (effect("task.accuracy"), "hurts"),
        (effect("valid_loss"), "helps"),
        (effect("matrix-nuclear-norm.mnn"), "lowers it"),
        (effect("mnn", 0.4, low=0.2, high=0.6), "raises it"),
        (effect(low=-0.9, high=0.1), "within the spread"),
        (effect(high=0.0), "within the spread"),
        (effect(difference=0.0, low=0.0, high=0.0), "no difference"),
        (effect(low=None), "no spread measured"),
        (effect(high=math.nan), "no spread measured"),
        (effect(difference=None), "not measured"),
        (effect(difference=math.nan), "not measured"),
    ],
)
def test_what_a_difference_means(given: Effect, reading: str) -> None:
    assert words.reading_of(given) == reading


def test_effect_sentences() -> None:
    assert words.effect_sentence(effect()) == "fira lowered perplexity by 0.400 (0.200 to 0.600)."
    assert words.effect_sentence(effect(low=-0.9, high=0.1)) == (
        "fira: a difference of −0.400 in perplexity is within the spread (−0.900 to +0.100)."
    )
    assert "so this may be chance" in words.effect_sentence(effect(low=None))
    assert words.effect_sentence(effect(difference=None)) == "fira: its effect on perplexity was not measured."
    assert words.effect_sentence(effect(difference=0.0, low=0.0, high=0.0)) == "fira made no difference in perplexity."
    assert "raised perplexity by 0.400" in words.effect_sentence(effect(difference=0.4, low=0.2, high=0.6))


def test_the_headline_of_a_finished_run(tmp_path: Path) -> None:
    raw = run_json((0,))
    stages = raw["arms"][0]["stages"]
    for stage, value in zip(stages, (12.4, 13.1, 13.2), strict=True):
        stage["metrics"]["perplexity"] = {"value": value, "low": value - 0.5, "high": value + 0.5}
    did, outcome = words.headline(read_run(write_run(tmp_path, raw)))
    assert did.replace("\u00a0", " ") == (
        "This run took a llama model (3.15 M parameters), trained it on 300 k tokens of python-docs with "
        "layernorm-scaling and fira, compressed it with dsnot and eora, and evaluated it."
    )
    assert outcome.replace("\u00a0", " ") == (
        "It ends at perplexity 13.20 (12.70 to 13.70) in 7.22 MB; after training it stood at 12.40 in 12.6 MB."
    )


def test_the_headline_tells_the_tokens_of_the_recipe_not_of_the_data(tmp_path: Path) -> None:
    raw = run_json((0,))
    for recipe in ({}, {"stages": "x"}, {"stages": [1, {"train": 2}, {"train": {"tokens": "many"}}]}):
        raw["recipe"] = recipe
        assert "trained it on python-docs with" in words.headline(read_run(write_run(tmp_path, raw)))[0]


def test_the_headline_averages_over_seeds(tmp_path: Path) -> None:
    raw = run_json((0,)) | {"arms": [arm(seed=0), arm(seed=1)]}
    for entry, value in zip(raw["arms"], (13.0, 14.0), strict=True):
        entry["stages"][-1]["metrics"]["perplexity"]["value"] = value
    assert "perplexity 13.50 (13.00 to 14.00)" in words.headline(read_run(write_run(tmp_path, raw)))[1]


@pytest.mark.parametrize(
    ("status", "end"),
    [
        ("running", "It was still running when this page was written."),
        ("failed", "It failed before its end."),
        ("interrupted", "It was interrupted; the same command resumes it."),
        ("finished", "no stage is finished yet."),
    ],
)
def test_the_headline_of_an_unfinished_run(tmp_path: Path, status: str, end: str) -> None:
    run = read_run(write_run(tmp_path, {"format": 1, "status": status, "model": {"family": "olmo2"}}))
    did, outcome = words.headline(run)
    assert did.startswith("This run took an olmo2 model; no stage is finished yet.")
    assert did.endswith(end)
    assert outcome == ""


def test_a_run_without_perplexity_speaks_of_its_first_metric(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path, run_json((0,))))
    stages = tuple(replace(s, metrics={"accuracy": s.metrics["perplexity"]}) for s in run.arms[0].stages)
    run = replace(run, arms=(replace(run.arms[0], stages=stages),))
    assert words.headline(run)[1].startswith("It ends at accuracy 13.")
