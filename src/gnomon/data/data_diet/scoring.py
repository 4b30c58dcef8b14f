"""Scores of all rows of a data set under given models: in shards, on this machine, on Ray, or on the ranks of a run."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from accelerate.utils import gather_object
from jaxtyping import Float, Int
from torch import Tensor, nn

from gnomon.common.depth import evaluating
from gnomon.common.engine import Engine, run_all
from gnomon.common.ranks import ranks
from gnomon.data.data_diet.forgetting import ForgettingTable
from gnomon.data.data_diet.ghost import GradientNorms
from gnomon.data.data_diet.rows import Rows, aligned_logits
from gnomon.data.data_diet.scores import logit_scores, name_rows
from gnomon.data.data_diet.training import Reading, TrainingPlan, seeds_of, train_model
from gnomon.errors import GnomonError, GnomonWarning, MethodError, ModelError, nearest
from gnomon.progress import Progress, quiet

__all__ = ["METHODS", "Method", "Scored", "forgetting_run", "score_examples", "score_models"]

Method = Literal["el2n", "grand", "forgetting", "el1", "margin", "sum_margin"]
METHODS: tuple[str, ...] = get_args(Method)


@dataclass
class Scored:
    """Scores of some rows, and their labels where each row has one."""

    values: Float[np.ndarray, " rows"]
    labels: Int[np.ndarray, " rows"] | None


def score_examples(
    model: nn.Module | Sequence[nn.Module],
    dataset: Any,
    method: Method = "el2n",
    *,
    batch_size: int = 64,
    plan: TrainingPlan | None = None,
    seed: int = 0,
    shards: int = 1,
    engine: Engine = "local",
    distributed: bool = False,
    reading: Reading | None = None,
    progress: Progress | None = None,
) -> Float[np.ndarray, " rows"]:
    """Score every row of a data set by how hard it is for a model.

    The models are used in evaluation mode (restored afterwards) and are not changed. For the whole method, with models
    trained for a few epochs from several seeds, see `ExampleScorer`.

    Parameters
    ----------
    model : nn.Module, or sequence of them
        A classifier (any module that returns logits), a sequence classifier or a causal language model of transformers,
        trained for a few epochs. Of several, the scores are averaged.
    dataset : data set
        `datasets.Dataset`, torch data set, list of ``(input, label)`` or mappings, ``(inputs, labels)``, or token ids
        (rows, tokens).
    method : {"el2n", "grand", "forgetting", "el1", "margin", "sum_margin"}, default "el2n"
        ``"forgetting"`` trains a private copy by `plan` and counts.
    batch_size : int, default 64
        The scores do not depend on it.
    plan : TrainingPlan, optional
        Train a private copy of each model by it first. Default: score the models as they are; for forgetting, the
        default plan.
    seed : int, default 0
        Of that training.
    shards : int, default 1
        Parts the rows are cut into; each is a task of the engine.
    engine : {"local", "ray"}, default "local"
        Where tasks run. The numbers are the same.
    distributed : bool, default False
        Share the rows among the ranks of a torchrun or accelerate run (all of them must call) and gather by row.
    reading : Reading, optional
        Collation, loss, shift of labels.
    progress : Progress, optional
        Where to show it; default: nowhere.

    Returns
    -------
    array (rows,)
        float64, in the order of the data set.

    Raises
    ------
    DataError
        Rows without a usable label; the message names them.
    ModelError
        Logits that are not finite; the message names run and row.
    MethodError
        Options that are not possible.

    Warns
    -----
    GnomonWarning
        With a single model: its scores are noisy.

    Examples
    --------
    >>> layer = nn.Linear(2, 2)
    >>> _ = nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
    >>> score_examples([layer, layer], (torch.eye(2), torch.tensor([0, 1]))).round(4)
    array([0.7071, 0.7071])
    """
    models: list[Any] = list(model) if isinstance(model, (list, tuple)) else [model]
    reading = reading or Reading()
    rows = Rows(dataset, reading.collate)
    _check(models, method, batch_size, shards, distributed, engine)
    if len(models) == 1:
        warnings.warn(
            "Scores of one run are noisy: average several models (the paper takes 10), see ExampleScorer(runs=10).",
            GnomonWarning,
            stacklevel=2,
        )
    if method == "forgetting":
        count = functools.partial(_forget, rows, plan or TrainingPlan(), seed, reading)
        return np.mean(run_all(count, list(enumerate(models)), engine=engine), axis=0)
    if plan is not None:
        train = functools.partial(_trained, rows, plan, seed, reading)
        models = run_all(train, list(enumerate(models)), engine=engine)
    if distributed:
        return _on_ranks(models, rows, method, batch_size, reading).mean(0)
    found = score_models(
        models, rows, method, batch_size=batch_size, shards=shards, engine=engine, reading=reading, progress=progress
    )
    return np.mean([scored.values for scored in found], axis=0)


def _check(models: list[nn.Module], method: str, batch_size: int, shards: int, distributed: bool, engine: str) -> None:
    check_method(method)
    if not models or not all(isinstance(model, nn.Module) for model in models):
        shown = ", ".join(type(model).__name__ for model in models) or "nothing"
        raise MethodError(f"model is {shown}. Give a torch module, or a list of them to average over.")
    if batch_size < 1 or shards < 1:
        raise MethodError(f"batch_size = {batch_size}, shards = {shards}. Both must be at least 1.")
    if distributed and (engine != "local" or shards > 1):
        raise MethodError(
            "distributed = True shares the rows among the ranks already. Leave engine and shards out, or distributed."
        )
    if distributed and method == "forgetting":
        raise MethodError(
            "method = 'forgetting' follows one training run. On several ranks use DataDietCallback in the Trainer."
        )


def check_method(method: str) -> None:
    """Refuse the name of a method that does not exist."""
    if method not in METHODS:
        raise MethodError(f"method = {method!r} is unknown. {nearest(str(method), METHODS, noun='method')}")


def _forget(rows: Rows, plan: TrainingPlan, seed: int, reading: Reading, task: tuple[int, nn.Module]) -> np.ndarray:
    run, model = task
    return forgetting_run(copy.deepcopy(model), rows, plan, seed=seeds_of(seed, run)[1], reading=reading).scores()


def _trained(rows: Rows, plan: TrainingPlan, seed: int, reading: Reading, task: tuple[int, nn.Module]) -> nn.Module:
    run, model = task
    return train_model(copy.deepcopy(model), rows, plan, seed=seeds_of(seed, run)[1], reading=reading)


def forgetting_run(
    model: nn.Module,
    rows: Rows,
    plan: TrainingPlan,
    *,
    seed: int,
    stop: int | None = None,
    reading: Reading | None = None,
) -> ForgettingTable:
    """Train a model in place and return its table of forgetting events.

    Raises
    ------
    MethodError
        When rows have labels by token: one label a row is needed.
    """
    table = ForgettingTable(len(rows))

    def note(numbers: Tensor, logits: Tensor, targets: Tensor) -> None:
        if logits.dim() != 2 or targets.dim() != 1 or targets.is_floating_point():
            raise MethodError(
                f"method = 'forgetting' needs one class label a row; labels have shape {tuple(targets.shape)}. For "
                "language models use method='el2n' or 'grand'."
            )
        table.update(numbers.numpy(), (logits.argmax(1) == targets).cpu().numpy())

    train_model(model, rows, plan, seed=seed, stop=stop, reading=reading, on_batch=note)
    return table


def score_models(
    models: Sequence[nn.Module],
    rows: Rows,
    method: Method,
    *,
    batch_size: int = 64,
    shards: int = 1,
    engine: Engine = "local",
    reading: Reading | None = None,
    progress: Progress | None = None,
) -> list[Scored]:
    """Score all rows under each model as it is; one `Scored` a model."""
    parts = np.array_split(np.arange(len(rows)), min(shards, len(rows)))
    tasks = [(run, part) for run in range(len(models)) for part in parts]
    work = functools.partial(_score_part, list(models), rows, method, batch_size, reading or Reading())
    with (progress or quiet()).task(f"scoring by {method}", len(models) * len(rows)) as shown:
        found = run_all(work, tasks, engine=engine, on_result=lambda i, _: shown.advance(len(tasks[i][1])))
    return [_joined(found[k * len(parts) : (k + 1) * len(parts)]) for k in range(len(models))]


def _joined(parts: Sequence[Scored]) -> Scored:
    labels = [part.labels for part in parts if part.labels is not None]
    return Scored(
        np.concatenate([part.values for part in parts]), np.concatenate(labels) if len(labels) == len(parts) else None
    )


def _score_part(
    models: list[nn.Module],
    rows: Rows,
    method: Method,
    batch_size: int,
    reading: Reading,
    task: tuple[int, Int[np.ndarray, " part"]],
) -> Scored:
    run, places = task
    batches = (places[start : start + batch_size] for start in range(0, len(places), batch_size))
    return _joined(list(_score_batches(models[run], rows, method, batches, reading, run)))


def _score_batches(
    model: nn.Module,
    rows: Rows,
    method: Method,
    batches: Iterator[Int[np.ndarray, " part"]],
    reading: Reading,
    run: int,
) -> Iterator[Scored]:
    norms = GradientNorms(model, loss=reading.loss) if method == "grand" else None
    with evaluating(model), torch.no_grad():
        for places in batches:
            numbers = places.tolist()
            batch = rows.take(model, numbers, shift=reading.shift)
            if norms is None:
                logits, targets = aligned_logits(model, batch)
                values = logit_scores(logits, targets, method, places=numbers)  # type: ignore[arg-type]
            else:
                values = norms(batch, places=numbers)
            bad = ~torch.isfinite(values)
            if bool(bad.any()):
                raise ModelError(
                    f"run {run}: the model's output is not finite for {name_rows(bad, numbers)}, so there is no score. "
                    "Look at these rows, or at a training that diverged."
                )
            one_label = batch.targets.dim() == 1 and not batch.targets.is_floating_point()
            yield Scored(values.double().cpu().numpy(), batch.targets.cpu().numpy() if one_label else None)


def _on_ranks(
    models: Sequence[nn.Module], rows: Rows, method: Method, batch_size: int, reading: Reading
) -> Float[np.ndarray, "runs rows"]:
    """Score every rank's share of the rows and gather by row.

    All ranks make equally many calls of equal size (the last repeat rows), so that sharded models, whose ranks wait
    for each other in every call, do not hang.
    """
    state = ranks()
    share = -(-len(rows) // state.num_processes)
    mine = (np.arange(share) * state.num_processes + state.process_index) % len(rows)
    table = np.full((len(models), len(rows)), np.nan)
    for run in range(len(models)):
        found: tuple[np.ndarray, Any]
        try:
            found = mine, _score_part(list(models), rows, method, batch_size, reading, (run, mine)).values
        except GnomonError as error:  # every rank must hear of it, or the others wait for ever
            found = mine, error
        for places, values in gather_object([found]) if state.num_processes > 1 else [found]:
            if isinstance(values, GnomonError):
                raise values
            table[run, places] = values
    return table
