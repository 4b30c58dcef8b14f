"""The refinement itself: prune and grow in every row until the expected output error is gone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gnomon.common.calibration import LayerInputs
from gnomon.compress.dsnot.bases import check_weight
from gnomon.compress.dsnot.selection import Budget, first_indices, row_chunks, wide_dtype
from gnomon.errors import MethodError

__all__ = ["dsnot_layer", "scaled_cycles", "scaled_threshold"]

_SMALLEST_VARIANCE = 1e-12


def scaled_cycles(features: int) -> int:
    """Return the cycles for rows of `features` inputs: the paper's 50, but never more than 1.25 % of a row.

    50 swaps are 1.2 % of a row of 4096 inputs, on which the paper settled; on narrow layers 50 swaps would turn over
    much of the row.
    """
    return min(50, math.ceil(0.0125 * features))


def scaled_threshold(inputs: LayerInputs) -> float:
    """Return the paper's threshold 0.1, which is meant for sequences of 2048 tokens, for sequences of other length."""
    return 0.1 * inputs.tokens / max(inputs.sequences, 1) / 2048


@dataclass
class _Candidates:
    """One list of each row: columns in the order in which they are taken, and their contributions."""

    index: Tensor  # (rows, k) int32
    contribution: Tensor  # (rows, k)
    valid: Tensor  # (rows, k) bool

    @classmethod
    def empty(cls, rows: int, k: int, like: Tensor) -> _Candidates:
        index = torch.zeros(rows, k, dtype=torch.int32, device=like.device)
        return cls(index, torch.zeros(rows, k, dtype=like.dtype, device=like.device), torch.zeros_like(index).bool())

    def fill(self, part: slice, keys: Tensor, contributions: Tensor, *, below: float, ties: str = "low") -> None:
        """List the smallest keys of each row of a chunk; those not `below` the limit are no candidates."""
        found, values = first_indices(keys, self.index.shape[1], ties=ties)
        self.index[part] = found
        self.contribution[part] = contributions.gather(1, found.long())
        self.valid[part] = values < below

    def take(self, pointer: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return column, contribution and validity of each row's entry at `pointer` (invalid past the end)."""
        k = self.index.shape[1]
        at = pointer.clamp(max=k - 1)[:, None]
        valid = self.valid.gather(1, at)[:, 0] & (pointer < k)
        return self.index.gather(1, at)[:, 0].long(), self.contribution.gather(1, at)[:, 0], valid


@dataclass
class _Lists:
    error: Tensor  # (rows,): expected dense-minus-sparse output, summed over a sequence
    grow_high: _Candidates
    grow_low: _Candidates
    prune_positive: _Candidates
    prune_negative: _Candidates


def _lists(weight: Tensor, inputs: LayerInputs, keep: Tensor, k: int, power: float, with_pruning: bool) -> _Lists:
    """Build every row's lists, by chunks: the first k of the growing order's two ends and of both pruning lists."""
    dtype = wide_dtype(weight.device)
    sums = inputs.mean_sum.to(weight.device, dtype)
    root = inputs.mean_square.to(weight.device, dtype).sqrt()
    variance = inputs.variance.to(weight.device, dtype).clamp(min=_SMALLEST_VARIANCE).pow(power)
    rows, features = weight.shape
    size = min(k, features), sums
    lists = _Lists(
        torch.zeros(rows, dtype=dtype, device=weight.device),
        _Candidates.empty(rows, *size),
        _Candidates.empty(rows, *size),
        _Candidates.empty(rows if with_pruning else 0, *size),
        _Candidates.empty(rows if with_pruning else 0, *size),
    )
    wrong = torch.finfo(dtype).max / 4
    for part in row_chunks(rows, features):  # masks enter as products and sums: branches cost ten times as much
        dense = weight[part].to(dtype)
        contribution = dense * sums
        gone = contribution * (~keep[part]).to(dtype)
        lists.error[part] = gone.sum(1)
        growing = gone.div_(variance)
        lists.grow_low.fill(part, growing, contribution, below=0.0)
        lists.grow_high.fill(part, growing.neg_(), contribution, below=0.0, ties="high")
        if with_pruning:
            scores = (dense * root).abs_()
            for pruning, sign in ((lists.prune_positive, contribution > 0), (lists.prune_negative, contribution < 0)):
                other = sign.logical_and_(keep[part]).logical_not_().to(dtype)
                keys = torch.add(scores, other, alpha=wrong, out=growing)
                pruning.fill(part, keys, contribution, below=wrong / 2)
    return lists


class _BlockPruning:
    """Chooses the weight to prune in the grown weight's own block of m: the one with the smallest base score."""

    def __init__(self, weight: Tensor, keep: Tensor, scale: Tensor, sums: Tensor, m: int) -> None:
        self.weight, self.scale, self.sums, self.m = weight, scale, sums, m
        self.free = keep.clone()  # what was grown or pruned once is not free any more
        self.offsets = torch.arange(m, device=weight.device)

    def take(self, grown: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        columns = (grown - grown % self.m)[:, None] + self.offsets
        values = self.weight.gather(1, columns).to(self.scale.dtype)
        scores = (values * self.scale[columns]).abs_().masked_fill_(~self.free.gather(1, columns), math.inf)
        best = scores.amin(1, keepdim=True)
        place = torch.where(scores == best, self.offsets, self.m).amin(1, keepdim=True).clamp(max=self.m - 1)
        column = columns.gather(1, place)
        contribution = values.gather(1, place) * self.sums[column]
        return column[:, 0], contribution[:, 0], torch.isfinite(best[:, 0])

    def swapped(self, rows: Tensor, pruned: Tensor) -> None:
        self.free[rows, pruned] = False  # a grown weight was not free before and stays so


@torch.no_grad()
def dsnot_layer(
    weight: Float[Tensor, "out in"],
    inputs: LayerInputs,
    keep: Bool[Tensor, "out in"],
    *,
    pattern: str | None = None,
    max_cycles: int = 50,
    threshold: float = 0.1,
    power: float = 1.0,
    without_same_sign: bool = True,
    scale: Float[Tensor, " in"] | None = None,
) -> Bool[Tensor, "out in"]:
    """Re-choose the mask of one layer by pruning and growing that cancels its expected output error (DSnoT).

    Starts from any mask. Each row grows the pruned weight that takes most from the error and prunes a kept weight of
    the opposite effect, until the error is below the threshold, the cycles are used up, or no weight of the needed
    sign is left. The number of kept weights of every row (of every block, with a pattern) does not change.

    Parameters
    ----------
    weight : Tensor (out, in)
        The dense weight, also where the mask prunes it.
    inputs : LayerInputs
        Statistics of the layer's inputs; no Gram matrix is needed.
    keep : Tensor (out, in) of bool
        The mask to start from: True = kept.
    pattern : str, optional
        ``"n:m"``: `keep` prunes n of every m consecutive inputs, and swaps stay inside a block.
    max_cycles : int, default 50
        At most this many swaps per row (authors' ``max_cycle_time``); 0 returns `keep`. See `scaled_cycles`.
    threshold : float, default 0.1
        A row stops when its expected error, summed over a sequence, is at most this (authors' ``update_threshold``,
        for sequences of 2048 tokens; see `scaled_threshold`).
    power : float, default 1.0
        Power of the variance in the growing criterion (the paper's p).
    without_same_sign : bool, default True
        Go on when the error changes its sign. False stops before that; with a pattern it is always so.
    scale : Tensor (in,), optional
        With a pattern: a block's base score is ``|W_ij| * scale_j``. Default Wanda's ``sqrt(mean_square)``; ones for
        magnitude; ``1 / diag(U)`` for SparseGPT.

    Returns
    -------
    Tensor (out, in) of bool
        The refined mask: True = kept.

    Raises
    ------
    MethodError
        For a mask of another shape or one that breaks the pattern, negative cycles or threshold, or as `wanda_mask`.

    Examples
    --------
    >>> from gnomon.compress.dsnot import magnitude_mask
    >>> x = torch.randn(4, 16, 8, generator=torch.Generator().manual_seed(0)) + 1
    >>> inputs = LayerInputs.from_tensor(x)
    >>> weight = torch.eye(8)
    >>> keep = magnitude_mask(weight, 0.5, scope="row")
    >>> dsnot_layer(weight, inputs, keep).sum(1).tolist() == keep.sum(1).tolist()
    True
    """
    check_weight(weight, inputs)
    block = _check_options(weight, keep, pattern, max_cycles, threshold, power)
    result = keep.clone()
    if max_cycles == 0:
        return result
    keep = keep.to(weight.device)
    lists = _lists(weight, inputs, keep, max_cycles, power, with_pruning=block is None)
    pruning = None
    if block is not None:
        dtype = wide_dtype(weight.device)
        scale = inputs.mean_square.sqrt() if scale is None else scale
        sums = inputs.mean_sum.to(weight.device, dtype)
        pruning = _BlockPruning(weight, keep, scale.to(weight.device, dtype), sums, block[1])
    _swap(result, lists, pruning, max_cycles, threshold, same_sign=block is not None or not without_same_sign)
    return result


def _swap(
    keep: Tensor, lists: _Lists, pruning: _BlockPruning | None, cycles: int, threshold: float, same_sign: bool
) -> None:
    """Walk all rows' lists together, at most `cycles` steps, changing `keep` in place."""
    error = lists.error
    first_sign = error.sign()
    active = error.abs() > threshold
    high, low, positive, negative = (torch.zeros_like(error, dtype=torch.long) for _ in range(4))
    for _ in range(cycles):
        if not bool(active.any()):
            return
        up = error > 0  # pruned weights hold back a positive output: grow a positive one, prune a negative one
        grown, grown_c, grown_ok = _either(up, lists.grow_high.take(high), lists.grow_low.take(low))
        if pruning is not None:
            pruned, pruned_c, pruned_ok = pruning.take(grown)
        else:
            pruned, pruned_c, pruned_ok = _either(
                error < 0, lists.prune_positive.take(positive), lists.prune_negative.take(negative)
            )
        after = error + pruned_c - grown_c
        active = active & grown_ok & pruned_ok
        if same_sign:
            active = active & (after.sign() == first_sign)
        rows = active.nonzero().squeeze(1)
        keep[rows, grown[rows]] = True
        keep[rows, pruned[rows]] = False
        if pruning is not None:
            pruning.swapped(rows, pruned[rows])
        high, positive = high + up, positive + ~up
        low, negative = low + ~up, negative + up
        error = torch.where(active, after, error)
        active = active & (error.abs() > threshold)


def _either(first: Tensor, a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    one, two, three = (torch.where(first, x, y) for x, y in zip(a, b, strict=True))
    return one, two, three


def _check_options(
    weight: Tensor, keep: Tensor, pattern: str | None, max_cycles: int, threshold: float, power: float
) -> tuple[int, int] | None:
    if keep.shape != weight.shape or keep.dtype != torch.bool:
        raise MethodError(
            f"keep has shape {tuple(keep.shape)} and dtype {keep.dtype}; it must be bool of the weight's shape "
            f"{tuple(weight.shape)}, True where a weight is kept."
        )
    if max_cycles < 0:
        raise MethodError(f"max_cycles = {max_cycles}. It must be at least 0 (0 returns the starting mask).")
    if not threshold >= 0:
        raise MethodError(f"threshold = {threshold}. It must be at least 0.")
    if not (power >= 0 and math.isfinite(power)):
        raise MethodError(f"power = {power}. It must be a finite number of at least 0.")
    if pattern is None:
        return None
    budget = Budget(None, pattern)
    budget.check(weight.shape[1])
    assert budget.block is not None
    n, m = budget.block
    pruned = (~keep).view(len(keep), -1, m).sum(-1)
    if bool((pruned != n).any()):
        bad = int((pruned != n).sum())
        raise MethodError(
            f"keep breaks the pattern {pattern!r}: {bad} of {pruned.numel()} blocks do not have {n} of {m} weights "
            "pruned. Start from a mask of that pattern."
        )
    return n, m
