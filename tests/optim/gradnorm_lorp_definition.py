"""The three steps as their equations, one matrix at a time: what the optimizer is held against."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def definition(
    W: Tensor,
    grads: list[Tensor],
    rank: int | None,
    gap: int,
    *,
    mode: str = "weightnorm",
    alpha: float = 1.0,
    lr: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    side: str = "std",
    still: bool = False,
) -> Tensor:
    """Return the weight after all steps; `still` forces the step of the magnitudes to zero."""
    W = v = W.clone()
    m, n = W.shape
    right = {"std": m >= n, "reverse_std": m < n, "left": False, "right": True, "full": True}[side]
    left = not right or side == "full"
    M = V = Mg = Vg = 0.0
    P, Q = torch.eye(m, dtype=W.dtype), torch.eye(n, dtype=W.dtype)
    for t, G in enumerate(grads):
        v = W if mode == "weightnorm" else v
        g = v.norm(dim=1, keepdim=True)
        u = v / g
        gg = (G * u).sum(1, keepdim=True)
        gv = g * (G - gg * u) if mode == "weightnorm" else G
        if rank is not None and t % gap == 0:
            U, _, Vh = torch.linalg.svd(gv, full_matrices=False)
            P = U[:, :rank] if left else P
            Q = Vh[:rank] if right else Q
        R = P.T @ gv @ Q.T
        M, V = betas[0] * M + (1 - betas[0]) * R, betas[1] * V + (1 - betas[1]) * R * R
        Mg, Vg = betas[0] * Mg + (1 - betas[0]) * gg, betas[1] * Vg + (1 - betas[1]) * gg * gg
        s = lr * math.sqrt(1 - betas[1] ** (t + 1)) / (1 - betas[0] ** (t + 1))
        update = s * alpha * P @ (M / (V.sqrt() + eps)) @ Q
        g = g - (0.0 if still else s) * Mg / (Vg.sqrt() + eps)
        if mode == "weightnorm":
            u = u - update
            W = g * u / u.norm(dim=1, keepdim=True) * (1 - lr * weight_decay)
        else:
            v = (v - update) * (1 - lr * weight_decay)
            W = g * (1 - lr * weight_decay) * v / v.norm(dim=1, keepdim=True)
    return W


def run(optimizer_class: type, W: Tensor, grads: list[Tensor], group: dict[str, Any], **options: Any) -> Any:
    """Return the weight after the gradients and the optimizer."""
    weight = torch.nn.Parameter(W.clone())
    optimizer = optimizer_class([{"params": [weight], **group}], **options)
    for grad in grads:
        weight.grad = grad.clone()
        optimizer.step()
    return weight.detach(), optimizer


def draws(m: int, n: int, steps: int, dtype: torch.dtype = torch.float64, seed: int = 5) -> list[Tensor]:
    """Gaussian matrices with one strong direction each."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return [(draw(m, n) + draw(m, 1) @ draw(1, n)).to(dtype) for _ in range(steps)]
