"""Scores with what they belong to: the row ids, the labels, the runs they were averaged over, the data set."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from gnomon.common.files import atomic_folder
from gnomon.data.data_diet.rows import Rows, fingerprint
from gnomon.errors import DataError

__all__ = ["ScoreTable", "as_scores"]


@dataclass(frozen=True, eq=False)
class ScoreTable:
    """Scores of N rows from K runs; acts as the array of their means in numpy functions.

    Attributes
    ----------
    runs : array (K, N) float64
        The scores of each run.
    method : str
        What was computed.
    ids : array (N,) int64
        Row ids; the rows' numbers unless a column was named.
    fingerprint : str
        Of the data set, in its order; empty when it is not known.
    labels : array (N,) int64 or None
        Class labels, for data with one label a row.
    """

    runs: Float[np.ndarray, "runs rows"]
    method: str
    ids: Int[np.ndarray, " rows"]
    fingerprint: str = ""
    labels: Int[np.ndarray, " rows"] | None = None

    @property
    def values(self) -> Float[np.ndarray, " rows"]:
        """Mean over runs; +inf where any run has +inf (a row never learnt)."""
        return self.runs.mean(0)

    @property
    def never(self) -> Int[np.ndarray, " rows"]:
        """In how many runs each row was never learnt (forgetting scores); parts the ties among +inf."""
        return np.isinf(self.runs).sum(0)

    @property
    def spread(self) -> Float[np.ndarray, " rows"]:
        """Standard deviation over runs; nan with one run or where a run has +inf."""
        if len(self.runs) < 2:
            return np.full(len(self), np.nan)
        finite = np.isfinite(self.runs).all(0)
        return np.where(finite, np.where(finite, self.runs, 0.0).std(0, ddof=1), np.nan)

    def __len__(self) -> int:
        return self.runs.shape[1]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.values if dtype is None else self.values.astype(dtype)

    def check(self, dataset: Any) -> None:
        """Refuse a data set that is not the one that was scored, or that was shuffled since.

        Raises
        ------
        DataError
        """
        rows = Rows(dataset)
        if len(rows) != len(self):
            raise DataError(f"{len(self)} rows were scored, the data set has {len(rows)}. Select from the scored one.")
        if self.fingerprint and fingerprint(rows) != self.fingerprint:
            raise DataError(
                "these are not the rows that were scored, or they stand in another order (the fingerprint differs), so "
                "scores would meet the wrong rows. Select before shuffling or mapping, or score again."
            )

    def save(self, path: str | Path) -> Path:
        """Write the table into a folder (``scores.npz``), whole or not at all; return the folder."""
        path = Path(path)
        with atomic_folder(path) as part:
            labels: dict[str, Any] = {} if self.labels is None else {"labels": self.labels}
            fields: dict[str, Any] = {
                "runs": self.runs,
                "ids": self.ids,
                "about": np.array([self.method, self.fingerprint]),
            }
            np.savez_compressed(part / "scores.npz", **fields, **labels)
        return path

    @classmethod
    def load(cls, path: str | Path) -> ScoreTable:
        """Read a table that `save` wrote.

        Raises
        ------
        DataError
            When there is none at that place.
        """
        file = Path(path) / "scores.npz"
        try:
            with np.load(io.BytesIO(file.read_bytes()), allow_pickle=False) as found:
                method, mark = found["about"].tolist()
                labels = found["labels"] if "labels" in found.files else None
                return cls(found["runs"], method, found["ids"], mark, labels)
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"this is no score table ({error}). Give the folder `save` wrote.", file=file) from error


def as_scores(scores: Any) -> tuple[Float[np.ndarray, " rows"], Int[np.ndarray, " rows"]]:
    """Return the scores as float64 (N,) and, beside them, in how many runs each row was never learnt.

    Raises
    ------
    DataError
        When they are not one finite (or +inf) number a row; the message names the rows.
    """
    if isinstance(scores, ScoreTable):
        values, never = scores.values, scores.never
    else:
        try:
            values = np.asarray(scores, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise DataError(f"the scores are no numbers ({error}). Give one number a row.") from error
        never = np.isinf(values).astype(np.int64) if values.ndim == 1 else np.zeros(0, dtype=np.int64)
    if values.ndim != 1 or not len(values):
        raise DataError(f"the scores have shape {values.shape}. Give one number a row: (rows,).")
    bad = np.flatnonzero(np.isnan(values) | np.isneginf(values))
    if len(bad):
        shown = ", ".join(map(str, bad[:10])) + (f" and {len(bad) - 10} more" if len(bad) > 10 else "")
        raise DataError(
            f"the scores of row{'s' if len(bad) > 1 else ''} {shown} are nan or -inf. Score these rows again, or leave "
            "them out."
        )
    return values, never
