"""The gradients of LoRA's factors at an attention head, by chained low-rank products, beside the exact ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gnomon.adapters.lora_limits.attention import poly_attention
from gnomon.errors import MethodError

__all__ = ["LoraGradient", "approximate_lora_gradient"]

_NAMES = ("q", "k", "v")


@dataclass(frozen=True)
class LoraGradient:
    """Gradients of the factors, and how far they are from the exact ones.

    Attributes
    ----------
    grads : dict of str to (Tensor, Tensor)
        For each of ``"q"``, ``"k"``, ``"v"`` that has factors: (dA (r, in), dB (out, r)).
    output : Tensor (tokens, heads * width)
        The approximate attention output O.
    errors : dict of str to float
        Relative Frobenius error of ``"output"`` and of ``"q/A"``, ``"q/B"``, ...; empty where the exact gradients were
        not wanted.
    largest_errors : dict of str to float
        The same by the largest entry of the difference over the largest entry of the exact tensor, the norm of the
        theorems.
    """

    grads: dict[str, tuple[Tensor, Tensor]]
    output: Tensor
    errors: dict[str, float]
    largest_errors: dict[str, float]


def approximate_lora_gradient(
    x: Float[Tensor, "L model"],
    weights: Mapping[str, Float[Tensor, "out model"]],
    factors: Mapping[str, tuple[Float[Tensor, "r model"], Float[Tensor, "out r"]]],
    d_out: Float[Tensor, "L out"],
    *,
    degree: int = 2,
    scaling: float = 1.0,
    heads: int = 1,
    center: bool = True,
    causal: bool = False,
    chunk: int | None = None,
    exact: bool = True,
) -> LoraGradient:
    """Return the gradients of LoRA's factors with the polynomial in place of exp, and their measured errors.

    With Q = X (W_Q + s B_Q A_Q)^T and so on, and dQ of the attention head:
    dB_Q = s dQ^T X A_Q^T and dA_Q = s B_Q^T dQ^T X.

    Parameters
    ----------
    x : Tensor (tokens, model width)
        The input of the attention layer.
    weights : mapping
        ``"q"``, ``"k"``, ``"v"`` -> frozen weight (out, in) as torch stores it.
    factors : mapping
        Which of the three have LoRA -> (A (r, in), B (out, r)). ``"q"`` and ``"v"`` is the paper's partial case; with
        ``"k"`` the full one. Without ``"k"`` the sums that only dK needs are not made.
    d_out : Tensor (tokens, heads * width)
        The gradient of the loss with respect to the attention output.
    degree : int, default 2
        Even.
    scaling : float, default 1.0
        s = alpha / r.
    heads : int, default 1
        Into which the rows of the weights are divided. The rows of k and v may be fewer (grouped queries).
    center, causal, chunk
        As in `poly_attention`.
    exact : bool, default True
        Also compute the exact gradients (`scaled_dot_product_attention`, quadratic in the tokens) and the errors.

    Returns
    -------
    LoraGradient

    Raises
    ------
    MethodError
        When a weight is missing, names or shapes do not fit, or `poly_attention` refuses.

    Examples
    --------
    >>> g = torch.Generator().manual_seed(0)
    >>> x, w = torch.randn(32, 6, generator=g), {n: 0.3 * torch.randn(4, 6, generator=g) for n in "qkv"}
    >>> ab = {n: (torch.randn(2, 6, generator=g), 0.1 * torch.randn(4, 2, generator=g)) for n in "qv"}
    >>> found = approximate_lora_gradient(x, w, ab, torch.ones(32, 4), degree=10)
    >>> found.grads["q"][0].shape, found.errors["q/A"] < 1e-2
    (torch.Size([2, 6]), True)
    """
    _checked(x, weights, factors, d_out, heads)

    def run(attend: Any) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor]:
        leaves = {n: tuple(t.detach().requires_grad_() for t in pair) for n, pair in factors.items()}
        with torch.enable_grad():
            parts = [_projected(x.detach(), weights[n].detach(), leaves.get(n), scaling, d_out, heads) for n in _NAMES]
            out = attend(*parts)[0].transpose(0, 1).flatten(1)
            flat = [t for n in leaves for t in leaves[n]]
            grads = torch.autograd.grad(out, flat, d_out.to(out.dtype))
        pairs = {n: (grads[2 * i], grads[2 * i + 1]) for i, n in enumerate(leaves)}
        return pairs, out.detach()

    grads, output = run(
        lambda q, k, v: poly_attention(q, k, v, degree, center=center, causal=causal, chunk=chunk)
    )  # fmt: skip
    errors: dict[str, float] = {}
    largest: dict[str, float] = {}
    if exact:
        true_grads, true_output = run(lambda q, k, v: _sdpa(q, k, v, causal))
        compared = {"output": (output, true_output)}
        for n in grads:
            compared |= {f"{n}/{letter}": (grads[n][i], true_grads[n][i]) for i, letter in enumerate("AB")}
        errors = {name: _relative(a, b, 2) for name, (a, b) in compared.items()}
        largest = {name: _relative(a, b, torch.inf) for name, (a, b) in compared.items()}
    return LoraGradient(grads, output, errors, largest)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
    )


def _relative(found: Tensor, exact: Tensor, order: float) -> float:
    difference = float((found - exact).flatten().norm(order))
    return difference / float(exact.flatten().norm(order)) if difference else 0.0


def _projected(
    x: Tensor, weight: Tensor, pair: tuple[Tensor, ...] | None, scaling: float, d_out: Tensor, heads: int
) -> Tensor:
    """Return X (W + s B A)^T by heads, (1, heads, tokens, width)."""
    y = x @ weight.T
    if pair is not None:
        y = y + scaling * (x @ pair[0].T) @ pair[1].T
    width = d_out.shape[-1] // heads
    return y.unflatten(-1, (-1, width)).transpose(0, 1)[None]


def _checked(
    x: Tensor, weights: Mapping[str, Tensor], factors: Mapping[str, Any], d_out: Tensor, heads: int
) -> None:  # fmt: skip
    if set(weights) != set(_NAMES):
        raise MethodError(f"weights has {', '.join(sorted(weights)) or 'nothing'}; it needs the weights of q, k and v.")
    if not factors or not set(factors) <= set(_NAMES):
        raise MethodError(
            f"factors has {', '.join(sorted(factors)) or 'nothing'}; give (A, B) for one or more of q, k and v."
        )
    if x.dim() != 2 or d_out.dim() != 2 or len(x) != len(d_out):
        raise MethodError(
            f"x is {tuple(x.shape)} and d_out {tuple(d_out.shape)}: give (tokens, model width) and (tokens, heads * "
            "width) of the same tokens."
        )
    width, rest = divmod(d_out.shape[1], max(heads, 1))
    if heads < 1 or rest:
        raise MethodError(f"heads = {heads}: d_out has {d_out.shape[1]} columns, which {heads} heads cannot share.")
    for name in _NAMES:
        rows, columns = weights[name].shape
        full = heads * width
        if columns != x.shape[1] or (rows != full if name == "q" else rows % width or full % max(rows, 1)):
            raise MethodError(
                f"the weight of {name} is {(rows, columns)}: give (out, in) as torch stores it, with {x.shape[1]} "
                f"columns and {full} rows (k and v: a divisor of the heads times {width})."
            )
        if name in factors:
            a, b = factors[name]
            if a.dim() != 2 or b.dim() != 2 or a.shape[1] != columns or b.shape != (rows, a.shape[0]):
                raise MethodError(
                    f"the factors of {name} are A {tuple(a.shape)} and B {tuple(b.shape)}: give (r, {columns}) and "
                    f"({rows}, r)."
                )
