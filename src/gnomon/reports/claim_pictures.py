"""Pictures of claims: what each arm measured, seed by seed."""

from __future__ import annotations

import math

from gnomon.reports import words
from gnomon.reports._drawing import FAINT, PALETTE, Picture, drawing, label, picture
from gnomon.reports.ledger import Entry

__all__ = ["claim_picture"]


def claim_picture(entry: Entry) -> Picture | None:
    """Draw one claim of a ledger: a row for each arm, a point for each seed, a bar at their mean.

    Parameters
    ----------
    entry : Entry
        As `read_ledger` gives it.

    Returns
    -------
    Picture or None
        None when nothing finite was measured.
    """
    arms = {arm: [v for v in seeds.values() if math.isfinite(v)] for arm, seeds in entry.arms.items()}
    arms = {arm: values for arm, values in arms.items() if values}
    if not arms:
        return None
    everything = [v for values in arms.values() for v in values]
    wide = min(everything) > 0 and max(everything) > 30 * min(everything)
    with drawing(0.8 + 0.32 * len(arms)) as figure:
        axes = figure.add_subplot()
        for row, values in enumerate(arms.values()):
            color = PALETTE[row % len(PALETTE)]
            axes.plot(values, [row] * len(values), "o", color=color, markersize=5, zorder=3)
            axes.plot(sum(values) / len(values), row, "|", color=color, markersize=16, markeredgewidth=2, zorder=3)
        axes.set_yticks(range(len(arms)), [label(arm, 26) for arm in arms])
        axes.set_ylim(len(arms) - 0.5, -0.5)
        if wide:
            axes.set_xscale("log")
        axes.set_xlabel(label(entry.unit, 60))
        axes.grid(axis="y", color=FAINT, alpha=0.25)
        told = "; ".join(
            f"{arm} {words.figure(sum(v) / len(v))} ({words.between(min(v), max(v))})" for arm, v in arms.items()
        )
        caption = f"A point for each seed, a bar at the mean. {entry.verdict[:1].upper()}{entry.verdict[1:]}."
        return picture(figure, entry.says, caption, f"{entry.unit} of each arm, mean and range over the seeds: {told}.")
