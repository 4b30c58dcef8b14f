"""``gnomon claims``: run and print."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gnomon.errors import ConfigError

__all__ = ["run_command", "table_command"]


def run_command(
    slugs: Sequence[str],
    every: bool,
    claim: str | None,
    scale: str,
    seeds: int | None,
    ledger: Path,
    as_json: bool,
    engine: str = "local",
) -> None:
    """Carry out ``gnomon claims run``."""
    from gnomon import catalog
    from gnomon.cli.running import quiet_libraries
    from gnomon.progress import Progress

    if bool(slugs) == every:
        names = ", ".join(card.slug for card in catalog.methods())
        raise ConfigError(f"Name the methods whose claims to run, or --all (not both). Methods: {names}.")
    for slug in slugs:
        catalog.get(slug)
    if seeds is not None and seeds < 3:
        raise ConfigError(f"--seeds {seeds}: a verdict needs at least 3 seeds.")
    quiet_libraries()
    logging.getLogger("gnomon").setLevel(logging.INFO)
    from gnomon.claims.ledger import run_claims
    from gnomon.common.engine import check_engine
    from gnomon.reports import write_ledger

    chosen = None if seeds is None else tuple(range(seeds))
    entries = run_claims(
        slugs, only=claim, scale=scale, seeds=chosen, ledger=ledger, progress=Progress(), engine=check_engine(engine)
    )
    if not entries:
        raise ConfigError(f"No method has a claim {claim!r}. `gnomon show SLUG` lists a method's claims.")
    write_ledger(ledger, ledger.parent)
    if as_json:
        print(json.dumps(entries))
        return
    for entry in entries:
        _print_entry(entry)


def _print_entry(entry: dict[str, Any]) -> None:
    print(f"{entry['slug']}/{entry['id']}: {entry['says']}")
    print(f"  paper     {entry['paper_figure']}")
    print(f"  measured  {entry['unit']}, scale {entry['scale']}, {entry['seconds']:.0f} s")
    for arm, values in entry["arms"].items():
        numbers = list(values.values())
        mean = sum(numbers) / len(numbers)
        paper = (entry["paper"] or {}).get(arm)
        print(
            f"    {arm:<24} {mean:.4g}  (seeds: {', '.join(f'{v:.4g}' for v in numbers)})"
            + (f"  paper: {paper:g}" if paper is not None else "")
        )
    for found in entry["relations"]:
        print(
            f"  {found['text']}: gap {found['gap']:.4g}, 95 % interval {found['low']:.4g} to {found['high']:.4g}"
            f" -> {found['verdict']}"
        )
    print(f"  verdict   {entry['verdict']}")


def table_command(ledger: Path, as_json: bool) -> None:
    """Carry out ``gnomon claims table``."""
    from gnomon.claims.ledger import read_ledger
    from gnomon.reports import write_ledger

    book = read_ledger(ledger)
    if not book["entries"]:
        raise ConfigError(f"{ledger} holds no claims yet. Measure them with: gnomon claims run --all")
    if as_json:
        print(json.dumps(book))
        return
    for entry in book["entries"]:
        _print_entry(entry)
    print("\n".join(str(path) for path in write_ledger(ledger, ledger.parent)), file=sys.stderr)
