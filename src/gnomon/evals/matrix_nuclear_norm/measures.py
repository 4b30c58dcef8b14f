"""The matrix nuclear-norm as a function of hidden states: column norms from two passes over them.

Letters: B sequences, T positions with padding, L real tokens of a sequence, d features, D = min(L, d).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import mse_loss

from gnomon.errors import MethodError

__all__ = [
    "ColumnNorms",
    "column_norms",
    "isotropic_mnn",
    "matrix_nuclear_norm",
    "mnn_bounds",
    "without_first",
]

CACHE_BYTES = 1 << 20
"""Working set of one step per thread of the CPU: what is squared is still in the cache when it is summed."""

DEVICE_BYTES = 1 << 28
"""The same on an accelerator, where it only bounds the memory of the temporaries."""


class ColumnNorms(NamedTuple):
    """Column norms of the centred, row-normalised hidden states, one row per sequence."""

    norms: Float[Tensor, "batch features"]
    """c_j = sqrt(sum_i R_ij^2), in float32 or better; NaN where a state is NaN or infinite."""
    lengths: Int[Tensor, " batch"]
    """Real tokens per sequence."""
    zero_rows: Int[Tensor, " batch"]
    """Tokens whose state equals the mean; their rows of R are 0."""


def column_norms(
    hidden: Float[Tensor, "batch tokens features"], mask: Int[Tensor, "batch tokens"] | None = None
) -> ColumnNorms:
    """Return the norms of the columns of R for each sequence, in two passes over the states and no copy of them.

    With the mean row mu, ``c_j^2 = sum_i (H_ij - mu_j)^2 / ||H_i - mu||^2``; the squares of a few rows at a
    time are formed in a buffer that stays in the cache and serve both sums. The centred form is used, not the
    expansion ``sum H^2 - 2 mu sum H + mu^2``, which loses half of the digits when the mean is large.

    Parameters
    ----------
    hidden : tensor (batch, tokens, features)
        Hidden states; half precision is brought to float32 first. Gradients do not flow.
    mask : tensor (batch, tokens), optional
        1 for real tokens, 0 for padding (anywhere, of any content). Default: all real.

    Returns
    -------
    ColumnNorms

    Raises
    ------
    MethodError
        When the shapes do not fit or there is nothing to measure.

    Examples
    --------
    >>> column_norms(torch.eye(4)[None]).zero_rows
    tensor([0])
    """
    hidden, mask = checked(hidden, mask)
    exact = torch.promote_types(hidden.dtype, torch.float32)
    squares = hidden.new_empty(len(hidden), hidden.shape[2], dtype=exact)
    zeros = mask.new_empty(len(hidden), dtype=torch.long)
    room = CACHE_BYTES * torch.get_num_threads() if hidden.device.type == "cpu" else DEVICE_BYTES
    at_once = max(1, room // (hidden.shape[2] * squares.element_size()))
    together = at_once // hidden.shape[1]
    whole = bool(mask.all())
    for start in range(0, len(hidden), max(1, together)):
        part = slice(start, start + max(1, together))
        if together:
            squares[part], zeros[part] = _short(hidden[part].to(exact), mask[part])
        else:
            rows = hidden[start] if whole else real_rows(hidden[start], mask[start])
            squares[part], zeros[part] = _long(rows.to(exact), at_once)
    # Only float64 tells a row that equals the mean from one that rounds to it, and infinity from overflow; here too
    # come sequences whose padding holds NaN, which times its weight of 0 is NaN.
    doubtful = (zeros > 0) | ~torch.isfinite(squares.sum(1))
    for k in doubtful.nonzero()[:, 0].tolist():
        rows, zeros[k] = normalised(real_rows(hidden[k], mask[k]))
        squares[k] = rows.square().sum(0)
    return ColumnNorms(squares.sqrt_(), mask.sum(1), zeros)


def _short(hidden: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Sum the squares of several sequences that fit the cache together; count rows that round to the mean."""
    lengths = mask.sum(1, keepdim=True)
    mean = torch.bmm((mask.to(hidden.dtype) / lengths)[:, None], hidden)
    squares = mse_loss(hidden, mean.expand_as(hidden), reduction="none")
    rows = squares.sum(-1)
    inverse = rows.reciprocal().where(mask, 0)
    return torch.bmm(inverse[:, None], squares)[:, 0], (mask & (rows <= rounding_of_mean(mean[:, 0], lengths))).sum(1)


def _long(rows: Tensor, at_once: int) -> tuple[Tensor, Tensor]:
    """The same for one sequence, a few rows at a time."""
    length, features = rows.shape
    mean = torch.mv(rows.T, rows.new_full((length,), 1 / max(length, 1)))
    total, sizes = rows.new_zeros(features), rows.new_empty(length)
    for block, size in zip(rows.split(at_once), sizes.split(at_once), strict=True):
        squares = mse_loss(block, mean.expand_as(block), reduction="none")  # one pass; (block - mean)^2 takes two
        torch.sum(squares, 1, out=size)
        total.addmv_(squares.T, size.reciprocal())
    return total, (sizes <= rounding_of_mean(mean, length)).sum()


def normalised(states: Tensor) -> tuple[Tensor, int]:
    """Return R (tokens, features) of one sequence in float64, and how many of its rows are 0."""
    rows = in_float64(states)
    mean = rows.sum(0) / max(len(rows), 1)
    rows = rows - mean
    sizes = rows.square().sum(1)
    zero = sizes <= rounding_of_mean(mean, len(rows))
    return (rows * sizes.rsqrt()[:, None]).masked_fill(zero[:, None], 0), int(zero.sum())


def in_float64(rows: Tensor) -> Tensor:
    """Return the rows in float64, on the CPU where the device (mps) has none."""
    return (rows.cpu() if rows.device.type == "mps" else rows).double()


def rounding_of_mean(mean: Tensor, length: Tensor | int) -> Tensor:
    """Return the squared distance from the mean (..., features) that is no more than its rounding error (..., 1)."""
    relative = (8 + length / 4) * torch.finfo(mean.dtype).eps
    return (relative * torch.linalg.vector_norm(mean, dim=-1, keepdim=True)).square()


def matrix_nuclear_norm(
    hidden: Float[Tensor, "*batch tokens features"], mask: Int[Tensor, "*batch tokens"] | None = None
) -> Float[Tensor, "*batch"]:
    """Return the matrix nuclear-norm of each sequence: the D = min(L, d) largest column norms of R, summed, over L.

    Parameters
    ----------
    hidden : tensor (batch, tokens, features) or (tokens, features)
        Hidden states after the final norm. Half precision is brought to float32 first.
    mask : tensor (batch, tokens) or (tokens,), optional
        1 for real tokens, 0 for padding. Default: all real.

    Returns
    -------
    tensor (batch,) or ()
        One score per sequence, float32 or better; NaN for a sequence with fewer than 2 distinct token states.
        Against float64, float32 is off by about 1e-7 relative.

    Raises
    ------
    MethodError
        When the shapes do not fit or a state of a real token is NaN or infinite.

    Examples
    --------
    >>> float(matrix_nuclear_norm(torch.tensor([[3.0, 0.0], [0.0, 4.0]])))
    0.9899...
    """
    states, real = batched(hidden, mask)
    return score_columns(column_norms(states, real)).reshape(hidden.shape[:-2])


def score_columns(found: ColumnNorms) -> Tensor:
    norms, lengths, zeros = found
    total = norms.sum(1)
    refuse_not_finite(total[:, None])
    short = (lengths < norms.shape[1]).nonzero()[:, 0]
    if len(short):  # no sorting at all for sequences that keep every column
        kept = lengths[short]
        largest = norms[short].topk(int(kept.max()), dim=1).values
        ranks = torch.arange(largest.shape[1], device=norms.device)
        total[short] = largest.where(ranks < kept[:, None], 0).sum(1)
    return torch.where(zeros < lengths, total / lengths, torch.nan)


def isotropic_mnn(length: int, features: int) -> float:
    """Return the score of states without any preferred direction: ``sqrt(min(L, d) / max(L, d))``.

    The score depends on L / d before it depends on anything learned; divide by this to compare lengths and
    widths.
    """
    _check_sizes(length, features)
    return math.sqrt(min(length, features) / max(length, features))


def mnn_bounds(length: int, features: int) -> tuple[float, float]:
    """Return the least and the greatest possible score at this length and width.

    ``1/sqrt(L) .. sqrt(d/L)`` for L >= d, where the score is also at least the exact nuclear norm per token;
    ``1/sqrt(d) .. 1`` for L < d, where there is no inequality with the nuclear norm.

    The lower bound supposes that no token state equals the mean.
    """
    _check_sizes(length, features)
    if length >= features:
        return 1 / math.sqrt(length), math.sqrt(features / length)
    return 1 / math.sqrt(features), 1.0


def without_first(mask: Int[Tensor, "batch tokens"], count: int) -> Int[Tensor, "batch tokens"]:
    """Return the mask without the first `count` real tokens of each sequence, whichever side the padding is on.

    A first token with massive activations (an attention sink) moves the mean that all other tokens are
    centred by.
    """
    return mask.bool() & (mask.long().cumsum(1) > count)


def batched(hidden: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if hidden.ndim == 2:
        return hidden[None], None if mask is None else mask[None]
    return hidden, mask


def checked(hidden: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    if hidden.ndim != 3 or not hidden.is_floating_point() or 0 in hidden.shape:
        raise MethodError(
            f"Hidden states must be floating point of shape (batch, tokens, features) with nothing empty; got "
            f"{hidden.dtype} of shape {tuple(hidden.shape)}."
        )
    if mask is None:
        mask = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
    elif mask.shape != hidden.shape[:2]:
        raise MethodError(
            f"The mask has shape {tuple(mask.shape)}, the hidden states have {tuple(hidden.shape[:2])} positions. "
            "Give the tokenizer's attention_mask (1: real, 0: padding)."
        )
    return hidden.detach(), mask.to(hidden.device).bool()


def real_rows(states: Tensor, real: Tensor) -> Tensor:
    """Return the rows of real tokens: a view where they are contiguous, as with padding on one side."""
    count = int(real.sum())
    first = int(real.int().argmax())
    return states[first : first + count] if bool(real[first : first + count].all()) else states[real]


def refuse_not_finite(values: Tensor, first: int = 0) -> None:
    bad = (~torch.isfinite(values.sum(1))).nonzero()
    if len(bad):
        raise MethodError(
            f"Hidden states of sequence {first + int(bad[0])} hold NaN or infinity. "
            "Run the model in float32 or bfloat16, or mask those tokens."
        )


def _check_sizes(length: int, features: int) -> None:
    if length < 1 or features < 1:
        raise MethodError(f"length is {length}, features is {features}; both must be 1 or more.")
