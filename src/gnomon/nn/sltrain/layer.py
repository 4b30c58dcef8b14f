"""The layer that stands in for a linear layer: low-rank factors and sparse values in place of a dense weight."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gnomon.common.layers import weight_of
from gnomon.common.linalg import svd
from gnomon.errors import MethodError
from gnomon.nn.sltrain.functional import dense_weight, draw_support, sparse_low_rank_linear, support_size

__all__ = ["SparseLowRankLinear", "check_sizes", "default_alpha"]


def default_alpha(rank: int) -> float:
    """Return the paper's alpha at its ranks: 32 at 128, 16 at 256, 8 from 512 on; the rank itself up to 32.

    Examples
    --------
    >>> [default_alpha(rank) for rank in (4, 128, 256, 1024)]
    [4.0, 32.0, 16.0, 8.0]
    """
    return float(min(rank, 32) if rank <= 128 else 16 if rank <= 256 else 8)


def check_sizes(rank: int, sparsity: float, alpha: float | None) -> None:
    """Refuse a rank below 1, a sparsity outside (0, 1) and an alpha that is not above 0.

    Raises
    ------
    MethodError
        Naming the value and what is allowed.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise MethodError(
            f"rank = {rank!r}; it must be a whole number of at least 1. The paper: 128 (60M) to 1024 (7B)."
        )
    if not 0.0 < sparsity < 1.0:
        raise MethodError(
            f"sparsity = {sparsity}; it is the share of the entries that are trained and must lie between 0 and 1. The "
            "paper: 0.03, and 0.05 at 7B."
        )
    if alpha is not None and not 0.0 < alpha < math.inf:
        raise MethodError(f"alpha = {alpha}; it must be above 0. The paper: 32 at rank 128, 16 at 256, 8 from 512 on.")


class SparseLowRankLinear(nn.Module):
    """A linear layer with W = (alpha / rank) * B A + S, where S is sparse on a fixed random support.

    Parameters
    ----------
    in_features, out_features : int
        n and m.
    rank : int
        r, the paper: a quarter to a third of the width.
    sparsity : float, default 0.03
        Share of the entries of W that S trains.
    alpha : float, optional
        Default `default_alpha`.
    bias : bool, default True
    trainable_scale : bool, default False
        Replace alpha / rank by tanh of a trained number that starts at 1.
    generator : torch.Generator, optional
        Of the CPU; draws support and initial values. Default: one seeded with 0.
    device, dtype : optional
        As in `torch.nn.Linear`.

    Attributes
    ----------
    A, B, values : Parameters of shapes (r, n), (m, r) and (k,)
    indices : integer buffer of shape (k,)
        Flat row-major positions of `values`, ascending; int32 where m * n < 2^31.
    bias : Parameter of shape (m,) or None
    scaling : Parameter of shape (1,) or None

    Raises
    ------
    MethodError
        When an option is out of range, or the layer is so small that no entry would be trained.

    Examples
    --------
    >>> layer = SparseLowRankLinear(20, 16, rank=4, sparsity=0.1)
    >>> layer(torch.zeros(3, 20)).shape, layer.values.shape
    (torch.Size([3, 16]), torch.Size([32]))
    """

    A: nn.Parameter
    B: nn.Parameter
    values: nn.Parameter
    indices: Tensor
    bias: nn.Parameter | None
    scaling: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        sparsity: float = 0.03,
        alpha: float | None = None,
        bias: bool = True,
        *,
        trainable_scale: bool = False,
        generator: torch.Generator | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(rank, sparsity, alpha)
        size = support_size(out_features, in_features, sparsity)
        if size == 0:
            raise MethodError(
                f"sparsity = {sparsity} of a weight of {out_features} x {in_features} is no entry at all. Take at "
                f"least {1 / (out_features * in_features):.2g}, or keep this layer dense."
            )
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.sparsity = sparsity
        self.alpha = default_alpha(rank) if alpha is None else float(alpha)
        self.transposed = False  # whether it stands for a `Conv1D`
        options = {"device": device, "dtype": dtype}
        self.A = nn.Parameter(torch.empty(rank, in_features, **options))
        self.B = nn.Parameter(torch.empty(out_features, rank, **options))
        self.values = nn.Parameter(torch.empty(size, **options))
        wide = torch.int64 if out_features * in_features >= 2**31 else torch.int32
        self.register_buffer("indices", torch.empty(size, dtype=wide, device=device))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features, **options)) if bias else None)
        self.register_parameter("scaling", nn.Parameter(torch.empty(1, **options)) if trainable_scale else None)
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw support and values anew: A and values from U(-1/sqrt n, 1/sqrt n), B = 0, bias U(-1/sqrt m, 1/sqrt m).

        The bias bound is the authors' (`torch.nn.Linear` has 1/sqrt n).

        Parameters
        ----------
        generator : torch.Generator, optional
            Of the CPU; numbers are drawn there in float32, so that every device and dtype starts alike.
        """
        if self.A.is_meta:
            return
        generator = generator or torch.Generator().manual_seed(0)
        self.indices.copy_(draw_support(self.out_features, self.in_features, self.sparsity, generator))
        bound = 1 / math.sqrt(self.in_features)
        for parameter, limit in ((self.A, bound), (self.values, bound), (self.bias, 1 / math.sqrt(self.out_features))):
            if parameter is not None:
                parameter.copy_(torch.empty(parameter.shape).uniform_(-limit, limit, generator=generator))
        self.B.zero_()
        if self.scaling is not None:
            self.scaling.fill_(1.0)

    @property
    def scale(self) -> float:
        """The factor of B A: alpha / rank, or the tanh of the trained number."""
        return self.alpha / self.rank if self.scaling is None else math.tanh(float(self.scaling.detach()))

    @property
    def weight(self) -> Float[Tensor, "m n"]:
        """The dense weight, built at every access; gradients flow into the factors."""
        A, scale = self._scaled()
        return dense_weight(A, self.B, self.values, self.indices, scale)

    def _scaled(self) -> tuple[Tensor, float]:
        """A and the factor that is still to be applied to it."""
        return (self.A, self.alpha / self.rank) if self.scaling is None else (self.A * self.scaling.tanh(), 1.0)

    def forward(self, x: Float[Tensor, "... n"]) -> Float[Tensor, "... m"]:
        """Return x W^T + bias."""
        A, scale = self._scaled()
        return sparse_low_rank_linear(x, A, self.B, self.values, self.indices, self.bias, scale=scale)

    @classmethod
    def from_linear(
        cls,
        layer: nn.Linear | Conv1D,
        rank: int,
        sparsity: float = 0.03,
        alpha: float | None = None,
        *,
        init: Literal["random", "svd"] = "random",
        trainable_scale: bool = False,
        generator: torch.Generator | None = None,
    ) -> SparseLowRankLinear:
        """Make the stand-in of a linear layer, on its device, in its dtype and mode.

        Parameters
        ----------
        layer : nn.Linear or Conv1D
            Not changed.
        rank, sparsity, alpha, trainable_scale, generator
            As in the class.
        init : {"random", "svd"}, default "random"
            ``"random"`` drops the weight and the bias of the layer. ``"svd"`` approximates the weight: B A is its best
            approximation of this rank, `values` what remains at the support; the bias is kept.

        Returns
        -------
        SparseLowRankLinear

        Examples
        --------
        >>> SparseLowRankLinear.from_linear(nn.Linear(20, 16), rank=4).in_features
        20
        """
        weight = weight_of(layer)
        made = cls(
            weight.shape[1],
            weight.shape[0],
            rank,
            sparsity,
            alpha,
            layer.bias is not None,
            trainable_scale=trainable_scale,
            generator=generator,
            device=weight.device,
            dtype=weight.dtype,
        )
        made.transposed = isinstance(layer, Conv1D)
        if init == "svd" and not weight.is_meta:
            made._approximate(weight, layer.bias)
        for parameter in (made.A, made.B, made.values, made.scaling):
            if parameter is not None:
                parameter.requires_grad_(layer.weight.requires_grad)
        if made.bias is not None:
            made.bias.requires_grad_(layer.bias.requires_grad)
        return made.train(layer.training)

    @torch.no_grad()
    def _approximate(self, weight: Tensor, bias: Tensor | None) -> None:
        """Take the factors from the truncated SVD, half of each singular value on either side."""
        exact = weight.float() if weight.dtype != torch.float64 else weight
        U, S, Vh = svd(exact, rank=min(self.rank, *weight.shape))
        scale, root = self.scale, S.sqrt()
        self.A.zero_()
        self.B.zero_()
        self.A[: len(S)] = (root / math.sqrt(scale))[:, None] * Vh
        self.B[:, : len(S)] = U * (root / math.sqrt(scale))
        rest = exact - scale * (self.B.to(exact.dtype) @ self.A.to(exact.dtype))
        self.values.copy_(rest.reshape(-1)[self.indices])
        if bias is not None and self.bias is not None:
            self.bias.copy_(bias)

    @torch.no_grad()
    def to_dense(self) -> nn.Linear | Conv1D:
        """Return the ordinary layer with the same weight: `nn.Linear`, or `Conv1D` where it stood for one.

        The weight is summed in float32 at least and rounded once.

        Examples
        --------
        >>> SparseLowRankLinear(20, 16, rank=4, bias=False).to_dense()
        Linear(in_features=20, out_features=16, bias=False)
        """
        dtype = torch.promote_types(self.B.dtype, torch.float32)
        A, B, values = (t.to(dtype) for t in (self.A, self.B, self.values))
        weight = dense_weight(A, B, values, self.indices, self.scale).to(self.B.dtype)
        made: Any
        with torch.device("meta"):  # draws no numbers
            if self.transposed:
                made = Conv1D(self.out_features, self.in_features)
            else:
                made = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        weight = weight.t().contiguous() if self.transposed else weight
        made.weight = nn.Parameter(weight, requires_grad=self.B.requires_grad)
        if self.bias is not None:
            made.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=self.bias.requires_grad)
        return made.train(self.training)

    def extra_repr(self) -> str:
        """Sizes, for the printed model."""
        scale = "trained" if self.scaling is not None else f"{self.alpha / self.rank:g}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"entries={len(self.values)}, scale={scale}, bias={self.bias is not None}"
        )
