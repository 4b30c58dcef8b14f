"""The whole method: several models from several seeds, trained for a few epochs each, scores averaged."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from gnomon.common.engine import Engine, run_all
from gnomon.common.files import content_hash
from gnomon.data.data_diet.rows import Rows, fingerprint
from gnomon.data.data_diet.scoring import Method, Scored, check_method, forgetting_run, score_models
from gnomon.data.data_diet.table import ScoreTable
from gnomon.data.data_diet.training import ModelFactory, Reading, TrainingPlan, own_randomness, seeds_of, train_model
from gnomon.errors import DataError, GnomonWarning, MethodError, ModelError
from gnomon.progress import Progress, quiet

__all__ = ["ExampleScorer"]

_AT_EPOCH = 5
TrainFunction = Callable[[nn.Module, Any, int], Any]


@dataclass(frozen=True)
class _Job:
    """All that one run needs; pickled once for Ray."""

    model_init: ModelFactory
    dataset: Any
    method: Method
    plan: TrainingPlan
    stop: int | None
    seed: int
    batch_size: int
    shards: int
    reading: Reading
    train: TrainFunction | None
    keep: bool
    folder: Path | None = None
    key: str = ""

    def place(self, run: int) -> Path | None:
        """Where the scores of one run are kept."""
        return None if self.folder is None else self.folder / f"run-{run:02d}-{self.key}"


class ExampleScorer:
    """Scores the rows of a labelled data set by training several models for a few epochs.

    Parameters
    ----------
    method : {"el2n", "grand", "forgetting", "el1", "margin", "sum_margin"}, default "el2n"
    runs : int, default 10
        Models, each with its own initial weights and order of rows. The paper takes 10.
    at_epoch : float, optional
        When in the training to score. Default: epoch 5, or the end of a shorter plan; forgetting events are counted
        to the end. (The paper scores CIFAR at epoch 20 of 200.)
    at_step : int, optional
        The same in steps.
    plan : TrainingPlan, optional
        The training. Its schedule is that of the whole plan, also when scores are taken early.
    seed : int, default 0
    batch_size : int, default 256
        For scoring; the scores do not depend on it.
    shards : int, default 1
        Parts the rows are cut into when scores are taken; each part of each run is a task of the engine.
    engine : {"local", "ray"}, default "local"
        Where runs and shards are computed. The numbers are the same. With ``"ray"`` `model_init` must pickle.
    train : callable, optional
        ``(model, dataset, seed) -> model or None`` in place of the built-in loop, such as a function that runs a
        `transformers.Trainer`. `plan`, `at_epoch` and `at_step` do not apply then.
    keep_models : bool, default False
        Keep the trained models in `models_`, so that `score` can score rows that come later.
    reading : Reading, optional
        Collation, loss, shift of labels, column of row ids.

    Raises
    ------
    MethodError
        Options that are not possible.

    Warns
    -----
    GnomonWarning
        With one run (noisy scores), and for GraNd at initialisation.

    Examples
    --------
    >>> import torch
    >>> x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    >>> rows = (x, (x[:, 0] > 0).long())
    >>> scorer = ExampleScorer(runs=2, plan=TrainingPlan(epochs=10, batch_size=16))
    >>> table = scorer.fit(lambda seed: nn.Linear(2, 2), rows)
    >>> len(table), table.runs.shape
    (64, (2, 64))
    """

    def __init__(
        self,
        method: Method = "el2n",
        *,
        runs: int = 10,
        at_epoch: float | None = None,
        at_step: int | None = None,
        plan: TrainingPlan | None = None,
        seed: int = 0,
        batch_size: int = 256,
        shards: int = 1,
        engine: Engine = "local",
        train: TrainFunction | None = None,
        keep_models: bool = False,
        reading: Reading | None = None,
    ) -> None:
        check_method(method)
        if min(runs, batch_size, shards) < 1:
            raise MethodError(f"runs = {runs}, batch_size = {batch_size}, shards = {shards}. Each is at least 1.")
        if at_epoch is not None and at_step is not None:
            raise MethodError(f"at_epoch = {at_epoch} and at_step = {at_step}: give one of them.")
        if method == "forgetting" and train is not None:
            raise MethodError(
                "method = 'forgetting' follows the training batch by batch, which train= hides. Leave train out, or "
                "use DataDietCallback in your Trainer."
            )
        self.method, self.runs, self.seed = method, runs, seed
        self.at_epoch, self.at_step = at_epoch, at_step
        self.plan, self.reading = plan or TrainingPlan(), reading or Reading()
        self.batch_size, self.shards, self.engine = batch_size, shards, engine
        self.train, self.keep_models = train, keep_models
        self.models_: list[nn.Module] = []
        self._warn()

    def _warn(self) -> None:
        if self.runs == 1:
            warnings.warn("Scores of one run are noisy. The paper averages runs=10.", GnomonWarning, stacklevel=3)
        if self.method == "grand" and 0 in (self.at_epoch, self.at_step):
            warnings.warn(
                "GraNd at initialisation follows the norm of the inputs and did not beat random pruning when it was "
                "replicated (arXiv 2303.14753). Take it after a few epochs of training.",
                GnomonWarning,
                stacklevel=3,
            )

    def _stop(self, rows: int) -> int | None:
        total = self.plan.total_steps(rows)
        if self.at_step is not None:
            stop = self.at_step
        elif self.at_epoch is not None:
            stop = round(self.at_epoch * self.plan.epoch_steps(rows))
        else:
            return None if self.method == "forgetting" else min(total, _AT_EPOCH * self.plan.epoch_steps(rows))
        if not 0 <= stop <= total:
            raise MethodError(
                f"at_epoch = {self.at_epoch}, at_step = {self.at_step}: that is step {stop} of a plan of {total}. "
                "Score at 0 or later and before the end, or lengthen the plan."
            )
        if stop == 0 and self.method == "forgetting":
            raise MethodError("at_step = 0: before training no row was learnt or forgotten. Give a later step.")
        return stop

    def fit(
        self,
        model_init: ModelFactory,
        dataset: Any,
        *,
        folder: str | Path | None = None,
        progress: Progress | None = None,
    ) -> ScoreTable:
        """Train `runs` models and score every row under each.

        Parameters
        ----------
        model_init : callable
            ``seed -> untrained model``. Torch is seeded with that number around the call and restored afterwards.
        dataset : data set
            As for `score_examples`. Rows must be the same each time they are read (no random augmentation; that
            belongs into the plan).
        folder : str or Path, optional
            Keep the scores of each finished run there; a call that was interrupted goes on where it was. The name
            holds the options and the data, but not the code of `model_init` or `train`.
        progress : Progress, optional

        Returns
        -------
        ScoreTable

        Raises
        ------
        DataError, ModelError, MethodError
            As `score_examples`.

        Warns
        -----
        GnomonWarning
            When the data set gives other rows the second time.
        """
        rows = Rows(dataset, self.reading.collate)
        mark = fingerprint(rows)
        if fingerprint(rows) != mark:
            mark = ""
            warnings.warn(
                "The data set gives other rows each time it is read. Scores want the rows without augmentation: put "
                "it into TrainingPlan(augment=...).",
                GnomonWarning,
                stacklevel=2,
            )
        ids = np.arange(len(rows)) if self.reading.id_column is None else rows.column(self.reading.id_column)
        job = self._job(model_init, dataset, self._stop(len(rows)), folder, mark)
        waiting = list(range(self.runs))
        done = {run: kept for run in waiting if (kept := _kept(job, run)) is not None}
        waiting = [run for run in waiting if run not in done]
        with (progress or quiet()).task(f"scoring by {self.method}", self.runs) as shown:
            shown.update(len(done))
            split = self.shards > 1 and self.method != "forgetting"
            compute: Any = functools.partial(_train_only if split else _run, job)
            found = run_all(compute, waiting, engine=self.engine, on_result=lambda i, _: shown.advance())
        self.models_ = [model for _, model in found if model is not None]
        if split:
            scores = self._score(self.models_, rows)
            for run, scored in zip(waiting, scores, strict=True):
                _keep(job, run, scored)
            self.models_ = self.models_ if self.keep_models else []
        else:
            scores = [scored for scored, _ in found]
        done |= dict(zip(waiting, scores, strict=True))
        values = np.stack([done[run].values for run in range(self.runs)])
        return ScoreTable(values, self.method, ids.astype(np.int64), mark, done[0].labels)

    def _job(
        self, model_init: ModelFactory, dataset: Any, stop: int | None, folder: str | Path | None, mark: str
    ) -> _Job:
        plan = {name: value for name, value in vars(self.plan).items() if name != "augment"}
        key = content_hash([self.method, plan, stop, self.seed, mark, repr(self.reading.id_column)])
        return _Job(
            model_init, dataset, self.method, self.plan, stop, self.seed, self.batch_size, self.shards, self.reading,
            self.train, self.keep_models, None if folder is None else Path(folder), key,
        )  # fmt: skip

    def _score(self, models: list[nn.Module], rows: Rows) -> list[Scored]:
        """Score rows under given models, in shards of the engine."""
        return score_models(
            models, rows, self.method, batch_size=self.batch_size, shards=self.shards, engine=self.engine,
            reading=self.reading,
        )  # fmt: skip

    def score(self, dataset: Any) -> ScoreTable:
        """Score rows that came later, under the models that `fit` kept.

        Parameters
        ----------
        dataset : data set

        Returns
        -------
        ScoreTable

        Raises
        ------
        MethodError
            When no models were kept, or the method counts events during training.
        """
        if self.method == "forgetting":
            raise MethodError("method = 'forgetting' counts during training; later rows have no history. Use 'el2n'.")
        if not self.models_:
            raise MethodError("There are no models to score with. Call fit with ExampleScorer(keep_models=True).")
        rows = Rows(dataset, self.reading.collate)
        ids = np.arange(len(rows)) if self.reading.id_column is None else rows.column(self.reading.id_column)
        found = self._score(self.models_, rows)
        values = np.stack([scored.values for scored in found])
        return ScoreTable(values, self.method, ids.astype(np.int64), fingerprint(rows), found[0].labels)


def _make(job: _Job, run: int) -> nn.Module:
    seed = seeds_of(job.seed, run)[0]
    with own_randomness(seed):
        model = job.model_init(seed)
    if not isinstance(model, nn.Module):
        raise ModelError(f"model_init returned a {type(model).__name__}. It must return a torch module for a seed.")
    return model


def _train_only(job: _Job, run: int) -> tuple[Any, nn.Module]:
    seed = seeds_of(job.seed, run)[1]
    model = _make(job, run)
    if job.train is not None:
        with own_randomness(seed):
            returned = job.train(model, job.dataset, seed)
        return None, returned if isinstance(returned, nn.Module) else model
    rows = Rows(job.dataset, job.reading.collate)
    return None, train_model(model, rows, job.plan, seed=seed, stop=job.stop, reading=job.reading)


def _run(job: _Job, run: int) -> tuple[Scored, nn.Module | None]:
    rows = Rows(job.dataset, job.reading.collate)
    if job.method == "forgetting":
        model = _make(job, run)
        seed = seeds_of(job.seed, run)[1]
        table = forgetting_run(model, rows, job.plan, seed=seed, stop=job.stop, reading=job.reading)
        scored = Scored(table.scores(), None)
    else:
        _, model = _train_only(job, run)
        try:
            (scored,) = score_models([model], rows, job.method, batch_size=job.batch_size, reading=job.reading)
        except ModelError as error:
            raise ModelError(str(error).replace("run 0:", f"run {run}:", 1)) from error
    _keep(job, run, scored)
    return scored, model if job.keep else None


def _keep(job: _Job, run: int, scored: Scored) -> None:
    place = job.place(run)
    if place is not None:
        ids = np.arange(len(scored.values))
        ScoreTable(scored.values[None], job.method, ids, "", scored.labels).save(place)


def _kept(job: _Job, run: int) -> Scored | None:
    place = job.place(run)
    if place is None or job.keep:  # models are not kept on disk, so runs that must return one are made again
        return None
    try:
        table = ScoreTable.load(place)
    except DataError:
        return None
    return Scored(table.values, table.labels)
