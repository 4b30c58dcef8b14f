"""Pictures of single layers: one fact of every layer as a map, errors before and after each method."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.colors import Normalize
from matplotlib.ticker import FuncFormatter, MaxNLocator

from gnomon.reports import words
from gnomon.reports._drawing import (
    FAINT,
    INK,
    LINE,
    PAPER,
    Picture,
    add_legend,
    drawing,
    label,
    legend_height,
    maybe_log,
    picture,
)
from gnomon.reports.reading import Layer, Stage

__all__ = ["error_steps", "layer_errors", "layer_map", "percent"]

_BLOCK = re.compile(r"^(.*?)(\d+)\.(.+)$")


def _placed(names: Sequence[str]) -> dict[str, tuple[int, str]] | None:
    """Split layer names into (block, projection), or None when they do not all have one block number."""
    found: dict[str, tuple[int, str]] = {}
    prefixes: set[str] = set()
    for name in names:
        match = _BLOCK.match(name)
        if match is None or len(match.group(2)) > 6:
            return None
        prefixes.add(match.group(1))
        found[name] = (int(match.group(2)), match.group(3))
    return found if len(prefixes) == 1 and len(set(found.values())) == len(found) else None


def _latest(layers: Sequence[Layer], fact: str) -> dict[str, float]:
    return {e.name: e.facts[fact] for e in layers if fact in e.facts and math.isfinite(e.facts[fact])}


def layer_map(stage: Stage, fact: str, title: str, write: Callable[[float], str]) -> Picture | None:
    """Draw one fact of every layer: blocks across, projections down; bars where the names have no blocks."""
    values = _latest(stage.layers, fact)
    if not values:
        return None
    low, high = min(values.values()), max(values.values())
    caption = f"The arm with all methods. From {write(low)} to {write(high)}."
    alt = f"{title}, {len(values)} layers, from {write(low)} to {write(high)}."
    # equal layers get the middle colour, unequal ones the whole range of colours
    norm = Normalize(low, high) if high > low else Normalize(low - 1, high + 1)
    placed = _placed(list(values))
    if placed is None or len({block for block, _ in placed.values()}) > 200:
        return _bars(values, title, caption, alt, norm, write)
    blocks = sorted({block for block, _ in placed.values()})
    rows = list(dict.fromkeys(name for _, name in placed.values()))[:24]
    grid = [[math.nan] * len(blocks) for _ in rows]
    for name, (block, row) in placed.items():
        if row in rows:
            grid[rows.index(row)][blocks.index(block)] = values[name]
    with drawing(0.95 + 0.27 * len(rows)) as figure:
        axes = figure.add_subplot()
        mesh = axes.pcolormesh(
            grid, cmap="cividis", norm=norm, edgecolors=PAPER, linewidth=0.8 if len(blocks) <= 16 else 0.3
        )
        axes.set_yticks([i + 0.5 for i in range(len(rows))], [label(row.rpartition(".")[2] or row, 18) for row in rows])
        step = math.ceil(len(blocks) / 12)
        shown = range(0, len(blocks), step)
        axes.set_xticks([i + 0.5 for i in shown], [str(blocks[i]) for i in shown])
        axes.set(xlabel="block", ylim=(len(rows), 0))
        axes.grid(visible=False)
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        if len(blocks) <= 8:
            for i, line in enumerate(grid):
                for j, value in enumerate(line):
                    if math.isfinite(value):
                        ink = "#ffffff" if norm(value) < 0.55 else "#101418"
                        axes.text(j + 0.5, i + 0.5, write(value), ha="center", va="center", color=ink, fontsize=8.5)
        if high > low:
            bar = figure.colorbar(
                mesh, ax=axes, ticks=MaxNLocator(4), format=FuncFormatter(lambda v, _: write(v)), pad=0.02, aspect=18
            )
            bar.outline.set_visible(False)
        return picture(
            figure,
            title,
            caption,
            alt,
        )


def _bars(
    values: dict[str, float],
    title: str,
    caption: str,
    alt: str,
    norm: Normalize,
    write: Callable[[float], str],
) -> Picture:
    names = list(values)[:40]
    if len(values) > len(names):
        caption += f" The first {len(names)} of {len(values)} layers."
    with drawing(0.7 + 0.21 * len(names)) as figure:
        axes = figure.add_subplot()
        axes.barh(range(len(names)), [values[n] for n in names], color=INK, height=0.6)
        axes.set_yticks(range(len(names)), [label(n, 26) for n in names])
        axes.set(ylim=(len(names) - 0.5, -0.5), xlim=(0, norm.vmax))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: write(v)))
        axes.grid(visible=False, axis="y")
        return picture(figure, title, caption, alt)


_ERROR_FACTS = {"error_before": "before", "error": "after", "error_after": "after"}
_STEP_STYLES = {"before": (FAINT, "o", "none"), "after": (INK, "o", INK)}


def error_steps(stage: Stage, method: str) -> dict[str, dict[str, float]]:
    """Return the error of every layer ``"before"`` and ``"after"`` a method, as far as it tells them."""
    layers = [layer for layer in stage.layers if layer.method == method]
    steps: dict[str, dict[str, float]] = {}
    for fact, step in _ERROR_FACTS.items():
        if values := _latest(layers, fact):
            steps.setdefault(step, {}).update(values)
    return steps


def layer_errors(stage: Stage, method: str) -> Picture | None:
    """Draw the error of every layer before and after a method, one above the other.

    Each method has a picture of its own: methods measure their error in different units.
    """
    steps = error_steps(stage, method)
    if not steps:
        return None
    names = list(dict.fromkeys(name for values in steps.values() for name in values))[:600]
    with drawing(2.9 + legend_height(steps)) as figure:
        axes = figure.add_subplot()
        for i, name in enumerate(names):
            column = [values[name] for values in steps.values() if name in values]
            if len(column) > 1:
                axes.plot([i, i], [min(column), max(column)], color=LINE, linewidth=1.2, zorder=1)
        for text, values in steps.items():
            color, marker, face = _STEP_STYLES[text]
            spots = [(i, values[name]) for i, name in enumerate(names) if name in values]
            axes.plot(
                *zip(*spots, strict=True),
                linestyle="none",
                marker=marker,
                markersize=4.2 if len(names) <= 84 else 2.4,
                color=color,
                markerfacecolor=face,
                label=text,
            )
        _ticks_of_blocks(axes, names)
        axes.set(ylabel=f"error {'' if len(steps) > 1 else next(iter(steps))}".strip())
        maybe_log(axes, [v for values in steps.values() for v in values.values()])
        add_legend(figure, axes)
        told = ", ".join(f"{words.figure(sum(values.values()) / len(values))} {text}" for text, values in steps.items())
        return picture(
            figure,
            f"Error per layer, {method or stage.title}",
            f"Each column is a layer, in the arm with all methods. Mean: {told}.",
            f"Dot chart of the error of {len(names)} layers, {method or stage.title}. Mean: {told}.",
        )


def _ticks_of_blocks(axes: Any, names: Sequence[str]) -> None:
    placed = _placed(names)
    axes.set(xlabel="layer" if placed is None else "block (its layers in order)")
    if placed is not None:
        starts = {block: i for i, (block, _) in reversed(list(enumerate(placed[n] for n in names)))}
        shown = sorted(starts)[:: math.ceil(len(starts) / 12)]
        axes.set_xticks([starts[block] for block in shown], [str(block) for block in shown])


def percent(value: float) -> str:
    """Write a share as a whole percentage."""
    return f"{100 * value:.0f} %"
