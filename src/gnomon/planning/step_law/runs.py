"""Tables of training runs: reading them, near-optimal rows, the shape of the loss, what a law's choice costs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from gnomon.errors import DataError, GnomonWarning, MethodError
from gnomon.planning.step_law.law import positive, whole

__all__ = ["convexity", "excess_loss", "is_complete", "near_optimal", "read_runs", "smooth_loss"]

_LOSS_NAMES = ("smooth loss", "smooth_loss", "loss")
_NUMBERS = ("N", "D", "lr", "bs")


def read_runs(runs: str | Path | pd.DataFrame, seq_len: int = 2048, *, decimal: str = ".") -> pd.DataFrame:
    """Read a table of runs and check every number in it.

    Parameters
    ----------
    runs : str, Path or DataFrame
        A csv file (``.gz`` too) or a frame. Columns: ``N`` (non-embedding parameters; mixture of experts: all), ``D``
        (tokens), ``lr`` (peak), ``bs`` (batch in sequences) and the loss, taken from ``smooth loss``, ``smooth_loss``
        or ``loss``, whichever is there first. ``Na`` (active parameters), if there, also tells groups apart; ``h``,
        ``ffnh``, ``numl`` or ``M`` (FLOPs per token) serve laws that take compute. The rest is ignored.
    seq_len : int, default 2048
        Tokens in one sequence of ``bs``; the column ``seq_len``, if there, wins.
    decimal : str, default "."
        Decimal mark of a file; with ``","`` columns are separated by ``;``.

    Returns
    -------
    DataFrame
        One row per run: ``N``, ``D``, ``lr``, ``batch`` (tokens), ``loss``, ``group`` (its number, by N, Na and D),
        ``excess`` (loss over the group's smallest, minus 1), ``M`` (NaN where unknown).

    Raises
    ------
    DataError
        With file and row: columns missing, a value that is no positive finite number, nothing in it.
    """
    file = None if isinstance(runs, pd.DataFrame) else str(runs)
    raw = runs if isinstance(runs, pd.DataFrame) else _csv(str(runs), decimal)
    loss = next((name for name in _LOSS_NAMES if name in raw.columns), None)
    missing = [name for name in _NUMBERS if name not in raw.columns] + ([] if loss else ["smooth loss (or loss)"])
    if missing:
        raise DataError(
            f"columns missing: {', '.join(missing)}. A table of runs has N, D (tokens), lr, bs (sequences) and smooth "
            f"loss; this one has {', '.join(map(str, raw.columns))}.",
            file=file,
        )
    if raw.empty:
        raise DataError("a table of runs without a row. Give one row per training run.", file=file)
    assert loss is not None
    numbers = {name: _numbers(raw, name, file) for name in (*_NUMBERS, loss)}
    extra = {name: _numbers(raw, name, file) for name in ("Na", "M", "seq_len") if name in raw.columns}
    lengths = extra.get("seq_len", np.full(len(raw), float(whole("seq_len", seq_len))))
    out = pd.DataFrame(
        {
            "N": numbers["N"],
            "D": numbers["D"],
            "lr": numbers["lr"],
            "batch": numbers["bs"] * lengths,
            "loss": numbers[loss],
            "Na": extra.get("Na", numbers["N"]),
            "M": extra.get("M", _flops(raw, lengths, file)),
        }
    )
    again = raw.duplicated().to_numpy()
    if again.any():
        warnings.warn(
            f"{int(again.sum())} rows repeat another one exactly and are left out.", GnomonWarning, stacklevel=2
        )
        out = out[~again].reset_index(drop=True)
    grouped = out.groupby(["N", "Na", "D"])
    out["group"] = grouped.ngroup()
    out["excess"] = out["loss"] / grouped["loss"].transform("min") - 1
    return out


def _csv(path: str, decimal: str) -> pd.DataFrame:
    try:
        return pd.read_csv(path, decimal=decimal, sep=";" if decimal == "," else ",")
    except FileNotFoundError as error:
        raise DataError("there is no such file. Give a csv file with one row per run.", file=path) from error
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError, OSError) as error:
        raise DataError(f"no csv file ({error}). Give one with a header and one row per run.", file=path) from error


def _numbers(raw: pd.DataFrame, name: str, file: str | None) -> NDArray[np.float64]:
    found = pd.to_numeric(raw[name], errors="coerce").to_numpy(dtype=np.float64)
    bad = ~(np.isfinite(found) & (found > 0))
    if bad.any():
        row = int(np.argmax(bad))
        seen = raw[name].iloc[row]
        seen = seen.item() if isinstance(seen, np.generic) else seen
        comma = isinstance(seen, str) and "," in seen
        hint = " It seems to have a decimal comma: write 0.001, or read_runs(..., decimal=',')." if comma else ""
        raise DataError(
            f"{name} = {seen!r}: every {name} is a positive finite number ({int(bad.sum())} rows are not).{hint} "
            "Leave runs without a result out of the table.",
            file=file,
            row=row + 1,
        )
    return found


def _flops(raw: pd.DataFrame, lengths: NDArray[np.float64], file: str | None) -> NDArray[np.float64]:
    """FLOPs per token from the widths, where the table has them."""
    if not {"h", "ffnh", "numl"} <= set(raw.columns):
        return np.full(len(raw), np.nan)
    h, ffn, layers = (_numbers(raw, name, file) for name in ("h", "ffnh", "numl"))
    return 6.0 * (4 * h + 3 * ffn + 2 * lengths) * layers * h


def near_optimal(runs: pd.DataFrame, threshold: float = 0.0025) -> pd.DataFrame:
    """Keep the runs whose loss is within `threshold` of the smallest of their group.

    Parameters
    ----------
    runs : DataFrame
        From `read_runs`.
    threshold : float, default 0.0025
        Relative excess loss, exclusive; the paper's value.

    Returns
    -------
    DataFrame
        Without groups of a single run, whose only loss says nothing about an optimum (a warning counts them).

    Raises
    ------
    MethodError
        When the threshold is not positive.
    DataError
        When no group has two runs.
    """
    if not threshold > 0:
        raise MethodError(f"threshold = {threshold!r}: a relative excess loss above 0, such as 0.0025.")
    sizes = runs.groupby("group")["loss"].transform("size")
    single = int((sizes == 1).sum())
    if single == len(runs):
        raise DataError("every (N, D) group has a single run, so none has an optimum. Give grids over lr and bs.")
    if single:
        warnings.warn(f"{single} groups of a single run are left out.", GnomonWarning, stacklevel=2)
    return runs[(runs["excess"] < threshold) & (sizes > 1)].reset_index(drop=True)


def convexity(runs: pd.DataFrame, threshold: float = 0.06) -> pd.DataFrame:
    """Fit a quadratic in (log2 lr, log2 batch) to the loss of every group and say whether it is a bowl.

    Parameters
    ----------
    runs : DataFrame
        From `read_runs`.
    threshold : float, default 0.06
        Only rows with a smaller relative excess loss.

    Returns
    -------
    DataFrame
        A row per group: ``N``, ``D``, ``rows``, ``r2``, ``eigenvalue_low``, ``eigenvalue_high`` (of the Hessian of the
        relative excess), ``convex`` (both above 0; missing with fewer than 7 rows or a grid of fewer than 3 x 3
        values), ``lr`` and ``batch`` at the bottom of the bowl (NaN without one), and ``lr_exponent``: the best
        learning rate at a given batch goes with the batch to this power.
    """
    found = []
    for _, rows in runs[runs["excess"] < threshold].groupby("group"):
        entry: dict[str, Any] = {"N": rows["N"].iloc[0], "Na": rows["Na"].iloc[0], "D": rows["D"].iloc[0]}
        x, y = np.log2(rows["lr"].to_numpy()), np.log2(rows["batch"].to_numpy())
        z = rows["excess"].to_numpy()
        enough = len(rows) >= 7 and len(set(x)) >= 3 and len(set(y)) >= 3
        found.append({**entry, "rows": len(rows), **(_bowl(x, y, z) if enough else {"convex": pd.NA})})
    if not found:
        raise DataError(f"no run is within {threshold:g} of its group's smallest loss. Give a larger threshold.")
    columns = [
        "N",
        "Na",
        "D",
        "rows",
        "r2",
        "eigenvalue_low",
        "eigenvalue_high",
        "convex",
        "lr",
        "batch",
        "lr_exponent",
    ]
    return pd.DataFrame(found).reindex(columns=columns).astype({"convex": "boolean"})


def _bowl(x: NDArray[np.float64], y: NDArray[np.float64], z: NDArray[np.float64]) -> dict[str, Any]:
    cx, cy = x.mean(), y.mean()
    a, b = x - cx, y - cy
    terms = np.stack([np.ones_like(a), a, b, a * a, a * b, b * b], axis=1)
    c = np.linalg.lstsq(terms, z, rcond=None)[0]
    hessian = np.array([[2 * c[3], c[4]], [c[4], 2 * c[5]]])
    low, high = np.linalg.eigvalsh(hessian)
    total = float(((z - z.mean()) ** 2).sum())
    bottom = -np.linalg.solve(hessian, c[1:3]) if low > 0 else np.full(2, np.nan)
    return {
        "r2": 1 - float(((z - terms @ c) ** 2).sum()) / total if total > 0 else np.nan,
        "eigenvalue_low": float(low),
        "eigenvalue_high": float(high),
        "convex": bool(low > 0),
        "lr": float(2 ** (bottom[0] + cx)),
        "batch": float(2 ** (bottom[1] + cy)),
        "lr_exponent": float(-c[4] / (2 * c[3])) if low > 0 else np.nan,
    }


def excess_loss(runs: pd.DataFrame, law: Callable[[pd.DataFrame], tuple[ArrayLike, ArrayLike | None]]) -> pd.DataFrame:
    """Return how much loss a law's choice costs, per group, by the run that lies nearest to it.

    Nearest is by distance in (log2 lr, log2 batch); without a batch from the law, the batch is the one of the group's
    best run.

    Parameters
    ----------
    runs : DataFrame
        From `read_runs`.
    law : callable
        Takes a frame with one row per group (``N``, ``Na``, ``D``, ``M``, ``loss`` of the best run) and returns
        learning rates and batches in tokens, or None for the batch.

    Returns
    -------
    DataFrame
        A row per group: ``N``, ``Na``, ``D``, ``lr`` and ``batch`` of the law, ``loss`` of the nearest run, ``excess``
        in per mille over the group's smallest loss.

    Raises
    ------
    MethodError
        When the law gives something that is no positive finite number.
    """
    best = runs.loc[runs.groupby("group")["loss"].idxmin()].reset_index(drop=True)
    lr, batch = law(best)
    lrs = np.broadcast_to(positive("the law's learning rate", lr), (len(best),))
    batches = np.broadcast_to(positive("the law's batch", best["batch"] if batch is None else batch), (len(best),))
    rows = []
    for row, chosen_lr, chosen_batch in zip(best.itertuples(), lrs, batches, strict=True):
        group = runs[runs["group"] == row.group]
        away = (np.log2(group["lr"]) - np.log2(chosen_lr)) ** 2 + (np.log2(group["batch"]) - np.log2(chosen_batch)) ** 2
        near = group.loc[away.idxmin()]
        rows.append((row.N, row.Na, row.D, chosen_lr, chosen_batch, near["loss"], 1e3 * near["excess"]))
    return pd.DataFrame(rows, columns=["N", "Na", "D", "lr", "batch", "loss", "excess"])


def smooth_loss(losses: Iterable[float], log_interval: int = 1) -> float:
    """Return the last value of a Gaussian-smoothed training-loss curve: the loss the law was fitted to.

    The standard deviation is ``min(100, 0.01 * number of points) / log_interval`` points, with reflection at the ends.

    Parameters
    ----------
    losses : iterable of float
        The logged losses of the whole run, in order.
    log_interval : int, default 1
        Steps between two of them.

    Returns
    -------
    float

    Raises
    ------
    DataError
        When there are none, or one is not finite (a diverged run has no place in a table of runs).

    Examples
    --------
    >>> round(smooth_loss([3.0] * 500), 6)
    3.0
    """
    from scipy.ndimage import gaussian_filter1d

    curve = np.fromiter(losses, dtype=np.float64)
    if curve.size == 0:
        raise DataError("a loss curve without a point. Give the losses the run logged.")
    if not np.isfinite(curve).all():
        row = int(np.argmax(~np.isfinite(curve)))
        raise DataError(f"loss {curve[row]} is not finite. Leave a diverged run out of the table.", row=row + 1)
    sigma = min(100.0, 0.01 * curve.size) / whole("log_interval", log_interval)
    return float(gaussian_filter1d(curve, sigma)[-1])


def is_complete(final_step: int, planned_steps: int, log_interval: int = 1) -> bool:
    """Say whether a run came to its end: its last logged step is within one log interval of the planned one.

    Parameters
    ----------
    final_step, planned_steps : int
        The last step in the log, and how many were to be made.
    log_interval : int, default 1
        Steps between two log lines.

    Returns
    -------
    bool

    Examples
    --------
    >>> is_complete(9990, 10_000, log_interval=10), is_complete(9000, 10_000, log_interval=10)
    (True, False)
    """
    interval = whole("log_interval", log_interval)
    return abs(int(final_step) // interval - int(positive("planned_steps", planned_steps)) // interval) <= 1
