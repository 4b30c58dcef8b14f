"""Running claims and the ledger of their outcomes: ``claims/ledger.json``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from gnomon import catalog
from gnomon.catalog import Card, ClaimCard
from gnomon.claims.experiment import Experiment, judge, worst
from gnomon.common.engine import Engine, run_all
from gnomon.common.environment import environment
from gnomon.common.files import read_json, write_json
from gnomon.errors import ConfigError, DataError, nearest
from gnomon.progress import Progress, Task, quiet

__all__ = ["LEDGER", "read_ledger", "run_claim", "run_claims", "update_ledger"]

LEDGER = Path("claims") / "ledger.json"


def _experiment(target: str) -> Experiment:
    found = catalog.resolve(target)
    if not isinstance(found, Experiment):
        raise ConfigError(f"{target} is no experiment. Declare it with gnomon.claims.experiment.experiment.")
    return found


def _measure_seed(
    target: str, scale: str, seed: int, tell: Callable[[str, float], None] = lambda arm, value: None
) -> dict[str, float]:
    """Measure all arms of an experiment with one seed, in one process, since arms share work."""
    trial = _experiment(target)
    values: dict[str, float] = {}
    for arm in trial.arms:
        values[arm] = trial(arm, seed, scale)
        tell(arm, values[arm])
    return values


def _measure_item(scale: str, item: tuple[str, int]) -> tuple[dict[str, float] | DataError, float]:
    """Measure one (experiment, seed) on a worker; return the arms' values and the seconds it took.

    Missing data is returned, not raised: it must not end the other tasks.
    """
    started = time.monotonic()
    try:
        return _measure_seed(item[0], scale, item[1]), time.monotonic() - started
    except DataError as error:
        return error, time.monotonic() - started


def run_claim(
    card: Card,
    claim: ClaimCard,
    *,
    scale: str = "small",
    seeds: Sequence[int] | None = None,
    progress: Progress | None = None,
    engine: Engine = "local",
) -> dict[str, Any]:
    """Measure all arms of one claim with all seeds and judge its relations.

    Parameters
    ----------
    card, claim : Card, ClaimCard
    scale : str, default "small"
    seeds : sequence of int, optional
        Default: the claim's own, at least three.
    progress : Progress, optional
    engine : {"local", "ray"}, default "local"
        With ``"ray"`` every seed is a task of its own (see `gnomon.common.engine.run_all`).

    Returns
    -------
    dict
        One entry of the ledger, JSON-plain.
    """
    entries: list[dict[str, Any]] = []
    _measure_all([(card, claim)], scale, seeds, progress or quiet(), engine, entries.append)
    return entries[0]


def _seeds_of(claim: ClaimCard, seeds: Sequence[int] | None) -> tuple[int, ...]:
    chosen = tuple(_experiment(claim.run).seeds if seeds is None else seeds)
    if len(set(chosen)) < 3:
        raise ConfigError(f"seeds = {chosen}: a verdict needs at least three different seeds.")
    return chosen


def _measure_all(
    chosen: Sequence[tuple[Card, ClaimCard]],
    scale: str,
    seeds: Sequence[int] | None,
    progress: Progress,
    engine: Engine,
    enter: Callable[[dict[str, Any]], None],
    missing: Callable[[Card, ClaimCard, DataError], None] | None = None,
) -> None:
    """Measure claims and hand each one's ledger entry to `enter` as it is complete."""
    plan = [(card, claim, _seeds_of(claim, seeds)) for card, claim in chosen]
    if engine == "ray":
        _measure_on_ray(plan, scale, progress, enter, missing)
        return
    for card, claim, of_claim in plan:
        started = time.monotonic()
        by_seed: dict[int, dict[str, float]] = {}
        with progress.task(f"{card.slug}/{claim.id}", len(_experiment(claim.run).arms) * len(of_claim)) as task:
            try:
                for seed in of_claim:  # seed by seed, so that what drifts on the machine hits all arms alike
                    by_seed[seed] = _measure_seed(claim.run, scale, seed, partial(_tell, task, seed))
            except DataError as error:
                if missing is None:
                    raise
                missing(card, claim, error)
                continue
        enter(_entry(card, claim, scale, by_seed, time.monotonic() - started, engine))


def _tell(task: Task, seed: int, arm: str, value: float) -> None:
    task.advance(note=f"{arm}, seed {seed}: {value:.4g}")


def _measure_on_ray(
    plan: Sequence[tuple[Card, ClaimCard, tuple[int, ...]]],
    scale: str,
    progress: Progress,
    enter: Callable[[dict[str, Any]], None],
    missing: Callable[[Card, ClaimCard, DataError], None] | None,
) -> None:
    """Make every seed of every claim a task; all of them wait for workers together."""
    items = [(place, seed) for place, (_, _, of_claim) in enumerate(plan) for seed in of_claim]
    found: dict[int, dict[int, tuple[dict[str, float], float]]] = {place: {} for place in range(len(plan))}
    with progress.task("claims", len(items)) as task:

        def on_result(position: int, result: tuple[dict[str, float] | DataError, float]) -> None:
            place, seed = items[position]
            task.advance()
            card, claim, of_claim = plan[place]
            values, took = result
            if isinstance(values, DataError):
                if missing is None:
                    raise values
                if seed == of_claim[0]:
                    missing(card, claim, values)
                return
            found[place][seed] = values, took
            if len(found[place]) == len(of_claim):
                by_seed = {seed: found[place][seed][0] for seed in of_claim}
                seconds = sum(took for _, took in found[place].values())
                enter(_entry(card, claim, scale, by_seed, seconds, "ray"))

        targets = [(plan[place][1].run, seed) for place, seed in items]
        run_all(partial(_measure_item, scale), targets, engine="ray", on_result=on_result)


def _entry(
    card: Card, claim: ClaimCard, scale: str, by_seed: dict[int, dict[str, float]], seconds: float, engine: Engine
) -> dict[str, Any]:
    trial = _experiment(claim.run)
    values = {arm: {seed: found[arm] for seed, found in by_seed.items()} for arm in trial.arms}
    outcomes = [judge(relation, values) for relation in trial.relations]
    return {
        "slug": card.slug,
        "id": claim.id,
        "says": claim.says,
        "paper_figure": claim.paper,
        "paper": dict(trial.paper) or None,
        "unit": trial.unit,
        "scale": scale,
        "arms": {arm: {str(s): v for s, v in of_arm.items()} for arm, of_arm in values.items()},
        "relations": [asdict(outcome) for outcome in outcomes],
        "verdict": worst([outcome.verdict for outcome in outcomes]),
        "seconds": round(seconds, 1),
        "engine": engine,
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
    engine: Engine = "local",
) -> list[dict[str, Any]]:
    """Run the claims of some methods (default: of all) and enter each outcome in the ledger as it comes.

    Among all claims, those whose real data is not at hand are passed over with a message.

    Parameters
    ----------
    slugs : sequence of str, default all methods
    only : str, optional
        The id of one claim.
    scale, seeds, progress, engine
        As for `run_claim`.
    ledger : Path, optional
        The ledger to update; None writes none.

    Returns
    -------
    list of dict
    """
    entries: list[dict[str, Any]] = []

    def enter(entry: dict[str, Any]) -> None:
        entries.append(entry)
        if ledger is not None:
            update_ledger(ledger, entry)

    shown = progress or quiet()

    def missing(card: Card, claim: ClaimCard, error: DataError) -> None:
        shown.say(f"{card.slug}/{claim.id}: not measured, the ledger keeps what it has. {error}")

    # asked for by name, a claim without its data is a mistake; among all claims it is passed over
    passed_over = None if slugs else missing
    _measure_all(list(_selected(slugs, only)), scale, seeds, shown, engine, enter, passed_over)
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
