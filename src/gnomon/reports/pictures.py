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
    """Return the style of each arm; the arm "all" is blue and solid."""
    return {
        name: Style(PALETTE[i % len(PALETTE)], DASHES[i // len(PALETTE) % len(DASHES)])
        for i, name in enumerate(arm_names(run))
    }


def _stages(run: Run, name: str, position: int) -> list[Stage]:
    return [arm.stages[position] for arm in runs_of(run, name) if position < len(arm.stages)]


def loss_picture(run: Run, position: int) -> Picture | None:
    """Draw the training loss of one stage, a line for each arm and seed, with the evaluations as points."""
    styles = arm_styles(run)
    curves = {
        name: [(finite(stage.loss), finite(stage.eval_loss)) for stage in _stages(run, name, position)]
        for name in styles
    }
    curves = {name: [c for c in pairs if c[0] or c[1]] for name, pairs in curves.items()}
    curves = {name: pairs for name, pairs in curves.items() if pairs}
    if not curves:
        return None
    lows: list[str] = []
    with drawing(2.9 + legend_height(len(curves))) as figure:
        axes = figure.add_subplot()
        for name, pairs in curves.items():
            style = styles[name]
            for i, (loss, evaluated) in enumerate(pairs):
                points = thinned(loss) or evaluated
                axes.plot(
                    *zip(*points, strict=True), color=style.color, linestyle=style.dash,
                    alpha=1.0 if len(pairs) == 1 else 0.75, label=label(name) if i == 0 else "_",
                )  # fmt: skip
                if evaluated:
                    axes.plot(
                        *zip(*evaluated, strict=True), "o", color=style.color, markersize=3.5, label="_"
                    )
            first, last = ((pairs[0][0] or pairs[0][1])[k][1] for k in (0, -1))
            lows.append(f"{name} from {words.figure(first)} to {words.figure(last)}")
        axes.set(xlabel="step", ylabel="loss (nats per token)")
        maybe_log(axes, [y for pairs in curves.values() for c in pairs for _, y in (*c[0], *c[1])])
        add_legend(figure, axes)
        stage = next(s for name in curves for s in _stages(run, name, position))
        return picture(
            figure,
            f"Loss while running {stage.title}",
            "Lines: training loss, one for each arm and seed. Points: loss on the validation text.",
            f"Line chart of the loss against the step. {'; '.join(lows)}.",
        )


def depth_picture(run: Run, position: int) -> Picture | None:
    """Draw the variance of the hidden states behind each block, a line for each arm."""
    styles = arm_styles(run)
    lines = {name: [finite(stage.depth) for stage in _stages(run, name, position)] for name in styles}
    lines = {name: [line for line in several if line] for name, several in lines.items()}
    lines = {name: several for name, several in lines.items() if several}
    if not lines:
        return None
    with drawing(2.9 + legend_height(len(lines))) as figure:
        axes = figure.add_subplot()
        for name, several in lines.items():
            for i, line in enumerate(several):
                axes.plot(
                    *zip(*line, strict=True), marker="o", markersize=3.5, color=styles[name].color,
                    linestyle=styles[name].dash, label=label(name) if i == 0 else "_",
                )  # fmt: skip
        axes.set(xlabel="block", ylabel="variance of the hidden states")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=9))
        log = maybe_log(axes, [y for several in lines.values() for line in several for _, y in line])
        add_legend(figure, axes)
        ends = "; ".join(
            f"{name} from {words.figure(several[0][0][1])} to {words.figure(several[0][-1][1])}"
            for name, several in lines.items()
        )
        stage = next(s for name in lines for s in _stages(run, name, position))
        return picture(
            figure,
            f"Variance over depth after {stage.title}",
            "How the variance of the hidden states grows from block to block"
            + (" (logarithmic)" if log else "")
            + ". Runaway growth leaves the late blocks with little to do.",
            f"Line chart of the variance of the hidden states against the block. {ends}.",
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
        low, high = (
            value.value if end is None or not math.isfinite(end) else end for end in (value.low, value.high)
        )
        below, above = max(0.0, value.value - low), max(0.0, high - value.value)
        found.append(_Spot(row.size, value.value, below, above, row.title))
    return found


def size_picture(run: Run) -> Picture | None:
    """Draw the main metric against the size of the model, a path through the stages for each arm."""
    metric = main_metric(run)
    styles = arm_styles(run)
    paths = {name: spots for name in styles if (spots := _spots(run, name, metric))}
    if not paths:
        return None
    largest = max(spot.x for spots in paths.values() for spot in spots)
    unit, bytes_each = ("GB", 1e9) if largest > 3e9 else ("MB", 1e6)
    with drawing(3.1 + legend_height(len(paths))) as figure:
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
                zorder=3 if name == "all" else 2,
            )
        axes.set(xlabel=f"size ({unit})", ylabel=label(words.metric_name(metric)))
        axes.margins(x=0.16, y=0.14)
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
            f"Each point is a stage, each bar its interval; the path of \u201c{next(iter(paths))}\u201d is labelled.",
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
            label(", ".join(dict.fromkeys(titles)), 30),
            (spot.x / bytes_each, spot.y),
            xytext=(-7 if right else 7, 7),
            textcoords="offset points",
            ha="right" if right else "left",
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
    found.append(size_picture(run))
    found += [depth_picture(run, position) for position in positions]
    main = runs_of(run, arm_names(run)[0])[:1] if run.arms else []
    for stage in (stage for arm in main for stage in arm.stages):
        found.append(layer_map(stage, "sparsity", f"Sparsity per layer after {stage.title}", percent))
        found.append(layer_map(stage, "bits", f"Bits per layer after {stage.title}", lambda v: f"{v:g}"))
        found.append(layer_errors(stage))
    return [picture for picture in found if picture is not None]
