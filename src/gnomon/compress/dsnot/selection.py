"""Choosing the smallest entries of every row: exactly so many, ties to the lower index, rows in bounded chunks."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Bool, Float, Int32
from torch import Tensor

from gnomon.errors import MethodError

__all__ = ["Budget", "first_indices", "row_chunks", "score_mask", "smallest_blocks", "smallest_mask", "wide_dtype"]

_CHUNK = 1 << 17  # elements worked on at a time: 1 MB in float64, which stays in the cache
_TOLERANCE = 1e-6  # float32 scores further apart than this (relative) are ordered as float64 ones are


class Budget:
    """How much to prune: a share of every row, or n of every m consecutive inputs.

    Parameters
    ----------
    sparsity : float or str, optional
        Share of zeros in [0, 1), or a pattern such as ``"2:4"``. Default 0.5 where no pattern is given.
    pattern : str, optional
        ``"n:m"``: n of every m consecutive inputs of a row are pruned.

    Attributes
    ----------
    sparsity : float
    block : tuple (n, m) or None
    pattern : str or None

    Raises
    ------
    MethodError
        When the sparsity lies outside [0, 1), the pattern is none, or the two contradict each other.
    """

    def __init__(self, sparsity: float | str | None = None, pattern: str | None = None) -> None:
        if isinstance(sparsity, str):
            if pattern is not None and pattern != sparsity:
                raise MethodError(f"sparsity = {sparsity!r} and pattern = {pattern!r} differ. Give one of them.")
            sparsity, pattern = None, sparsity
        self.block = None if pattern is None else _parse(pattern)
        self.pattern = None if self.block is None else f"{self.block[0]}:{self.block[1]}"
        share = 0.5 if self.block is None else self.block[0] / self.block[1]
        self.sparsity = share if sparsity is None else float(sparsity)
        if not 0 <= self.sparsity < 1:
            raise MethodError(
                f"sparsity = {sparsity}. Allowed is 0 <= sparsity < 1: the share of weights set to zero. (In YAML a "
                "pattern such as '2:4' needs its quotes; without them it is read as a number.)"
            )
        if self.block is not None and not math.isclose(self.sparsity, share):
            raise MethodError(
                f"sparsity = {sparsity} contradicts pattern = {pattern!r}, which prunes {share:g}. Leave sparsity out."
            )

    def check(self, features: int) -> None:
        """Raise `MethodError` when rows of `features` inputs cannot be cut into blocks."""
        if self.block is not None and features % self.block[1]:
            raise MethodError(
                f"A row of {features} inputs cannot be cut into blocks of {self.block[1]} "
                f"(pattern {self.block[0]}:{self.block[1]}). Give a sparsity instead, or a pattern whose second number "
                f"divides {features}."
            )

    def per_row(self, features: int) -> int:
        """Return how many weights of a row of `features` are pruned (without a pattern)."""
        return int(features * self.sparsity)


def _parse(pattern: str) -> tuple[int, int]:
    parts = str(pattern).split(":")
    if len(parts) == 2 and all(part.strip().isdigit() for part in parts):
        n, m = int(parts[0]), int(parts[1])
        if 0 < n < m:
            return n, m
    raise MethodError(
        f"pattern = {pattern!r}. Allowed is the text 'n:m' with 0 < n < m, such as '2:4' (in YAML with its quotes): n "
        "of every m consecutive inputs are pruned."
    )


def wide_dtype(device: torch.device) -> torch.dtype:
    """Return float64, or float32 on devices that have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def row_chunks(rows: int, features: int) -> Iterator[slice]:
    """Yield slices over the rows so that each holds a bounded number of elements."""
    step = max(1, _CHUNK // max(features, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _kth_and_next(keys: Float[Tensor, "rows n"], k: int) -> tuple[Tensor, Tensor]:
    """Return the k-th and the (k+1)-th smallest key of each row as columns (infinity past the end)."""
    return _by_numpy(keys, k) if keys.device.type == "cpu" else _by_torch(keys, k)


def _by_numpy(keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Take numpy's vectorised partition: on a CPU an order faster than torch's selection or sort."""
    parts = np.partition(keys.numpy(), k - 1, axis=1)
    kth = torch.from_numpy(np.ascontiguousarray(parts[:, k - 1 : k]))
    rest = parts[:, k:]
    return kth, torch.from_numpy(rest.min(1, keepdims=True)) if rest.size else torch.full_like(kth, math.inf)


def _by_torch(keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    kth = keys.kthvalue(k, dim=1, keepdim=True).values
    last = k == keys.shape[1]
    return kth, torch.full_like(kth, math.inf) if last else keys.kthvalue(k + 1, dim=1, keepdim=True).values


def smallest_mask(keys: Float[Tensor, "rows n"], k: int, *, ties: str = "low") -> Bool[Tensor, "rows n"]:
    """Mark exactly the k smallest keys of every row, as a stable ascending sort would list them.

    Parameters
    ----------
    keys : Tensor (rows, n)
        Without NaN; infinity counts as larger than everything.
    k : int
        How many, 0 to n.
    ties : {"low", "high"}, default "low"
        Whether the lower or the higher index comes first among equal keys.

    Returns
    -------
    Tensor (rows, n) of bool
    """
    if k == 0:
        return torch.zeros_like(keys, dtype=torch.bool)
    kth, after = _kth_and_next(keys, k)
    mask = keys <= kth
    tied = (after == kth).squeeze(1).nonzero().squeeze(1)
    if len(tied):
        rows, limit = keys[tied], kth[tied]
        below, equal = rows < limit, rows == limit
        need = k - below.sum(1, keepdim=True, dtype=torch.int32)
        if ties == "low":
            place = equal.cumsum(1, dtype=torch.int32)
        else:
            place = equal.flip(1).cumsum(1, dtype=torch.int32).flip(1)
        mask[tied] = below | (equal & (place <= need))
    return mask


def first_indices(
    keys: Float[Tensor, "rows n"], k: int, *, ties: str = "low"
) -> tuple[Int32[Tensor, "rows k"], Float[Tensor, "rows k"]]:
    """Return the indices of the k smallest keys of every row in ascending order, and the keys themselves.

    Equals the first k columns of a stable ascending argsort (`ties` as in `smallest_mask`), at the price of one
    partition instead of a sort.
    """
    rows, n = keys.shape
    if k == 0:
        empty = torch.zeros(rows, 0, dtype=torch.int32, device=keys.device)
        return empty, empty.to(keys.dtype)
    mask = smallest_mask(keys, k, ties=ties)
    if mask.device.type == "cpu":
        flat = torch.from_numpy(np.flatnonzero(mask.numpy()))
    else:
        flat = mask.flatten().nonzero().squeeze(1)
    found = (flat % n).view(rows, k)
    if ties == "high":
        found = found.flip(1)
    values, order = keys.gather(1, found).sort(dim=1, stable=True)
    return found.gather(1, order).to(torch.int32), values


def smallest_blocks(scores: Float[Tensor, "rows n"], block: tuple[int, int]) -> Bool[Tensor, "rows n"]:
    """Mark the n smallest of every m consecutive scores of each row, ties to the lower index."""
    n, m = block
    grouped = scores.reshape(len(scores), -1, m)
    if m > 16:
        order = grouped.sort(dim=-1, stable=True).indices[..., :n]
        return torch.zeros_like(grouped, dtype=torch.bool).scatter_(-1, order, True).view(scores.shape)
    columns = [column.contiguous() for column in grouped.unbind(-1)]
    ranks = [torch.zeros_like(columns[0], dtype=torch.uint8) for _ in range(m)]
    for i in range(m):
        for j in range(i + 1, m):
            first = columns[i] <= columns[j]
            ranks[j] += first
            ranks[i] += ~first
    return torch.stack([rank < n for rank in ranks], dim=-1).view(scores.shape)


def score_mask(weight: Float[Tensor, "out in"], scale: Float[Tensor, " in"], budget: Budget) -> Bool[Tensor, "out in"]:
    """Keep in every row (or block) the weights with the largest scores |W_ij| scale_j; True = kept.

    Scores are ordered as in float64; they are computed in float32 and again in float64 only for rows where two
    scores at the cut lie closer together than float32 can tell apart.
    """
    rows, features = weight.shape
    budget.check(features)
    keep = torch.empty(rows, features, dtype=torch.bool, device=weight.device)
    wide = scale.to(weight.device, wide_dtype(weight.device))
    exact = weight.dtype == torch.float64 or budget.block is not None
    narrow = wide if exact else wide.float()
    k = budget.per_row(features)
    for part in row_chunks(rows, features):
        scores = (weight[part].to(narrow.dtype) * narrow).abs_()
        if budget.block is not None:
            keep[part] = ~smallest_blocks(scores, budget.block)
        elif exact or k == 0:
            keep[part] = ~smallest_mask(scores, k)
        else:
            kth, after = _kth_and_next(scores, k)
            if scores.device.type == "cpu":  # numpy compares faster than torch
                np.greater(scores.numpy(), kth.numpy(), out=keep[part].numpy())
            else:
                torch.gt(scores, kth, out=keep[part])
            clear = (after - kth > _TOLERANCE * kth) & (kth > 1e-30)
            unclear = (~clear).squeeze(1).nonzero().squeeze(1)
            if len(unclear):
                again = (weight[part][unclear].to(wide.dtype) * wide).abs_()
                keep[part][unclear] = ~smallest_mask(again, k)
    return keep
