"""Choosing among the snapshots of a run, and the table that compares the choices."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from gnomon.common.models import load_model
from gnomon.errors import MethodError
from gnomon.merge.checkpoint_averaging.running import RunningAverage

__all__ = ["RULES", "XltReport", "XltRow", "XltRun", "score_run", "xlt_report"]

RULES = ("LAST", "S-DEV", "CA", "T-DEV")


@dataclass(frozen=True)
class XltRun:
    """Scores of one run; the higher, the better.

    Parameters
    ----------
    seed : int
    test : mapping of str to sequence of float
        Language -> test score of each snapshot, first snapshot first.
    average : mapping of str to float
        Language -> test score of the averaged snapshots.
    source_dev : sequence of float, optional
        Development score of each snapshot in the source language; without it there is no S-DEV.
    target_dev : mapping of str to sequence of float, optional
        Language -> development score of each snapshot in that language; without it there is no T-DEV.
    setting : str, default ""
        The hyperparameters, as a label: ``"lr 1e-5, constant"``.

    Raises
    ------
    MethodError
        When numbers of snapshots or languages do not agree, or a score is not finite.
    """

    seed: int
    test: Mapping[str, Sequence[float]]
    average: Mapping[str, float]
    source_dev: Sequence[float] | None = None
    target_dev: Mapping[str, Sequence[float]] | None = None
    setting: str = ""

    def __post_init__(self) -> None:
        where = f"run of seed {self.seed}{f' ({self.setting})' if self.setting else ''}"
        if not self.test or not all(len(scores) for scores in self.test.values()):
            raise MethodError(f"{where}: there are no test scores. Give a score per language and snapshot.")
        count = len(next(iter(self.test.values())))
        series = {f"test[{k!r}]": v for k, v in self.test.items()}
        series |= {f"target_dev[{k!r}]": v for k, v in (self.target_dev or {}).items()}
        series |= {"source_dev": self.source_dev} if self.source_dev is not None else {}
        for name, scores in series.items():
            if len(scores) != count:
                raise MethodError(f"{where}: {name} has {len(scores)} scores for {count} snapshots. Give one for each.")
        for name, languages in (("average", self.average), ("target_dev", self.target_dev)):
            if languages is not None and set(languages) != set(self.test):
                raise MethodError(
                    f"{where}: {name} has the languages {sorted(languages)}, test has {sorted(self.test)}. "
                    "Give the same ones."
                )
        for name, scores in {**series, "average": list(self.average.values())}.items():
            if not all(math.isfinite(score) for score in scores):
                raise MethodError(f"{where}: {name} holds a score that is not finite: {list(scores)}.")

    def chosen(self, rule: str) -> dict[str, int] | None:
        """Return the snapshot a rule picks for each language (the first of equals); None for CA."""
        last = len(next(iter(self.test.values()))) - 1
        if rule == "LAST":
            return dict.fromkeys(self.test, last)
        if rule == "S-DEV" and self.source_dev is not None:
            return dict.fromkeys(self.test, _best(self.source_dev))
        if rule == "T-DEV" and self.target_dev is not None:
            return {language: _best(self.target_dev[language]) for language in self.test}
        return None

    def scores(self, rule: str) -> dict[str, float] | None:
        """Return the test score of each language under a rule; None when the run has no scores to choose by."""
        if rule == "CA":
            return dict(self.average)
        picked = self.chosen(rule)
        return None if picked is None else {language: float(self.test[language][i]) for language, i in picked.items()}


def _best(scores: Sequence[float]) -> int:
    return max(range(len(scores)), key=lambda i: scores[i])


@dataclass(frozen=True)
class XltRow:
    """One cell of the table: mean and sample standard deviation over runs (NaN for a single one)."""

    rule: str
    setting: str
    language: str
    mean: float
    std: float
    runs: int


@dataclass(frozen=True)
class XltReport:
    """Rules against settings; `str` gives the table, `to_dict` plain values."""

    rows: list[XltRow] = field(default_factory=list)

    def row(self, rule: str, setting: str = "all", language: str = "mean") -> XltRow:
        """Return one cell.

        Raises
        ------
        MethodError
            When there is none.
        """
        for row in self.rows:
            if (row.rule, row.setting, row.language) == (rule, setting, language):
                return row
        known = sorted({(r.rule, r.setting, r.language) for r in self.rows})
        raise MethodError(f"The report has no {(rule, setting, language)}. It has {known[:12]}.")

    def to_dict(self) -> list[dict[str, Any]]:
        """Return the rows as plain values; a deviation that does not exist is None."""
        return [{**vars(row), "std": None if math.isnan(row.std) else row.std} for row in self.rows]

    def __str__(self) -> str:
        settings = list(dict.fromkeys(row.setting for row in self.rows))
        languages = list(dict.fromkeys(row.language for row in self.rows))
        heads = [f"{s} {lang}" if len(languages) > 1 else s for s in settings for lang in languages]
        lines = [["", *heads]]
        for rule in dict.fromkeys(row.rule for row in self.rows):
            cells = {(row.setting, row.language): row for row in self.rows if row.rule == rule}
            line = [_cell(cells.get((s, lang))) for s in settings for lang in languages]
            lines.append([rule, *line])
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        padded = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines]
        return "\n".join("  ".join(line) for line in padded)


def _cell(row: XltRow | None) -> str:
    if row is None:
        return "-"
    return f"{row.mean:.2f}" if math.isnan(row.std) else f"{row.mean:.2f} ± {row.std:.2f}"


def xlt_report(runs: Iterable[XltRun], *, by_language: bool = False) -> XltReport:
    """Compare LAST, S-DEV, CA and T-DEV: mean and deviation over seeds for each setting, and over all runs.

    S-DEV and LAST are what zero-shot transfer allows; T-DEV looks at target-language data and is an oracle. The
    deviation over all runs of all settings (the setting ``"all"``) is what shows how little an average depends on
    hyperparameters.

    Parameters
    ----------
    runs : iterable of XltRun
    by_language : bool, default False
        Also give each language, beside their mean.

    Returns
    -------
    XltReport
        A rule for which a run has no scores is left out of the table for all.

    Raises
    ------
    MethodError
        With no runs, runs of different languages, or one seed twice in a setting.

    Examples
    --------
    >>> runs = [XltRun(seed, {"de": [70 + seed, 60 + seed]}, {"de": 71 + seed}, [0.9, 0.8]) for seed in (0, 2)]
    >>> print(xlt_report(runs))
                    all
    LAST   61.00 ± 1.41
    S-DEV  71.00 ± 1.41
    CA     72.00 ± 1.41
    """
    listed = list(runs)
    if not listed:
        raise MethodError("There are no runs to report on: the list is empty.")
    languages = list(listed[0].test)
    seen: set[tuple[str, int]] = set()
    for run in listed:
        if set(run.test) != set(languages):
            raise MethodError(
                f"The run of seed {run.seed} has the languages {sorted(run.test)}, the first one {sorted(languages)}. "
                "Report on runs of one task."
            )
        if (run.setting, run.seed) in seen:
            raise MethodError(f"Seed {run.seed} stands twice in the setting {run.setting!r}. Give each run once.")
        seen.add((run.setting, run.seed))
    settings = dict.fromkeys(run.setting for run in listed)
    groups = {name: [run for run in listed if run.setting == name] for name in settings} if len(settings) > 1 else {}
    groups["all"] = listed
    report = XltReport()
    for rule in RULES:
        if any(run.scores(rule) is None for run in listed):
            continue
        for setting, group in groups.items():
            tables = [run.scores(rule) or {} for run in group]
            for language in ["mean", *(languages if by_language else [])]:
                values = [statistics.fmean(t.values()) if language == "mean" else t[language] for t in tables]
                std = statistics.stdev(values) if len(values) > 1 else math.nan
                report.rows.append(XltRow(rule, setting, language, statistics.fmean(values), std, len(values)))
    return report


def score_run(
    model: nn.Module,
    snapshots: Iterable[Mapping[str, Tensor] | str | Path],
    evaluate: Callable[[nn.Module], Mapping[str, Any]],
    *,
    seed: int,
    setting: str = "",
) -> XltRun:
    """Score every snapshot of a run and their average, for `xlt_report`.

    Parameters
    ----------
    model : Module
        Takes the snapshots in turn; holds the average afterwards.
    snapshots : iterable of state dict, str or Path
        First snapshot first, such as the folders of ``CheckpointAveraging(keep="disk")``.
    evaluate : callable
        Takes the model and returns ``{"test": {language: score}}``, and where it has them ``"source_dev"`` (a score)
        and ``"target_dev"`` (language -> score).
    seed : int
    setting : str, default ""

    Returns
    -------
    XltRun

    Raises
    ------
    MethodError
        With no snapshots, or when they do not fit together.
    """
    average = RunningAverage()
    scores: list[Mapping[str, Any]] = []
    for snapshot in snapshots:
        state = load_model(snapshot).state_dict() if isinstance(snapshot, (str, Path)) else snapshot
        average.update(state)
        model.load_state_dict(state)
        scores.append(evaluate(model))
    model.load_state_dict(average.result())
    mean = evaluate(model)
    languages = list(mean["test"])

    def series(name: str) -> dict[str, list[float]] | None:
        if name not in mean:
            return None
        return {language: [float(s[name][language]) for s in scores] for language in languages}

    return XltRun(
        seed,
        series("test") or {},
        {language: float(mean["test"][language]) for language in languages},
        [float(s["source_dev"]) for s in scores] if "source_dev" in mean else None,
        series("target_dev"),
        setting,
    )
