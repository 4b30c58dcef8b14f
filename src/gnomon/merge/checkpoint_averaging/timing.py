"""When snapshots are taken."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from gnomon.errors import MethodError, nearest

__all__ = ["Timing"]

DEFAULT_SNAPSHOTS = 10  # the paper's runs have ten epochs


class Timing:
    """Decides after each optimizer step whether a snapshot is due.

    Parameters
    ----------
    every : {"auto", "epoch"} or int
    per_epoch : int
    snapshots : int, optional
    skip_first : int
        As for `CheckpointAveraging`.
    """

    def __init__(self, every: str | int, per_epoch: int, snapshots: int | None, skip_first: int) -> None:
        if isinstance(every, str) and every not in ("auto", "epoch"):
            hint = nearest(every, ("auto", "epoch"), noun="every")
            raise MethodError(f"every = {every!r} is unknown. {hint} Or a number of steps.")
        if isinstance(every, bool) or (not isinstance(every, str) and (not isinstance(every, int) or every < 1)):
            raise MethodError(f"every = {every!r}. Allowed: 'auto', 'epoch' or a number of steps, 1 or more.")
        if per_epoch < 1:
            raise MethodError(f"per_epoch = {per_epoch}. Allowed: 1 or more.")
        if snapshots is not None and (snapshots < 2 or every != "auto" or per_epoch != 1):
            raise MethodError(
                f"snapshots = {snapshots} with every = {every!r} and per_epoch = {per_epoch}. Give 2 snapshots or more "
                "and leave the other two out."
            )
        if per_epoch != 1 and not isinstance(every, str):
            raise MethodError(f"per_epoch = {per_epoch} does not go with every = {every} steps. Give one of the two.")
        if skip_first < 0:
            raise MethodError(f"skip_first = {skip_first}. Allowed: 0 or more.")
        self.every, self.per_epoch, self.snapshots, self.skip_first = every, per_epoch, snapshots, skip_first
        self._spread: int | None = None  # snapshots over all steps, when they do not follow epochs
        self._before = 0.0
        self._last = 0
        self._counted = True  # the length of an epoch is known

    def begin(self, state: Any, args: Any, dataloader: Any) -> None:
        """Settle what "auto" means for this run, and refuse one too short for an average.

        Raises
        ------
        MethodError
            When fewer than two snapshots would be averaged.
        """
        self._before, self._last = float(state.epoch or 0.0), int(state.global_step)
        steps, per_epoch = int(state.max_steps), _steps_of_epoch(args, dataloader)
        self._counted = per_epoch is not None
        if not self._counted and self.per_epoch != 1:
            raise MethodError(
                f"per_epoch = {self.per_epoch}, but the training data have no length, so parts of an epoch cannot be "
                "told. Use every=STEPS or snapshots=N."
            )
        self._spread = self.snapshots
        marks = None if per_epoch is None else int(steps / per_epoch * self.per_epoch + 1e-9)
        few = self.per_epoch == 1 and (marks is None or marks < 2)
        if self.every == "auto" and self.snapshots is None and few:
            self._spread = min(DEFAULT_SNAPSHOTS, steps)
        planned = marks
        if self._spread is not None:
            planned = self._spread if self._spread <= steps else 0
        elif isinstance(self.every, int):
            planned = steps // self.every
        if planned is not None and planned - self.skip_first < 2:
            of = "" if per_epoch is None else f" of {per_epoch} to the epoch"
            raise MethodError(
                f"{self.says()}, skip_first = {self.skip_first}: a run of {steps} steps{of} would average "
                f"{max(0, planned - self.skip_first)} snapshots, and an average needs two. Train longer, or take them "
                f"more often: snapshots={max(2, min(DEFAULT_SNAPSHOTS, steps))} spreads them over the steps."
            )

    def says(self) -> str:
        """Return the timing as an option reads."""
        if self.snapshots is not None:
            return f"snapshots = {self.snapshots}"
        more = f", per_epoch = {self.per_epoch}" if self.per_epoch != 1 else ""
        return f"every = {self.every!r}{more}"

    def options(self) -> dict[str, Any]:
        """Return what must stay the same when a run is resumed."""
        return {"every": self.every, "per_epoch": self.per_epoch, "spread": self._spread, "skip_first": self.skip_first}

    def check_same(self, saved: dict[str, Any], folder: Path) -> None:
        """Refuse to go on with another timing.

        Raises
        ------
        MethodError
            When an option differs from the one in the checkpoint.
        """
        for key, value in self.options().items():
            if saved.get(key) != value:
                raise MethodError(
                    f"{key} is {value!r} now and was {saved.get(key)!r} in {folder}: the snapshots would not be "
                    "equidistant. Resume with the same options, or start a new average with resume_from='nothing'."
                )

    def before_step(self, state: Any) -> None:
        """Note the place in the epoch before a step."""
        self._before = float(state.epoch or 0.0)

    def due(self, state: Any) -> bool:
        """Return whether the step that just ended completes a stretch."""
        step = int(state.global_step)
        if self._spread is not None:
            done, total = self._spread * step, int(state.max_steps)
            found = done // total > (done - self._spread) // total
        elif isinstance(self.every, int):
            found = step % self.every == 0
        else:
            # without a length the Trainer's epoch is no share of one; its end is told by `due_at_epoch_end`
            found = self._counted and _marks(float(state.epoch), self.per_epoch) > _marks(self._before, self.per_epoch)
        self._last = step if found else self._last
        return found

    def due_at_epoch_end(self, state: Any, control: Any) -> bool:
        """Return whether an epoch ended that `due` could not see: its length was unknown, or it was cut short.

        An epoch that ends only because training does is no whole one.
        """
        if self._spread is not None or isinstance(self.every, int) or control.should_training_stop:
            return False
        found = int(state.global_step) > self._last
        self._last = int(state.global_step)
        return found


def _marks(epoch: float, per_epoch: int) -> int:
    return math.floor(epoch * per_epoch + 1e-9)


def _steps_of_epoch(args: Any, dataloader: Any) -> int | None:
    try:
        return -(-len(dataloader) // int(args.gradient_accumulation_steps)) or None
    except TypeError:  # no dataloader, or one without a length
        return None
