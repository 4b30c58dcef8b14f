"""From labels to the numbers of ordered classes, and what is asked of rows and weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gnomon.errors import MethodError

__all__ = ["encode", "natural_order"]


def natural_order(y: Any) -> list[Any] | None:
    """Return the categories of an ordered pandas categorical, and None for anything else."""
    dtype: Any = getattr(y, "dtype", None)
    if getattr(dtype, "ordered", None) and hasattr(dtype, "categories"):
        return list(dtype.categories)
    return None


def encode(
    y: NDArray[Any], classes_order: Sequence[Any] | str | None, reverse: bool, natural: Sequence[Any] | None = None
) -> tuple[NDArray[np.intp], NDArray[Any]]:
    """Return the position of each label in the order of the classes, and the classes in that order.

    Parameters
    ----------
    y : array of shape (n,)
        Labels.
    classes_order : sequence, "sorted" or None
        The order given by the user. None: numbers in ascending order, or `natural`.
    reverse : bool
        Turn the order round.
    natural : sequence, optional
        Order that came with the labels; may hold labels that do not occur.

    Returns
    -------
    codes : integer array of shape (n,)
    ordered : array of shape (K,)

    Raises
    ------
    MethodError
        When the labels have no order, the order given does not fit them, or there is one class only.
    """
    present = np.unique(y)
    if isinstance(classes_order, str):
        if classes_order != "sorted":
            raise MethodError(
                f"classes_order = {classes_order!r}; allowed are a list of the labels from the most common end to the "
                "rare end, 'sorted' and None."
            )
        ordered = present
    elif classes_order is not None:
        ordered = _as_given(present, classes_order)
    elif natural is not None:
        known = set(present.tolist())
        ordered = _labels([label for label in natural if label in known], present)
    elif present.dtype.kind in "biuf":
        ordered = present
    else:
        raise MethodError(
            f"the labels {_few(present)} have no order of their own. Pass classes_order=[...] with all of them, the "
            "rare end last, or classes_order='sorted' if their sorted order is meant."
        )
    if len(ordered) < 2:
        raise MethodError(
            f"y holds {len(ordered)} class only ({_few(ordered)}); ordered regression needs 3 classes or more "
            "(with 2 it is LogisticRegression with an L1 penalty). Give rows of the other classes."
        )
    if reverse:
        ordered = ordered[::-1]
    sorter = np.argsort(ordered, kind="stable")
    return sorter[np.searchsorted(ordered[sorter], y)].astype(np.intp), ordered.copy()


def _as_given(present: NDArray[Any], order: Sequence[Any]) -> NDArray[Any]:
    given = list(order)
    if len(set(given)) != len(given):
        raise MethodError(f"classes_order = {given} names a label twice. Name each once.")
    missing = [label for label in present.tolist() if label not in given]
    if missing:
        raise MethodError(f"classes_order = {given} lacks {_few(missing)}, which occurs in y. Name every label.")
    known = set(present.tolist())
    empty = [label for label in given if label not in known]
    if empty:
        raise MethodError(
            f"classes_order names {_few(empty)}, of which y holds no row with a positive weight. A class without rows "
            "has no boundary: leave it out, or stratify the split that lost it."
        )
    return _labels(given, present)


def _labels(labels: Sequence[Any], present: NDArray[Any]) -> NDArray[Any]:
    if present.dtype == object:
        out = np.empty(len(labels), dtype=object)
        out[:] = labels
        return out
    return np.asarray(labels, dtype=present.dtype)


def _few(labels: Sequence[Any] | NDArray[Any]) -> str:
    shown = [repr(x.item() if isinstance(x, np.generic) else x) for x in labels]
    return ", ".join(shown[:6]) + (", ..." if len(shown) > 6 else "")
