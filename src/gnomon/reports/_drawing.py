"""How pictures are drawn: matplotlib's objects, no pyplot state; SVG as data URIs, always the same bytes."""

from __future__ import annotations

import base64
import io
import math
import re
import unicodedata
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

__all__ = [
    "DASHES",
    "FAINT",
    "INK",
    "LINE",
    "PALETTE",
    "PAPER",
    "Picture",
    "add_legend",
    "drawing",
    "finite",
    "label",
    "legend_height",
    "maybe_log",
    "picture",
    "thinned",
]  # fmt: skip

INK, FAINT, LINE, PAPER = "#1d2733", "#5b6875", "#d5dbe1", "#fdfefe"
# Okabe and Ito's colours, told apart by colour-blind readers; the light yellow is left out
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
_DARK = {
    INK: "#e8ecf0", FAINT: "#a3afba", LINE: "#3a444e", PAPER: "#1a2027", "#0072b2": "#4aa8e0", "#d55e00": "#f0823c",
    "#009e73": "#2cc79b", "#cc79a7": "#dd98be", "#e69f00": "#f0b53c", "#56b4e9": "#8accf2",
}  # fmt: skip
_FONTS = "system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue',Arial,sans-serif"
_WIDTH = 4.3  # inches: small enough that the text stays readable on a telephone
_POINTS = 160  # of a curve; longer ones are averaged in bins
_RC = {
    "svg.fonttype": "none",
    "svg.hashsalt": "gnomon",
    "text.parse_math": False,  # a dollar sign in a label is a dollar sign
    "axes.formatter.use_mathtext": False,
    "axes.unicode_minus": True,
    "font.family": ["DejaVu Sans"],
    "font.size": 9.5,
    "axes.labelsize": 9.5,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.7,
    "legend.frameon": False,
    "axes.prop_cycle": matplotlib.rcParamsDefault["axes.prop_cycle"],
    "savefig.transparent": True,
    "savefig.dpi": 72,
    "figure.dpi": 72,
}


@dataclass(frozen=True)
class Picture:
    """One picture: what it shows, the same in words for who cannot see it, and its data URI."""

    title: str
    caption: str
    alt: str
    uri: str
    width: int
    height: int


def label(text: str, length: int = 34) -> str:
    """Make a text from data fit for a picture: one line, no control characters, not too long."""
    kept = "".join(" " if unicodedata.category(c) in ("Cc", "Cs", "Cf", "Zl", "Zp") else c for c in text)
    kept = " ".join(kept.split())
    # matplotlib leaves out whatever begins with an underscore from legends
    kept = f"\u200a{kept}" if kept.startswith("_") else kept
    return kept if len(kept) <= length else kept[: length - 1] + "…"


@contextmanager
def drawing(height: float) -> Iterator[Figure]:
    with matplotlib.rc_context(_RC), warnings.catch_warnings():
        # the reader's browser has its own fonts: a glyph missing here is no fault
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield Figure(figsize=(_WIDTH, height), layout="constrained")


def _uri(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    names = {color: f"--c{i}" for i, color in enumerate(_DARK)}
    light = ";".join(f"{name}:{color}" for color, name in names.items())
    dark = ";".join(f"{name}:{_DARK[color]}" for color, name in names.items())

    def adapt(match: re.Match[str]) -> str:
        tag = match.group(0)
        for color, name in names.items():
            tag = tag.replace(color, f"var({name})")
        return tag.replace("'DejaVu Sans'", _FONTS)

    svg = re.sub(r"<[^<>]*>", adapt, svg)  # tags alone: labels stay as they are
    rules = f":root{{{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}"
    svg = svg.replace('<style type="text/css">', f'<style type="text/css">{rules}', 1)
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode("utf-8", errors="replace")).decode("ascii")


def picture(figure: Figure, title: str, caption: str, alt: str) -> Picture:
    width, height = figure.get_size_inches()
    return Picture(title, caption, alt, _uri(figure), round(width * 96), round(height * 96))


def _columns(labels: Iterable[str]) -> int:
    return 2 if max(map(len, labels), default=0) <= 25 else 1


def add_legend(figure: Figure, axes: Any) -> None:
    """Put the legend under the axes, in two columns where the labels are short; none for a single line."""
    handles, labels = axes.get_legend_handles_labels()
    if len(handles) > 1:
        columns = _columns(labels)
        figure.legend(handles, labels, loc="outside lower left", ncols=columns, handlelength=2.2, columnspacing=1.2)


def legend_height(names: Iterable[str]) -> float:
    """Return the inches a legend of these labels takes."""
    labels = [label(name) for name in names]
    return 0.0 if len(labels) < 2 else 0.1 + 0.19 * math.ceil(len(labels) / _columns(labels))


def _plain(value: float, _: object) -> str:
    return f"{value:g}".replace("e+0", "e").replace("e-0", "e-")


def maybe_log(axes: Any, values: Sequence[float], factor: float = 30.0) -> bool:
    """Make the vertical axis logarithmic where the values span more than `factor`; say whether it is."""
    if not values or min(values) <= 0 or max(values) < factor * min(values):
        return False
    wide = max(values) > 300 * min(values)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(numticks=7) if wide else LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(_plain))
    axes.yaxis.set_minor_locator(NullLocator())
    return True


def finite(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y) and max(abs(x), abs(y)) < 1e30]


def thinned(points: Sequence[tuple[float, float]], limit: int = _POINTS) -> list[tuple[float, float]]:
    """Average a long curve in bins of equal length, so that a page stays small."""
    size = math.ceil(len(points) / limit)
    bins = [points[i : i + size] for i in range(0, len(points), max(size, 1))]
    return [(sum(x for x, _ in b) / len(b), sum(y for _, y in b) / len(b)) for b in bins]
