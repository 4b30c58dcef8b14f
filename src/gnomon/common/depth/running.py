"""Running a model for a measurement: modes restored, losses weighted by tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gnomon.common.calibration import as_batches
from gnomon.common.layers import family, unwrap
from gnomon.errors import DataError, MethodError, ModelError

__all__ = ["Batch", "check_index", "device_of", "evaluating", "first_tensor", "summed_loss", "token_loss"]

Batch = dict[str, Tensor]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module in evaluation mode; on exit each is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@torch.no_grad()
def token_loss(model: nn.Module, batches: Any, *, batch_size: int = 8) -> float:
    """Return the next-token loss in nats, averaged over tokens (not over batches); padding is left out."""
    total, count = 0.0, 0
    with evaluating(model):
        for batch in as_batches(batches, batch_size, device_of(model)):
            loss, tokens = summed_loss(model, batch)
            total, count = total + float(loss), count + tokens
    return total / count


def summed_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    """Return the summed next-token loss of one batch and the number of predicted tokens."""
    ids = batch["input_ids"]
    labels = ids.masked_fill(batch["attention_mask"] == 0, -100) if "attention_mask" in batch else ids
    targets = labels[:, 1:]
    count = int((targets != -100).sum())
    if count == 0:
        raise DataError("A batch has no token to predict: every sequence has length 1. Give at least two tokens each.")
    output = model(**batch, use_cache=False)
    logits = getattr(output, "logits", None)
    if logits is None:
        raise ModelError(
            f"A {family(model)!r} model ({type(unwrap(model)).__name__}) has no language-model head, so there is no "
            "loss. Give a ...ForCausalLM, or a metric of your own."
        )
    scores = logits[:, :-1].float().flatten(0, 1)
    return nn.functional.cross_entropy(scores, targets.flatten(), reduction="sum"), count


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the first parameter."""
    return next(model.parameters()).device


def first_tensor(value: Any) -> Tensor:
    """Return a tensor, or the first tensor among several values."""
    if isinstance(value, Tensor):
        return value
    return next(item for item in value if isinstance(item, Tensor))


def check_index(blocks: nn.ModuleList, index: int) -> None:
    """Refuse the number of a block that does not exist."""
    if not 0 <= index < len(blocks):
        raise MethodError(f"There is no block {index}. Blocks are numbered from 0 to {len(blocks) - 1}.")
