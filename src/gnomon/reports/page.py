"""The report of one run: a run folder in, one self-contained HTML page out."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

import gnomon
from gnomon.common.files import write_text
from gnomon.reports import words
from gnomon.reports.arms import arm_rows
from gnomon.reports.pictures import arm_styles, pictures_of
from gnomon.reports.reading import Effect, Layer, Run, quarantined_rows, read_run
from gnomon.reports.tables import Row, arm_names, main_metric, rows_of, runs_of, split_metrics, stage_row

__all__ = ["render_report", "write_report"]

_LAYER_ROWS = 150


@lru_cache(maxsize=1)
def environment() -> Environment:
    """Return the template environment: autoescape on for every template, an unknown name is an error."""
    found = Environment(
        loader=PackageLoader("gnomon.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters.update(
        figure=words.figure,
        signed=words.signed,
        size=words.bytes_,
        count=words.count,
        time=words.seconds_,
        metric=words.metric_name,
        parts=words.metric_parts,
        options=words.options_of,
        listing=words.listing,
        moment=words.moment,
    )
    found.globals.update(between=words.between, share=words.share, gnomon_version=gnomon.__version__)
    return found


@dataclass(frozen=True)
class Bar:
    """Where an interval stands in a small drawing that is 120 units wide with zero in the middle."""

    low: float
    value: float
    high: float
    margin: float | None = None


def bar(
    low: float | None, value: float | None, high: float | None, scale: float, margin: float | None = None
) -> Bar | None:
    """Place an interval, or return None when it has no finite ends."""
    numbers = (low, value, high)
    if scale <= 0 or any(number is None or not math.isfinite(number) for number in numbers):
        return None
    spots = [60 + 54 * max(-1.0, min(1.0, (number or 0.0) / scale)) for number in numbers]
    edge = None if margin is None or not math.isfinite(margin) else 60 + 54 * max(-1.0, min(1.0, margin / scale))
    return Bar(spots[0], spots[1], spots[2], edge)


def reach(numbers: Sequence[float | None]) -> float:
    """Return the largest finite magnitude, the half width of a drawing."""
    return max((abs(n) for n in numbers if n is not None and math.isfinite(n)), default=0.0)


def write_report(run_folder: str | Path) -> Path:
    """Write ``report.html`` into a run folder.

    The page holds everything it shows (pictures as data URIs, styles inline), needs no JavaScript and no network,
    and is the same bytes for the same run.json. It is written under a temporary name and renamed.

    Parameters
    ----------
    run_folder : str or Path
        A folder with a run.json, of a finished run or of one that is still running, failed or was interrupted.

    Returns
    -------
    Path
        The page.

    Raises
    ------
    DataError
        When there is no run.json, or it is no JSON, or its format is unknown.

    Examples
    --------
    >>> write_report("runs/quickstart-1a2b3c")  # doctest: +SKIP
    PosixPath('runs/quickstart-1a2b3c/report.html')
    """
    run = read_run(run_folder)
    page = run.folder / "report.html"
    write_text(page, render_report(run))
    return page


def render_report(run: Run) -> str:
    """Return the HTML of a run's report."""
    names = arm_names(run)
    styles = arm_styles(run)
    main = names[0] if names else ""
    metric = main_metric(run)
    shown, more = split_metrics(run)
    did, outcome = words.headline(run)
    effects = [_effect(effect, run.ablation) for effect in run.ablation]
    first = [effect for effect in effects if effect["row"].metric == metric]
    moved = {effect["row"].metric for effect in effects if effect["reading"] != "no difference"}
    rest = [effect for effect in effects if effect["row"].metric in moved - {metric}]
    same = dict.fromkeys(e.metric for e in run.ablation if e.metric not in moved | {metric})
    return environment().get_template("report.html").render(
        run=run,
        did=did,
        outcome=outcome,
        bought=first,
        tiles=_tiles(run, rows_of(run, main), metric),
        metrics=shown,
        more_metrics=more,
        main=main,
        tables=[
            {
                "name": name,
                "color": styles[name].color,
                "rows": rows_of(run, name),
                "seeds": [
                    {"seed": arm.seed, "rows": [stage_row(stage) for stage in arm.stages]} for arm in runs_of(run, name)
                ],
            }
            for name in names
        ],
        pictures=pictures_of(run),
        arms=arm_rows(run),
        effects=[part for part in (first, rest) if part],
same=[words.metric_name(name) for name in same],
        layers=_layer_tables(run, main),
        quarantine=quarantined_rows(run),
        recipe=yaml_text(run.recipe),
        machine=machine_rows(run.environment),
    )  # fmt: skip


def _effect(effect: Effect, all_effects: Sequence[Effect]) -> dict[str, Any]:
    same = [e for e in all_effects if e.metric == effect.metric]
    scale = reach([n for e in same for n in (e.low, e.difference, e.high)])
    seeds = f"{effect.seeds} seed{'s' if effect.seeds > 1 else ''}" if effect.seeds else ""
    spread = {"seeds": f"range over {seeds or 'the seeds'}", "windows": f"text windows{f', {seeds}' if seeds else ''}"}
    return {
        "row": effect,
        "sentence": words.effect_sentence(effect),
        "reading": words.reading_of(effect),
        "bar": bar(effect.low, effect.difference, effect.high, scale),
        "spread": spread.get(effect.spread, effect.spread),
    }


def _tiles(run: Run, rows: Sequence[Row], metric: str) -> list[dict[str, str]]:
    """Return the key figures above the fold: name, value, what it was before."""
    if not rows:
        return []
    tiles: list[dict[str, str]] = []

    def add(name: str, values: Sequence[str], note: str = "") -> None:
        known = [value for value in values if value != words.NOT_RECORDED]
        if not known:
            return
        before = f"from {known[0]}" if known[0] != known[-1] else ""
        tiles.append({"name": name, "value": known[-1], "note": "; ".join(t for t in (note, before) if t)})

    measured = [row.metrics[metric] for row in rows if metric in row.metrics]
    if measured:
        add(words.metric_name(metric), [words.figure(m.value) for m in measured])
    add("size", [words.bytes_(row.size) for row in rows])
    last = rows[-1]
    add("parameters", [words.count(last.parameters)], _nonzero(last))
    peak = max((row.peak_memory for row in rows if row.peak_memory is not None), default=None)
    add("peak memory", [words.bytes_(peak)])
    spent = [row.seconds for row in rows if row.seconds is not None]
    add("time", [words.seconds_(run.seconds if run.seconds is not None else sum(spent) if spent else None)])
    return tiles


def _nonzero(row: Row) -> str:
    part = words.share(row.nonzero, row.parameters)
    return f"{part} non-zero" if part else ""


def _layer_tables(run: Run, main: str) -> list[dict[str, Any]]:
    """Return the numbers behind the pictures of single layers, first seed of the main arm."""
    tables = []
    for stage in (stage for arm in runs_of(run, main)[:1] for stage in arm.stages if stage.layers):
        facts = list(dict.fromkeys(fact for layer in stage.layers for fact in layer.facts))[:8]
        shown: Sequence[Layer] = stage.layers[:_LAYER_ROWS]
        tables.append({"stage": stage.title, "facts": facts, "layers": shown, "left": len(stage.layers) - len(shown)})
    return tables


def yaml_text(recipe: Mapping[str, Any]) -> str:
    """Write a recipe as YAML, "" when there is none."""
    if not recipe:
        return ""
    try:
        return yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True, width=96).rstrip()
    except (RecursionError, yaml.YAMLError):
        return "# nested too deeply to be written here: see run.json"


_MACHINE = {
    "gnomon": "gnomon", "python": "Python", "torch": "PyTorch", "transformers": "Transformers", "peft": "PEFT",
    "platform": "platform", "cpu": "processor", "cores": "cores", "memory_bytes": "memory", "gpus": "accelerators",
}  # fmt: skip


def machine_rows(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Write an environment as rows of name and text, the known names first."""
    keys = [key for key in _MACHINE if key in found] + [key for key in found if key not in _MACHINE]
    return [(_MACHINE.get(key, key), _machine_text(key, found[key])) for key in keys]


def _machine_text(key: str, value: object) -> str:
    if key == "memory_bytes" and isinstance(value, (int, float)):
        return words.bytes_(float(value)) if abs(value) < 2**63 else "not finite"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
