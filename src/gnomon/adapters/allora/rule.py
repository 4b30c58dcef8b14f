"""ALLoRA's rule on tensors: how far a row of B A has grown decides how strongly its gradient is taken."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from gnomon.common.lora import product_row_norms
from gnomon.errors import MethodError

__all__ = ["allora_linear", "check_eta", "row_scales"]


def check_eta(eta: float) -> float:
    """Return eta as a float.

    Raises
    ------
    MethodError
        When it is not a finite number above 0.
    """
    if isinstance(eta, bool) or not isinstance(eta, (int, float)) or not 0 < eta < float("inf"):
        raise MethodError(
            f"eta = {eta!r}: a finite number above 0. Take lora_alpha / r of the LoRA that is replaced, such as 2.0."
        )
    return float(eta)


def row_scales(b: Float[Tensor, "out r"], a: Float[Tensor, "r in"], eta: float) -> Float[Tensor, " out"]:
    """Return s_i = 1 / sqrt(||(B A)_i|| + 1 / eta^2) of every row, without forming B A.

    Parameters
    ----------
    b, a : Tensor (out, r), (r, in)
        Any floating dtype; the norms are taken in float32 (float64 where a factor is), also under autocast.
    eta : float
        Above 0: the scale of a row that is zero, and the largest.

    Returns
    -------
    Tensor (out,)
        float32, or float64; a constant for autograd. A row whose terms cancel has a norm off by up to
        sqrt(eps) ||B_i|| ||A||.

    Examples
    --------
    >>> row_scales(torch.tensor([[0.0], [15.75]]), torch.tensor([[0.6, 0.8]]), eta=2.0)
    tensor([2.0000, 0.2500])
    """
    device = b.device.type
    with torch.no_grad():
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                norms = product_row_norms(b, a)
        else:
            norms = product_row_norms(b, a)
        return eta * norms.mul(eta * eta).add(1.0).rsqrt()  # this form is exactly eta where the norm is zero


class _Rule(torch.autograd.Function):
    """(B A x, A x): the gradients of A and B are those of the rescaled output gradient, that of x is LoRA's."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, a: Tensor, b: Tensor, eta: float) -> tuple[Tensor, Tensor]:
        hidden = linear(x, a.to(x.dtype))
        return linear(hidden, b.to(x.dtype)), hidden

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, a, b, ctx.eta = inputs
        hidden = output[1]
        ctx.mark_non_differentiable(hidden)
        ctx.save_for_backward(x, a, b, hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_output: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, hidden = ctx.saved_tensors
        for_x, for_a, for_b, _eta = ctx.needs_input_grad
        dtype = of_output.dtype
        flat = of_output.reshape(-1, of_output.shape[-1])
        scales = row_scales(b, a, ctx.eta).unsqueeze(1)
        dx = da = db = None
        # The small factor is scaled, not the gradient of the output: no (tokens x out) tensor is made. What goes to
        # x and what goes to A differ in that scale only, so one product over the tokens serves both.
        towards = [b.to(dtype)] if for_x else []
        if for_a:
            towards.append((scales * b).to(dtype))
        if towards:
            of_hidden = (flat @ torch.cat(towards, dim=1)).split(b.shape[1], dim=1)
            if for_x:
                dx = (of_hidden[0] @ a.to(dtype)).reshape(x.shape)
            if for_a:
                da = (of_hidden[-1].T @ x.reshape(-1, x.shape[-1])).to(a.dtype)
        if for_b:
            db = (scales * (flat.T @ hidden.reshape(-1, hidden.shape[-1]))).to(b.dtype)
        return dx, da, db, None


def allora_linear(
    x: Float[Tensor, "... in"], a: Float[Tensor, "r in"], b: Float[Tensor, "out r"], eta: float
) -> Float[Tensor, "... out"]:
    """Return B A x, with ALLoRA's rule for the gradients of A and B.

    With G = dL/d(B A), that is the sum over the tokens of (gradient of the output) x^T, and s from `row_scales`:
    dA = B^T diag(s) G, dB = diag(s) G A^T, dx as without the rule. What A and B receive is therefore no gradient of the
    output: `torch.autograd.gradcheck` fails for them, and passes for x. s is computed from A and B as they are.

    Parameters
    ----------
    x : Tensor (..., in)
        Under autocast it is cast as in `torch.nn.functional.linear`.
    a, b : Tensor (r, in), (out, r)
        May be wider than x; their gradients come in their own dtypes.
    eta : float
        Above 0.

    Returns
    -------
    Tensor (..., out)
        Bit-equal to ``linear(linear(x, a), b)``. It can be differentiated once.

    Examples
    --------
    >>> a, b = torch.ones(1, 2, requires_grad=True), torch.zeros(3, 1, requires_grad=True)
    >>> allora_linear(torch.tensor([1.0, 2.0]), a, b, eta=4.0).sum().backward()
    >>> b.grad.flatten()
    tensor([12., 12., 12.])
    """
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
    out: Tensor = _Rule.apply(x, a, b, eta)[0]
    return out
