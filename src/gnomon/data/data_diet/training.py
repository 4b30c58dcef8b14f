"""The short training before scores are taken: a plain loop over a private copy, with its own randomness."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from gnomon.common.depth import evaluating
from gnomon.data.data_diet.rows import Batch, Loss, Rows, aligned_logits, row_losses
from gnomon.errors import MethodError, ModelError

__all__ = ["Reading", "SubsetTrial", "TrainingPlan", "accuracy", "own_randomness", "seeds_of", "train_model"]

ModelFactory = Callable[[int], nn.Module]


@dataclass(frozen=True)
class Reading:
    """How rows become batches and losses.

    Parameters
    ----------
    collate : callable, optional
        List of rows -> batch; default: stack, and pad token ids on the right.
    shift : bool, optional
        The logits at t predict the label at t + 1; default: for causal language models.
    loss : callable, optional
        ``(logits, targets) -> (rows,)``; default: cross-entropy (of tokens: their mean), or the squared error.
    id_column : str, optional
        An integer column that names the rows; default: their numbers from 0.
    """

    collate: Callable[[list[Any]], Any] | None = None
    shift: bool | None = None
    loss: Loss | None = None
    id_column: str | None = None


@dataclass(frozen=True)
class TrainingPlan:
    """How a model is trained before, or while, rows are scored.

    The paper's setting for CIFAR is ``TrainingPlan(epochs=200, batch_size=128, optimizer="sgd", lr=0.1,
    weight_decay=5e-4, schedule="steps", augment=...)``; scores transfer between settings and architectures, so a
    short plan serves.

    Parameters
    ----------
    epochs : float, default 30
        Length of the whole schedule, also when scores are taken earlier.
    steps : int, optional
        The length in steps, in place of `epochs`. Compare subsets at equal steps, not at equal epochs.
    batch_size : int, default 128
        The paper's. The last partial batch of an epoch is dropped.
    lr, weight_decay : float, default 3e-3, 0.01
    optimizer : {"adamw", "sgd"}, default "adamw"
        ``"sgd"`` has Nesterov momentum 0.9.
    schedule : {"cosine", "steps", "constant"}, default "cosine"
        ``"steps"``: a fifth of it after 30, 60 and 80 % of the steps, as the paper.
    augment : callable, optional
        ``(inputs, generator) -> inputs`` for training batches; scoring sees the rows as they are.
    """

    epochs: float = 30
    steps: int | None = None
    batch_size: int = 128
    lr: float = 3e-3
    weight_decay: float = 0.01
    optimizer: Literal["adamw", "sgd"] = "adamw"
    schedule: Literal["cosine", "steps", "constant"] = "cosine"
    augment: Callable[[Any, torch.Generator], Any] | None = field(default=None)

    def __post_init__(self) -> None:
        for name, allowed in (("optimizer", ("adamw", "sgd")), ("schedule", ("cosine", "steps", "constant"))):
            if getattr(self, name) not in allowed:
                raise MethodError(f"{name} = {getattr(self, name)!r}. Allowed: {', '.join(allowed)}.")
        for name in ("epochs", "batch_size", "lr"):
            if not getattr(self, name) > 0 or not math.isfinite(getattr(self, name)):
                raise MethodError(f"{name} = {getattr(self, name)}. It must be a number above 0.")
        if self.steps is not None and self.steps < 1:
            raise MethodError(f"steps = {self.steps}. A plan has at least 1 step; leave it out to count in epochs.")

    def epoch_steps(self, rows: int) -> int:
        """Return the steps of one epoch."""
        return max(1, rows // self.batch_size)

    def total_steps(self, rows: int) -> int:
        """Return the steps of the whole schedule."""
        return self.steps if self.steps is not None else max(1, round(self.epochs * self.epoch_steps(rows)))

    def factor(self, step: int, total: int) -> float:
        """Return the learning rate at a step, as a share of `lr`."""
        if self.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * min(step, total) / total))
        if self.schedule == "steps":
            return 0.2 ** sum(step >= share * total for share in (0.3, 0.6, 0.8))
        return 1.0


def seeds_of(seed: int, run: int) -> tuple[int, int]:
    """Return the seeds of one run: of its model, and of its data order and dropout."""
    first, second = np.random.SeedSequence([seed, run]).generate_state(2)
    return int(first), int(second)


@contextmanager
def own_randomness(seed: int) -> Iterator[None]:
    """Seed torch for the block (dropout, initial weights); what was before is restored."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def batches_of(rows: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield row numbers without end, in a new order each epoch; the last partial batch of an epoch is dropped."""
    size = min(batch_size, rows)
    while True:
        order = torch.randperm(rows, generator=generator)
        yield from order[: rows // size * size].split(size)


def train_model(
    model: nn.Module,
    rows: Rows,
    plan: TrainingPlan,
    *,
    seed: int = 0,
    stop: int | None = None,
    reading: Reading | None = None,
    places: Sequence[int] | None = None,
    on_batch: Callable[[Tensor, Tensor, Tensor], None] | None = None,
) -> nn.Module:
    """Train a model in place.

    Parameters
    ----------
    model : nn.Module
    rows : Rows
    plan : TrainingPlan
    seed : int, default 0
        Of the order of the rows, of dropout and of the augmentation. The global random state is left as it was.
    stop : int, optional
        Steps after which to stop; the schedule stays that of the whole plan.
    reading : Reading, optional
    places : sequence of int, optional
        Train on these rows only; default all.
    on_batch : callable, optional
        Called with the row numbers, the train-mode logits and the targets of each step, before it is made.

    Returns
    -------
    nn.Module
        The same model, in training mode.

    Raises
    ------
    ModelError
        When the loss is not finite.
    """
    reading = reading or Reading()
    chosen = torch.arange(len(rows)) if places is None else torch.as_tensor(places, dtype=torch.long)
    total = plan.total_steps(len(chosen))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer: torch.optim.Optimizer
    if plan.optimizer == "sgd":
        optimizer = torch.optim.SGD(parameters, lr=plan.lr, momentum=0.9, nesterov=True, weight_decay=plan.weight_decay)
    else:
        optimizer = torch.optim.AdamW(parameters, lr=plan.lr, weight_decay=plan.weight_decay)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    with own_randomness(seed), torch.enable_grad():
        order = batches_of(len(chosen), plan.batch_size, generator)
        for step in range(total if stop is None else min(stop, total)):
            numbers = chosen[next(order)]
            batch = rows.take(model, numbers.tolist(), shift=reading.shift)
            if plan.augment is not None:
                batch = Batch(plan.augment(batch.inputs, generator), batch.targets, batch.shift)
            logits, targets = aligned_logits(model, batch)
            if on_batch is not None:
                on_batch(numbers, logits.detach(), targets)
            loss = row_losses(logits, targets, reading.loss).mean()
            value = float(loss.detach())
            if not math.isfinite(value):
                raise ModelError(
                    f"the loss is {value} at step {step} of the training before scoring. Lower lr "
                    f"({plan.lr:g}), or look for rows that are not finite."
                )
            for group in optimizer.param_groups:
                group["lr"] = plan.lr * plan.factor(step, total)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    model.zero_grad(set_to_none=True)
    return model


@torch.no_grad()
def accuracy(model: nn.Module, rows: Rows, *, batch_size: int = 512, reading: Reading | None = None) -> float:
    """Return the share of labels that the model gets right (of tokens, for token labels), in evaluation mode."""
    reading = reading or Reading()
    right = count = 0
    with evaluating(model):
        for start in range(0, len(rows), batch_size):
            batch = rows.take(model, range(start, min(start + batch_size, len(rows))), shift=reading.shift)
            logits, targets = aligned_logits(model, batch)
            used = targets >= 0
            right += int((logits.argmax(-1) == targets)[used].sum())
            count += int(used.sum())
    return right / max(1, count)


class SubsetTrial:
    """Judges a subset by training fresh models on it: the accuracy on validation rows, averaged over seeds.

    Every subset gets the steps that the plan gives the whole set, as in the paper.

    Parameters
    ----------
    model_init : callable
        ``seed -> untrained model``.
    dataset, valid : data set
        Rows to choose from; labelled rows to judge by.
    plan : TrainingPlan, optional
        A small budget will do to choose an order.
    seeds : sequence of int, default (0, 1)
    reading : Reading, optional

    Examples
    --------
    >>> x = torch.randn(60, 2, generator=torch.Generator().manual_seed(0))
    >>> rows = (x, (x[:, 0] > 0).long())
    >>> trial = SubsetTrial(lambda seed: nn.Linear(2, 2), rows, rows, TrainingPlan(steps=50, lr=0.1), seeds=(0,))
    >>> trial(range(30)) > 0.8
    True
    """

    def __init__(
        self,
        model_init: ModelFactory,
        dataset: Any,
        valid: Any,
        plan: TrainingPlan | None = None,
        *,
        seeds: Sequence[int] = (0, 1),
        reading: Reading | None = None,
    ) -> None:
        self.reading = reading or Reading()
        self.model_init, self.seeds = model_init, tuple(seeds)
        self.rows, self.valid = Rows(dataset, self.reading.collate), Rows(valid, self.reading.collate)
        plan = plan or TrainingPlan()
        self.plan = TrainingPlan(**{**vars(plan), "steps": plan.total_steps(len(self.rows))})

    def __call__(self, places: Sequence[int]) -> float:
        """Return the mean accuracy after training on these rows."""
        found = []
        for seed in self.seeds:
            first, second = seeds_of(seed, 0)
            with own_randomness(first):
                model = self.model_init(first)
            train_model(model, self.rows, self.plan, seed=second, places=places, reading=self.reading)
            found.append(accuracy(model, self.valid, reading=self.reading))
        return float(np.mean(found))
