"""What an evaluation found: its counts, its ``run.json``, its table on the terminal."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gnomon.catalog import Card
from gnomon.common.figures import Figure

__all__ = ["Result", "counts_of", "facts_of", "log_facts", "remarks_on", "show"]


@dataclass
class Result:
    """What an evaluation or an offline scoring found."""

    figures: Mapping[str, Figure]
    counts: Mapping[str, int]
    baselines: Mapping[str, float] = field(default_factory=dict)
    notes: Sequence[str] = ()


def counts_of(log: Any) -> dict[str, int]:
    """Count samples, epochs included, and the answers that could not be scored by reason."""
    samples = log.samples or []
    counts = {"samples": len(samples)}
    for sample in samples:
        for reason in {score.reason for score in (sample.scores or {}).values() if score.reason}:
            counts[str(reason)] = counts.get(str(reason), 0) + 1
    return counts


def remarks_on(log: Any) -> list[str]:
    """Say how many answers could not be used, and how many were cut off."""
    counts = counts_of(log)
    missing = {k: v for k, v in counts.items() if k != "samples"}
    said = []
    if missing:
        reasons = ", ".join(f"{v} {k.replace('_', ' ')}" for k, v in missing.items())
        said.append(f"{sum(missing.values())} of {counts['samples']} answers could not be used: {reasons}.")
    cut = sum(sample.output.stop_reason == "max_tokens" for sample in log.samples or [])
    if cut:
        said.append(f"{cut} of {counts['samples']} answers were cut at the limit of tokens (-T max_tokens=...).")
    return said


def facts_of(card: Card, options: Mapping[str, Any], result: Result, started: float) -> dict[str, Any]:
    """Return what run.json says of every result."""
    from importlib.metadata import PackageNotFoundError, version

    from gnomon.common.environment import environment

    packages = {}
    for name in ("inspect-ai", "openai"):
        with contextlib.suppress(PackageNotFoundError):
            packages[name] = version(name)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {
        "format": 1,
        "kind": "evaluation",
        "name": card.slug,
        "status": "finished",
        "created": now,
        "finished": now,
        "seconds": round(time.monotonic() - started, 2),
        "environment": {**environment(), **packages},
        "task": {"slug": card.slug, "options": json.loads(json.dumps(dict(options), default=str))},
        "metrics": {name: figure.plain() for name, figure in result.figures.items()},
        "confidence": 0.95,
        "counts": dict(result.counts),
        "baselines": dict(result.baselines),
        "warnings": list(result.notes),
    }


def log_facts(log: Any, identity: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return what run.json says of an evaluation of a model besides; `path` is the log's place in the folder."""
    usage = {name: use.model_dump(exclude_none=True) for name, use in log.stats.model_usage.items()}
    metadata = log.eval.metadata or {}
    return {
        **identity,
        "created": log.stats.started_at or log.eval.created,
        "finished": log.stats.completed_at,
        "data": {
            "source": ", ".join(metadata.get("data", [])),
            "sha256": metadata.get("data_sha256", ""),
            "rows": log.eval.dataset.samples,
        },
        "generation": log.eval.model_generate_config.model_dump(exclude_none=True)
        | log.plan.config.model_dump(exclude_none=True),
        "usage": usage,
        "log": str(path),
    }


def show(card: Card, result: Result, facts: Mapping[str, Any], what: str, *, as_json: bool) -> None:
    """Print the result as a table, or `facts` as JSON."""
    if as_json:
        print(json.dumps(facts))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console() if sys.stdout.isatty() else Console(width=140, no_color=True)
    table = Table(title=f"{card.slug}: {what}", box=box.SIMPLE_HEAD, title_justify="left")
    for head in ("figure", "value", "standard error", "95 % interval", "n"):
        table.add_column(Text(head), justify="left" if head == "figure" else "right")
    for name, figure in result.figures.items():
        plain = figure.plain()
        number = [("-" if plain[k] is None else f"{plain[k]:.4f}") for k in ("value", "stderr")]
        spread = "-" if plain["low"] is None else f"{plain['low']:.4f} to {plain['high']:.4f}"
        table.add_row(*map(Text, (name, *number, spread, str(figure.n or "-"))))
    console.print(table)
    for title, values in (("counts", result.counts), ("baselines", result.baselines)):
        if values:
            text = ", ".join(f"{k} {v:.4g}" for k, v in values.items())
            console.print(f"{title}: {text}", markup=False, highlight=False, soft_wrap=True)
    for note in result.notes:
        console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
