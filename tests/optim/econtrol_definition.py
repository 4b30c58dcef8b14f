"""The equations of every algorithm as the plainest loop in float64, one worker after the other."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def top(x: Tensor, k: int) -> Tensor:
    order = sorted(range(x.numel()), key=lambda i: (-abs(float(x.reshape(-1)[i])), i))[:k]
    out = torch.zeros_like(x).reshape(-1)
    out[order] = x.reshape(-1)[order]
    return out.view_as(x)


def loop(
    kind: str, grads: list[list[Tensor]], compress: Callable[[Tensor], Tensor], *, eta=0.3, beta=0.1, dense=True
) -> list[Tensor]:
    """Return the update of every step; `grads[t][i]` is worker i's gradient at step t."""
    n = len(grads[0])
    zero = torch.zeros_like(grads[0][0])
    e, h, v = [zero] * n, [zero] * n, list(grads[0])
    average = zero
    if dense and kind in ("ef21", "ef21-sgdm", "econtrol"):
        h, average = list(grads[0]), sum(grads[0]) / n
    updates = []
    for t in range(len(grads)):
        sent = []
        for i in range(n):
            g = grads[t][i]
            if kind == "none":
                c = compress(g)
            elif kind == "ec":
                c = compress(e[i] + g)
                e[i] = e[i] + g - c
            elif kind == "econtrol":
                c = compress(eta * e[i] + g - h[i])
                e[i] = e[i] + g - h[i] - c
                h[i] = h[i] + c
            else:
                if kind == "ef21-sgdm":
                    v[i] = (1 - beta) * v[i] + beta * g
                    g = v[i]
                c = compress(g - h[i])
                h[i] = h[i] + c
            sent.append(c)
        average = sum(sent) / n + (average if kind in ("ef21", "ef21-sgdm", "econtrol") else 0)
        updates.append(average)
    return updates
