"""Linear algebra that several methods share: exact and randomised SVD, whitening, projections.

Decompositions run in float32 at least (float64 stays float64), whatever the dtype of the input. Random test
matrices come from a generator of the call's own, so no call touches torch's global random state.

Signs: an SVD fixes its vectors only up to a common sign of each pair. `fix_signs` settles it (the entry of
largest magnitude of every left vector is positive), which makes results equal across LAPACK builds, devices
and ranks.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from gnomon.errors import MethodError

__all__ = ["dominant_basis", "fix_signs", "project_out", "randomized_svd", "svd", "whitening"]

_OVERSAMPLE = 8
_NOT_FINITE = (
    "{what} of shape {shape} holds NaN or infinite entries, so it cannot be decomposed. "
    "Find the step or the input that produced them."
)


def _working_copy(a: Tensor, what: str = "a", *, check: bool = True) -> Tensor:
    """Return `a` in float32 or float64 after checking that it is a finite real matrix."""
    if a.ndim != 2:
        raise MethodError(f"{what} has the shape {tuple(a.shape)}; a matrix with 2 dimensions is needed.")
    if not a.is_floating_point():
        raise MethodError(f"{what} has the dtype {a.dtype}; a real floating dtype is needed. Convert it first.")
    work = a if a.dtype in (torch.float32, torch.float64) else a.float()
    if check and not bool(torch.isfinite(work).all()):
        raise MethodError(_NOT_FINITE.format(what=what, shape=tuple(a.shape)))
    return work


def _checked_rank(rank: int | None, limit: int) -> int:
    if rank is None:
        return limit
    if rank <= 0:
        raise MethodError(f"rank = {rank}; it must be at least 1.")
    return min(int(rank), limit)


def fix_signs(U: Float[Tensor, "m k"], Vh: Float[Tensor, "k n"]) -> tuple[Float[Tensor, "m k"], Float[Tensor, "k n"]]:
    """Return the pair with signs chosen so that each left vector's entry of largest magnitude is positive.

    Parameters
    ----------
    U : Tensor of shape (m, k)
        Left singular vectors as columns.
    Vh : Tensor of shape (k, n)
        Right singular vectors as rows.

    Returns
    -------
    U, Vh : Tensors of the same shapes
        ``U @ diag(S) @ Vh`` is unchanged.

    Examples
    --------
    >>> U, Vh = fix_signs(torch.tensor([[-2.0], [1.0]]), torch.tensor([[3.0]]))
    >>> U.flatten().tolist(), Vh.flatten().tolist()
    ([2.0, -1.0], [-3.0])
    """
    largest = U.abs().argmax(dim=0, keepdim=True)
    signs = torch.where(U.gather(0, largest) < 0, -1.0, 1.0).to(U.dtype)
    return U * signs, Vh * signs.T.to(Vh.dtype)


def svd(
    a: Float[Tensor, "m n"], rank: int | None = None
) -> tuple[Float[Tensor, "m k"], Float[Tensor, " k"], Float[Tensor, "k n"]]:
    """Exact thin SVD in float32 or float64 with settled signs.

    Parameters
    ----------
    a : Tensor of shape (m, n)
        Any real floating dtype; half precision is decomposed in float32.
    rank : int, optional
        Keep this many leading triplets; a larger value than min(m, n) keeps all. Default: all.

    Returns
    -------
    U : Tensor of shape (m, k)
    S : Tensor of shape (k,), falling
    Vh : Tensor of shape (k, n)
        In float32, or float64 for a float64 input; contiguous, so that keeping one does not keep the rest.

    Raises
    ------
    MethodError
        When `a` is no matrix of real floating numbers, is not finite, or the rank is below 1.

    Examples
    --------
    >>> U, S, Vh = svd(torch.diag(torch.tensor([1.0, 3.0])), rank=1)
    >>> S.tolist(), U.flatten().tolist()
    ([3.0], [0.0, 1.0])
    """
    work = _working_copy(a)
    rank = _checked_rank(rank, min(a.shape))
    U, S, Vh = torch.linalg.svd(work, full_matrices=False)
    U, Vh = fix_signs(U[:, :rank], Vh[:rank])
    return U.contiguous(), S[:rank].clone(), Vh.contiguous()


def _private_generator(generator: torch.Generator | None) -> torch.Generator:
    return torch.Generator().manual_seed(0) if generator is None else generator


def _gaussian(rows: int, columns: int, like: Tensor, generator: torch.Generator) -> Tensor:
    """Draw on the generator's own device, so that one seed gives one matrix on every device."""
    drawn = torch.randn(rows, columns, generator=generator, device=generator.device, dtype=torch.float32)
    return drawn.to(device=like.device, dtype=like.dtype)


def randomized_svd(
    a: Float[Tensor, "m n"],
    rank: int,
    *,
    oversample: int = _OVERSAMPLE,
    power_iterations: int = 2,
    generator: torch.Generator | None = None,
    exact_below: int | None = None,
) -> tuple[Float[Tensor, "m r"], Float[Tensor, " r"], Float[Tensor, "r n"]]:
    """Leading singular triplets by a randomised range finder (Halko, Martinsson, Tropp 2011, algorithm 5.1).

    Every half step of the power iteration is re-orthonormalised by QR, so that small singular values survive.

    Parameters
    ----------
    a : Tensor of shape (m, n)
        Any real floating dtype; half precision is decomposed in float32.
    rank : int
        Number of triplets; a larger value than min(m, n) gives all.
    oversample : int, default 8
        Extra test vectors.
    power_iterations : int, default 2
        Passes of A A^T; more for a slowly falling spectrum.
    generator : torch.Generator, optional
        Draws the test matrix. Default: a private one seeded with 0, so equal calls give equal results.
    exact_below : int, optional
        Use the exact SVD when min(m, n) is at most this.

    Returns
    -------
    U : Tensor of shape (m, r)
    S : Tensor of shape (r,)
    Vh : Tensor of shape (r, n)
        In float32, or float64 for a float64 input, with the signs of `fix_signs`. The exact SVD is taken
        where ``rank + oversample >= min(m, n)``.

    Raises
    ------
    MethodError
        When `a` is no finite real matrix, or rank, oversample or power_iterations are out of range.

    Examples
    --------
    >>> low = torch.outer(torch.arange(1.0, 41.0), torch.arange(1.0, 31.0))
    >>> U, S, Vh = randomized_svd(low, 1)
    >>> bool(torch.allclose(U * S @ Vh, low, rtol=1e-4))
    True
    """
    if oversample < 0 or power_iterations < 0:
        raise MethodError(f"oversample = {oversample}, power_iterations = {power_iterations}; both must be 0 or more.")
    small = min(a.shape) if a.ndim == 2 else 0
    rank = _checked_rank(rank, max(small, 1))
    if rank + oversample >= small or (exact_below is not None and small <= exact_below):
        return svd(a, rank)
    work = _working_copy(a)
    sample = _gaussian(a.shape[1], rank + oversample, work, _private_generator(generator))
    Q = torch.linalg.qr(work @ sample).Q
    for _ in range(power_iterations):
        Z = torch.linalg.qr(work.T @ Q).Q
        Q = torch.linalg.qr(work @ Z).Q
    # A^T Q = Z C, so Q^T A = C^T Z^T and only a small matrix is left to decompose
    Z, C = torch.linalg.qr(work.T @ Q)
    inner_U, S, inner_Vh = torch.linalg.svd(C.T)
    U, Vh = fix_signs(Q @ inner_U[:, :rank], inner_Vh[:rank] @ Z.T)
    return U, S[:rank].clone(), Vh


def dominant_basis(
    a: Float[Tensor, "d n"],
    rank: int,
    *,
    start: Float[Tensor, "d p"] | None = None,
    oversample: int = _OVERSAMPLE,
    power_iterations: int | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "d r"]:
    """Approximate the leading left singular vectors of `a`, warm-started from an earlier basis.

    Block power iteration on A A^T, closed by a shifted Nystroem step (Tropp et al., 2017) in place of
    Rayleigh-Ritz: the sketch S gives A A^T ~ Y C^-1 Y^T with Y = A (A^T S) and C = S^T Y, whose eigenvectors
    cost one QR of Y. That is two products with A an iteration and nothing else of A's size.

    Parameters
    ----------
    a : Tensor of shape (d, n)
        Any real floating dtype; half precision is worked on in float32.
    rank : int
        Number of vectors.
    start : Tensor of shape (d, p), optional
        Orthonormal columns close to the answer, such as the basis of an earlier step.
    oversample : int, default 8
        Random directions added to the sketch; they find what the start does not contain.
    power_iterations : int, optional
        Products with A A^T. Default: 1 with a `start`, 3 without.
    generator : torch.Generator, optional
        Draws the random directions. Default: a private one seeded with 0.

    Returns
    -------
    Tensor of shape (d, min(rank, d, n))
        Orthonormal columns, leading vector first; float32 or float64. Each vector's sign is that of the same
        column of `start`, or as in `fix_signs` without one. The exact SVD is taken where
        ``rank + oversample >= min(d, n)`` or the sketch has lost its rank.

    Raises
    ------
    MethodError
        When `a` is no finite real matrix or the rank is below 1.

    Examples
    --------
    >>> a = torch.outer(torch.arange(1.0, 41.0), torch.ones(30))
    >>> basis = dominant_basis(a, 1)
    >>> bool(torch.allclose(basis, svd(a, 1)[0], atol=1e-5))
    True
    """
    work = _working_copy(a, check=False)
    rank = _checked_rank(rank, min(a.shape))
    basis = None
    if rank + oversample < min(a.shape):
        sketch = _starting_sketch(work, rank, oversample, start, _private_generator(generator))
        if power_iterations is None:
            power_iterations = 3 if start is None else 1
        for _ in range(power_iterations - 1):
            sketch = torch.linalg.qr(work @ (work.T @ sketch)).Q
        basis = _nystroem_basis(work, sketch, rank)
    if basis is None:
        basis = svd(work, rank)[0]
    if start is None or start.shape[1] < rank:
        return fix_signs(basis, basis.T)[0]
    agrees = (basis * start[:, :rank].to(basis)).sum(dim=0) >= 0
    return basis * torch.where(agrees, 1.0, -1.0).to(basis)


def _starting_sketch(a: Tensor, rank: int, oversample: int, start: Tensor | None, generator: torch.Generator) -> Tensor:
    """Return unit columns: the start, filled up with random directions outside it (nearly orthogonal)."""
    if start is None:
        return torch.linalg.qr(_gaussian(a.shape[0], rank + oversample, a, generator)).Q
    known = start[:, :rank].to(a)
    fresh = _gaussian(a.shape[0], rank + oversample - known.shape[1], a, generator)
    fresh -= known @ (known.T @ fresh)
    return torch.cat([known, fresh / fresh.norm(dim=0)], dim=1)


def _nystroem_basis(a: Tensor, sketch: Tensor, rank: int) -> Tensor | None:
    """Return the leading eigenvectors of the Nystroem approximation of A A^T, or None if it breaks down."""
    Y = a @ (a.T @ sketch)
    size = float(Y.norm())
    if not math.isfinite(size):
        raise MethodError(_NOT_FINITE.format(what="a", shape=tuple(a.shape)))
    # the shift keeps C positive definite under rounding; it moves eigenvalues, not eigenvectors
    shift = size * a.shape[0] ** 0.5 * torch.finfo(a.dtype).eps
    Y.add_(sketch, alpha=shift)
    C = (sketch.T @ Y).double()
    C = (C + C.T) / 2
    L, failed = torch.linalg.cholesky_ex(C)
    if bool(failed):
        return None
    Q, R = torch.linalg.qr(Y)
    K = torch.linalg.solve_triangular(L.to(R.dtype), R.T, upper=False)
    vectors = torch.linalg.eigh(K.T @ K).eigenvectors
    return Q @ vectors[:, -rank:].flip(1)


def whitening(
    gram: Float[Tensor, "n n"], *, cutoff: float | None = None
) -> tuple[Float[Tensor, "n k"], Float[Tensor, "k n"]]:
    """Factor a Gram matrix, M M^T = gram, and give the pseudo-inverse of the factor, in float64.

    Eigenvalues at or below the cutoff are dropped: directions that were never seen stay out of both factors,
    so both are finite for a singular Gram matrix.

    Parameters
    ----------
    gram : Tensor of shape (n, n)
        Symmetric, positive semi-definite up to rounding, such as X^T X.
    cutoff : float, optional
        Absolute. Default: ``lambda_max * min(1, n * eps of float32)``.

    Returns
    -------
    M : Tensor of shape (n, k)
        Q_k Lambda_k^(1/2), float64, largest eigenvalue first.
    M_pinv : Tensor of shape (k, n)
        Lambda_k^(-1/2) Q_k^T, float64; ``M_pinv @ M`` is the identity of size k.

    Raises
    ------
    MethodError
        When `gram` is not square and finite, or has no eigenvalue above the cutoff.

    Examples
    --------
    >>> M, M_pinv = whitening(torch.diag(torch.tensor([4.0, 0.0])))
    >>> M.tolist(), M_pinv.tolist()
    ([[2.0], [0.0]], [[0.5, 0.0]])
    """
    work = _working_copy(gram, "gram").double()
    if gram.shape[0] != gram.shape[1]:
        raise MethodError(f"gram has the shape {tuple(gram.shape)}; a Gram matrix is square (in x in).")
    values, vectors = torch.linalg.eigh((work + work.T) / 2)
    values, vectors = values.flip(0), vectors.flip(1)
    if cutoff is None:
        cutoff = float(values[0]) * min(1.0, gram.shape[0] * torch.finfo(torch.float32).eps)
    kept = int((values > max(cutoff, 0.0)).sum())
    if kept == 0:
        raise MethodError(
            f"No eigenvalue of gram is above {cutoff:g} (the largest is {float(values[0]):g}). "
            "The inputs it was summed from are all zero; use other calibration data."
        )
    vectors, _ = fix_signs(vectors[:, :kept], vectors[:, :kept].T)
    root = values[:kept].sqrt()
    return vectors * root, (vectors / root).T.contiguous()


def project_out(x: Float[Tensor, "... d"], basis: Float[Tensor, "d k"]) -> Float[Tensor, "... d"]:
    """Remove from `x` its component in the span of the columns of `basis`.

    Parameters
    ----------
    x : Tensor of shape (..., d)
    basis : Tensor of shape (d, k) or (d,)
        Need not be orthonormal nor of full rank.

    Returns
    -------
    Tensor of shape (..., d)
        In the dtype of `x`; its inner product with every column of `basis` is zero.

    Raises
    ------
    MethodError
        When the sizes do not fit or `basis` is not finite.

    Examples
    --------
    >>> project_out(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 5.0])).tolist()
    [1.0, 0.0]
    """
    columns = basis[:, None] if basis.ndim == 1 else basis
    if x.shape[-1] != columns.shape[0]:
        raise MethodError(f"x has {x.shape[-1]} features and basis {columns.shape[0]}; they must be equal.")
    work = _working_copy(columns, "basis")
    U, S, _ = torch.linalg.svd(work, full_matrices=False)
    negligible = S[:1] * max(work.shape) * torch.finfo(work.dtype).eps
    Q = U[:, negligible < S]
    wide = x.to(torch.promote_types(x.dtype, Q.dtype))
    Q = Q.to(wide.dtype)
    return (wide - (wide @ Q) @ Q.T).to(x.dtype)
