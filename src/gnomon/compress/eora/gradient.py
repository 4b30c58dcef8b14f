"""The baseline by descent: A and B of one layer fitted to its calibration inputs, a random sequence per step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from gnomon.errors import MethodError

__all__ = ["gradient_fit"]


def gradient_fit(
    delta: Float[Tensor, "out in"],
    inputs: Sequence[Float[Tensor, "tokens in"]],
    rank: int,
    *,
    steps: int = 3000,
    lr: float = 5e-4,
    generator: torch.Generator | None = None,
) -> tuple[Float[Tensor, "r in"], Float[Tensor, "out r"]]:
    """Fit a layer's adapter by AdamW: what EoRA's closed form is measured against.

    Each step draws one sequence and descends the mean squared error of (delta - B A) x over its tokens, with a
    cosine schedule to zero; B starts at zero, A from a Xavier-uniform draw.

    Parameters
    ----------
    delta : Tensor of shape (out, in)
        W - W_compressed.
    inputs : sequence of tensors (tokens, in)
        The layer's inputs, one tensor for each calibration sequence.
    rank : int
        r, from 1 to min(out, in).
    steps : int, default 3000
    lr : float, default 5e-4
    generator : torch.Generator, optional
        Draws A and the sequences; default a private one seeded with 0.

    Returns
    -------
    A : Tensor of shape (r, in)
    B : Tensor of shape (out, r)

    Raises
    ------
    MethodError
        When there are no inputs, or the rank or the number of steps is out of range.

    Examples
    --------
    >>> A, B = gradient_fit(torch.ones(4, 6), [torch.eye(6)], rank=1, steps=300, lr=0.05)
    >>> bool(torch.allclose(B @ A, torch.ones(4, 6), atol=1e-2))
    True
    """
    if not inputs or not 1 <= rank <= min(delta.shape) or steps < 1:
        raise MethodError(
            f"gradient_fit got {len(inputs)} sequences, rank = {rank}, steps = {steps} for a layer of shape "
            f"{tuple(delta.shape)}. At least one sequence and one step, and 1 <= rank <= min(out, in), are needed."
        )
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    target = delta.detach() if delta.dtype == torch.float64 else delta.detach().float()
    out_features, in_features = target.shape
    bound = math.sqrt(6 / (in_features + rank))
    drawn = torch.rand(rank, in_features, generator=generator, device=generator.device) * 2 - 1
    A = (drawn.to(target) * bound).requires_grad_(True)
    B = target.new_zeros(out_features, rank).requires_grad_(True)
    optimizer = torch.optim.AdamW([A, B], lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order = torch.randint(len(inputs), (steps,), generator=generator, device=generator.device).tolist()
    with torch.enable_grad():
        for index in order:
            x = inputs[index].to(target)
            loss = (x @ target.T - (x @ A.T) @ B.T).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return A.detach(), B.detach()
