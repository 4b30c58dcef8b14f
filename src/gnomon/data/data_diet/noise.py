"""Wrong labels: the rows most likely to have one, and label noise to try it on."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Bool, Int
from scipy.stats import rankdata
from sklearn.metrics import roc_auc_score

from gnomon.data.data_diet.selection import share_or_number
from gnomon.data.data_diet.table import ScoreTable, as_scores
from gnomon.errors import DataError, GnomonWarning, MethodError

__all__ = ["NoisyLabels", "noise_auc", "noise_report", "permute_labels"]


class NoisyLabels(NamedTuple):
    """Labels with noise: the labels, the rows that were drawn, and those whose label really changed."""

    labels: Int[np.ndarray, " rows"]
    drawn: Bool[np.ndarray, " rows"]
    changed: Bool[np.ndarray, " rows"]


def permute_labels(labels: Sequence[int] | np.ndarray, share: float, *, seed: int = 0) -> NoisyLabels:
    """Permute the labels of a share of the rows among these rows, as the authors' code makes label noise.

    Of `share` rows drawn about ``share (1 - 1/C)`` end up wrong with C balanced classes: 9 % of all labels for 10 %
    and ten classes.

    Parameters
    ----------
    labels : array (rows,)
    share : float
        In [0, 1]; floor(share rows) rows are drawn.
    seed : int, default 0

    Returns
    -------
    NoisyLabels

    Examples
    --------
    >>> noisy = permute_labels([0, 1, 2, 3], 0.5)
    >>> int(noisy.drawn.sum()), sorted(noisy.labels.tolist())
    (2, [0, 1, 2, 3])
    """
    old = np.asarray(labels)
    if not 0 <= share <= 1 or old.ndim != 1:
        raise MethodError(f"share = {share} of labels of shape {old.shape}. Allowed: 0 to 1, of one label a row.")
    generator = np.random.default_rng(seed)
    chosen = generator.choice(len(old), math.floor(share * len(old)), replace=False)
    new = old.copy()
    new[chosen] = old[generator.permutation(chosen)]
    drawn = np.zeros(len(old), dtype=np.bool_)
    drawn[chosen] = True
    return NoisyLabels(new, drawn, new != old)


def noise_auc(scores: ScoreTable | Sequence[float] | np.ndarray, wrong: Sequence[bool] | np.ndarray) -> float:
    """Return the area under the ROC curve with which high scores find the rows known to be wrong.

    Examples
    --------
    >>> noise_auc([0.1, 0.9, 0.2], [False, True, False])
    1.0
    """
    values, never = as_scores(scores)
    known = np.asarray(wrong).astype(np.bool_)
    if known.shape != values.shape or known.all() or not known.any():
        raise DataError(
            f"wrong has shape {known.shape} with {int(known.sum())} wrong rows, for {len(values)} scores. It needs one "
            "entry a row, some of each kind."
        )
    ranks = rankdata(values)  # ranks, because sklearn takes no infinite scores
    top = np.isinf(values)
    ranks[top] += rankdata(never[top]) / (len(values) + 1) if top.any() else 0
    return float(roc_auc_score(known, ranks))


def noise_report(
    scores: ScoreTable | Sequence[float] | np.ndarray,
    top: float | int = 0.01,
    *,
    labels: Sequence[Any] | np.ndarray | None = None,
    texts: Sequence[str] | None = None,
    wrong: Sequence[bool] | np.ndarray | None = None,
) -> pd.DataFrame:
    """List the rows with the highest scores: those most likely to be mislabelled, and the hardest right ones.

    Parameters
    ----------
    scores : ScoreTable or array (rows,)
        EL2N, early in training and averaged over runs, ranks wrong labels highest.
    top : float or int, default 0.01
        Share or number of rows to list.
    labels : sequence (rows,), optional
        Shown beside the row; default: those in the table.
    texts : sequence of str (rows,), optional
        Shown beside the row, such as the text or the file name.
    wrong : array (rows,) of bool, optional
        Rows known to be wrong: adds a column, and ``attrs["auc"]`` and ``attrs["precision"]``.

    Returns
    -------
    pandas.DataFrame
        Highest score first: ``row`` (its id), ``position`` (its number), ``score``, ``quantile`` (share of rows with a
        lower score), ``spread`` (over runs), ``never_learnt`` (runs), and the columns asked for.

    Raises
    ------
    DataError
        When a column has another length than the scores.
    MethodError
        When `top` is no share or number of rows.

    Warns
    -----
    GnomonWarning
        When the scores come from a single run.

    Examples
    --------
    >>> noise_report([0.1, 1.4, 0.2], top=1)[["row", "score"]].values.tolist()
    [[1.0, 1.4]]
    """
    values, never = as_scores(scores)
    count = share_or_number(top, len(values), "top")
    if isinstance(top, float):
        count = max(1, count)
    if not 1 <= count <= len(values):
        raise MethodError(f"top = {top}: that is {count} of {len(values)} rows. Allowed: 1 to all of them.")
    table = scores if isinstance(scores, ScoreTable) else None
    if table is not None and len(table.runs) == 1:
        warnings.warn("These scores come from one run and are noisy: average 10.", GnomonWarning, stacklevel=2)
    first = np.lexsort((never, values))[::-1][:count]
    columns: dict[str, Any] = {
        "row": first if table is None else table.ids[first],
        "position": first,
        "score": values[first],
        "quantile": (rankdata(values, method="min")[first] - 1) / len(values),
    }
    if table is not None:
        columns |= {"spread": table.spread[first], "never_learnt": never[first]}
        labels = table.labels if labels is None else labels
    for name, given in (("label", labels), ("text", texts), ("wrong", wrong)):
        if given is not None:
            if len(given) != len(values):
                raise DataError(f"{name}: {len(given)} entries for {len(values)} scores. Give one a row.")
            columns[name] = [given[i] for i in first]
    report = pd.DataFrame(columns)
    if wrong is not None:
        report.attrs["auc"] = noise_auc(scores, wrong)
        report.attrs["precision"] = float(np.mean(np.asarray(wrong, dtype=np.bool_)[first]))
    return report
