"""Per-row gradient norms without formulas: `torch.func` row by row, and one backward pass a row."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gnomon.data.data_diet.rows import Batch, Loss, aligned_logits, row_losses

__all__ = ["functional_squares", "looped_squares"]

_BUDGET = 1 << 24  # floats of per-row gradients held at once


class _RowLoss(nn.Module):
    """A model whose output is the loss of its rows, so that its parameters can be swapped for the call."""

    def __init__(self, model: nn.Module, loss: Loss | None) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, batch: Batch) -> Tensor:
        logits, targets = aligned_logits(self.model, batch)
        return row_losses(logits, targets, self.loss, check=False)


def functional_squares(
    model: nn.Module, names: Sequence[str], batch: Batch, loss: Loss | None = None
) -> Float[Tensor, " rows"]:
    """Return the squared norm of each row's gradient over the named parameters by ``vmap(grad)``.

    A few rows at a time, so that no more than a fixed number of floats is held.
    """
    wrapped = _RowLoss(model, loss)
    parameters = dict(model.named_parameters())
    chosen = {f"model.{name}": parameters[name].detach() for name in names}

    def of_row(weights: dict[str, Tensor], inputs: Any, targets: Tensor) -> Tensor:
        one = {k: v[None] for k, v in inputs.items()} if isinstance(inputs, dict) else tuple(v[None] for v in inputs)
        return torch.func.functional_call(wrapped, weights, (Batch(one, targets[None], batch.shift),)).sum()

    def squares(inputs: Any, targets: Tensor) -> Tensor:
        grads = torch.func.grad(of_row)(chosen, inputs, targets)
        return torch.stack([_squared(grad) for grad in grads.values()]).sum()

    size = sum(p.numel() for p in chosen.values())
    step = max(1, min(len(batch), _BUDGET // size))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*batching rule")  # slower where torch has none, and as exact
        return torch.func.vmap(squares, chunk_size=step)(batch.inputs, batch.targets)


def looped_squares(
    model: nn.Module, names: Sequence[str], batch: Batch, loss: Loss | None = None
) -> Float[Tensor, " rows"]:
    """Return the same by one backward pass a row, for models whose code depends on the data."""
    parameters = dict(model.named_parameters())
    chosen = [parameters[name] for name in names]
    wrapped = _RowLoss(model, loss)
    squares = []
    for place in range(len(batch)):
        with torch.enable_grad():
            value = wrapped(batch.row(place)).sum()
        grads = torch.autograd.grad(value, chosen, allow_unused=True)
        parts = [_squared(grad.to_dense() if grad.is_sparse else grad) for grad in grads if grad is not None]
        squares.append(torch.stack(parts).sum() if parts else value.detach().new_zeros(()))
    return torch.stack(squares)


def _squared(grad: Tensor) -> Tensor:
    return (grad if grad.dtype == torch.float64 else grad.float()).square().sum()
