"""One linear layer: the low-rank adapter that best repairs a weight error on the layer's own inputs."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from gnomon.common import linalg
from gnomon.errors import GnomonWarning, MethodError, nearest

__all__ = ["EXACT_BELOW", "METHODS", "InputSpace", "eora_layer", "factorise", "input_space", "output_error"]

METHODS = ("eora", "svd", "act_s")
EXACT_BELOW = 512  # below this size a full decomposition costs milliseconds
_OVERSAMPLE = 16
_POWER_ITERATIONS = 6

Unseen = Literal["skip", "correct"]


@dataclass(frozen=True)
class InputSpace:
    """A square root M of the statistics C = M M^T of a layer's inputs; shared by all layers that read them.

    Attributes
    ----------
    root : Tensor or None
        M: a matrix (in, k), a vector (in,) that stands for a diagonal, or None for the identity.
    inverse : Tensor or None
        The pseudo-inverse of M in the same form; None where it is not needed: every direction was seen, so that
        M M^+ = 1, or `ridge` takes its place.
    gram : Tensor or None
        C, for the effective rank.
    least : float
        Eigenvalue of C at or below which a direction counts as never seen.
    ridge : float, default 0.0
        Above 0, `root` is the Cholesky factor of C + ridge, and M M^+ is approached by a filter that is 1 far above
        `ridge`, 1/2 at it and 0 far below.
    """

    root: Tensor | None
    inverse: Tensor | None = None
    gram: Tensor | None = None
    least: float = 0.0
    ridge: float = 0.0

    @cached_property
    def effective_rank(self) -> int | None:
        """Number of input directions that occur in the statistics; None without statistics. Counted when asked for."""
        if self.root is not None and self.root.ndim == 1:
            return int((self.root > 0).sum())
        if self.ridge > 0 and self.gram is not None:
            return _count_above(_wide(self.gram), self.least)
        return None if self.root is None else self.root.shape[1]

    def weigh(self, delta: Float[Tensor, "out in"]) -> Float[Tensor, "out k"]:
        """Return delta M."""
        if self.root is None:
            return delta
        root = self.root.to(delta)
        return delta @ root if root.ndim == 2 else delta * root

    def project(self, rows: Float[Tensor, "r in"]) -> Float[Tensor, "r in"]:
        """Return rows M M^+: what is left after directions that were never seen are dropped."""
        if self.ridge > 0:
            return self._filter(rows)
        if self.inverse is None or self.root is None:
            return rows
        inverse = self.inverse.to(rows)
        weighed = self.weigh(rows)
        return weighed @ inverse if inverse.ndim == 2 else weighed * inverse

    def _filter(self, rows: Float[Tensor, "r in"]) -> Float[Tensor, "r in"]:
        """Apply 3 P^2 - 2 P^3 with P = C (C + ridge)^-1, which is steeper about `ridge` than P."""
        assert self.root is not None
        powers = [rows.T.to(self.root)]
        for _ in range(3):
            powers.append(powers[-1] - self.ridge * torch.cholesky_solve(powers[-1], self.root))
        return (3 * powers[2] - 2 * powers[3]).T.to(rows)


def _wide(gram: Tensor) -> Tensor:
    """Return a copy in float64, on the CPU where the device has none."""
    return (gram.cpu() if gram.device.type == "mps" else gram).to(torch.float64, copy=True)


def _count_above(gram: Tensor, least: float) -> int:
    """Count the eigenvalues above `least` by the signs of the pivots (Sylvester); `gram` is overwritten."""
    gram.diagonal().sub_(least)
    factor, pivots = torch.linalg.ldl_factor(gram)
    paired = pivots < 0  # these belong to blocks of two, each with one positive and one negative eigenvalue
    return int((factor.diagonal()[~paired] > 0).sum()) + int(paired.sum()) // 2


def _largest_eigenvalue(gram: Tensor, iterations: int = 24) -> float:
    """Estimate the largest eigenvalue from below by power iteration (in^2 per step) from a private random start."""
    start = torch.randn(gram.shape[0], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    vector, value = start.to(gram), 0.0
    for _ in range(iterations):
        vector = gram @ vector
        value = float(torch.linalg.vector_norm(vector))
        vector = vector / max(value, 1e-300)
    return value


def _smallest_seen(gram: Tensor, wide: Tensor, cutoff: float | None) -> float:
    """Return the eigenvalue at or below which a direction counts as never seen."""
    if cutoff is not None:
        return cutoff * _largest_eigenvalue(wide)
    size = gram.shape[0]
    summing = 16 * torch.finfo(gram.dtype).eps / size**0.5
    solving = size * torch.finfo(wide.dtype).eps
    return float(wide.trace()) * max(summing, solving)


def input_space(gram: Float[Tensor, "in in"], *, exact: bool = True, cutoff: float | None = None) -> InputSpace:
    """Factor the Gram matrix of a layer's inputs.

    Parameters
    ----------
    gram : Tensor of shape (in, in)
        C = X^T X, the sum over all tokens; any positive multiple gives the same adapter.
    exact : bool, default True
        True diagonalises C in float64. False takes the Cholesky factor of C + cut-off, and a filter that is smooth
        about the cut-off in place of the projection on the directions that were seen.
    cutoff : float, optional
        Directions with an eigenvalue below this part of the largest one count as never seen. The default is an
        absolute bound on what rounding leaves in a sum kept in the dtype of `gram`: 16 eps tr(C) / sqrt(in), and
        never below in * eps of float64 * tr(C). (The rule in * eps of float32 of the largest eigenvalue, common
        elsewhere, drops most directions of a wide layer whose inputs have outliers.)

    Returns
    -------
    InputSpace

    Raises
    ------
    MethodError
        When the matrix is not square and symmetric, or holds values that are not finite.
    """
    _check_gram(gram)
    if cutoff is not None and not 0.0 <= cutoff < 1.0:
        raise MethodError(f"cutoff = {cutoff}: a part of the largest eigenvalue, from 0 to below 1, is allowed.")
    wide = _wide(gram)
    least = _smallest_seen(gram, wide, cutoff)
    if not bool(wide.any()):
        return InputSpace(wide[:, :0], wide[:0], gram, least)
    if not exact and least > 0:
        wide.diagonal().add_(least)
        root, failed = torch.linalg.cholesky_ex(wide)
        if int(failed) == 0:
            return InputSpace(root, None, gram, least, ridge=least)
        wide.diagonal().sub_(least)
    root, inverse = linalg.whitening(wide, cutoff=least)
    return InputSpace(root, None if root.shape[1] == len(wide) else inverse, gram, least)


def diagonal_space(scale: Float[Tensor, " in"]) -> InputSpace:
    """Return the input space of M = diag(scale): inputs weighed by their mean size (ACT-S)."""
    if scale.ndim != 1 or bool((scale < 0).any()) or not bool(torch.isfinite(scale).all()):
        raise MethodError(
            f"abs_mean of shape {tuple(scale.shape)}: one finite mean of |x| >= 0 for each input is needed."
        )
    alive = scale > 0
    inverse = torch.where(alive, 1 / scale.where(alive, torch.ones_like(scale)), torch.zeros_like(scale))
    return InputSpace(scale, inverse)


def _check_gram(gram: Tensor) -> None:
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1]:
        raise MethodError(
            f"gram has the shape {tuple(gram.shape)}; a square matrix (in, in), X^T X of the layer's inputs, is needed."
        )
    if not gram.dtype.is_floating_point or torch.finfo(gram.dtype).bits < 32:
        raise MethodError(
            f"gram has the dtype {gram.dtype}: sums of squares overflow and lose the small eigenvalues in 16 bits. "
            "Accumulate X^T X in float32 or float64 (up-cast X first)."
        )
    largest = gram.abs().max() if gram.numel() else gram.new_zeros(())
    if not bool(torch.isfinite(largest)):
        raise MethodError("gram holds NaN or infinite values: the layer's inputs were not finite or overflowed.")
    if bool((gram - gram.T).abs().max() > 1e-3 * largest):
        raise MethodError("gram is not symmetric, so it is no X^T X. Pass the Gram matrix of the layer's inputs.")


def _check_delta(delta: Tensor, rank: int) -> int:
    if delta.ndim != 2:
        raise MethodError(f"delta has the shape {tuple(delta.shape)}; a matrix (out, in), W - W_compressed, is needed.")
    if not bool(torch.isfinite(delta).all()):
        raise MethodError("delta holds NaN or infinite values: look at the dense and the compressed weight.")
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise MethodError(f"rank = {rank!r}: a whole number >= 1 is needed. Without an adapter, do not call EoRA.")
    largest = min(delta.shape)
    if rank > largest:
        warnings.warn(
            f"rank = {rank} exceeds min(out, in) = {largest} of a layer of shape {tuple(delta.shape)}; rank {largest} "
            "already repairs it wholly and is used.",
            GnomonWarning,
            stacklevel=3,
        )
    return min(rank, largest)


def _leading(delta: Tensor, space: InputSpace, width: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Return the leading left singular vectors and values of delta M by a range finder that never forms delta M."""
    if space.root is None or space.root.ndim == 1:
        return linalg.randomized_svd(
            space.weigh(delta),
            width,
            oversample=_OVERSAMPLE,
            power_iterations=_POWER_ITERATIONS,
            generator=generator,
        )[:2]
    root = space.root.to(delta)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    sample = torch.randn(root.shape[1], width + _OVERSAMPLE, generator=generator, device=generator.device).to(delta)
    basis = torch.linalg.qr(delta @ (root @ sample)).Q
    for _ in range(_POWER_ITERATIONS):
        sample = torch.linalg.qr(root.T @ (delta.T @ basis)).Q
        basis = torch.linalg.qr(delta @ (root @ sample)).Q
    _, values, inner = torch.linalg.svd(root.T @ (delta.T @ basis), full_matrices=False)
    left = basis @ inner[:width].T
    return linalg.fix_signs(left, left.T)[0], values[:width]


def factorise(
    delta: Float[Tensor, "out in"],
    space: InputSpace,
    rank: int,
    *,
    exact: bool = True,
    unseen: Unseen = "skip",
    generator: torch.Generator | None = None,
) -> tuple[Float[Tensor, "r in"], Float[Tensor, "out r"]]:
    """Return (A, B) for a weight error and an input space that is already factored; see `eora_layer`.

    With E = delta M = U S V^T the optimum is B = U_r S_r^{1/2}, A = S_r^{1/2} V_r^T M^+. As V_r^T M^+ equals
    S_r^{-1} U_r^T delta (M M^+), A is computed as S_r^{-1/2} U_r^T delta with the unseen directions projected
    out: small eigenvalues of C are never divided by.
    """
    size = delta.shape[1] if space.root is None else space.root.shape[-1]
    width = min(rank, delta.shape[0], size)
    if width == 0 or not bool(delta.any()):
        return delta.new_zeros(rank, delta.shape[1]), delta.new_zeros(delta.shape[0], rank)
    if exact or width + _OVERSAMPLE >= min(delta.shape[0], size):
        left, values, _ = linalg.svd(space.weigh(delta), rank=width)
    else:
        left, values = _leading(delta, space, width, generator)
    noise = values[0] * max(delta.shape) * torch.finfo(delta.dtype).eps
    root = torch.where(values > noise, values, torch.zeros_like(values)).sqrt()
    inverse = torch.where(root > 0, 1 / root.where(root > 0, torch.ones_like(root)), torch.zeros_like(root))
    rows = left.T @ delta
    A = delta.new_zeros(rank, delta.shape[1])
    B = delta.new_zeros(delta.shape[0], rank)
    A[:width] = inverse[:, None] * (space.project(rows) if unseen == "skip" else rows)
    B[:, :width] = left * root
    return A, B


def eora_layer(
    delta: Float[Tensor, "out in"],
    gram: Float[Tensor, "in in"] | None,
    rank: int,
    *,
    method: Literal["eora", "svd", "act_s"] = "eora",
    exact: bool | None = None,
    cutoff: float | None = None,
    unseen: Unseen = "skip",
    abs_mean: Float[Tensor, " in"] | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Float[Tensor, "r in"], Float[Tensor, "out r"]]:
    """Return the rank-r adapter B A nearest to a weight error on the layer's inputs.

    Minimises ||(delta - B A) X^T||_F^2 = tr((delta - B A) C (delta - B A)^T) over all B A of rank <= r; the optimum
    is global, its value the sum of the squared singular values of delta M beyond r, for any M with M M^T = C.

    Parameters
    ----------
    delta : Tensor of shape (out, in)
        W - W_compressed, dense minus compressed. Computed in float64 if it is float64, else in float32.
    gram : Tensor of shape (in, in) or None
        C = X^T X over all calibration tokens, float32 or float64. Not used by the two baselines.
    rank : int
        r >= 1. Above min(out, in) it is lowered to that, with a warning.
    method : {"eora", "svd", "act_s"}, default "eora"
        "svd" ignores the inputs (M = 1); "act_s" weighs each input by its mean absolute value (M = diag(abs_mean)).
    exact : bool, optional
        True: eigendecomposition and full SVD. False: a Cholesky factor and a randomised range finder (16 extra
        directions, 6 power iterations: within 1 % of the optimum even on white noise). Default: exact when
        min(out, in) <= 512.
    cutoff : float, optional
        See `input_space`.
    unseen : {"skip", "correct"}, default "skip"
        Input directions that never occur in the calibration data get no correction, or the part of the dense weight
        that the chosen output directions carry ("correct": then no input is served worse than without adapter).
    abs_mean : Tensor of shape (in,), optional
        Mean of |x_j| over the tokens; needed by "act_s".
    generator : torch.Generator, optional
        For the range finder; default a private one seeded with 0.

    Returns
    -------
    A : Tensor of shape (r, in)
        S_r^{1/2} V_r^T M^+.
    B : Tensor of shape (out, r)
        U_r S_r^{1/2}.

    Raises
    ------
    MethodError
        When a shape, a dtype, the rank or the method is not usable or a value is not finite.

    Examples
    --------
    >>> x = torch.randn(100, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    >>> delta = torch.ones(4, 6, dtype=torch.float64)
    >>> A, B = eora_layer(delta, x.T @ x, rank=1)
    >>> bool(torch.allclose(B @ A, delta))
    True
    """
    if method not in METHODS:
        raise MethodError(f"method = {method!r}. {nearest(str(method), METHODS, noun='method')}")
    if unseen not in ("skip", "correct"):
        raise MethodError(f"unseen = {unseen!r}: 'skip' or 'correct' is allowed.")
    rank = _check_delta(delta, rank)
    if exact is None:
        exact = min(delta.shape) <= EXACT_BELOW
    if method == "svd":
        space = InputSpace(None)
    elif method == "act_s":
        if abs_mean is None:
            raise MethodError(
                "method = 'act_s' weighs inputs by their mean absolute value: pass abs_mean of shape (in,)."
            )
        space = diagonal_space(abs_mean)
    else:
        if gram is None:
            raise MethodError("method = 'eora' needs gram = X^T X of shape (in, in); 'svd' works without inputs.")
        space = input_space(gram, exact=exact, cutoff=cutoff)
    weights = space.root
    if weights is not None and weights.shape[0] != delta.shape[1]:
        raise MethodError(
            f"delta of shape {tuple(delta.shape)} has {delta.shape[1]} inputs, the statistics have {weights.shape[0]}. "
            "delta is (out, in); a Conv1D weight (GPT-2) must be transposed first."
        )
    compute = delta if delta.dtype == torch.float64 else delta.float()
    return factorise(compute, space, rank, exact=exact, unseen=unseen, generator=generator)


def output_error(delta: Float[Tensor, "out in"], gram: Float[Tensor, "in in"]) -> float:
    """Return ||delta X^T||_F^2 = tr(delta C delta^T), the squared error a weight error makes on the inputs.

    Parameters
    ----------
    delta : Tensor of shape (out, in)
    gram : Tensor of shape (in, in)

    Returns
    -------
    float

    Examples
    --------
    >>> output_error(torch.ones(2, 3), torch.eye(3))
    6.0
    """
    wide = delta if delta.dtype == torch.float64 else delta.float()
    return max(0.0, float(((wide @ gram.to(wide)) * wide).sum(dtype=torch.float64)))
