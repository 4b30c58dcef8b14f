"""Which rows to keep: a window of the rows in the order of their scores, over all rows or within each class."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from gnomon.data.data_diet.table import ScoreTable, as_scores
from gnomon.errors import DataError, GnomonWarning, MethodError, nearest

__all__ = ["Order", "prune_by_score", "select"]

Order = Literal["hard", "easy", "random", "auto"]


def select(
    scores: ScoreTable | Sequence[float] | np.ndarray,
    keep: float | int = 0.5,
    *,
    order: Order = "hard",
    offset: float | int = 0,
    balance: Literal["class"] | None = None,
    labels: Sequence[int] | np.ndarray | None = None,
    seed: int = 0,
    judge: Callable[[Int[np.ndarray, " kept"]], float] | None = None,
) -> Int[np.ndarray, " kept"]:
    """Choose rows by their scores.

    Parameters
    ----------
    scores : ScoreTable or array (rows,)
        High: hard. Ties keep the order of the rows; +inf (never learnt) is hardest, more runs with +inf harder.
    keep : float or int, default 0.5
        A share of the rows in (0, 1], or a number of rows.
    order : {"hard", "easy", "random", "auto"}, default "hard"
        Which end is kept. ``"hard"`` is the paper's; it needs many rows a degree of freedom and few wrong labels.
        ``"auto"`` asks `judge` about the three others and takes the best.
    offset : float or int, default 0
        Share or number of rows that are skipped at the end that is kept. With ``"hard"`` these are the hardest: where
        labels are wrong, skip about as many as are. ``order="easy"`` counts from the easiest, as the authors' code.
    balance : {"class"}, optional
        Keep the same share of every class, and skip the same share.
    labels : array (rows,) of int, optional
        Of the rows; default: those in the table.
    seed : int, default 0
        Of ``order="random"``.
    judge : callable, optional
        Row numbers -> a figure of merit, such as a `SubsetTrial`.

    Returns
    -------
    array (kept,)
        int64 row numbers, ascending: for `datasets.Dataset.select`.

    Raises
    ------
    MethodError
        A share, number, order or offset that is not possible.
    DataError
        Scores that are nan, or labels that do not belong to them.

    Warns
    -----
    GnomonWarning
        When a class keeps less than half the share that the data set keeps; with the table.

    Examples
    --------
    >>> select([0.1, 0.9, 0.5, 0.7], keep=2)
    array([1, 3])
    >>> select([0.1, 0.9, 0.5, 0.7], keep=0.5, offset=1)
    array([2, 3])
    """
    values, never = as_scores(scores)
    known = scores.labels if labels is None and isinstance(scores, ScoreTable) else labels
    groups = _groups(known, len(values), balance)
    if order not in get_args(Order):
        raise MethodError(f"order = {order!r} is unknown. {nearest(str(order), get_args(Order), noun='order')}")
    if balance not in (None, "class"):
        raise MethodError(f"balance = {balance!r}. Allowed: 'class', or None for no balance.")
    count, skip = _counts(keep, offset, len(values))
    ranking = np.lexsort((never, values)).astype(np.int64)  # ascending; equal rows stay in their order
    choices: dict[str, np.ndarray] = {}
    for name in ("hard", "easy", "random") if order == "auto" else (order,):
        line = {"hard": ranking[::-1], "easy": ranking, "random": _shuffled(len(values), seed)}[name]
        if balance == "class" and groups is not None:
            choices[name] = _balanced(line, groups, count, skip if name != "random" else 0)
        else:
            start = 0 if name == "random" else skip
            choices[name] = np.sort(line[start : start + count])
    kept = choices[_best(choices, judge)] if order == "auto" else choices[order]
    if groups is not None and balance is None and order != "random":
        _warn_of_lost_classes(kept, groups)
    return kept


def _shuffled(rows: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(rows)


def _best(choices: dict[str, np.ndarray], judge: Callable[[np.ndarray], float] | None) -> str:
    if judge is None:
        raise MethodError(
            "order = 'auto' compares hard, easy and random rows by a figure of merit, and there is none. Give judge=, "
            "such as SubsetTrial(model_init, dataset, valid), or name an order."
        )
    figures = {name: float(judge(rows)) for name, rows in choices.items()}
    return max(figures, key=lambda name: figures[name])


def share_or_number(value: float | int, rows: int, name: str) -> int:
    """Return a number of rows: a float is a share of them, an int is the number itself."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise MethodError(f"{name} = {value!r}. Give a share (a float up to 1.0) or a number of rows (an int).")
    if isinstance(value, (int, np.integer)):
        return int(value)
    if not 0 <= value <= 1:
        raise MethodError(f"{name} = {value}: a share is between 0 and 1. For a number of rows give an int.")
    return round(float(value) * rows)


def _counts(keep: float | int, offset: float | int, rows: int) -> tuple[int, int]:
    count, skip = share_or_number(keep, rows, "keep"), share_or_number(offset, rows, "offset")
    if not 1 <= count <= rows:
        raise MethodError(f"keep = {keep}: that is {count} of {rows} rows. Allowed: 1 row to all of them.")
    if not 0 <= skip <= rows - count:
        raise MethodError(
            f"offset = {offset} skips {skip} rows and keep = {keep} takes {count}, of {rows}. Their sum may be at most "
            "all rows: lower one of them."
        )
    return count, skip


def _groups(labels: Any, rows: int, balance: str | None) -> np.ndarray | None:
    if labels is None:
        if balance is not None:
            raise DataError("balance = 'class' needs the labels of the rows, and the scores bring none. Give labels=.")
        return None
    found = np.asarray(labels)
    if found.shape != (rows,):
        raise DataError(f"labels have shape {found.shape} for {rows} scores. Give one label a row.")
    return found


def _balanced(line: np.ndarray, groups: np.ndarray, count: int, skip: int) -> np.ndarray:
    """Take the window within each class; the rows left over by rounding go to the largest remainders."""
    classes, sizes = np.unique(groups, return_counts=True)
    quotas = _apportion(count, sizes)
    kept = []
    for label, size, quota in zip(classes, sizes, quotas, strict=True):
        mine = line[groups[line] == label]
        start = min(round(skip * size / len(line)), size - quota)
        kept.append(mine[start : start + quota])
    return np.sort(np.concatenate(kept))


def _apportion(count: int, sizes: np.ndarray) -> np.ndarray:
    exact = count * sizes / sizes.sum()
    quotas = np.floor(exact).astype(np.int64)
    left = np.argsort(-(exact - quotas), kind="stable")[: count - int(quotas.sum())]
    quotas[left] += 1
    return quotas


def _warn_of_lost_classes(kept: np.ndarray, groups: np.ndarray) -> None:
    classes, sizes = np.unique(groups, return_counts=True)
    if len(classes) > max(2, len(groups) // 2):
        return  # no classes: a label of its own for every row
    left = np.array([(groups[kept] == label).sum() for label in classes])
    share = len(kept) / len(groups)
    if (left / sizes < share / 2).any():
        table = ", ".join(f"{label}: {n} of {size}" for label, n, size in zip(classes, left, sizes, strict=True))
        warnings.warn(
            f"The selection upsets the balance of the classes; kept by class: {table}. Use balance='class' to keep "
            "the same share of each.",
            GnomonWarning,
            stacklevel=3,
        )


def prune_by_score(
    dataset: Any,
    scores: ScoreTable | Sequence[float] | np.ndarray,
    keep: float | int,
    offset: float | int = 0,
    *,
    order: Order = "hard",
    balance: Literal["class"] | None = None,
    labels: Sequence[int] | np.ndarray | None = None,
    seed: int = 0,
    judge: Callable[[Int[np.ndarray, " kept"]], float] | None = None,
) -> Any:
    """Return the part of a data set that `select` keeps.

    Parameters
    ----------
    dataset : data set
        The one that was scored, in the same order; a `ScoreTable` is checked against it.
    scores, keep, offset, order, balance, labels, seed, judge
        As for `select`.

    Returns
    -------
    data set
        A `datasets.Dataset`, tensor, pair of arrays or list gives its like; any other a `torch.utils.data.Subset`.

    Raises
    ------
    DataError
        When the scores belong to other rows, or to rows in another order.

    Examples
    --------
    >>> prune_by_score(["a", "b", "c", "d"], [0.1, 0.9, 0.5, 0.7], keep=0.5)
    ['b', 'd']
    """
    if isinstance(scores, ScoreTable):
        scores.check(dataset)
    rows = len(dataset[0]) if isinstance(dataset, tuple) else len(dataset)
    values, _ = as_scores(scores)
    if rows != len(values):
        raise DataError(f"{len(values)} scores for {rows} rows. Give the data set that was scored.")
    kept = select(scores, keep, order=order, offset=offset, balance=balance, labels=labels, seed=seed, judge=judge)
    if isinstance(dataset, (Tensor, np.ndarray)):
        return dataset[kept]
    if hasattr(dataset, "select"):
        return dataset.select(kept)
    if isinstance(dataset, tuple):
        return tuple(part[kept] for part in dataset)
    if isinstance(dataset, list):
        return [dataset[i] for i in kept]
    return torch.utils.data.Subset(dataset, kept.tolist())
