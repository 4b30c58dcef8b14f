"""What every task owes, tested over all members the catalog finds; an exception is a line with its reason."""

from __future__ import annotations

import dataclasses
import inspect
import math
import random
import subprocess
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

inspect_ai = pytest.importorskip("inspect_ai")

from inspect_ai import eval as run_eval  # noqa: E402
from inspect_ai._util.registry import is_registry_object, registry_info  # noqa: E402
from inspect_ai.scorer._scorer import scorer_metrics  # noqa: E402

from gnomon import catalog  # noqa: E402
from gnomon.common.figures import mean_figure  # noqa: E402
from gnomon.common.tasks import CLUSTER, failure_of, log_figures, rescore, scripted_model  # noqa: E402
from gnomon.errors import GnomonError  # noqa: E402

SLUGS = [card.slug for card in catalog.methods(plugs="task")]


@dataclasses.dataclass(frozen=True)
class Case:
    """What the suite needs to know of a task: a little data, a right answer, a wrong one, answers that are none."""

    options: Callable[[Path], dict[str, Any]]  # writes data into a folder, returns the task's options
    right: Callable[[Any], str]  # the answer to a sample that scores 1
    wrong: Callable[[Any], str]
    figure: str  # of `log_figures`: 1 for right answers, 0 for wrong and for missing ones
    unreadable: tuple[str, ...] = ("I would rather not say.",)


def _medec_data(folder: Path) -> dict[str, Any]:
    head = "Text ID,Sentences,Error Flag,Error Type,Error Sentence ID,Corrected Sentence\n"
    note = '"0 Case {c} has a fever.\n1 Drug {d} is given."'
    rows = []
    for i in range(6):  # vignettes; the first four with and without the error
        rows.append(f"n-{i}," + note.format(c=i, d="B") + ",1,treatment,1,Drug A is given.")
        if i < 4:
            rows.append(f"m-{i}," + note.format(c=i, d="A") + ",0,,-1,NA")
    (folder / "notes.csv").write_text(head + "\n".join(rows) + "\n")
    return {"data": str(folder / "notes.csv")}


CASES = {
    "medec": Case(
        options=_medec_data,
        right=lambda s: f"1 {s.metadata['correction']}" if s.metadata["flag"] else "CORRECT",
        wrong=lambda s: "CORRECT" if s.metadata["flag"] else "0 Nothing.",
        figure="flag",
    ),
}

EXCEPTIONS: dict[tuple[str, str], str] = {}  # (slug, check): reason


def excuse(slug: str, check: str) -> None:
    if (slug, check) in EXCEPTIONS:
        pytest.skip(f"{slug}: {EXCEPTIONS[slug, check]}")


def made(slug: str, folder: Path, **more: Any) -> tuple[Any, Case]:
    assert slug in CASES, f"add a row for {slug} to CASES: a little data, right and wrong answers"
    return catalog.load(slug)(**CASES[slug].options(folder), **more), CASES[slug]


def asked(sample: Any) -> str:
    """The text of the sample's last message, by which the scripted model knows the sample again."""
    return sample.input if isinstance(sample.input, str) else sample.input[-1].text


def answered(task: Any, answer: Callable[[Any], str], folder: Path, **options: Any) -> Any:
    """Run a task on a scripted model that answers each sample as `answer` says."""
    samples = list(task.dataset)

    def reply(text: str) -> str:
        found = [sample for sample in samples if asked(sample) in text]
        assert found, "the prompt does not hold the sample's input"
        return answer(found[0])

    log = run_eval(task, model=scripted_model(reply), log_dir=str(folder / "logs"), display="none", **options)[0]
    assert log.status == "success", failure_of(log)
    return log


def mixed(case: Case) -> Callable[[Any], str]:
    """Right, wrong and unreadable answers, fixed by the sample's id."""

    def answer(sample: Any) -> str:
        turn = sum(map(ord, str(sample.id))) % 4
        return case.unreadable[0] if turn == 0 else case.wrong(sample) if turn == 1 else case.right(sample)

    return answer


def same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert list(a) == list(b)
    for name in a:
        for x, y in zip(dataclasses.astuple(a[name]), dataclasses.astuple(b[name]), strict=True):
            assert x == pytest.approx(y, rel=1e-12, abs=1e-12, nan_ok=True), name


@pytest.mark.parametrize("slug", SLUGS)
def test_the_entry_is_a_task_that_inspect_and_the_command_line_can_call(slug):
    excuse(slug, "entry")
    entry = catalog.load(slug)
    assert is_registry_object(entry)
    assert registry_info(entry).type == "task"
    assert registry_info(entry).name == f"gnomon/{slug.replace('-', '_')}"
    hints = typing.get_type_hints(inspect.unwrap(entry))
    parameters = inspect.signature(entry).parameters
    assert "data" in parameters
    for name, parameter in parameters.items():
        assert parameter.default is not parameter.empty, f"{name} needs a default"
        assert name in hints, f"{name} needs an annotation"
    from gnomon.evals import tasks

    assert tasks.TASKS[slug.replace("-", "_")] is entry


@pytest.mark.parametrize("slug", SLUGS)
def test_one_sample_end_to_end(slug, tmp_path):
    excuse(slug, "end-to-end")
    task, case = made(slug, tmp_path)
    state = np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    log = answered(task, case.right, tmp_path, limit=1)
    assert log_figures(log)[case.figure].value == 1.0
    assert log.eval.metadata["data_sha256"]
    assert log.plan.config.max_tokens, "the default of local models is very long: set max_tokens"
    assert (np.random.get_state()[1] == state[0]).all()  # noqa: NPY002
    assert random.getstate() == state[1]


@pytest.mark.parametrize("slug", SLUGS)
def test_samples_have_unique_ids_and_name_their_cluster(slug, tmp_path):
    task, _ = made(slug, tmp_path)
    samples = list(task.dataset)
    assert len({sample.id for sample in samples}) == len(samples)
    clusters = [sample.metadata[CLUSTER] for sample in samples]
    assert all(isinstance(c, str) and c for c in clusters)
    assert 1 < len(set(clusters)) < len(samples), "the data of the case should have clusters of more than one sample"


@pytest.mark.parametrize("slug", SLUGS)
def test_all_right_all_wrong_and_missing_kept_apart(slug, tmp_path):
    excuse(slug, "missing")
    task, case = made(slug, tmp_path)
    right = log_figures(answered(task, case.right, tmp_path))
    wrong = log_figures(answered(task, case.wrong, tmp_path))
    assert (right[case.figure].value, wrong[case.figure].value) == (1.0, 0.0)
    assert right["answered"].value == wrong["answered"].value == 1.0
    reasons = {"": "no_response", **dict.fromkeys(case.unreadable, "invalid_response_format")}
    for text, reason in reasons.items():
        log = answered(task, lambda sample, text=text: text, tmp_path)
        assert log_figures(log)["answered"].value == 0.0
        assert log_figures(log)[case.figure].value in (0.0, pytest.approx(math.nan, nan_ok=True))
        given = {score.reason for sample in log.samples for score in sample.scores.values()}
        assert given == {reason}
    told = answered(task, case.wrong, tmp_path)
    assert {score.reason for sample in told.samples for score in sample.scores.values()} == {None}


@pytest.mark.parametrize("slug", SLUGS)
def test_standard_errors_are_clustered(slug, tmp_path):
    excuse(slug, "clustered")
    task, case = made(slug, tmp_path)
    log = answered(task, mixed(case), tmp_path)
    found = log_figures(log)[case.figure]
    rows = [s for s in log.samples if not math.isnan(_value(s, case.figure))]
    values = [_value(s, case.figure) for s in rows]
    expected = mean_figure(values, [s.metadata[CLUSTER] for s in rows], bounds=(0, 1))
    assert found.value == pytest.approx(expected.value)
    assert found.stderr == pytest.approx(expected.stderr)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.stderr != pytest.approx(mean_figure(values).stderr), "the case's answers should tell them apart"


def _value(sample: Any, figure: str) -> float:
    value = next(iter(sample.scores.values())).value
    return float(value[figure] if isinstance(value, dict) else value)


@pytest.mark.parametrize("slug", SLUGS)
def test_scoring_a_log_again_gives_the_same_numbers(slug, tmp_path):
    excuse(slug, "rescore")
    task, case = made(slug, tmp_path)
    log = answered(task, mixed(case), tmp_path)
    again = rescore(log.location, task.scorer[0] if isinstance(task.scorer, list) else task.scorer)
    same(log_figures(again), log_figures(log))


@pytest.mark.parametrize("slug", SLUGS)
def test_the_order_of_samples_changes_nothing(slug, tmp_path):
    excuse(slug, "order")
    task, case = made(slug, tmp_path)
    first = log_figures(answered(task, mixed(case), tmp_path))
    task, _ = made(slug, tmp_path)
    before = [sample.id for sample in task.dataset]
    task.dataset.shuffle(3)
    assert [sample.id for sample in task.dataset] != before
    other = log_figures(answered(task, mixed(case), tmp_path))
    same(dict(sorted(first.items())), dict(sorted(other.items())))


@pytest.mark.parametrize("slug", SLUGS)
def test_repeating_a_deterministic_model_changes_nothing(slug, tmp_path):
    excuse(slug, "epochs")
    task, case = made(slug, tmp_path)
    once = log_figures(answered(task, mixed(case), tmp_path))
    thrice = log_figures(answered(task, mixed(case), tmp_path, epochs=3))
    same(once, thrice)


@pytest.mark.parametrize("slug", SLUGS)
def test_metrics_bear_an_empty_list(slug, tmp_path):
    task, _ = made(slug, tmp_path)
    for scorer in task.scorer if isinstance(task.scorer, list) else [task.scorer]:
        metrics = scorer_metrics(scorer)
        for metric in _flat(task.metrics or metrics):
            found = metric([])
            values = found.values() if isinstance(found, dict) else [found]
            assert all(math.isnan(v) or v == 0 for v in values)


def _flat(metrics: Any) -> list[Any]:
    if isinstance(metrics, dict):
        return [m for group in metrics.values() for m in group]
    return [m for item in metrics for m in (_flat(item) if isinstance(item, dict) else [item])]


@pytest.mark.parametrize("slug", SLUGS)
def test_data_that_is_not_there_gets_a_message(slug):
    entry = catalog.load(slug)
    for data in ("", "/no/such/file.csv"):
        with pytest.raises(GnomonError, match=r"(?i)expected|--data"):
            entry(data=data)


@pytest.mark.parametrize("slug", SLUGS)
def test_without_inspect_it_says_what_to_install(slug):
    """The package still imports, so that what needs no model, such as an offline scorer, works."""
    card = catalog.get(slug)
    module, _, name = card.entry.partition(":")
    score = card.verbs.get("score", "")
    code = f"""
import sys
sys.modules["inspect_ai"] = None
import importlib
from gnomon import catalog
from gnomon.errors import ConfigError
entry = getattr(importlib.import_module({module!r}), {name!r})
assert not {score!r} or callable(catalog.resolve({score!r}))
try:
    entry(data="x")
except ConfigError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "inspect-ai is not installed. Install it with: pip install 'gnomon[evals]'" in done.stdout
