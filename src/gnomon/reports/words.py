"""Numbers and findings in plain words: the way they stand on every page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from datetime import datetime

from gnomon.progress import duration
from gnomon.reports.reading import Effect, Measured, MethodUse, Run
from gnomon.reports.tables import Row, main_arm, main_metric, rows_of

__all__ = [
    "NOT_RECORDED", "between", "bytes_", "count", "effect_sentence", "figure", "headline", "listing",
    "metric_name", "metric_parts", "moment", "options_of", "reading_of", "seconds_", "share", "signed",
]  # fmt: skip

NOT_RECORDED = "–"

_LOWER_IS_BETTER = (
    "perplexity",
    "loss",
    "error",
    "bits_per_byte",
    "bits-per-byte",
    "bpb",
    "nll",
    "ece",
    "brier",
)
_HIGHER_IS_BETTER = ("accuracy", "acc", "f1", "exact_match", "auroc", "bleu", "chrf", "pass@1")


def figure(value: float | None) -> str:
    """Write a number with the digits a reader can use.

    Examples
    --------
    >>> figure(13.0249), figure(0.000123), figure(51234.0), figure(None)
    ('13.02', '1.23e-4', '51,234', '–')
    """
    if value is None:
        return NOT_RECORDED
    if not math.isfinite(value):
        return "not finite"
    size = abs(value)
    if size >= 1e7 or 0 < size < 1e-3:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{mantissa}e{int(exponent)}".replace("-", "\u2212" if value < 0 else "-", 1)
    digits = 0 if size >= 1000 or value == 0 else 1 if size >= 100 else 2 if size >= 10 else 3
    return f"{value:,.{digits}f}".replace("-", "\u2212")


def signed(value: float | None) -> str:
    """Write a difference, always with its sign."""
    text = figure(value)
    return f"+{text}" if value is not None and math.isfinite(value) and value > 0 else text


def between(low: float | None, high: float | None, *, sign: bool = False) -> str:
    """Write an interval as ``"12.6 to 13.5"``, or "" when there is none."""
    if low is None or high is None:
        return ""
    write = signed if sign else figure
    return f"{write(low)} to {write(high)}"


def _scaled(value: float, units: Sequence[str]) -> str:
    step = 0
    while abs(value) >= 999.5 and step < len(units) - 1:
        value /= 1000
        step += 1
    digits = 0 if step == 0 or abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    return f"{value:,.{digits}f}{units[step]}"


def bytes_(value: float | None) -> str:
    """Write a size: ``bytes_(12_600_000)`` is ``"12.6 MB"`` (1 MB = 10^6 bytes; the space does not break)."""
    if value is None:
        return NOT_RECORDED
    if not math.isfinite(value):
        return "not finite"
    if abs(value) >= 1e18:
        return f"{figure(value)}\u00a0B"
    return _scaled(value, ("\u00a0B", "\u00a0kB", "\u00a0MB", "\u00a0GB", "\u00a0TB", "\u00a0PB"))


def count(value: float | None) -> str:
    """Write a count: ``count(3_151_872)`` is ``"3.15 M"``."""
    if value is None:
        return NOT_RECORDED
    if not math.isfinite(value):
        return "not finite"
    if abs(value) >= 1e18:
        return figure(value)
    if abs(value) < 100_000:
        return f"{value:,.0f}"
    return _scaled(value, ("", "\u00a0k", "\u00a0M", "\u00a0B", "\u00a0T"))


def share(part: float | None, whole: float | None) -> str:
    """Write a share in percent, or "" when it cannot be told."""
    if part is None or not whole or not math.isfinite(part) or not math.isfinite(whole):
        return ""
    percent = 100 * part / whole
    return f"{percent:.0f}\u00a0%" if percent >= 10 or percent == 0 else f"{percent:.1f}\u00a0%"


def seconds_(value: float | None) -> str:
    """Write a time: tenths below ten seconds, then as people say it."""
    if value is None:
        return NOT_RECORDED
    if not math.isfinite(value):
        return "not finite"
    return (f"{value:.1f} s" if value < 9.95 else duration(value)).replace(" ", "\u00a0")


def moment(text: str) -> str:
    """Write an ISO 8601 time as ``"2025-03-14 09:26 UTC"``; any other text as it is."""
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        return text
    zone = "" if found.tzinfo is None else " UTC" if not found.utcoffset() else f" {found:%z}"
    return f"{found:%Y-%m-%d %H:%M}{zone}"


def listing(items: Iterable[str], *, joint: str = " and ") -> str:
    """Join texts: ``"a"``, ``"a and b"``, ``"a, b and c"``."""
    *rest, last = list(items) or [""]
    return f"{', '.join(rest)}{joint}{last}" if rest else last


def metric_name(name: str) -> str:
    """Write a metric's name for a heading: ``matrix-nuclear-norm.mnn`` is ``matrix nuclear norm: mnn``."""
    method, dot, inner = name.partition(".")
    return f"{method.replace('-', ' ')}: {inner}" if dot and inner else name.replace("-", " ")


def metric_parts(name: str) -> tuple[str, str]:
    """Split a metric's name for a table: ``matrix-nuclear-norm.mnn`` is ``("mnn", "matrix nuclear norm")``."""
    method, dot, inner = name.partition(".")
    plain = method.replace("-", " ")
    return (inner.replace("_", " "), plain) if dot and inner else (plain, "")


def options_of(method: MethodUse) -> str:
    """Write a method's options as ``"rank 16, sparsity 0.5"``."""
    return ", ".join(f"{key} {value}"[:120] for key, value in method.options.items())


def direction(metric: str) -> int:
    """Return -1 where lower is better, +1 where higher is better, 0 where that is not known."""
    last = metric.rpartition(".")[2].lower()
    for names, sign in ((_LOWER_IS_BETTER, -1), (_HIGHER_IS_BETTER, 1)):
        if last in names or any(last.endswith((f"_{name}", f"-{name}")) for name in names):
            return sign
    return 0


def reading_of(effect: Effect) -> str:
    """Say what a difference means.

    Returns
    -------
    str
        ``"helps"`` or ``"hurts"`` where the interval lies on one side of zero and the metric has a known good
        direction, ``"raises it"`` or ``"lowers it"`` where it has none; ``"within the spread"`` where the interval
        holds zero, ``"no difference"`` where it is zero alone; ``"no spread measured"`` without an interval;
        ``"not measured"`` without a difference.
    """
    if effect.difference is None or not math.isfinite(effect.difference):
        return "not measured"
    if effect.low is None or effect.high is None or not (math.isfinite(effect.low) and math.isfinite(effect.high)):
        return "no spread measured"
    if effect.low == effect.high == 0:
        return "no difference"
    if effect.low <= 0 <= effect.high:
        return "within the spread"
    good = direction(effect.metric)
    if not good:
        return "raises it" if effect.difference > 0 else "lowers it"
    return "helps" if effect.difference * good > 0 else "hurts"


def effect_sentence(effect: Effect) -> str:
    """Say in one sentence what a method bought."""
    name, metric = effect.method or "an unnamed method", metric_name(effect.metric) or "an unnamed metric"
    reading = reading_of(effect)
    if reading == "not measured":
        return f"{name}: its effect on {metric} was not measured."
    difference = effect.difference or 0.0
    if reading == "no difference":
        return f"{name} made no difference in {metric}."
    if reading == "within the spread":
        span = between(effect.low, effect.high, sign=True)
        return f"{name}: a difference of {signed(difference)} in {metric} is within the spread ({span})."
    changed = f"{name} {'raised' if difference > 0 else 'lowered'} {metric} by {figure(abs(difference))}"
    if reading == "no spread measured":
        return f"{changed}; no spread was measured, so this may be chance."
    low, high = sorted((abs(effect.low or 0.0), abs(effect.high or 0.0)))
    return f"{changed} ({between(low, high)})."


_DEEDS = {
    "select": ("selected its training rows", "selection"),
    "train": ("trained it", "training"),
    "compress": ("compressed it", "compression"),
    "extend": ("extended it", "extension"),
    "merge": ("merged it", "merging"),
    "evaluate": ("evaluated it", "evaluation"),
}


def _article(noun: str) -> str:
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"


def _deed(row: Row) -> str:
    verb = _DEEDS.get(row.kind, (f"ran {row.title}", ""))[0]
    names = [method.uses for method in row.methods if method.uses]
    return f"{verb} with {listing(names)}" if names else verb


def headline(run: Run) -> tuple[str, str]:
    """Say what a run did and where it ended.

    Parameters
    ----------
    run : Run

    Returns
    -------
    tuple of str
        What was done; what came out. The second is "" when nothing was measured.
    """
    rows = rows_of(run, main_arm(run)) or (rows_of(run, run.arms[0].name) if run.arms else [])
    return _did(run, rows), _outcome(run, rows)


def _trained_tokens(run: Run) -> int | None:
    """Return the tokens the first training stage of the recipe asks for; the data may hold more or fewer."""
    stages = run.recipe.get("stages")
    for stage in stages if isinstance(stages, list) else ():
        train = stage.get("train") if isinstance(stage, dict) else None
        tokens = train.get("tokens") if isinstance(train, dict) else None
        if isinstance(tokens, int) and 0 < tokens < 2**63:
            return tokens
    return None


def _did(run: Run, rows: Sequence[Row]) -> str:
    model = f"{_article(run.model.family)} model" if run.model.family else run.model.source or "a model"
    if run.model.parameters:
        model = f"{model} ({count(run.model.parameters)} parameters)"
    tokens = _trained_tokens(run)
    text = " of ".join(part for part in (f"{count(tokens)} tokens" if tokens else "", run.data.source) if part)
    ends = {
        "failed": " It failed before its end.",
        "running": " It was still running when this page was written.",
        "interrupted": " It was interrupted; the same command resumes it.",
    }
    start = f"This run took {model}"
    if not rows:
        source = f" and data from {run.data.source}" if run.data.source else ""
        return f"{start}{source}; no stage is finished yet." + ends.get(run.status, "")
    deeds = [_deed(row) for row in rows]
    first = next((i for i, row in enumerate(rows) if row.kind == "train"), None)
    if first is not None and text:
        verb, _, methods = deeds[first].partition(" with ")
        deeds[first] = f"{verb} on {text}" + (f" with {methods}" if methods else "")
    return f"{start}, {listing(deeds, joint=', and ' if len(deeds) > 2 else ' and ')}." + ends.get(run.status, "")


def _outcome(run: Run, rows: Sequence[Row]) -> str:
    metric = main_metric(run)
    measured = [row for row in rows if metric in row.metrics]
    if not measured:
        return ""
    last = measured[-1]
    value = last.metrics[metric]
    text = f"It ends at {metric_name(metric)} {figure(value.value)}{_bracket(value)}"
    if last.size is not None:
        text += f" in {bytes_(last.size)}"
    before = next((row for row in measured if row.size and last.size and row.size > 1.02 * last.size), None)
    if before is None:
        return text + "."
    noun = _DEEDS.get(before.kind, ("", ""))[1]
    return (
        f"{text}; after {noun or before.title} it stood at {figure(before.metrics[metric].value)} "
        f"in {bytes_(before.size)}."
    )


def _bracket(value: Measured) -> str:
    span = between(value.low, value.high)
    return f" ({span})" if span else ""
