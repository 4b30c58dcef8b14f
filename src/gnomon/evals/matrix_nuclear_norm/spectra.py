"""Measures of the singular values of the centred, row-normalised states R, from the smaller of its Gram matrices."""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gnomon.errors import MethodError
from gnomon.evals.matrix_nuclear_norm.measures import (
    batched,
    checked,
    column_norms,
    normalised,
    real_rows,
    refuse_not_finite,
    score_columns,
)

__all__ = [
    "combine_entropies", "effective_rank", "matrix_entropy", "measure", "nuclear_norm", "rankme", "spectrum",
]  # fmt: skip


def spectrum(
    hidden: Float[Tensor, "batch tokens features"], mask: Int[Tensor, "batch tokens"] | None = None
) -> Float[Tensor, "batch least"]:
    """Return the squared singular values of R per sequence, largest first, from the smaller of its Gram matrices.

    Parameters
    ----------
    hidden, mask
        As in `column_norms`.

    Returns
    -------
    tensor (batch, min(tokens, features)), float64, on the CPU
        Eigenvalues of ``R R^T`` or ``R^T R``, padded with 0; their sum is the number of rows that are not 0.
        NaN for a sequence with fewer than 2 distinct token states. Computed in float64, since the singular
        values are square roots and would keep half of float32's digits only.

    Raises
    ------
    MethodError
        As in `matrix_nuclear_norm`.
    """
    hidden, mask = checked(hidden, mask)
    least = min(hidden.shape[1:])
    values = torch.full((len(hidden), least), torch.nan, dtype=torch.float64)
    for k in range(len(hidden)):
        rows, zero = normalised(real_rows(hidden[k], mask[k]))
        refuse_not_finite(rows.flatten()[None], k)
        if zero == len(rows):
            continue
        gram = rows @ rows.T if len(rows) <= rows.shape[1] else rows.T @ rows
        found = torch.linalg.eigvalsh(gram).flip(0)
        found[found < max(rows.shape) * torch.finfo(found.dtype).eps * found[0]] = 0
        values[k] = 0
        values[k, : len(found)] = found.cpu()
    return values


def _entropy(weights: Tensor) -> Tensor:
    """Return -sum p log p of each row, normalised to sum 1; 0 log 0 = 0 and NaN stays NaN."""
    return torch.special.entr(weights / weights.sum(1, keepdim=True)).sum(1)


def matrix_entropy(
    hidden: Float[Tensor, "*batch tokens features"], mask: Int[Tensor, "*batch tokens"] | None = None
) -> Float[Tensor, "*batch"]:
    """Return the matrix entropy of each sequence: the von Neumann entropy of ``R^T R / L`` over log d (0 to 1).

    Parameters, errors and NaN as in `matrix_nuclear_norm`; the result is float64. The eigenvalues come from
    the smaller Gram matrix; those missing from it are 0 and add nothing.

    Raises
    ------
    MethodError
        Also when there is one feature only (log d = 0).

    Examples
    --------
    >>> float(matrix_entropy(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))) < 1e-12  # two tokens span one direction
    True
    """
    states, real = batched(hidden, mask)
    return (_entropy(spectrum(states, real)) / _log_width(hidden.shape[-1])).reshape(hidden.shape[:-2])


def effective_rank(
    hidden: Float[Tensor, "*batch tokens features"], mask: Int[Tensor, "*batch tokens"] | None = None
) -> Float[Tensor, "*batch"]:
    """Return ``exp`` of the von Neumann entropy of ``R^T R / L`` (1 to min(L - 1, d)), else as `matrix_entropy`."""
    states, real = batched(hidden, mask)
    return _entropy(spectrum(states, real)).exp().reshape(hidden.shape[:-2])


def nuclear_norm(
    hidden: Float[Tensor, "*batch tokens features"], mask: Int[Tensor, "*batch tokens"] | None = None
) -> Float[Tensor, "*batch"]:
    """Return the exact nuclear norm of R per token, ``sum_k s_k / L``, else as `matrix_entropy`."""
    states, real = batched(hidden, mask)
    lengths = (states.new_ones(states.shape[:2]) if real is None else real).sum(1).cpu()
    return (spectrum(states, real).sqrt().sum(1) / lengths).reshape(hidden.shape[:-2])


def rankme(
    hidden: Float[Tensor, "*batch tokens features"], mask: Int[Tensor, "*batch tokens"] | None = None
) -> Float[Tensor, "*batch"]:
    """Return ``exp`` of the entropy of the singular values of R over their sum, else as `matrix_entropy`.

    This is RankMe's formula on centred and row-normalised states (RankMe itself takes the embeddings as they
    are).
    """
    states, real = batched(hidden, mask)
    return _entropy(spectrum(states, real).sqrt()).exp().reshape(hidden.shape[:-2])


def measure(
    hidden: Float[Tensor, "batch tokens features"],
    mask: Int[Tensor, "batch tokens"] | None = None,
    *,
    spectra: bool = True,
) -> dict[str, Tensor]:
    """Return every measure of each sequence at once, with one eigendecomposition.

    Parameters
    ----------
    hidden, mask
        As in `column_norms`.
    spectra : bool, default True
        False leaves out what needs eigenvalues (they cost 50 to 500 times the matrix nuclear-norm).

    Returns
    -------
    dict of str to tensor (batch,), float64 or int64, on the CPU
        ``mnn, length, zero_rows`` and, with `spectra`, ``nuclear_norm, matrix_entropy, effective_rank,
        rankme``.
    """
    found = column_norms(hidden, mask)
    lengths = found.lengths.cpu()
    numbers = {"length": lengths, "zero_rows": found.zero_rows.cpu(), "mnn": score_columns(found).cpu().double()}
    if spectra:
        squares = spectrum(hidden, mask)
        entropy = _entropy(squares)
        numbers["nuclear_norm"] = squares.sqrt().sum(1) / lengths
        numbers["matrix_entropy"] = entropy / _log_width(hidden.shape[-1])
        numbers["effective_rank"] = entropy.exp()
        numbers["rankme"] = _entropy(squares.sqrt()).exp()
    return numbers


def combine_entropies(
    entropies: Float[Tensor, " texts"], features: int, algorithm: Literal["a", "b", "c"] = "a"
) -> float:
    """Return one number for a corpus from the matrix entropies of its texts; NaN entries are left out.

    Parameters
    ----------
    entropies : tensor (texts,)
        Results of `matrix_entropy`.
    features : int
        Width d of the states.
    algorithm : {"a", "b", "c"}, default "a"
        "a": their mean. "b": ``exp(mean * log d) / d``. "c": mean of ``exp(entropy * log d) / d``.

    Raises
    ------
    MethodError
        When no entropy is finite or the algorithm does not exist.
    """
    finite = entropies[torch.isfinite(entropies)].double()
    if not len(finite):
        raise MethodError("No text has a finite matrix entropy; each needs 2 distinct token states or more.")
    width = _log_width(features)
    if algorithm == "a":
        return float(finite.mean())
    if algorithm == "b":
        return math.exp(float(finite.mean()) * width) / features
    if algorithm == "c":
        return float((finite * width).exp().mean()) / features
    raise MethodError(f"algorithm is {algorithm!r}; 'a', 'b' and 'c' exist.")


def _log_width(features: int) -> float:
    if features < 2:
        raise MethodError("Matrix entropy divides by log d, which needs 2 features or more; got 1.")
    return math.log(features)
