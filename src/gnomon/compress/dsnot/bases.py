"""The masks DSnoT starts from: magnitude, Wanda and SparseGPT."""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gnomon.common.calibration import LayerInputs
from gnomon.compress.dsnot.selection import Budget, score_mask, smallest_blocks, smallest_mask
from gnomon.errors import MethodError

__all__ = ["check_weight", "inverse_factor", "magnitude_mask", "sparsegpt_layer", "sparsegpt_mask", "wanda_mask"]

_SUB_BLOCK = 32  # columns updated one by one before a matrix product carries their errors on


def check_weight(weight: Tensor, inputs: LayerInputs | None = None) -> None:
    """Refuse weights that are quantised, not finite or not a matrix, and statistics of another layer or of nothing.

    Raises
    ------
    MethodError
    """
    if weight.dim() != 2:
        raise MethodError(f"A weight of shape {tuple(weight.shape)} is no matrix. Give (out, in).")
    if not weight.is_floating_point() or weight.element_size() < 2:
        raise MethodError(
            f"The weight has dtype {weight.dtype}: it is quantised. Pruning works on float16, bfloat16, float32 or "
            "float64; dequantise the model first (model.dequantize()) or prune before quantising."
        )
    if (
        weight.numel()
        and not weight.is_meta
        and not math.isfinite(sum(float(end.abs()) for end in weight.detach().aminmax()))
    ):
        raise MethodError("The weight holds NaN or infinite values. Check the checkpoint.")
    if inputs is None:
        return
    if inputs.features != weight.shape[1]:
        raise MethodError(
            f"The weight has {weight.shape[1]} inputs, the statistics {inputs.features} features. "
            "Collect them at the input of this layer."
        )
    if inputs.tokens == 0:
        raise MethodError("The statistics hold no tokens. Run calibration data through the layer first.")


@torch.no_grad()
def magnitude_mask(
    weight: Float[Tensor, "out in"],
    sparsity: float | str | None = None,
    pattern: str | None = None,
    *,
    scope: Literal["layer", "row"] = "layer",
    inclusive: bool = False,
) -> Bool[Tensor, "out in"]:
    """Keep the weights of largest magnitude.

    Parameters
    ----------
    weight : Tensor (out, in)
    sparsity : float, default 0.5
        Share of zeros, or a pattern as text.
    pattern : str, optional
        ``"n:m"``: prune the n smallest of every m consecutive inputs.
    scope : {"layer", "row"}, default "layer"
        Compare magnitudes over the whole layer (as the Wanda authors' baseline does) or within each row (as DSnoT
        needs it). A pattern is always within blocks.
    inclusive : bool, default False
        Prune ``|W| <= sorted(|W|)[int(numel * sparsity)]`` as that code does: at least one weight more than the
        budget and all its ties. Only with scope "layer".

    Returns
    -------
    Tensor (out, in) of bool
        True = kept; exactly ``int(numel * sparsity)`` are False (``int(in * sparsity)`` in every row with scope
        "row"), the lower index first among equals.

    Raises
    ------
    MethodError
        For a sparsity outside [0, 1), a pattern that does not fit, or weights that are quantised or not finite.

    Examples
    --------
    >>> magnitude_mask(torch.tensor([[1.0, -3.0], [0.5, 2.0]]), 0.5).tolist()
    [[False, True], [False, True]]
    """
    check_weight(weight)
    budget = Budget(sparsity, pattern)
    if budget.block is not None or scope == "row":
        return score_mask(weight, torch.ones(weight.shape[1]), budget)
    if scope != "layer":
        raise MethodError(f"scope = {scope!r}. Allowed are 'layer' and 'row'.")
    magnitude = weight.abs().to(torch.promote_types(weight.dtype, torch.float32)).reshape(1, -1)
    return ~_smallest(magnitude, int(weight.numel() * budget.sparsity), inclusive).view(weight.shape)


def _smallest(keys: Float[Tensor, "one n"], k: int, inclusive: bool) -> Bool[Tensor, "one n"]:
    """Mark the k smallest of one row, or (inclusive) everything up to the next one's value."""
    if not inclusive:
        return smallest_mask(keys, k)
    chosen = smallest_mask(keys, k + 1)
    return keys <= keys[chosen].max()


@torch.no_grad()
def wanda_mask(
    weight: Float[Tensor, "out in"],
    inputs: LayerInputs,
    sparsity: float | str | None = None,
    pattern: str | None = None,
) -> Bool[Tensor, "out in"]:
    """Keep in every row the weights with the largest |W_ij| sqrt(q_j), q_j the squared norm of input j (Wanda).

    Parameters
    ----------
    weight : Tensor (out, in)
    inputs : LayerInputs
        Statistics of the layer's inputs.
    sparsity : float, default 0.5
        Share of zeros in every row, or a pattern as text.
    pattern : str, optional
        ``"n:m"``: prune the n smallest of every m consecutive inputs.

    Returns
    -------
    Tensor (out, in) of bool
        True = kept; ``int(in * sparsity)`` of every row are False, the lower index first among equal scores.

    Raises
    ------
    MethodError
        As `magnitude_mask`; also when the statistics are of another width or empty.

    Examples
    --------
    >>> x = torch.tensor([[[1.0, 10.0]]])
    >>> wanda_mask(torch.tensor([[5.0, 1.0]]), LayerInputs.from_tensor(x), 0.5).tolist()
    [[False, True]]
    """
    check_weight(weight, inputs)
    return score_mask(weight, inputs.mean_square.sqrt(), Budget(sparsity, pattern))


@torch.no_grad()
def inverse_factor(inputs: LayerInputs, damping: float = 0.01) -> Float[Tensor, "in in"]:
    """Return U, the upper Cholesky factor of the inverse Hessian: H^-1 = U^T U, H = (2/N) X^T X + damping.

    Inputs that are never active get H_jj = 1. `damping` times the mean of the diagonal is added to the diagonal.
    One Cholesky of the matrix read backwards and one triangular inverse give it, without forming H^-1.

    Parameters
    ----------
    inputs : LayerInputs
        With a Gram matrix.
    damping : float, default 0.01
        SparseGPT's ``percdamp``.

    Raises
    ------
    MethodError
        Without a Gram matrix, or when H is not positive definite.
    """
    if inputs.gram is None:
        raise MethodError("These statistics hold no Gram matrix. Collect them with gram=True for SparseGPT.")
    hessian = inputs.gram * (2 / max(inputs.sequences, 1))
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += damping * diagonal.mean()
    lower, info = torch.linalg.cholesky_ex(hessian.flip(0, 1))
    if int(info):
        raise MethodError(
            f"The Hessian of {inputs.features} inputs and {inputs.tokens} tokens is not positive definite with "
            f"damping = {damping}. Give a larger damping or more calibration tokens."
        )
    return _invert_lower(lower).flip(0, 1)


def _invert_lower(lower: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """Invert a lower triangular matrix by halves, so that nearly all work is in matrix products."""
    n = len(lower)
    if n <= 256:
        eye = torch.eye(n, dtype=lower.dtype, device=lower.device)
        return torch.linalg.solve_triangular(lower, eye, upper=False)
    half = n // 2
    inverse = torch.zeros_like(lower)
    inverse[:half, :half] = _invert_lower(lower[:half, :half])
    inverse[half:, half:] = _invert_lower(lower[half:, half:])
    inverse[half:, :half] = inverse[half:, half:] @ (lower[half:, :half] @ inverse[:half, :half]).neg_()
    return inverse


@torch.no_grad()
def sparsegpt_mask(
    weight: Float[Tensor, "out in"],
    inputs: LayerInputs,
    sparsity: float | str | None = None,
    pattern: str | None = None,
    *,
    damping: float = 0.01,
    factor: Float[Tensor, "in in"] | None = None,
) -> Bool[Tensor, "out in"]:
    """Keep in every row the weights with the largest W_ij^2 / U_jj^2, without updating any weight.

    The base for DSnoT, which keeps dense values; `sparsegpt_layer` is SparseGPT itself.

    Parameters
    ----------
    weight, inputs, sparsity, pattern
        As in `wanda_mask`; the statistics need a Gram matrix.
    damping : float, default 0.01
    factor : Tensor (in, in), optional
        What `inverse_factor` returned for these inputs, to share it among layers.

    Returns
    -------
    Tensor (out, in) of bool
        True = kept.
    """
    check_weight(weight, inputs)
    factor = inverse_factor(inputs, damping) if factor is None else factor
    return score_mask(weight, factor.diagonal().double().reciprocal(), Budget(sparsity, pattern))


@torch.no_grad()
def sparsegpt_layer(
    weight: Float[Tensor, "out in"],
    inputs: LayerInputs,
    sparsity: float | str | None = None,
    pattern: str | None = None,
    *,
    block_size: int = 128,
    damping: float = 0.01,
    inclusive: bool = False,
    factor: Float[Tensor, "in in"] | None = None,
) -> tuple[Float[Tensor, "out in"], Bool[Tensor, "out in"]]:
    """Prune one layer with SparseGPT: choose weights block by block and let the weights to their right make up for it.

    Parameters
    ----------
    weight : Tensor (out, in)
    inputs : LayerInputs
        Statistics with a Gram matrix.
    sparsity : float, default 0.5
        Share of zeros in every block of columns over all rows, or a pattern as text.
    pattern : str, optional
        ``"n:m"``: the n of every m consecutive inputs with the smallest score at the moment they are reached.
    block_size : int, default 128
        Columns per block (as the authors); rounded up to a multiple of m.
    damping : float, default 0.01
        Share of the Hessian's mean diagonal added to it.
    inclusive : bool, default False
        Prune ``score <= sorted(score)[int(numel * sparsity)]`` as the authors' code does, at least one weight per
        block more than the budget.
    factor : Tensor (in, in), optional
        What `inverse_factor` returned for these inputs, to share it among layers.

    Returns
    -------
    weight : Tensor (out, in)
        The pruned and updated weight, in the dtype given.
    keep : Tensor (out, in) of bool
        True = kept.

    Raises
    ------
    MethodError
        As `wanda_mask` and `inverse_factor`.
    """
    check_weight(weight, inputs)
    budget = Budget(sparsity, pattern)
    features = weight.shape[1]
    budget.check(features)
    m = 1 if budget.block is None else budget.block[1]
    block_size = -(-block_size // m) * m
    factor = inverse_factor(inputs, damping) if factor is None else factor
    dtype = torch.promote_types(weight.dtype, torch.float32)
    upper = factor.to(weight.device, dtype)
    columns = weight.t().to(dtype).contiguous()  # (in, out): a column of the weight is one stretch of memory
    if columns.data_ptr() == weight.data_ptr():
        columns = columns.clone()
    columns[(inputs.squares == 0).to(weight.device)] = 0
    pruned = torch.zeros_like(columns, dtype=torch.bool)
    for start in range(0, features, block_size):
        end = min(start + block_size, features)
        errors = _prune_block(columns[start:end], upper[start:end, start:end], pruned[start:end], budget, inclusive)
        columns[end:].addmm_(upper[start:end, end:].t(), errors, alpha=-1)
    return columns.t().to(weight.dtype).contiguous(), ~pruned.t().contiguous()


def _prune_block(columns: Tensor, upper: Tensor, pruned: Tensor, budget: Budget, inclusive: bool) -> Tensor:
    """Prune the columns (b, out) of one block in place, fill `pruned`; return the errors (b, out) to hand on."""
    width = len(columns)
    diagonal = upper.diagonal()
    scale = diagonal.reciprocal()[:, None]
    if budget.block is None:
        scores = (columns * scale).square_()
        k = int(columns.numel() * budget.sparsity)
        pruned.copy_(_smallest(scores.view(1, -1), k, inclusive).view_as(columns))
    m = 1 if budget.block is None else budget.block[1]
    step = m * max(1, _SUB_BLOCK // m)
    factors = diagonal.tolist()
    errors = torch.zeros_like(columns)
    for start in range(0, width, step):
        end = min(start + step, width)
        for i in range(start, end):
            if budget.block is not None and i % m == 0:
                scores = (columns[i : i + m] * scale[i : i + m]).square_()
                pruned[i : i + m] = smallest_blocks(scores.t().contiguous(), budget.block).t()
            torch.mul(columns[i], pruned[i], out=errors[i]).div_(factors[i])
            columns[i].masked_fill_(pruned[i], 0)
            if i + 1 < end:
                columns[i + 1 : end].addr_(upper[i, i + 1 : end], errors[i], alpha=-1)
        if end < width:
            columns[end:].addmm_(upper[start:end, end:].t(), errors[start:end], alpha=-1)
    return errors
