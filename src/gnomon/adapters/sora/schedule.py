"""The sparsifying schedule (Algorithm 1): a threshold that rises stage by stage, and what each stage kept."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from gnomon.adapters.sora.optimizer import SoRAProximal
from gnomon.adapters.sora.pruning import sora_summary
from gnomon.errors import MethodError

__all__ = ["SparsifyingSchedule", "Stage", "thresholds"]

Spacing = Literal["linear", "log_linear", "exp_linear"]


def thresholds(start: float, end: float, stages: int, spacing: Spacing = "linear") -> list[float]:
    """Return the thresholds of a schedule, both ends included.

    Parameters
    ----------
    start, end : float
        The first and the last threshold, 0 <= start < end.
    stages : int
        How many, at least 2.
    spacing : {"linear", "log_linear", "exp_linear"}, default "linear"
        Equal steps of xi, of e^xi (denser towards the end), or of log xi (denser towards the start; start above 0).

    Returns
    -------
    list of float

    Raises
    ------
    MethodError
        When an argument is not allowed.

    Examples
    --------
    >>> [round(xi, 6) for xi in thresholds(1e-4, 1e-2, 3, "exp_linear")]
    [0.0001, 0.001, 0.01]
    """
    if not 0 <= start < end < float("inf"):
        raise MethodError(f"start = {start!r}, end = {end!r}: thresholds rise, 0 <= start < end, such as 0 and 7e-4.")
    if not isinstance(stages, int) or isinstance(stages, bool) or stages < 2:
        raise MethodError(f"stages = {stages!r}: a whole number of at least 2, the first and the last threshold.")
    if spacing == "linear":
        found = np.linspace(start, end, stages)
    elif spacing == "log_linear":
        found = np.log(np.linspace(math.exp(start), math.exp(end), stages))
    elif spacing == "exp_linear":
        if start == 0:
            raise MethodError("start = 0 has no logarithm. With spacing = 'exp_linear' start above 0, such as 1e-5.")
        found = np.exp(np.linspace(math.log(start), math.log(end), stages))
    else:
        raise MethodError(f"spacing = {spacing!r}. Allowed: 'linear', 'log_linear', 'exp_linear'.")
    return [start, *(float(xi) for xi in found[1:-1]), end]


@dataclass(frozen=True)
class Stage:
    """What one stage of the schedule ended with.

    Attributes
    ----------
    stage : int
        From 0.
    xi : float
    train_metric, eval_metric : float or None
        Higher is better; None where nothing was measured.
    gates, all_gates : int
        Gates that are not zero, and all.
    parameters : int
        Trained numbers less (out + in) for every zero gate.
    """

    stage: int
    xi: float
    train_metric: float | None
    eval_metric: float | None
    gates: int
    all_gates: int
    parameters: int


class SparsifyingSchedule:
    """A rising list of thresholds, each trained from where the last one ended.

    Three ways to use it: `run` in a loop of one's own, ``SoRACallback(schedule=...)`` in a `Trainer`, or `xi` and
    `record` by hand. Optimizer and learning-rate schedule go on from stage to stage.

    Parameters
    ----------
    xi : sequence of float
        Rising, at least one, none below 0.
    first, further : float, default 50 and 15
        How long the first stage and each further one lasts, in any unit (authors' script: epochs). `run` hands them to
        the training; a `Trainer`'s steps are divided in their proportion.

    Attributes
    ----------
    records : list of Stage
        The stages that have ended.

    Raises
    ------
    MethodError
        When the thresholds do not rise or a length is not positive.

    Examples
    --------
    >>> schedule = SparsifyingSchedule([0.0, 1e-3], first=3, further=1)
    >>> schedule.ends(100)
    [75, 100]
    >>> schedule.xi_at(80, 100)
    0.001
    """

    def __init__(self, xi: Sequence[float], *, first: float = 50, further: float = 15) -> None:
        self.xi = [float(value) for value in xi]
        rising = all(a < b for a, b in zip(self.xi, self.xi[1:], strict=False))
        if not self.xi or not rising or self.xi[0] < 0 or not math.isfinite(self.xi[-1]):
            raise MethodError(f"xi = {self.xi}: thresholds rise from 0 or more, such as [0, 1e-4, 2e-4].")
        if not 0 < first < float("inf") or not 0 < further < float("inf"):
            raise MethodError(
                f"first = {first!r}, further = {further!r}: lengths of stages above 0, such as 50 and 15."
            )
        self.first, self.further = first, further
        self.records: list[Stage] = []

    @classmethod
    def spaced(
        cls,
        start: float = 0.0,
        end: float = 7e-4,
        stages: int = 7,
        spacing: Spacing = "linear",
        *,
        first: float = 50,
        further: float = 15,
    ) -> SparsifyingSchedule:
        """Return a schedule over `thresholds` (defaults: the authors' script)."""
        return cls(thresholds(start, end, stages, spacing), first=first, further=further)

    def length(self, stage: int) -> float:
        """Return how long a stage lasts."""
        return self.first if stage == 0 else self.further

    def ends(self, total: int) -> list[int]:
        """Return the step at which each stage ends when there are `total` steps in all.

        Raises
        ------
        MethodError
            When a stage would have no step.
        """
        lengths = np.cumsum([self.length(stage) for stage in range(len(self.xi))])
        found = [round(total * float(end / lengths[-1])) for end in lengths]
        if any(a >= b for a, b in zip([0, *found], found, strict=False)):
            raise MethodError(
                f"{total} steps do not suffice for {len(self.xi)} stages of lengths {self.first:g} and "
                f"{self.further:g}. Train longer, or take fewer thresholds."
            )
        return found

    def stage_at(self, step: int, total: int) -> int:
        """Return the stage of a step, counted from 0; the last one after the end."""
        return next((stage for stage, end in enumerate(self.ends(total)) if step < end), len(self.xi) - 1)

    def xi_at(self, step: int, total: int) -> float:
        """Return the threshold of a step, counted from 0."""
        return self.xi[self.stage_at(step, total)]

    def record(
        self,
        model: nn.Module,
        train_metric: float | None = None,
        eval_metric: float | None = None,
        adapter: str | None = None,
    ) -> Stage:
        """Add the stage that has ended to `records`.

        Parameters
        ----------
        model : PeftModel
        train_metric, eval_metric : float, optional
            Higher is better, such as accuracies. The authors measure the first on 1000 training rows,
            ``train.shuffle(seed=42).select(range(1000))``.
        adapter : str, optional

        Raises
        ------
        MethodError
            When a metric is not finite, or all stages have ended.
        """
        for name, value in (("train_metric", train_metric), ("eval_metric", eval_metric)):
            if value is not None and not math.isfinite(value):
                raise MethodError(f"{name} = {value!r}: a finite number, higher is better, such as an accuracy.")
        stage = len(self.records)
        if stage >= len(self.xi):
            raise MethodError(f"all {len(self.xi)} stages have ended. Make a new schedule.")
        found = sora_summary(model, adapter)
        made = Stage(stage, self.xi[stage], train_metric, eval_metric, found.gates, found.all_gates, found.parameters)
        self.records.append(made)
        return made

    def table(self) -> list[dict[str, Any]]:
        """Return the stages as rows, with memorisation and generalisation.

        Returns
        -------
        list of dict
            The fields of `Stage`; `memorisation` and `generalisation`: the train and the eval metric in percent of the
            best stage's; `best`: whether the eval metric is the best. None where nothing was measured.
        """
        rows = [asdict(record) for record in self.records]
        for name, of in (("memorisation", "train_metric"), ("generalisation", "eval_metric")):
            best = max((row[of] for row in rows if row[of] is not None), default=None)
            for row in rows:
                row[name] = 100.0 * row[of] / best if best and row[of] is not None else None
                row["best"] = row["generalisation"] == 100.0 if name == "generalisation" else None
        return rows

    def state_dict(self) -> dict[str, Any]:
        """Return the records and the thresholds as plain values."""
        return {"xi": self.xi, "records": [asdict(record) for record in self.records]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the stages of a saved state.

        Raises
        ------
        MethodError
            When it belongs to other thresholds.
        """
        if list(state["xi"]) != self.xi:
            raise MethodError(
                f"the saved schedule has the thresholds {state['xi']}, this one {self.xi}. Go on with the saved ones, "
                "or start in a new place."
            )
        self.records = [Stage(**record) for record in state["records"]]

    def run(
        self,
        model: nn.Module,
        optimizer: SoRAProximal,
        train: Callable[[int, float], object],
        evaluate: Callable[[], tuple[float, float]] | None = None,
        *,
        path: str | Path | None = None,
        scheduler: Any = None,
    ) -> list[Stage]:
        """Train all stages that have not ended; with a file, go on where a killed run stopped.

        Parameters
        ----------
        model : PeftModel
        optimizer : SoRAProximal
        train : callable
            Called with the number of the stage and its length; trains the model with the optimizer. It must draw its
            rows by the stage's number, not from a generator of the run, for a resumed run to equal a whole one.
        evaluate : callable, optional
            Returns the train and the eval metric.
        path : str or Path, optional
            Where trained parameters, optimizer and records are written after each stage, and read from at the start.
        scheduler : LRScheduler, optional
            Saved and restored with them.

        Returns
        -------
        list of Stage
        """
        file = None if path is None else Path(path)
        if file is not None and file.is_file():
            self._restore(torch.load(file, map_location="cpu", weights_only=True), model, optimizer, scheduler)
        for stage in range(len(self.records), len(self.xi)):
            optimizer.xi = self.xi[stage]
            train(stage, self.length(stage))
            train_metric, eval_metric = evaluate() if evaluate is not None else (None, None)
            self.record(model, train_metric, eval_metric, optimizer.gates.adapter)
            if file is not None:
                state = {
                    "schedule": self.state_dict(),
                    "model": {name: p.detach() for name, p in model.named_parameters() if p.requires_grad},
                    "optimizer": optimizer.state_dict(),
                    "scheduler": None if scheduler is None else scheduler.state_dict(),
                }
                part = file.with_name(file.name + ".part")
                torch.save(state, part)
                os.replace(part, file)
        return self.records

    def _restore(self, state: dict[str, Any], model: nn.Module, optimizer: SoRAProximal, scheduler: Any) -> None:
        self.load_state_dict(state["schedule"])
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if trained.keys() != state["model"].keys():
            raise MethodError("the saved run trains other parameters than this model. Attach the same adapter first.")
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(state["model"][name])
        optimizer.load_state_dict(state["optimizer"])
        if scheduler is not None:
            scheduler.load_state_dict(state["scheduler"])
