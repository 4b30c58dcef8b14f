"""The factors of LoRA-SB and LoRA-XS as plain functions of tensors.

Letters: W is m x n (out, in); B is m x r, R is r x r, A is r x n; the change of the weight is s B R A.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from gnomon.common.linalg import randomized_svd, svd
from gnomon.errors import MethodError

__all__ = [
    "Factors",
    "Sketch",
    "authors_factors",
    "captured",
    "first_update",
    "sketched_factors",
    "update_factors",
    "weight_factors",
]

SVD = Literal["auto", "exact", "randomized"]
SVDS: tuple[str, ...] = ("auto", "exact", "randomized")

_EXACT_BELOW = 512  # smaller side up to which "auto" decomposes exactly: a second on one core
_OVERSAMPLE, _ITERATIONS = 8, 4
_AUTHORS_SEED, _AUTHORS_ITERATIONS = 42, 10


class Factors(NamedTuple):
    """A (r, n), B (m, r) and R (r, r) of one layer."""

    A: Tensor
    B: Tensor
    R: Tensor


def first_update(gradient: Float[Tensor, "m n"], eta: float) -> Float[Tensor, "m n"]:
    """Return what the first step of AdamW adds to a weight, - eta sign(g), with sign(0) = 0.

    Parameters
    ----------
    gradient : Tensor (m, n)
    eta : float
        The learning rate of that step.

    Examples
    --------
    >>> first_update(torch.tensor([[3.0, 0.0, -0.1]]), 0.5)
    tensor([[-0.5000, -0.0000,  0.5000]])
    """
    return -eta * gradient.sign()


def update_factors(
    update: Float[Tensor, "m n"],
    rank: int,
    *,
    scaling: float = 1.0,
    method: SVD = "auto",
    generator: torch.Generator | None = None,
) -> Factors:
    """Return the best approximation of an update by s B R A: its leading singular triplets, A and B orthonormal.

    Parameters
    ----------
    update : Tensor (m, n)
    rank : int
        At most min(m, n).
    scaling : float, default 1.0
        s; R is diag(sigma) / s.
    method : {"auto", "exact", "randomized"}, default "auto"
        Exact SVD, or randomised with 8 extra vectors and 4 power iterations; "auto" is exact where the smaller side
        is at most 512.
    generator : torch.Generator, optional
        Of the randomised SVD; default a private one seeded with 0.

    Returns
    -------
    Factors
        float32, or float64 for float64.

    Examples
    --------
    >>> A, B, R = update_factors(torch.eye(3), 3, scaling=2.0)
    >>> bool(torch.allclose(2.0 * B @ R @ A, torch.eye(3)))
    True
    """
    U, S, Vh = _leading(update, rank, method, generator)
    return Factors(Vh, U, torch.diag(S) / scaling)


def authors_factors(update: Float[Tensor, "m n"], rank: int, *, scaling: float = 1.0) -> Factors:
    """Return the factors as the authors' code computes them.

    `torch.svd_lowrank` of the transposed update with 10 iterations and no further vectors, seeded with 42 after one
    draw that is thrown away; factors and singular values are rounded to bfloat16. Equal to the bit but for entries
    that float32 puts on either side of a rounding. The global generator is restored.

    Parameters
    ----------
    update : Tensor (m, n)
    rank : int
    scaling : float, default 1.0

    Returns
    -------
    Factors
        bfloat16 values in the dtype of the update.
    """
    rows, _ = update.shape
    devices = [update.device] if update.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(_AUTHORS_SEED)
        torch.randn(rows, rank, device=update.device)
        V, S, U = torch.svd_lowrank(update.T.float(), q=rank, niter=_AUTHORS_ITERATIONS)
    A, B, sigma = (x.contiguous().bfloat16().to(update.dtype) for x in (V.T, U, S))
    return Factors(A, B, torch.diag(sigma) / scaling)


def weight_factors(
    weight: Float[Tensor, "m n"],
    rank: int,
    *,
    method: SVD = "auto",
    generator: torch.Generator | None = None,
) -> tuple[Float[Tensor, "r n"], Float[Tensor, "m r"]]:
    """Return LoRA-XS's factors of a weight: A = V_r^T and B = U_r S_r of its singular value decomposition.

    Parameters
    ----------
    weight : Tensor (m, n)
    rank, method, generator
        As in `update_factors`.

    Examples
    --------
    >>> A, B = weight_factors(torch.diag(torch.tensor([1.0, 3.0])), 1)
    >>> (B @ A).tolist()
    [[0.0, 0.0], [0.0, 3.0]]
    """
    U, S, Vh = _leading(weight, rank, method, generator)
    return Vh, U * S


def captured(update: Float[Tensor, "m n"], factors: Factors, scaling: float = 1.0) -> float:
    """Return the share of an update's energy that s B R A takes over, 1 - ||dW - s B R A||^2 / ||dW||^2."""
    total = float(update.square().sum())
    if not total:
        return 1.0
    rest = update.to(factors.R.dtype) - scaling * (factors.B @ factors.R @ factors.A)
    return 1.0 - float(rest.square().sum()) / total


def _leading(
    matrix: Tensor, rank: int, method: str, generator: torch.Generator | None
) -> tuple[Tensor, Tensor, Tensor]:
    if not 1 <= rank <= min(matrix.shape):
        raise MethodError(
            f"r = {rank} for a weight of {matrix.shape[0]} x {matrix.shape[1]}. Allowed: 1 to {min(matrix.shape)}, its "
            "smaller side."
        )
    if method not in SVDS:
        raise MethodError(f"svd = {method!r}. Allowed: {', '.join(map(repr, SVDS))}.")
    if method == "exact":
        return svd(matrix, rank)
    return randomized_svd(
        matrix,
        rank,
        oversample=_OVERSAMPLE,
        power_iterations=_ITERATIONS,
        generator=generator,
        exact_below=_EXACT_BELOW if method == "auto" else None,
    )


@dataclass(frozen=True, eq=False)
class Sketch:
    """k orthonormal rows in a space of `size` dimensions that follow from a seed; every coordinate lies in one row.

    Row h has the entries sign_j / sqrt(c_h) at the c_h coordinates j with bucket_j = h. Vectors in their span are
    stored by one number for each row.

    Parameters
    ----------
    bucket : Tensor (size,), int64
    sign : Tensor (size,), float32
        1 or -1.

    Examples
    --------
    >>> sketch = Sketch.make(6, 2, seed=0)
    >>> S = sketch.rows()
    >>> torch.allclose(S @ S.T, torch.eye(2))
    True
    """

    bucket: Int64[Tensor, " size"]
    sign: Float[Tensor, " size"]

    @classmethod
    def make(cls, size: int, k: int, seed: int) -> Sketch:
        """Return the sketch of a seed, on the CPU; k above `size` counts as `size`.

        The numbers come from numpy's legacy Mersenne Twister, whose stream is frozen for good.
        """
        state = np.random.RandomState(seed & 0xFFFFFFFF)  # the seeded stream, not numpy's global state
        bucket = torch.from_numpy(state.permutation(size).astype(np.int64)) % min(k, size)
        sign = torch.from_numpy(state.randint(0, 2, size).astype(np.float32)) * 2 - 1
        return cls(bucket, sign)

    @property
    def k(self) -> int:
        """Rows."""
        return int(self.bucket.max()) + 1

    def _counts(self) -> Tensor:
        return torch.bincount(self.bucket, minlength=self.k).to(self.sign.dtype)

    def rows(self) -> Float[Tensor, "k size"]:
        """Return the orthonormal rows as a dense matrix."""
        dense = torch.zeros(self.k, len(self.bucket), device=self.sign.device)
        dense[self.bucket, torch.arange(len(self.bucket), device=self.sign.device)] = self.sign
        return dense / self._counts().sqrt()[:, None]

    def project(self, x: Float[Tensor, "size d"]) -> Float[Tensor, "k d"]:
        """Return S x."""
        summed = x.new_zeros(self.k, x.shape[1]).index_add_(0, self.bucket, self.sign.to(x)[:, None] * x)
        return summed / self._counts().to(x).sqrt()[:, None]

    def lift(self, y: Float[Tensor, "k d"]) -> Float[Tensor, "size d"]:
        """Return S^T y."""
        return self.expand(y / self._counts().to(y).sqrt()[:, None])

    def expand(self, values: Float[Tensor, "k d"]) -> Float[Tensor, "size d"]:
        """Return the vectors whose stored values these are."""
        return self.sign.to(values)[:, None] * values[self.bucket]

    def pick(self, x: Float[Tensor, "size d"]) -> Float[Tensor, "k d"]:
        """Return the values to store of vectors in the span; `expand` gives the vectors back to the bit."""
        order = torch.argsort(self.bucket, stable=True)
        counts = torch.bincount(self.bucket, minlength=self.k)
        first = order[counts.cumsum(0) - counts]
        return self.sign.to(x)[first, None] * x[first]

    def to(self, device: torch.device | str) -> Sketch:
        """Return the sketch on another device."""
        return Sketch(self.bucket.to(device), self.sign.to(device))


def sketched_factors(
    update: Float[Tensor, "m n"], rank: int, rows: Sketch, columns: Sketch, *, scaling: float = 1.0
) -> Factors:
    """Return the best approximation of an update by factors in the span of two sketches.

    Parameters
    ----------
    update : Tensor (m, n)
    rank : int
        At most the k of either sketch.
    rows, columns : Sketch
        Of m and of n dimensions.
    scaling : float, default 1.0
    """
    core = columns.project(rows.project(update).T).T
    A, B, R = update_factors(core, rank, scaling=scaling, method="auto")
    return Factors(columns.lift(A.T).T.contiguous(), rows.lift(B), R)


def derive_seed(seed: int, *parts: object) -> int:
    """Return 63 bits of the SHA-256 of ``"seed/part/part..."``: a stream of its own for every module."""
    text = "/".join(str(part) for part in (seed, *parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
