"""What every metric that runs a model needs: evaluation mode that is put back, the device of its inputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from gnomon.common.layers import unwrap

__all__ = ["evaluating", "input_device", "vocabulary_size"]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch a model to evaluation without gradients; on exit each submodule gets its training flag back.

    `torch.inference_mode` is not used: buffers that a model computes on first use would be unusable in
    training.
    """
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, flag in flags:
            module.training = flag


def input_device(model: nn.Module) -> torch.device:
    """Return where token ids must be: the device of the input embedding, also for split models."""
    inner: Any = unwrap(model)
    embedding = inner.get_input_embeddings() if hasattr(inner, "get_input_embeddings") else None
    parameter = next((embedding if embedding is not None else inner).parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def vocabulary_size(model: nn.Module) -> int:
    """Return the number of rows of the input embedding: token ids must be below it."""
    inner: Any = unwrap(model)
    return int(inner.get_input_embeddings().weight.shape[0])
