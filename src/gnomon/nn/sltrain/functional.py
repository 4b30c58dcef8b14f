"""The mathematics of SLTrain: the support, the dense weight, and the linear map with its own backward pass."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import linear

from gnomon.errors import MethodError, nearest

__all__ = ["Path", "dense_weight", "draw_support", "sparse_low_rank_linear", "support_size", "takes_factored_path"]

Path = Literal["auto", "dense", "factored"]


def support_size(out_features: int, in_features: int, sparsity: float) -> int:
    """Return k = floor(sparsity * out_features * in_features), the number of sparse entries of a layer."""
    return int(sparsity * out_features * in_features)


def draw_support(out_features: int, in_features: int, sparsity: float, generator: torch.Generator) -> Int[Tensor, " k"]:
    """Draw k of the m * n positions of a weight uniformly without replacement, in ascending order.

    Positions are drawn until k different ones are there, each round as many as are missing; over one half the
    positions to leave out are drawn. That needs memory for k positions, where a random permutation needs it for m * n.

    Parameters
    ----------
    out_features, in_features : int
        m and n; position i stands for row ``i // n`` and column ``i % n``.
    sparsity : float
        Share of the positions, in (0, 1); k is rounded down.
    generator : torch.Generator
        Of the CPU, so that a seed gives the same support for every device.

    Returns
    -------
    Tensor of shape (k,)
        int32 where m * n < 2^31, else int64.

    Examples
    --------
    >>> draw_support(4, 5, 0.2, torch.Generator().manual_seed(0)).dtype
    torch.int32
    """
    total, wanted = out_features * in_features, support_size(out_features, in_features, sparsity)
    drawn = min(wanted, total - wanted)
    support = torch.empty(0, dtype=torch.int64)
    while len(support) < drawn:
        more = torch.randint(total, (drawn - len(support),), generator=generator)
        support = torch.unique(torch.cat([support, more]))
    if drawn < wanted:
        kept = torch.ones(total, dtype=torch.bool)
        kept[support] = False
        support = kept.nonzero().view(-1)
    return support.to(torch.int32 if total < 2**31 else torch.int64)


def dense_weight(
    A: Float[Tensor, "r n"],
    B: Float[Tensor, "m r"],
    values: Float[Tensor, " k"],
    indices: Int[Tensor, " k"],
    scale: float = 1.0,
) -> Float[Tensor, "m n"]:
    """Return W = scale * B A with `values` added at the flat row-major positions `indices`.

    On the CPU a weight of 16 bits is summed in float32 and rounded once.

    Examples
    --------
    >>> A, B = torch.ones(1, 2), torch.ones(2, 1)
    >>> dense_weight(A, B, torch.tensor([5.0]), torch.tensor([3]), scale=2.0).tolist()
    [[2.0, 2.0], [2.0, 7.0]]
    """
    dtype = B.dtype
    if dtype in (torch.bfloat16, torch.float16) and B.device.type == "cpu":
        A, B, values = A.float(), B.float(), values.float()
    W = B @ (A * scale)
    W.view(-1).index_add_(0, indices, values)
    return W.to(dtype)


def _sparse_weight(
    values: Float[Tensor, " k"], indices: Int[Tensor, " k"], rows: int, columns: int
) -> Float[Tensor, "m n"]:
    """Return S as a dense matrix."""
    return values.new_zeros(rows * columns).index_add_(0, indices, values).view(rows, columns)


def takes_factored_path(tokens: int, out_features: int, in_features: int) -> bool:
    """Return whether so few tokens are multiplied by B, A and S in turn, and not by their sum.

    Building B A takes m n r multiplications, going through A and B takes T r (m + n): the factors are cheaper
    below T = m n / (m + n). ``benchmarks/sltrain.py`` measures both sides of the switch.
    """
    return tokens * (out_features + in_features) < out_features * in_features


def _no_autocast(device: str) -> AbstractContextManager[Any]:
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


class _SparseLowRankLinear(torch.autograd.Function):
    """Keeps x and the factors alone between the passes; the dense weight lives only while a pass uses it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        A: Tensor,
        B: Tensor,
        values: Tensor,
        indices: Tensor,
        bias: Tensor | None,
        scale: float,
        factored: bool,
    ) -> Tensor:
        with _no_autocast(x.device.type):
            if not factored:
                return linear(x, dense_weight(A, B, values, indices, scale), bias)
            sparse = linear(x, _sparse_weight(values, indices, B.shape[0], A.shape[1]), bias)
            return sparse + linear(linear(x, A * scale), B)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, A, B, values, indices, _, scale, factored = inputs
        ctx.save_for_backward(x, A, B, values, indices)
        ctx.scale, ctx.factored = scale, factored

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gy,) = gradients
        x, A, B, values, indices = ctx.saved_tensors
        with _no_autocast(x.device.type):
            return *_backward(ctx.needs_input_grad, ctx.scale, ctx.factored, gy, x, A, B, values, indices), None, None


def _backward(
    needed: tuple[bool, ...],
    scale: float,
    factored: bool,
    gy: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    values: Tensor,
    indices: Tensor,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, A, B, values, indices (none) and bias, as far as they are needed."""
    x_needed, A_needed, B_needed, values_needed, _, bias_needed = needed[:6]
    scaled = A * scale
    rows, columns = gy.reshape(-1, gy.shape[-1]), x.reshape(-1, x.shape[-1])
    gx = gA = gB = gvalues = None
    if factored:
        inner = rows @ B  # (T, r)
        if x_needed:
            gx = rows @ _sparse_weight(values, indices, B.shape[0], A.shape[1]) + inner @ scaled
        if A_needed:
            gA = scale * (inner.t() @ columns)
        if B_needed:
            gB = rows.t() @ (columns @ scaled.t())
        if values_needed:
            gvalues = (rows.t() @ columns).reshape(-1).index_select(0, indices)
    else:
        if x_needed:
            gx = rows @ dense_weight(A, B, values, indices, scale)
        if A_needed or B_needed or values_needed:
            G = rows.t() @ columns  # (m, n), the gradient of the dense weight
            gA = scale * (B.t() @ G) if A_needed else None
            gB = G @ scaled.t() if B_needed else None
            gvalues = G.reshape(-1).index_select(0, indices) if values_needed else None
    gbias = rows.sum(0) if bias_needed else None
    return None if gx is None else gx.view(x.shape), gA, gB, gvalues, None, gbias


def sparse_low_rank_linear(
    x: Float[Tensor, "... n"],
    A: Float[Tensor, "r n"],
    B: Float[Tensor, "m r"],
    values: Float[Tensor, " k"],
    indices: Int[Tensor, " k"],
    bias: Float[Tensor, " m"] | None = None,
    *,
    scale: float = 1.0,
    path: Path = "auto",
) -> Float[Tensor, "... m"]:
    """Compute y = x W^T + bias with W = scale * B A + S, where S holds `values` at `indices`.

    Only x, A, B, values and indices are kept for the backward pass; W and its gradient G are temporary. With
    G = dY^T X: dX = dY W, dB = scale * G A^T, dA = scale * B^T G, dvalues = G at the indices, dbias = sum of dY.

    Parameters
    ----------
    x : Tensor of shape (..., n)
    A, B : Tensors of shapes (r, n) and (m, r)
    values : Tensor of shape (k,)
    indices : integer Tensor of shape (k,)
        Flat row-major positions in the (m, n) weight, all different.
    bias : Tensor of shape (m,), optional
    scale : float, default 1
        alpha / r.
    path : {"auto", "dense", "factored"}, default "auto"
        ``"dense"`` builds W; ``"factored"`` multiplies by A, B and S in turn; ``"auto"`` takes the cheaper one, see
        `takes_factored_path`. The results are equal but for rounding.

    Returns
    -------
    Tensor of shape (..., m)
        Under autocast in its dtype, as `torch.nn.functional.linear` returns it.

    Raises
    ------
    MethodError
        When the path is unknown.

    Examples
    --------
    >>> x, A, B = torch.ones(3, 2), torch.ones(1, 2), torch.zeros(2, 1)
    >>> sparse_low_rank_linear(x, A, B, torch.tensor([5.0]), torch.tensor([3]))[0].tolist()
    [0.0, 5.0]
    """
    if path not in get_args(Path):
        raise MethodError(f"path = {path!r} is unknown. {nearest(str(path), get_args(Path), noun='path')}")
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, A, B, values = (t.to(dtype) for t in (x, A, B, values))
        bias = None if bias is None else bias.to(dtype)
    tokens = x.numel() // max(1, x.shape[-1])
    factored = path == "factored" or (path == "auto" and takes_factored_path(tokens, B.shape[0], A.shape[1]))
    return _SparseLowRankLinear.apply(x, A, B, values, indices, bias, scale, factored)
