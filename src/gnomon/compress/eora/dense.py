"""Layers of the dense block, put in the place of the compressed ones while their inputs are collected."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gnomon.compress.eora.pairing import DenseLayer

__all__ = ["DenseLinear", "Observer"]


class Observer:
    """Keeps of a layer's inputs what sums over the calibration set do not hold.

    Parameters
    ----------
    masks : sequence of Tensor or None
        The attention mask of each batch, in order.
    decay_over : int, optional
        Number of calibration sequences n: keep the decaying average C <- C n / (n + b) + X^T X / n over batches of
        b sequences. Without it, keep the inputs themselves.
    """

    def __init__(self, masks: Sequence[Tensor | None], decay_over: int | None = None) -> None:
        self.masks = masks
        self.decay_over = decay_over
        self.batches = 0
        self.sequences: list[Tensor] = []
        self.gram: Tensor | None = None

    def __call__(self, x: Tensor) -> None:
        """Take the inputs of one batch, (sequences, tokens, in), or (tokens, in) as experts see them."""
        mask = self.masks[self.batches]
        self.batches += 1
        parts = [x] if x.ndim == 2 else list(x)
        if mask is not None and x.shape[:-1] == mask.shape:
            parts = [part[keep.bool().to(part.device)] for part, keep in zip(parts, mask, strict=True)]
        if self.decay_over is None:
            self.sequences.extend(parts)
            return
        flat = torch.cat(parts)
        flat = flat if flat.dtype == torch.float64 else flat.float()
        gram = flat.T @ flat / self.decay_over
        if self.gram is not None:
            gram += self.gram * (self.decay_over / (self.decay_over + len(parts)))
        self.gram = gram


class DenseLinear(nn.Linear):
    """A linear layer that shares the dense model's storage; moved to its inputs' device and dtype call by call.

    Parameters
    ----------
    layer : DenseLayer
    observer : Observer, optional
        Is shown the inputs while somebody listens to them (a forward pre-hook is attached).
    """

    def __init__(self, layer: DenseLayer, observer: Observer | None = None) -> None:
        super().__init__(layer.weight.shape[1], layer.weight.shape[0], bias=False, device="meta")
        self.weight = nn.Parameter(layer.weight, requires_grad=False)
        self.dense_bias = None if layer.bias is None else layer.bias.detach()
        self.observer = observer

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + b."""
        if self.observer is not None and self._forward_pre_hooks:
            self.observer(x)
        bias = None if self.dense_bias is None else self.dense_bias.to(x)
        return nn.functional.linear(x, self.weight.to(x), bias)
