"""Forgetting events: how often a row that was classified correctly is got wrong the next time it is trained on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from gnomon.errors import MethodError

__all__ = ["ForgettingTable", "forgetting_scores"]


class ForgettingTable:
    """Counts forgetting events row by row while a model trains.

    Each time row i is in a mini-batch, with a_i = 1 if the argmax of the train-mode logits (the forward pass that
    makes the loss, before the step) is its label: if prev_i = 1 and a_i = 0 the row was forgotten once more; then
    prev_i = a_i. An evaluation at the end of the epoch would give another, lower count.

    Parameters
    ----------
    rows : int
        Rows of the training set.

    Attributes
    ----------
    events : array (rows,) int64
        Times forgotten.
    learnt, correct : array (rows,) bool
        Ever classified correctly; correct the last time.
    seen : array (rows,) int64
        Times in a mini-batch.

    Examples
    --------
    >>> table = ForgettingTable(2)
    >>> for right in ([True, False], [False, False]):
    ...     table.update([0, 1], right)
    >>> table.scores()
    array([ 1., inf])
    """

    def __init__(self, rows: int) -> None:
        if rows < 1:
            raise MethodError(f"rows = {rows}. A table needs at least 1 row.")
        self.events = np.zeros(rows, dtype=np.int64)
        self.seen = np.zeros(rows, dtype=np.int64)
        self.learnt = np.zeros(rows, dtype=np.bool_)
        self.correct = np.zeros(rows, dtype=np.bool_)

    def update(
        self, rows: Sequence[int] | Int[np.ndarray, " n"], correct: Sequence[bool] | Bool[np.ndarray, " n"]
    ) -> None:
        """Enter one mini-batch.

        Parameters
        ----------
        rows : array (n,) of int
            Row numbers, each once.
        correct : array (n,) of bool
            Whether each was classified correctly.

        Raises
        ------
        MethodError
            Lengths that differ, a row that does not exist, or one that occurs twice.
        """
        places, now = np.asarray(rows, dtype=np.int64), np.asarray(correct, dtype=np.bool_)
        if places.shape != now.shape or places.ndim != 1:
            raise MethodError(f"rows have shape {places.shape}, correct {now.shape}. Give two vectors of one length.")
        if len(places) and (places.min() < 0 or places.max() >= len(self.events)):
            wrong = int(places[(places < 0) | (places >= len(self.events))][0])
            raise MethodError(f"row {wrong} is not in the table. Allowed: 0 to {len(self.events) - 1}.")
        if len(np.unique(places)) < len(places):
            raise MethodError("A row occurs twice in one mini-batch. Enter its occurrences one after the other.")
        self.events[places] += self.correct[places] & ~now
        self.correct[places] = now
        self.learnt[places] |= now
        self.seen[places] += 1

    def scores(self) -> Float[np.ndarray, " rows"]:
        """Return the events of each row as float64; +inf for rows that were never classified correctly."""
        return np.where(self.learnt, self.events.astype(np.float64), np.inf)


def forgetting_scores(correct: Bool[np.ndarray, "epochs rows"]) -> Float[np.ndarray, " rows"]:
    """Return the forgetting scores of a whole history, one line an epoch.

    Parameters
    ----------
    correct : array (epochs, rows) of bool
        Whether each row was classified correctly when it was trained on in that epoch.

    Returns
    -------
    array (rows,)
        float64; +inf for rows never correct.

    Examples
    --------
    >>> forgetting_scores(np.array([[0, 1, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0]]))
    array([ 1.,  1., inf])
    """
    history = np.asarray(correct).astype(np.bool_)
    if history.ndim != 2:
        raise MethodError(f"correct has shape {history.shape}. Give one line an epoch: (epochs, rows).")
    events = (history[:-1] & ~history[1:]).sum(0).astype(np.float64)
    return np.where(history.any(0), events, np.inf)
