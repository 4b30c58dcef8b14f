"""Runs a recipe: every arm and seed through its stages, into a run folder that survives being killed."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from gnomon import __version__
from gnomon.common.engine import Engine
from gnomon.common.environment import environment
from gnomon.common.files import content_hash, write_json
from gnomon.common.layers import family, unwrap
from gnomon.common.memory import PeakMemory
from gnomon.common.models import export_model, load_model, save_model
from gnomon.common.ranks import agree, ranks
from gnomon.errors import ModelError
from gnomon.progress import Progress, quiet
from gnomon.recipes.arms import Arm, arms_of, differences
from gnomon.recipes.measuring import depth_of, noted_warnings, size_of
from gnomon.recipes.options import check_recipe
from gnomon.recipes.prepare import build_model, check_methods, prepare_data, source_hash
from gnomon.recipes.schema import EvaluateStage, Recipe, Stage
from gnomon.recipes.stages import StageContext, run_stage
from gnomon.recipes.stages.context import Prepared
from gnomon.recipes.stages.evaluate import evaluate
from gnomon.recipes.stages.select import SELECTED
from gnomon.recipes.store import RunFolder

__all__ = ["RunResult", "run_recipe"]

log = logging.getLogger("gnomon")
START = "start"


@dataclass(frozen=True)
class RunResult:
    """A finished run: its folder and the content of its ``run.json``."""

    folder: Path
    run: dict[str, Any]
    report: Path | None = None

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics at the end of the arm ``all``, first seed."""
        stages = self.run["arms"][0]["stages"]
        return {name: figure["value"] for name, figure in (stages[-1]["metrics"] if stages else {}).items()}


@dataclass
class _Run:
    """The state of one run in one process."""

    recipe: Recipe
    data: Prepared
    store: RunFolder
    progress: Progress
    run: dict[str, Any]
    root: str
    engine: Engine
    on_change: Callable[[dict[str, Any]], None]
    windows: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)

    def publish(self) -> None:
        """Write ``run.json`` as it stands and tell whoever watches; the first rank alone does."""
        if self.store.writes:
            self.store.write_run(self.run)
            self.on_change(self.run)


def run_recipe(
    recipe: Recipe,
    *,
    out: str | Path | None = None,
    progress: Progress | None = None,
    on_change: Callable[[dict[str, Any]], None] | None = None,
    engine: Engine = "local",
) -> RunResult:
    """Run a recipe, or go on with a run that was interrupted; finished stages are skipped.

    Parameters
    ----------
    recipe : Recipe
    out : str or Path, optional
        The run folder, exactly; default ``runs/<name>-<hash>``.
    progress : Progress, optional
        Where to show progress; default nowhere.
    on_change : callable, optional
        Called with the content of ``run.json`` whenever it changes.
    engine : {"local", "ray"}, default "local"
        Where the scoring of text runs: here, or spread over a Ray cluster. The numbers are the same.

    Returns
    -------
    RunResult

    Raises
    ------
    ConfigError, DataError, ModelError, MethodError
        Before anything is trained wherever that can be known.
    """
    check_recipe(recipe)
    main = ranks().is_main_process
    progress = (progress or quiet()) if main else quiet()
    plain = {k: v for k, v in recipe.plain().items() if k not in ("seeds", "ablate", "arm", "arms")}
    source = source_hash(recipe.model)
    data = prepare_data(recipe)
    first = build_model(
        recipe.model,
        vocab_size=len(data.tokenizer),
        context=data.context,
        seed=recipe.seed,
        meta=recipe.model.path is None,
    )
    check_methods(recipe, first)
    identity = content_hash([plain, source, data.facts["sha256"], __version__])
    folder = Path(out) if out is not None else Path("runs") / f"{recipe.name}-{identity}"
    store = RunFolder(folder, identity, plain, writes=main)
    try:
        store.begin(plain, yaml.safe_dump(recipe.plain(), sort_keys=False, allow_unicode=True))
        if main and data.facts["quarantined"]:
            prepare_data(recipe, folder)
        state = _Run(
            recipe=recipe,
            data=data,
            store=store,
            progress=progress,
            run=_head(recipe, identity, data, first, source),
            root=content_hash([source, data.facts["sha256"], __version__]),
            engine=engine,
            on_change=on_change or (lambda run: None),
        )
        del first
        return _run_all(state)
    finally:
        store.release()


def _head(recipe: Recipe, identity: str, data: Prepared, model: Any, source: str) -> dict[str, Any]:
    spec = recipe.model
    return {
        "format": 1,
        "name": recipe.name,
        "status": "running",
        "recipe": recipe.plain(),
        "recipe_hash": identity,
        "created": _now(),
        "finished": None,
        "seconds": 0.0,
        "environment": environment(),
        "data": {**data.facts, "quarantine_file": "quarantine.jsonl" if data.facts["quarantined"] else None},
        "model": {
            "family": family(model),
            "parameters": sum(p.numel() for p in model.parameters()),
            "source": spec.path or f"{spec.architecture}, {spec.size or 'tiny'}",
            "hash": source,
        },
        "seeds": list(range(recipe.seed, recipe.seed + recipe.seeds)),
        "arms": [],
        "ablation": [],
        "warnings": _data_warnings(data),
    }


def _data_warnings(data: Prepared) -> list[str]:
    count = data.facts["quarantined"]
    return [f"{count} rows of the data could not be used; they are listed in quarantine.jsonl."] if count else []


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _run_all(state: _Run) -> RunResult:
    started = time.monotonic()
    run = state.run
    state.publish()
    status = "failed"
    try:
        for arm in arms_of(state.recipe):
            for seed in run["seeds"]:
                _run_arm(state, arm, seed)
        run["ablation"] = differences(run["arms"], state.windows)
        if state.store.writes:
            _publish_models(state)
        status = "finished"
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    finally:
        run["status"] = status
        run["finished"] = _now() if status == "finished" else None
        run["seconds"] = round(time.monotonic() - started, 2)
        state.publish()
    return RunResult(state.store.path, run)


def _run_arm(state: _Run, arm: Arm, seed: int) -> None:
    """Run one arm with one seed; what an earlier arm or run computed from the same inputs is reused."""
    row: dict[str, Any] = {"name": arm.name, "without": arm.without, "seed": seed, "stages": []}
    state.run["arms"].append(row)
    key = content_hash([state.root, seed])
    if state.recipe.model.path is not None and state.recipe.model.weights == "pretrained":
        row["stages"].append(_start_row(state, arm, seed, key))
    chain: list[tuple[str, Stage, str, str]] = []
    for index, (kind, stage) in enumerate(arm.steps):
        if kind == "evaluate":
            continue
        before, key = key, content_hash([key, kind, stage.model_dump(mode="json", by_alias=True)])
        chain.append((kind, stage, before, key))
        entry = _run_stage(state, arm, seed, index, chain)
        row["stages"].append(entry)
        state.publish()
    if not row["stages"]:
        row["stages"].append(_start_row(state, arm, seed, key))
    state.publish()


def _label(state: _Run, arm: Arm, seed: int, kind: str) -> str:
    parts = [arm.name] if state.recipe.ablate or state.recipe.arms else []
    if state.recipe.seeds > 1:
        parts.append(f"seed {seed}")
    return " ".join([f"[{', '.join(parts)}]", kind] if parts else [kind])


def _start_model(state: _Run, seed: int) -> Any:
    return build_model(state.recipe.model, vocab_size=len(state.data.tokenizer), context=state.data.context, seed=seed)


def _model_at(state: _Run, arm: Arm, seed: int, chain: list[tuple[str, Stage, str, str]], depth: int) -> Any:
    """Return the model after `depth` stages of the chain; a stage whose model was dropped is run again."""
    if depth == 0:
        return _start_model(state, seed)
    kind, key = chain[depth - 1][0], chain[depth - 1][-1]
    if kind == "select":  # leaves the model as it was
        return _model_at(state, arm, seed, chain, depth - 1)
    if not state.store.has_model(key):
        _compute(state, arm, seed, chain[:depth], lambda: _model_at(state, arm, seed, chain, depth - 1))
    return load_model(state.store.stage(key) / "model")


def _context(
    state: _Run, arm: Arm, seed: int, kind: str, key: str, reload: Callable[[], Any], selected: Path | None = None
) -> StageContext:
    def event(facts: Mapping[str, Any]) -> None:
        state.store.event({"arm": arm.name, "seed": seed, "stage": key, **facts})

    return StageContext(
        data=state.data,
        seed=seed,
        kind=kind,
        work=state.store.stage(key),
        label=_label(state, arm, seed, kind),
        progress=state.progress,
        event=event,
        reload=reload,
        selected=selected,
        engine=state.engine,
    )


def _selected(state: _Run, chain: list[tuple[str, Stage, str, str]]) -> Path | None:
    """Return the file of the last select stage in a chain."""
    keys = [key for kind, _, _, key in chain if kind == "select"]
    return state.store.stage(keys[-1]) / SELECTED if keys else None


def _compute(
    state: _Run, arm: Arm, seed: int, chain: list[tuple[str, Stage, str, str]], source: Callable[[], Any]
) -> dict[str, Any]:
    """Run the last stage of a chain; the first rank saves its model and its result.

    All ranks take part, since methods may sum over ranks; merging and selecting write files, so the first does it
    alone.
    """
    kind, stage, _, key = chain[-1]
    if kind not in ("merge", "select") or ranks().is_main_process:
        context = _context(state, arm, seed, kind, key, source, _selected(state, chain[:-1]))
        started = time.monotonic()
        with PeakMemory() as memory, noted_warnings(state.run["warnings"]):
            model, details = run_stage(kind, stage, source(), context)
        if ranks().is_main_process:
            if kind == "train":
                details["depth"] = depth_of(model, state.data)
            if kind != "select":
                save_model(model, state.store.stage(key) / "model", state.data.tokenizer)
            result = {
                "seconds": round(time.monotonic() - started, 3),
                "peak_memory_bytes": memory.peak,
                **size_of(model),
                "details": details,
            }
            write_json(state.store.stage(key) / "result.json", result)
        del model
    ranks().wait_for_everyone()
    found = state.store.result(key)
    assert found is not None  # written just above, by the first rank
    return found


def _run_stage(
    state: _Run, arm: Arm, seed: int, index: int, chain: list[tuple[str, Stage, str, str]]
) -> dict[str, Any]:
    kind, stage, _, key = chain[-1]
    result = agree(state.store.result(key))
    skipped = result is not None
    if result is None:
        result = _compute(state, arm, seed, chain, lambda: _model_at(state, arm, seed, chain, len(chain) - 1))
    else:
        state.progress.say(f"{_label(state, arm, seed, kind)}: finished before, skipped")
    metrics, windows = _measure(state, arm, seed, index, key, lambda: _model_at(state, arm, seed, chain, len(chain)))
    state.windows[(arm.name, seed)] = windows
    entry = {
        "index": index,
        "kind": kind,
        "label": kind,
        "key": key,
        "methods": [u.model_dump(by_alias=True) for u in getattr(stage, "methods", [])],
        "skipped": skipped,
        **result,
        "metrics": metrics,
    }
    if not skipped:
        state.store.event({"event": "stage", "arm": arm.name, "seed": seed, "kind": kind, "metrics": metrics})
    return entry


def _start_row(state: _Run, arm: Arm, seed: int, key: str) -> dict[str, Any]:
    """Measure the model as it came, before any stage."""
    metrics, windows = _measure(state, arm, seed, -1, key, lambda: _start_model(state, seed))
    state.windows[(arm.name, seed)] = windows
    file = state.store.stage(key) / "size.json"
    if ranks().is_main_process and not file.is_file():
        write_json(file, size_of(_start_model(state, seed)))
    ranks().wait_for_everyone()
    return {
        "index": -1,
        "kind": "evaluate",
        "label": "as loaded" if state.recipe.model.path else "untrained",
        "key": key,
        "methods": [],
        "skipped": False,
        "seconds": 0.0,
        "peak_memory_bytes": 0,
        **json.loads(file.read_text(encoding="utf-8")),
        "metrics": metrics,
        "details": {},
    }


def _measure(
    state: _Run, arm: Arm, seed: int, index: int, key: str, source: Callable[[], Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Measure the model after stage `index` with every evaluation that asks for it."""
    metrics: dict[str, Any] = {}
    windows: dict[str, Any] = {}
    later = [(i, s) for i, (_, s) in enumerate(arm.steps) if isinstance(s, EvaluateStage) and i > index]
    asked = [s for i, s in later if s.each_stage or not any(k != "evaluate" for k, _ in arm.steps[index + 1 : i])]
    model: Any = None
    for stage in asked:
        question = stage.model_dump(mode="json", by_alias=True)
        answer = agree(state.store.measured(key, question))
        if answer is None:
            model = model if model is not None else source()  # on all ranks: it may have to be trained again
            if ranks().is_main_process:
                with noted_warnings(state.run["warnings"]):
                    answer = evaluate(stage, model, _context(state, arm, seed, "evaluate", key, source))
                state.store.keep_measured(key, question, answer)
            answer = agree(answer)
        metrics |= answer["metrics"]
        windows = answer["windows"] or windows
    return metrics, windows


def _publish_models(state: _Run) -> None:
    """Put the final model of the first arm into ``model`` and, where it folds, a stock copy into ``export``."""
    stages = [s for s in state.run["arms"][0]["stages"] if s["index"] >= 0]
    if stages:
        source = state.store.stage(stages[-1]["key"]) / "model"
        if source.is_dir():
            model = load_model(source)
            save_model(model, state.store.path / "model", state.data.tokenizer)
            try:
                export_model(model, state.store.path / "export", state.data.tokenizer)
            except ModelError as error:
                state.run["warnings"].append(f"no stock copy was exported: {error}")
            base = unwrap(model)
            log.info("saved %s to %s", type(base).__name__, state.store.path / "model")
    keep = {s["key"] for arm in state.run["arms"] if arm["name"] == state.recipe.arm for s in arm["stages"][-1:]}
    state.store.drop_models_except(keep)
