"""The method as its equations, one matrix, float64 or whatever is given: what the optimizers are held against."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def definition(
    W: Tensor,
    grads: list[Tensor],
    rank: int,
    gap: int,
    *,
    alpha: float = 1.0,
    lr: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    inner: str = "adam",
    residual: str | None = "authors",
    side: str = "std",
    projectors: list[Tensor] | None = None,
    momentum: float = 0.0,
    centered: bool = False,
) -> tuple[Tensor, list[float]]:
    """Return the weight after all steps and q after each; `residual=None` is GaLore."""
    W, M, V, A, B, q, qs = W.clone(), 0.0, 0.0, 0.0, 0.0, None, []
    right = W.shape[0] >= W.shape[1]
    right = {"std": right, "reverse_std": not right, "left": False, "right": True}[side]
    for t, G in enumerate(grads):
        if t % gap == 0:
            U, _, Vh = torch.linalg.svd(G, full_matrices=False)
            P = Vh[:rank] if right else U[:, :rank]
        if projectors is not None:
            P = projectors[t]
        R = G @ P.T if right else P.T @ G
        if inner == "adam":
            M = betas[0] * M + (1 - betas[0]) * R
            V = betas[1] * V + (1 - betas[1]) * R * R
            N = M / (V.sqrt() + eps)
            eta = lr * math.sqrt(1 - betas[1] ** (t + 1)) / (1 - betas[0] ** (t + 1))
        else:
            V = 0.9 * V + 0.1 * R * R
            A = 0.9 * A + 0.1 * R
            N = R / ((V - A * A if centered else V).sqrt() + eps)
            B = momentum * B + N
            N, eta = B, lr
        update = alpha * (N @ P if right else P @ N)
        if residual is not None:
            phi = N.norm(dim=int(right), keepdim=True) / (R.norm(dim=int(right), keepdim=True) + 1e-8)
            scale = alpha if residual == "authors" else 1.0
            S = (G - scale * (R @ P if right else P @ R)) * phi
            norm = float(S.norm())
            if q is None:
                q = norm
            else:
                L = max(norm / (q + 1e-8), 1.01) / 1.01
                S, q = S / L, norm / L
            qs.append(q)
            update = update + S
        W = W - eta * update
        if inner == "adam":
            W = W - lr * weight_decay * W
    return W, qs


def run(optimizer_class: type, W: Tensor, grads: list[Tensor], group: dict[str, Any], **options: Any) -> Any:
    """Return the weight after the gradients and the optimizer."""
    weight = torch.nn.Parameter(W.clone())
    optimizer = optimizer_class([{"params": [weight], **group}], **options)
    for grad in grads:
        weight.grad = grad.clone()
        optimizer.step()
    return weight.detach(), optimizer


def gradients(m: int, n: int, steps: int, dtype: torch.dtype = torch.float64, seed: int = 5) -> list[Tensor]:
    """Gradients that grow, with one strong direction each."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return [(draw(m, n) * (1 + t) + draw(m, 1) @ draw(1, n)).to(dtype) for t in range(steps)]
