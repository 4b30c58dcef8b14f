"""From run.json to plain objects: everything a page needs, with what is missing said in words."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gnomon.reports._fields import Fields, clean, read_object

__all__ = ["Arm", "Data", "Effect", "Layer", "Measured", "MethodUse", "Model", "Run", "Stage", "read_run"]


@dataclass(frozen=True)
class Measured:
    """A number with its interval; `low` and `high` are None where there is none."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def finite(self) -> bool:
        """Whether the value is an ordinary number."""
        return math.isfinite(self.value)


@dataclass(frozen=True)
class MethodUse:
    """One method of a stage and its options."""

    uses: str
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Layer:
    """What a method noted about one layer."""

    name: str
    method: str
    facts: Mapping[str, float]


@dataclass(frozen=True)
class Stage:
    """One stage of one arm.

    `trainable` counts parameters; `trained_weights` and `optimizer` are the bytes of the weights and of the optimizer's
    state during training.
    """

    index: int
    kind: str
    label: str
    methods: tuple[MethodUse, ...]
    skipped: bool
    seconds: float | None
    peak_memory: float | None
    parameters: float | None
    nonzero: float | None
    size: float | None
    trainable: float | None
    trained_weights: float | None
    optimizer: float | None
    metrics: Mapping[str, Measured]
    loss: tuple[tuple[float, float], ...]
    eval_loss: tuple[tuple[float, float], ...]
    layers: tuple[Layer, ...]
    depth: tuple[tuple[float, float], ...]
    notes: tuple[str, ...]

    @property
    def title(self) -> str:
        """The stage's label, or its kind, or its number."""
        return self.label or self.kind or f"stage {self.index}"


@dataclass(frozen=True)
class Arm:
    """One pass through the stages with one seed."""

    name: str
    without: str
    seed: int | None
    stages: tuple[Stage, ...]


@dataclass(frozen=True)
class Effect:
    """One line of the ablation: a metric with a method and without it; `difference` is with minus without."""

    method: str
    stage: int | None
    metric: str
    with_: float | None
    without: float | None
    difference: float | None
    low: float | None
    high: float | None
    spread: str
    seeds: int | None


@dataclass(frozen=True)
class Data:
    """Where the text came from and how much of it was used."""

    source: str = ""
    sha256: str = ""
    train_tokens: int | None = None
    valid_tokens: int | None = None
    rows: int | None = None
    quarantined: int | None = None
    quarantine_file: str = ""


@dataclass(frozen=True)
class Model:
    """The model the run started from."""

    family: str = ""
    parameters: int | None = None
    source: str = ""


@dataclass(frozen=True)
class Run:
    """A run as its run.json tells it.

    Attributes
    ----------
    missing : tuple of str
        The sections that are not (yet) there, in words.
    odd : tuple of str
        The values that had the wrong type and were left out.
    """

    folder: Path
    name: str
    status: str
    recipe: Mapping[str, Any]
    recipe_hash: str
    created: str
    finished: str
    seconds: float | None
    environment: Mapping[str, Any]
    data: Data
    model: Model
    seeds: tuple[int, ...]
    arms: tuple[Arm, ...]
    ablation: tuple[Effect, ...]
    warnings: tuple[str, ...]
    missing: tuple[str, ...] = field(default=())
    odd: tuple[str, ...] = field(default=())


_SECTIONS = {
    "name": "the run's name",
    "status": "the status",
    "recipe": "the recipe",
    "created": "when it began",
    "environment": "the environment",
    "data": "the data",
    "model": "the model",
    "arms": "the stages",
}


def read_run(run_folder: str | Path) -> Run:
    """Read the run.json of a run folder, finished or not.

    Parameters
    ----------
    run_folder : str or Path
        The folder that `gnomon run` wrote.

    Returns
    -------
    Run

    Raises
    ------
    DataError
        When there is no run.json, or it is no JSON, or its format is unknown.
    """
    folder = Path(run_folder)
    raw = read_object(
        folder / "run.json",
        writer="gnomon run",
        again="Start the run again with `gnomon run` to write it anew.",
    )
    odd: list[str] = []
    fields = Fields(raw, "", odd)
    arms = tuple(_arm(arm) for arm in fields.children("arms"))
    missing = [words for key, words in _SECTIONS.items() if not fields.has(key)]
    if fields.has("arms") and not any(arm.stages for arm in arms):
        missing.append("the stages: none is finished yet")
    data, model = fields.child("data"), fields.child("model")
    return Run(
        folder=folder,
        name=fields.text("name") or folder.resolve().name,
        status=fields.text("status"),
        recipe=fields.child("recipe").raw,
        recipe_hash=fields.text("recipe_hash"),
        created=fields.text("created"),
        finished=fields.text("finished"),
        seconds=fields.number("seconds"),
        environment=fields.child("environment").raw,
        data=Data(
            source=data.text("source"),
            sha256=data.text("sha256"),
            train_tokens=data.whole("train_tokens"),
            valid_tokens=data.whole("valid_tokens"),
            rows=data.whole("rows"),
            quarantined=data.whole("quarantined"),
            quarantine_file=data.text("quarantine_file"),
        ),
        model=Model(model.text("family"), model.whole("parameters"), model.text("source")),
        seeds=tuple(seed for seed in fields.items("seeds") if isinstance(seed, int)),
        arms=arms,
        ablation=tuple(_effect(row) for row in fields.children("ablation")),
        warnings=tuple(fields.texts("warnings")),
        missing=tuple(missing),
        odd=tuple(odd),
    )


def _arm(fields: Fields) -> Arm:
    without = fields.child("without").text("method")
    name = fields.text("name") or (f"without {without}" if without else "all")
    stages = tuple(_stage(stage, i) for i, stage in enumerate(fields.children("stages")))
    return Arm(name=name, without=without, seed=fields.whole("seed"), stages=stages)


def _stage(fields: Fields, position: int) -> Stage:
    index = fields.whole("index")
    details = fields.child("details")
    depth = [(row.number("block"), row.number("variance")) for row in details.children("depth")]
    return Stage(
        index=position if index is None else index,
        kind=fields.text("kind"),
        label=fields.text("label"),
        methods=tuple(
            MethodUse(method.text("uses"), method.child("with").raw) for method in fields.children("methods")
        ),
        skipped=fields.flag("skipped"),
        seconds=fields.number("seconds"),
        peak_memory=fields.number("peak_memory_bytes"),
        parameters=fields.number("parameters"),
        nonzero=fields.number("nonzero_parameters"),
        size=fields.number("size_bytes"),
        trainable=details.number("trainable_parameters"),
        trained_weights=details.number("weight_bytes"),
        optimizer=details.number("optimizer_bytes"),
        metrics=_metrics(fields.child("metrics")),
        loss=tuple(details.pairs("loss_curve")),
        eval_loss=tuple(details.pairs("eval_curve")),
        layers=tuple(
            Layer(layer.text("name"), layer.text("method"), layer.numbers("facts"))
            for layer in details.children("layers")
        ),
        depth=tuple((block, variance) for block, variance in depth if block is not None and variance is not None),
        notes=tuple(details.texts("notes")),
    )


def _metrics(fields: Fields) -> dict[str, Measured]:
    found: dict[str, Measured] = {}
    for name, raw in fields.raw.items():
        if isinstance(raw, (int, float)) and not isinstance(raw, bool):  # a bare number has no interval
            value = fields.number(name)
            if value is not None:
                found[name] = Measured(value)
            continue
        inner = fields.child(name)
        value = inner.number("value")
        if value is not None:
            found[name] = Measured(value, inner.number("low"), inner.number("high"))
    return found


def _effect(fields: Fields) -> Effect:
    with_, without = fields.number("with"), fields.number("without")
    difference, low, high = (fields.number(key) for key in ("difference", "low", "high"))
    if with_ is not None and without is not None:
        plain = with_ - without
        if difference is None:
            difference = plain
        elif abs(difference + plain) < abs(difference - plain):  # written the other way round: turn it
            difference = -difference
            low, high = (None if high is None else -high), (None if low is None else -low)
    return Effect(
        method=fields.text("method"),
        stage=fields.whole("stage"),
        metric=fields.text("metric"),
        with_=with_,
        without=without,
        difference=difference,
        low=low,
        high=high,
        spread=fields.text("spread"),
        seeds=fields.whole("seeds"),
    )


def quarantined_rows(run: Run, limit: int = 8) -> list[dict[str, str]]:
    """Return the first rows of the run's quarantine file as texts.

    Only a file inside the run folder is opened: the path comes from run.json, which somebody may have sent.

    Parameters
    ----------
    run : Run
    limit : int, default 8
        At most so many rows.

    Returns
    -------
    list of dict
        Column -> text; empty when there is no readable file.
    """
    if not run.data.quarantine_file or "\0" in run.data.quarantine_file:
        return []
    root = run.folder.resolve()
    path = (root / run.data.quarantine_file).resolve()
    if not path.is_relative_to(root) or not path.is_file():
        return []
    rows: list[dict[str, str]] = []
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if len(rows) == limit:
                break
            if line.strip():
                rows.append(clean(_row(line.strip())))
    return rows


def _row(line: str) -> dict[str, str]:
    try:
        raw = json.loads(line)
    except (ValueError, RecursionError):
        raw = None
    if not isinstance(raw, dict):
        return {"row": line[:300]}
    return {
        str(key): (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))[:300]
        for key, value in list(raw.items())[:6]
    }
