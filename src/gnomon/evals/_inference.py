"""What metrics that run a model share: evaluation mode that is put back, padding, the checks of token ids."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gnomon.common.layers import unwrap
from gnomon.errors import DataError

__all__ = ["check_vocabulary", "evaluating", "input_device", "pad_right"]


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


def check_vocabulary(model: nn.Module, sequences: Iterable[Tensor]) -> None:
    """Refuse token ids that the model's input embedding has no row for.

    Raises
    ------
    DataError
        With the first such id.
    """
    inner: Any = unwrap(model)
    size = int(inner.get_input_embeddings().weight.shape[0])
    for ids in sequences:
        for extreme in (int(ids.max()), int(ids.min())):
            if not 0 <= extreme < size:
                raise DataError(
                    f"Token id {extreme} is not in the model's vocabulary (0 to {size - 1}). Was the text "
                    "tokenised with another model's tokenizer?"
                )


def pad_right(sequences: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return token ids (batch, longest) and their attention mask.

    Padding on the right leaves every token at its own position in every family; the pad token's id does not matter.
    """
    ids = nn.utils.rnn.pad_sequence(list(sequences), batch_first=True)
    lengths = torch.tensor([len(s) for s in sequences])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    return ids.to(device), mask.to(device)
