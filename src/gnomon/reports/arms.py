"""The named arms of a run side by side: what each trained, in how much memory, and where it ended."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gnomon.reports import words
from gnomon.reports._drawing import Picture, add_legend, drawing, finite, label, legend_height, picture
from gnomon.reports.reading import Measured, MethodUse, Run, Stage
from gnomon.reports.tables import arm_names, main_metric, rows_of, runs_of

__all__ = ["ArmRow", "arm_rows", "memory_picture"]


@dataclass(frozen=True)
class ArmRow:
    """One arm at its end; the mean over its seeds.

    `weights`, `optimizer`, `peak_memory` (bytes) and `trainable` are the largest over its training stages, `seconds`
    their sum, `loss` the last training loss.
    """

    name: str
    methods: tuple[MethodUse, ...]
    metrics: Mapping[str, Measured]
    loss: float | None
    trainable: float | None
    parameters: float | None
    weights: float | None
    optimizer: float | None
    peak_memory: float | None
    seconds: float | None

    @property
    def memory(self) -> float | None:
        """Bytes of weights and optimizer state together."""
        return None if self.weights is None or self.optimizer is None else self.weights + self.optimizer


def arm_rows(run: Run) -> list[ArmRow]:
    """Return the recipe as written and its named arms; empty when there is but one arm of that sort.

    Arms without a method (the ablation) are not among them.
    """
    ablated = {arm.name for arm in run.arms if arm.without}
    names = [name for name in arm_names(run) if name not in ablated]
    rows = [row for name in names if (row := _row(run, name)) is not None]
    return rows if len(rows) > 1 else []


def _row(run: Run, name: str) -> ArmRow | None:
    stages = rows_of(run, name)
    trained = [[stage for stage in arm.stages if stage.kind == "train"] for arm in runs_of(run, name)]
    trained = [passed for passed in trained if passed]
    if not stages or not trained:
        return None

    def over_seeds(pick: Callable[[Sequence[Stage]], float | None]) -> float | None:
        found = [value for value in map(pick, trained) if value is not None]
        return sum(found) / len(found) if found else None

    def largest(field: str) -> float | None:
        return over_seeds(lambda passed: max((v for s in passed if (v := getattr(s, field)) is not None), default=None))

    return ArmRow(
        name=name,
        methods=tuple(method for row in stages for method in row.methods),
        metrics=stages[-1].metrics,
        loss=over_seeds(lambda passed: passed[-1].loss[-1][1] if passed[-1].loss else None),
        trainable=largest("trainable"),
        parameters=largest("parameters"),
        weights=largest("trained_weights"),
        optimizer=largest("optimizer"),
        peak_memory=largest("peak_memory"),
        seconds=over_seeds(lambda passed: sum(s.seconds or 0.0 for s in passed)),
    )


def memory_picture(run: Run, styles: Mapping[str, Any]) -> Picture | None:
    """Draw the main metric at the end against the memory of weights and optimizer, a point for each named arm."""
    metric = main_metric(run)
    rows = [row for row in arm_rows(run) if row.memory is not None and metric in row.metrics]
    spots = {row.name: (row.memory or 0.0, row.metrics[metric]) for row in rows}
    spots = {name: (x, y) for name, (x, y) in spots.items() if finite([(x, y.value)])}
    if len(spots) < 2:
        return None
    unit, each = ("GB", 1e9) if max(x for x, _ in spots.values()) > 3e9 else ("MB", 1e6)
    with drawing(3.1 + legend_height(spots)) as figure:
        axes = figure.add_subplot()
        for name, (x, y) in spots.items():
            low, high = (y.value if end is None or not math.isfinite(end) else end for end in (y.low, y.high))
            axes.errorbar(
                [x / each],
                [y.value],
                yerr=[[max(0.0, y.value - low)], [max(0.0, high - y.value)]],
                color=styles[name].color,
                linestyle="none",
                marker="o",
                markersize=6,
                capsize=2.5,
                label=label(name),
            )
        axes.set(xlabel=f"weights and optimizer state ({unit})", ylabel=words.metric_name(metric))
        axes.set_xlim(0.0, 1.08 * max(x for x, _ in spots.values()) / each)
        add_legend(figure, axes)
        told = "; ".join(f"{name} {words.figure(y.value)} in {words.bytes_(x)}" for name, (x, y) in spots.items())
        return picture(
            figure,
            f"{words.metric_name(metric).capitalize()} against memory of weights and optimizer",
            "One point for each arm at its end: what the tensors of the weights and of the optimizer's state took in "
            "training, measured. Bars: the interval.",
            f"Scatter chart of {words.metric_name(metric)} against the memory of weights and optimizer state. {told}.",
        )
