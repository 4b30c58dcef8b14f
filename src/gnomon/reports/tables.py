"""Rows of the stage tables: one arm's stages, averaged over its seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from gnomon.reports.reading import Arm, Measured, MethodUse, Run, Stage

__all__ = [
    "Row",
    "arm_names",
    "main_arm",
    "main_metric",
    "metrics_of",
    "rows_of",
    "runs_of",
    "split_metrics",
    "stage_row",
]


@dataclass(frozen=True)
class Row:
    """One stage of one arm; with several seeds the mean, and as interval the range over the seeds."""

    index: int
    kind: str
    title: str
    methods: tuple[MethodUse, ...]
    notes: tuple[str, ...]
    skipped: bool
    seconds: float | None
    peak_memory: float | None
    parameters: float | None
    nonzero: float | None
    size: float | None
    metrics: Mapping[str, Measured]
    seeds: int


def arm_names(run: Run) -> list[str]:
    """Return the names of a run's arms, the recipe as written first, then in the run's order."""
    main = main_arm(run)
    return sorted(dict.fromkeys(arm.name for arm in run.arms), key=lambda name: name != main)


def main_arm(run: Run) -> str:
    """Return the name of the arm that is the recipe as written."""
    name = run.recipe.get("arm")
    return name if isinstance(name, str) and name else "all"


def runs_of(run: Run, name: str) -> list[Arm]:
    """Return the passes of one arm, one for each seed."""
    return [arm for arm in run.arms if arm.name == name]


def main_metric(run: Run) -> str:
    """Return the metric the headline speaks of: perplexity, or the first one measured where there is none."""
    names = metrics_of(run)
    return "perplexity" if "perplexity" in names or not names else names[0]


def metrics_of(run: Run) -> list[str]:
    """Return the names of all metrics of a run, perplexity first."""
    seen = dict.fromkeys(name for arm in run.arms for stage in arm.stages for name in stage.metrics)
    return sorted(seen, key=lambda name: name != "perplexity")


def split_metrics(run: Run, limit: int = 3) -> tuple[list[str], list[str]]:
    """Split a run's metrics into those that stand in the stage tables and the rest.

    Perplexity comes first; then those that are not the same everywhere, in the run's order, up to `limit`.
    """
    names = metrics_of(run)

    def varies(name: str) -> bool:
        stages = [stage for arm in run.arms for stage in arm.stages]
        return len({stage.metrics[name].value for stage in stages if name in stage.metrics}) > 1

    ranked = sorted(names, key=lambda name: (name != main_metric(run), not varies(name)))
    chosen = ranked[:limit]
    return [name for name in names if name in chosen], [name for name in names if name not in chosen]


def stage_row(stage: Stage) -> Row:
    """Return the row of one stage with one seed."""
    return Row(
        index=stage.index,
        kind=stage.kind,
        title=stage.title,
        methods=stage.methods,
        notes=stage.notes,
        skipped=stage.skipped,
        seconds=stage.seconds,
        peak_memory=stage.peak_memory,
        parameters=stage.parameters,
        nonzero=stage.nonzero,
        size=stage.size,
        metrics=stage.metrics,
        seeds=1,
    )


def rows_of(run: Run, name: str) -> list[Row]:
    """Return one row for each stage of an arm.

    Parameters
    ----------
    run : Run
    name : str
        The arm's name.

    Returns
    -------
    list of Row
        Averaged over the seeds; empty when the arm has no finished stage.
    """
    stages: dict[int, list[Stage]] = {}
    for arm in runs_of(run, name):
        for position, stage in enumerate(arm.stages):
            stages.setdefault(position, []).append(stage)
    return [_mean(group) for _, group in sorted(stages.items())]


def _mean(stages: Sequence[Stage]) -> Row:
    row = stage_row(stages[0])
    if len(stages) == 1:
        return row

    def mean(pick: Callable[[Stage], float | None]) -> float | None:
        values = [value for value in map(pick, stages) if value is not None]
        return sum(values) / len(values) if values else None

    names = dict.fromkeys(name for stage in stages for name in stage.metrics)
    return replace(
        row,
        skipped=all(stage.skipped for stage in stages),
        notes=tuple(dict.fromkeys(note for stage in stages for note in stage.notes)),
        seconds=mean(lambda stage: stage.seconds),
        peak_memory=mean(lambda stage: stage.peak_memory),
        parameters=mean(lambda stage: stage.parameters),
        nonzero=mean(lambda stage: stage.nonzero),
        size=mean(lambda stage: stage.size),
        metrics={name: _range([stage.metrics[name] for stage in stages if name in stage.metrics]) for name in names},
        seeds=len(stages),
    )


def _range(values: Sequence[Measured]) -> Measured:
    if len(values) == 1:
        return values[0]
    numbers = [measured.value for measured in values]
    return Measured(sum(numbers) / len(numbers), min(numbers), max(numbers))
