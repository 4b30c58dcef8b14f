"""The error of the polynomial in one head, measured against exact attention, degree by degree.

Whether features would be affordable does not matter here: the weights T_g(q . k) / sum are made densely, so the error
of any degree is known at the cost of exact attention, also for heads whose features would not fit any memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

__all__ = ["HeadScores", "Quadruple", "attention_gradients", "head_scores", "polynomial_gradients", "relative_errors"]

Quadruple = tuple[Tensor, Tensor, Tensor, Tensor]
_ENTRIES = 1 << 24  # entries of the score matrices worked on together


@dataclass(frozen=True)
class HeadScores:
    """What the scores and the polynomial do in each of n heads.

    Attributes
    ----------
    largest : Tensor (n,)
        max |q . k| over the pairs that a query sees.
    centred : Tensor (n,)
        The same after the keys' mean was subtracted: z*.
    output, gradient : Tensor (degrees, n)
        Relative Frobenius error of O, and the largest of those of dQ, dK and dV.
    """

    largest: Tensor
    centred: Tensor
    output: Tensor
    gradient: Tensor


def attention_gradients(
    q: Float[Tensor, "n L d"], k: Float[Tensor, "n L d"], v: Float[Tensor, "n L e"], d_out: Float[Tensor, "n L e"],
    *, causal: bool = False, scale: float = 1.0,
) -> Quadruple:  # fmt: skip
    """Return O, dQ, dK, dV of exact attention, by `scaled_dot_product_attention` and its backward pass.

    Parameters
    ----------
    q, k, v, d_out : Tensor (n, tokens, width)
    causal : bool, default False
    scale : float, default 1.0
    """
    a, b, c = (x.detach()[None].requires_grad_() for x in (q, k, v))
    with torch.enable_grad(), torch.autocast(q.device.type, enabled=False):
        out = scaled_dot_product_attention(a, b, c, is_causal=causal, scale=scale)
        grads = torch.autograd.grad(out, (a, b, c), d_out[None])
    return out.detach()[0], grads[0][0], grads[1][0], grads[2][0]


def _gradients_of(weights: Tensor, q: Tensor, k: Tensor, v: Tensor, d_out: Tensor) -> Quadruple:
    """Return O, dQ, dK, dV for given attention weights P (rows add up to 1)."""
    out = weights @ v
    rho = (d_out * out).sum(-1, keepdim=True)
    scores = weights * (d_out @ v.transpose(-1, -2) - rho)
    return out, scores @ k, scores.transpose(-1, -2) @ q, weights.transpose(-1, -2) @ d_out


def _taylor(scores: Tensor, degrees: Sequence[int], causal: bool) -> Iterator[Tensor]:
    """Yield the rows of T_g(scores), normalised, for growing degrees g."""
    hidden = torch.ones_like(scores[0], dtype=torch.bool).triu(1) if causal else None
    term, total = torch.ones_like(scores), torch.ones_like(scores)
    for j in range(1, max(degrees) + 1):
        term = term * scores / j
        total = total + term
        if j in degrees:
            seen = total if hidden is None else total.masked_fill(hidden, 0.0)
            yield seen / seen.sum(-1, keepdim=True)


def polynomial_gradients(
    q: Float[Tensor, "n L d"], k: Float[Tensor, "n L d"], v: Float[Tensor, "n L e"], d_out: Float[Tensor, "n L e"],
    degree: int, *, causal: bool = False,
) -> Quadruple:  # fmt: skip
    """Return O, dQ, dK, dV with the Taylor polynomial as weights, with L x L matrices: what features only speed up.

    Parameters
    ----------
    q, k, v, d_out : Tensor (n, tokens, width)
        q and k scaled, and k centred where wanted.
    degree : int
    causal : bool, default False
        The polynomial everywhere (`poly_attention` has exp inside its chunks).
    """
    weights = next(_taylor(q @ k.transpose(-1, -2), [degree], causal))
    return _gradients_of(weights, q, k, v, d_out)


def relative_errors(found: Sequence[Tensor], exact: Sequence[Tensor]) -> Float[Tensor, "m n"]:
    """Return ||found - exact|| / ||exact|| of each pair of (n, L, d) tensors and each of the n heads.

    Where the exact tensor is zero the error is 0 if the found one is zero as well, else infinite.
    """
    rows = []
    for a, b in zip(found, exact, strict=True):
        difference, size = (a - b).flatten(1).norm(dim=1), b.flatten(1).norm(dim=1)
        rows.append(torch.where(difference == 0, 0.0, difference / size))
    return torch.stack(rows)


def head_scores(
    q: Float[Tensor, "n L d"], k: Float[Tensor, "n L d"], v: Float[Tensor, "n L e"], degrees: Sequence[int],
    *, causal: bool = False, seed: int = 0,
) -> HeadScores:  # fmt: skip
    """Measure the scores of n heads, and the polynomials of several degrees against exact attention.

    Parameters
    ----------
    q, k, v : Tensor (n, tokens, width)
        One sequence; q and k scaled. float32 or float64.
    degrees : sequence of int
        Growing.
    causal : bool, default False
    seed : int, default 0
        Of the upstream gradient dO, standard normal, the same for every head.

    Returns
    -------
    HeadScores
    """
    tokens = q.shape[1]
    d_out = torch.randn(v.shape[1:], generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(v)
    size = max(1, _ENTRIES // tokens**2)
    found = [
        _group_scores(q[i : i + size], k[i : i + size], v[i : i + size], d_out, degrees, causal)
        for i in range(0, len(q), size)
    ]
    largest, centred, output, gradient = (torch.cat([part[i] for part in found], dim=-1) for i in range(4))
    return HeadScores(largest, centred, output, gradient)


def _group_scores(
    q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, degrees: Sequence[int], causal: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_out = d_out.expand_as(v)
    middle = k - k.mean(1, keepdim=True)
    exact = attention_gradients(q, middle, v, d_out, causal=causal)
    largest, scores = (q @ x.transpose(-1, -2) for x in (k, middle))
    if causal:
        largest, scores = largest.tril(), scores.tril()
    errors = [
        relative_errors(_gradients_of(weights, q, middle, v, d_out), exact)
        for weights in _taylor(scores, degrees, causal)
    ]
    return (
        largest.abs().amax((1, 2)),
        scores.abs().amax((1, 2)),
        torch.stack([part[0] for part in errors]),
        torch.stack([part[1:].amax(0) for part in errors]),
    )
