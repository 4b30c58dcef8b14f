"""Pictures of a whole run: loss, variance over depth, size against quality."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.ticker import MaxNLocator

from gnomon.reports import words
from gnomon.reports._drawing import (
    DASHES,
    PALETTE,
    PAPER,
    Picture,
    add_legend,
    drawing,
    finite,
    label,
    legend_height,
    maybe_log,
    picture,
    thinned,
)
from gnomon.reports.arms import memory_picture
from gnomon.reports.layer_pictures import layer_errors, layer_map, percent
from gnomon.reports.reading import Run, Stage
from gnomon.reports.tables import arm_names, main_metric, rows_of, runs_of

__all__ = ["Style", "arm_styles", "depth_picture", "loss_picture", "pictures_of", "size_picture"]


@dataclass(frozen=True)
class Style:
    """The colour and dash of one arm, the same in every picture of a run."""

    color: str
    dash: Any


def arm_styles(run: Run) -> dict[str, Style]:
    """Return the style of each arm; the recipe as written is blue and solid."""
    return {
        name: Style(PALETTE[i % len(PALETTE)], DASHES[i // len(PALETTE) % len(DASHES)])
        for i, name in enumerate(arm_names(run))
    }


def _stages(run: Run, name: str, position: int) -> list[Stage]:
    return [arm.stages[position] for arm in runs_of(run, name) if position < len(arm.stages)]


def _mean_curve(curves: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[float, float]]:
    """Average curves of several seeds at their common steps."""
    if len(curves) == 1:
        return list(curves[0])
    tables = [dict(curve) for curve in curves]
    steps = sorted(set.intersection(*(set(table) for table in tables)))
    return [(step, sum(table[step] for table in tables) / len(tables)) for step in steps]


def _roof(curves: Sequence[Sequence[tuple[float, float]]]) -> float | None:
    """Return where to cut the loss axis so that the first steep steps do not flatten the rest, or None."""
    values = [y for curve in curves for _, y in curve]
    late = [y for curve in curves for _, y in curve[len(curve) // 6 :]]
    low, high = min(values), max(late)
    room = high + 0.08 * (high - low)
    return room if len(late) > 20 and max(values) - low > 1.6 * (room - low) > 0 else None


def loss_picture(run: Run, position: int) -> Picture | None:
    """Draw the loss of one stage, a line for each arm (the mean over its seeds), the evaluations as points."""
    styles = arm_styles(run)
    curves: dict[str, tuple[list[tuple[float, float]], list[tuple[float, float]]]] = {}
    for name in styles:
        stages = _stages(run, name, position)
        losses = [points for stage in stages if (points := finite(stage.loss))]
        evaluated = [points for stage in stages if (points := finite(stage.eval_loss))]
        curve = thinned(_mean_curve(losses)) if losses else []
        points = _mean_curve(evaluated) if evaluated else []
        if curve or points:
            curves[name] = (curve or points, points)
    if not curves:
        return None
    with drawing(3.0 + legend_height(curves)) as figure:
        axes = figure.add_subplot()
        for i, (name, (curve, points)) in enumerate(curves.items()):
            style: dict[str, Any] = {"color": styles[name].color, "zorder": 3 - i / 100}
            axes.plot(*zip(*curve, strict=True), linestyle=styles[name].dash, label=label(name), **style)
            if points:
                axes.plot(*zip(*points, strict=True), "o", markersize=3.5, label="_", **style)
        axes.set(xlabel="step", ylabel="loss (nats per token)")
        roof = _roof([curve for curve, _ in curves.values()])
        if roof is not None:
            floor = min(y for pair in curves.values() for points in pair for _, y in points)
            axes.set_ylim(floor - 0.06 * (roof - floor), roof)
        add_legend(figure, axes)
        stage = next(s for name in curves for s in _stages(run, name, position))
        told = "; ".join(
            f"{name} from {words.figure(curve[0][1])} to {words.figure(curve[-1][1])}"
            for name, (curve, _) in curves.items()
        )
        caption = "Lines: training loss."
        if any(points for _, points in curves.values()):
            caption += " Points: loss on the validation text."
        if len({arm.seed for arm in run.arms}) > 1:
            caption += " Means over the seeds."
        if roof is not None:
            caption += " The steep first steps run out of the picture."
        return picture(
            figure, f"Loss, stage “{stage.title}”", caption, f"Line chart of the loss against the step. {told}."
        )


def depth_picture(run: Run, position: int) -> Picture | None:
    """Draw the variance of the hidden states behind each block, a line for each arm (the mean over its seeds)."""
    styles = arm_styles(run)
    lines: dict[str, list[tuple[float, float]]] = {}
    for name in styles:
        found = [points for stage in _stages(run, name, position) if (points := finite(stage.depth))]
        if found and (line := _mean_curve(found)):
            lines[name] = line
    if not lines:
        return None
    with drawing(2.9 + legend_height(lines)) as figure:
        axes = figure.add_subplot()
        for i, (name, line) in enumerate(lines.items()):
            axes.plot(
                *zip(*line, strict=True),
                marker="o",
                markersize=3.5,
                color=styles[name].color,
                linestyle=styles[name].dash,
                label=label(name),
                zorder=3 - i / 100,
            )
        axes.set(xlabel="block", ylabel="variance of the hidden states")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=9))
        log = maybe_log(axes, [y for line in lines.values() for _, y in line], factor=8.0)
        add_legend(figure, axes)
        told = "; ".join(
            f"{name} from {words.figure(line[0][1])} to {words.figure(line[-1][1])}" for name, line in lines.items()
        )
        stage = next(s for name in lines for s in _stages(run, name, position))
        return picture(
            figure,
            f"Variance over depth, stage “{stage.title}”",
            f"How the variance of the hidden states grows from block to block{' (logarithmic)' if log else ''}. "
            "Runaway growth leaves the late blocks with little to do.",
            f"Line chart of the variance of the hidden states against the block. {told}.",
        )


@dataclass(frozen=True)
class _Spot:
    x: float
    y: float
    below: float
    above: float
    title: str


def _spots(run: Run, name: str, metric: str) -> list[_Spot]:
    found: list[_Spot] = []
    for row in rows_of(run, name):
        value = row.metrics.get(metric)
        if value is None or row.size is None or not finite([(row.size, value.value)]):
            continue
        low, high = (value.value if end is None or not math.isfinite(end) else end for end in (value.low, value.high))
        below, above = max(0.0, value.value - low), max(0.0, high - value.value)
        found.append(_Spot(row.size, value.value, below, above, row.title))
    return found


def size_picture(run: Run) -> Picture | None:
    """Draw the main metric against the size of the model, a path through the stages for each arm."""
    metric = main_metric(run)
    styles = arm_styles(run)
    paths = {name: spots for name in styles if (spots := _spots(run, name, metric))}
    sizes = [spot.x for spots in paths.values() for spot in spots]
    if not sizes or max(sizes) < 1.01 * min(sizes):  # one size alone: the table says it better
        return None
    largest = max(sizes)
    unit, bytes_each = ("GB", 1e9) if largest > 3e9 else ("MB", 1e6)
    with drawing(3.1 + legend_height(paths)) as figure:
        axes = figure.add_subplot()
        for name, spots in paths.items():
            axes.errorbar(
                [spot.x / bytes_each for spot in spots],
                [spot.y for spot in spots],
                yerr=[[spot.below for spot in spots], [spot.above for spot in spots]],
                color=styles[name].color,
                linestyle=styles[name].dash,
                marker="o",
                markersize=5,
                capsize=2.5,
                linewidth=1.3,
                label=label(name),
                zorder=3 if name == arm_names(run)[0] else 2,
            )
        axes.set(xlabel=f"size ({unit})", ylabel=label(words.metric_name(metric)))
        axes.margins(x=0.16, y=0.2)
        maybe_log(axes, [spot.y for spots in paths.values() for spot in spots], factor=12.0)
        _annotate(axes, next(iter(paths.values())), bytes_each)
        add_legend(figure, axes)
        told = "; ".join(
            f"{name}: " + ", ".join(f"{s.title} {words.figure(s.y)} at {words.bytes_(s.x)}" for s in spots)
            for name, spots in paths.items()
        )
        return picture(
            figure,
            f"Size against {words.metric_name(metric)}",
            f"Each point is a stage, each bar its interval; the stages of “{next(iter(paths))}” are named.",
            f"Scatter chart of {words.metric_name(metric)} against the size of the model. {told}.",
        )


def _annotate(axes: Any, spots: Sequence[_Spot], bytes_each: float) -> None:
    """Write the stages beside their points; stages on the same spot share one text."""
    wide, tall = (max(values) - min(values) or 1.0 for values in ([s.x for s in spots], [s.y for s in spots]))
    groups: list[tuple[_Spot, list[str]]] = []
    for spot in spots:
        for other, titles in groups:
            if abs(spot.x - other.x) < 0.05 * wide and abs(spot.y - other.y) < 0.08 * tall:
                titles.append(spot.title)
                break
        else:
            groups.append((spot, [spot.title]))
    middle = (max(s.x for s in spots) + min(s.x for s in spots)) / 2
    for spot, titles in groups:
        right = spot.x > middle
        axes.annotate(
            ",\n".join(label(title, 20) for title in list(dict.fromkeys(titles))[:3]),
            (spot.x / bytes_each, spot.y),
            xytext=(10 if right else -10, -9),
            textcoords="offset points",
            ha="right" if right else "left",
            va="top",
            bbox={"facecolor": PAPER, "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
            fontsize=9,
        )


def pictures_of(run: Run) -> list[Picture]:
    """Draw every picture a run has the numbers for.

    Parameters
    ----------
    run : Run

    Returns
    -------
    list of Picture
        In reading order; empty for a run without measured stages.
    """
    found: list[Picture | None] = []
    positions = range(max((len(arm.stages) for arm in run.arms), default=0))
    found += [loss_picture(run, position) for position in positions]
    found += [memory_picture(run, arm_styles(run)), size_picture(run)]
    found += [depth_picture(run, position) for position in positions]
    main = runs_of(run, arm_names(run)[0])[:1] if run.arms else []
    for stage in (stage for arm in main for stage in arm.stages):
        found.append(layer_map(stage, "sparsity", f"Sparsity per layer, stage “{stage.title}”", percent))
        found.append(layer_map(stage, "bits", f"Bits per layer, stage “{stage.title}”", lambda v: f"{v:g}"))
        found += [layer_errors(stage, method) for method in dict.fromkeys(layer.method for layer in stage.layers)]
    return [picture for picture in found if picture is not None]
