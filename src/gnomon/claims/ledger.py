"""Running claims and the ledger of their outcomes: ``claims/ledger.json``."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gnomon import catalog
from gnomon.catalog import Card, ClaimCard
from gnomon.claims.experiment import Experiment, judge, worst
from gnomon.common.environment import environment
from gnomon.common.files import read_json, write_json
from gnomon.errors import ConfigError, DataError, nearest
from gnomon.progress import Progress, quiet

__all__ = ["LEDGER", "read_ledger", "run_claim", "run_claims", "update_ledger"]

LEDGER = Path("claims") / "ledger.json"


def _experiment(claim: ClaimCard) -> Experiment:
    found = catalog.resolve(claim.run)
    if not isinstance(found, Experiment):
        raise ConfigError(f"{claim.run} is no experiment. Declare it with gnomon.claims.experiment.experiment.")
    return found


def run_claim(
    card: Card,
    claim: ClaimCard,
    *,
    scale: str = "small",
    seeds: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure all arms of one claim with all seeds and judge its relations.

    Parameters
    ----------
    card, claim : Card, ClaimCard
    scale : str, default "small"
    seeds : sequence of int, optional
        Default: the claim's own, at least three.
    progress : Progress, optional

    Returns
    -------
    dict
        One entry of the ledger, JSON-plain.
    """
    trial = _experiment(claim)
    chosen = tuple(trial.seeds if seeds is None else seeds)
    if len(set(chosen)) < 3:
        raise ConfigError(f"seeds = {chosen}: a verdict needs at least three different seeds.")
    started = time.monotonic()
    values: dict[str, dict[int, float]] = {arm: {} for arm in trial.arms}
    shown = progress or quiet()
    with shown.task(f"{card.slug}/{claim.id}", len(trial.arms) * len(chosen)) as task:
        for seed in chosen:  # seed by seed, so that what drifts on the machine hits all arms alike
            for arm in trial.arms:
                values[arm][seed] = trial(arm, seed, scale)
                task.advance(note=f"{arm}, seed {seed}: {values[arm][seed]:.4g}")
    outcomes = [judge(relation, values) for relation in trial.relations]
    return {
        "slug": card.slug,
        "id": claim.id,
        "says": claim.says,
        "paper_figure": claim.paper,
        "paper": dict(trial.paper) or None,
        "unit": trial.unit,
        "scale": scale,
        "arms": {arm: {str(s): v for s, v in by_seed.items()} for arm, by_seed in values.items()},
        "relations": [asdict(outcome) for outcome in outcomes],
        "verdict": worst([outcome.verdict for outcome in outcomes]),
        "seconds": round(time.monotonic() - started, 1),
        "environment": environment(),
        "run_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _selected(slugs: Sequence[str], only: str | None) -> Iterable[tuple[Card, ClaimCard]]:
    for card in [catalog.get(slug) for slug in slugs] if slugs else catalog.methods():
        ids = [c.id for c in card.claims]
        if only is not None and only not in ids and slugs:
            raise ConfigError(f"{card.slug} has no claim {only!r}. {nearest(only, ids, noun='claim')}")
        for claim in card.claims:
            if only is None or claim.id == only:
                yield card, claim


def run_claims(
    slugs: Sequence[str] = (),
    *,
    only: str | None = None,
    scale: str = "small",
    seeds: Sequence[int] | None = None,
    ledger: Path | None = None,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Run the claims of some methods (default: of all) and enter each outcome in the ledger as it comes.

    Parameters
    ----------
    slugs : sequence of str, default all methods
    only : str, optional
        The id of one claim.
    scale, seeds, progress
        As for `run_claim`.
    ledger : Path, optional
        The ledger to update; None writes none.

    Returns
    -------
    list of dict
    """
    entries = []
    for card, claim in list(_selected(slugs, only)):
        entries.append(run_claim(card, claim, scale=scale, seeds=seeds, progress=progress))
        if ledger is not None:
            update_ledger(ledger, entries[-1])
    return entries


def read_ledger(path: Path) -> dict[str, Any]:
    """Read a ledger; a missing file is an empty one.

    Raises
    ------
    DataError
        When the file is no ledger of this format.
    """
    if not path.exists():
        return {"format": 1, "entries": []}
    try:
        found = read_json(path)
    except ValueError as error:
        raise DataError(f"no valid JSON ({error}). Remove it and run the claims again.", file=path) from error
    if not isinstance(found, dict) or found.get("format") != 1:
        raise DataError("not a claims ledger of format 1. Remove it and run the claims again.", file=path)
    return found


def update_ledger(path: Path, entry: dict[str, Any]) -> None:
    """Put one outcome into the ledger, in the place of an older one of the same claim and scale."""
    book = read_ledger(path)
    key = (entry["slug"], entry["id"], entry["scale"])
    rest = [e for e in book["entries"] if (e["slug"], e["id"], e["scale"]) != key]
    book["entries"] = sorted([*rest, entry], key=lambda e: (e["slug"], e["id"], e["scale"]))
    write_json(path, book)
