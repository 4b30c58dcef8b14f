"""What tasks of Inspect share: metrics with clustered errors, answers that are missing, logs, a scripted model.

A task of gnomon keeps these rules, and `tests/conformance/test_tasks.py` holds every task of the catalog to them.

- Its function is an Inspect ``@task`` with a parameter `data` (a file, or a list of files).
- Each sample has a unique id, and ``metadata["cluster"]`` names the cluster it is not independent of.
- A scorer needs nothing but the log: gold answers stand in the sample's metadata.
- An answer that is missing or cannot be read has ``Score.reason`` set and ``answered`` 0.
- The task's metadata holds ``data_sha256``, and under ``notes`` what a reader of the figures should know.
- Its card's ``[verbs] score`` names a function ``(run, data, **options)`` that scores a file of predictions and
  returns a `ScoreReport`.

Inspect is an optional part of gnomon and is imported by the functions that need it.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Protocol

from gnomon.common.figures import Figure
from gnomon.errors import ConfigError, DataError

if TYPE_CHECKING:
    from inspect_ai.log import EvalLog
    from inspect_ai.model import Model
    from inspect_ai.scorer import Metric, Scorer
    from inspect_ai.solver import TaskState

__all__ = [
    "CLUSTER",
    "Said",
    "ScoreReport",
    "failure_of",
    "inspect_installed",
    "log_figures",
    "mean_metrics",
    "named_values",
    "needs_inspect",
    "read_log",
    "rescore",
    "said",
    "scripted_model",
]

CLUSTER = "cluster"
"""Key of a sample's metadata that names its cluster."""

INSTALL = "inspect-ai is not installed. Install it with: pip install 'gnomon[evals]'."


class ScoreReport(Protocol):
    """What the offline scorer of a task returns."""

    @property
    def figures(self) -> Mapping[str, Figure]:
        """Figures by name."""

    @property
    def counts(self) -> Mapping[str, int]:
        """How much was scored, missing, left out."""

    @property
    def baselines(self) -> Mapping[str, float]:
        """What trivial answers reach on the same data."""

    @property
    def notes(self) -> Sequence[str]:
        """What a reader of the figures should know."""


def inspect_installed() -> bool:
    """Return whether the package inspect-ai can be imported."""
    return importlib.util.find_spec("inspect_ai") is not None


def needs_inspect(name: str) -> Callable[..., NoReturn]:
    """Return what stands for a task where inspect-ai is not installed: a function that says so when called."""

    def missing(*args: Any, **kwargs: Any) -> NoReturn:
        raise ConfigError(f"{name} runs on Inspect: {INSTALL}")

    missing.__name__ = missing.__qualname__ = name
    missing.__doc__ = f"Say that {name} needs inspect-ai."
    return missing


class Said(NamedTuple):
    """A model's answer, and why there is none: ``"no_response"``, ``"refusal"`` or None."""

    text: str
    reason: str | None


def said(state: TaskState) -> Said:
    """Return what a model answered in a finished sample, with the reason where it said nothing."""
    output = state.output
    if output.choices and output.stop_reason == "content_filter":
        return Said(output.completion, "refusal")
    if not output.completion.strip():
        return Said("", "no_response")
    return Said(output.completion, None)


def mean_metrics(keys: Sequence[str], by: Mapping[str, str] | None = None) -> dict[str, list[Metric]]:
    """Return the metrics of a score whose value is a dict: mean, clustered standard error and interval of each key.

    NaN values do not count, so a key that is NaN where it is undefined has its mean over the others.

    Parameters
    ----------
    keys : sequence of str
        Keys of the value.
    by : mapping of str to str, optional
        Key -> key of the sample's metadata by whose values the mean is also given.

    Returns
    -------
    dict of str to list of Metric
        For ``@scorer(metrics=...)``. Needs ``metadata["cluster"]`` in every sample.
    """
    from inspect_ai.scorer import ci, grouped, mean, stderr

    found: dict[str, list[Metric]] = {}
    for key in keys:
        found[key] = [mean(), stderr(cluster=CLUSTER), ci(cluster=CLUSTER)]
        if by and key in by:
            found[key].append(grouped(mean(), by[key], all=False))
    return found


def named_values(figures: Mapping[str, Figure]) -> dict[str, float]:
    """Return figures as the flat dict that a metric may return: ``f1``, ``f1_stderr``, ``f1_low``, ``f1_high``."""
    return {
        name + suffix: value
        for name, figure in figures.items()
        for suffix, value in (("", figure.value), ("_stderr", figure.stderr), ("_low", figure.low),
                              ("_high", figure.high))
    }  # fmt: skip


def read_log(path: str | Path) -> EvalLog:
    """Read an Inspect log with its samples.

    Raises
    ------
    DataError
        When there is no such file, or it is no log.
    ConfigError
        When inspect-ai is not installed.
    """
    if not inspect_installed():
        raise ConfigError(f"reading the log {path}: {INSTALL}")
    from inspect_ai.log import read_eval_log

    path = Path(path)
    if not path.is_file():
        raise DataError("there is no such log. Give the .eval file that an evaluation wrote.", file=path)
    try:
        return read_eval_log(str(path))
    except Exception as error:  # the package raises whatever the broken file led to
        raise DataError(f"this is no log of Inspect ({type(error).__name__}: {error}).", file=path) from error


def failure_of(log: EvalLog) -> str:
    """Return why an evaluation did not succeed, as one line; empty when it did."""
    if log.status == "success":
        return ""
    if log.error is not None:
        return " ".join(log.error.message.split())
    broken = next((sample.error for sample in log.samples or [] if sample.error is not None), None)
    return " ".join(broken.message.split()) if broken is not None else f"status {log.status}"


def rescore(log: str | Path | EvalLog, scorer: Scorer) -> EvalLog:
    """Score a log again with a scorer; the log given stays as it is.

    Parameters
    ----------
    log : str, Path or EvalLog
    scorer : Scorer

    Returns
    -------
    EvalLog
        With the new scores in place of the old.

    Raises
    ------
    DataError
        When it is no log, or the evaluation wrote no samples into it.
    """
    from inspect_ai import score

    read = read_log(log) if isinstance(log, str | Path) else log
    if not read.samples:
        raise DataError("this log holds no samples, so nothing can be scored again.", file=str(log)[:200])
    return score(read, scorer, action="overwrite", display="none")


def scripted_model(answer: Callable[[str], str]) -> Model:
    """Return a model whose answers a function makes, for tests: no network, no tokenizer, any concurrency.

    Parameters
    ----------
    answer : callable
        Takes the text of the last message, returns the answer.

    Returns
    -------
    Model
        ``mockllm/model`` with token usage set, which would else be counted with a downloaded tokenizer.
    """
    from inspect_ai.model import ModelOutput, ModelUsage, get_model

    def output(messages: list[Any], tools: Any, choice: Any, config: Any) -> ModelOutput:
        text = answer(messages[-1].text)
        made = ModelOutput.from_content("mockllm/model", text)
        made.usage = ModelUsage(input_tokens=1, output_tokens=1, total_tokens=2)
        return made

    return get_model("mockllm/model", custom_outputs=output, memoize=False)


def log_figures(log: EvalLog) -> dict[str, Figure]:
    """Return the figures of a log, each with the standard error and interval that stand beside it.

    The mean of a key is named by the key (``flag``), the mean of a group ``flag[diagnosis]``; what a metric returned
    as a dict keeps its names, with ``f1_stderr``, ``f1_low``, ``f1_high`` taken into ``f1``.

    Parameters
    ----------
    log : EvalLog

    Returns
    -------
    dict of str to Figure
    """
    figures: dict[str, Figure] = {}
    bounded = _bounded_keys(log)
    for score in log.results.scores if log.results else []:
        values = {name: float(metric.value) for name, metric in score.metrics.items()}
        n = score.scored_samples or 0
        for main in ("mean", "accuracy"):
            if main in values:
                low, high = (values.get(f"ci_{end}", math.nan) if n > 1 else math.nan for end in ("lower", "upper"))
                if score.name in bounded:
                    low, high = (max(0.0, low) if low == low else low), (min(1.0, high) if high == high else high)
                error = values.get("stderr", math.nan) if n > 1 else math.nan
                figures[score.name] = Figure(values[main] if n else math.nan, error, low, high, n)
                grouped = sorted((m.name, m.value) for m in score.metrics.values() if m.group == "grouped")
                figures |= {f"{score.name}[{group}]": Figure(float(value)) for group, value in grouped}
                break
        else:
            figures |= _flat_figures(values, n)
    return figures


def _flat_figures(values: Mapping[str, float], n: int) -> dict[str, Figure]:
    ends = ("_stderr", "_low", "_high")
    mains = [name for name in values if not any(name.endswith(e) and name[: -len(e)] in values for e in ends)]
    spread = {name: [values.get(name + end, math.nan) for end in ends] for name in mains}
    return {name: Figure(values[name], error, low, high, n) for name, (error, low, high) in spread.items()}


def _bounded_keys(log: EvalLog) -> set[str]:
    """Keys whose values all lie in [0, 1], so that an interval must as well."""
    found: dict[str, bool] = {}
    for reduction in log.reductions or []:
        for sample in reduction.samples:
            items = sample.value.items() if isinstance(sample.value, Mapping) else [(reduction.scorer, sample.value)]
            for key, value in items:
                inside = isinstance(value, int | float) and (math.isnan(value) or 0 <= value <= 1)
                found[key] = found.get(key, True) and inside
    return {key for key, inside in found.items() if inside}
