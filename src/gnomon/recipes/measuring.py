"""Facts about a model and a stage that stand in every run: sizes, depth, warnings."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from gnomon.common.corpora import windows
from gnomon.common.depth import residual_variance
from gnomon.common.memory import tensor_bytes
from gnomon.errors import ModelError
from gnomon.recipes.stages.context import Prepared

__all__ = ["depth_of", "noted_warnings", "size_of"]

_PACKAGE = str(Path(__file__).resolve().parents[1])


@contextmanager
def noted_warnings(notes: list[str]) -> Iterator[None]:
    """Put gnomon's own warnings into the run, once each; those of other libraries go on their way."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for found in caught:
        if found.category.__module__.startswith("gnomon") or found.filename.startswith(_PACKAGE):
            if str(found.message) not in notes:
                notes.append(str(found.message))
        else:
            warnings.warn_explicit(found.message, found.category, found.filename, found.lineno)


def size_of(model: Any) -> dict[str, int]:
    """Parameters, those that are not zero, and bytes; adapters count."""
    parameters = list(model.parameters())
    return {
        "parameters": sum(p.numel() for p in parameters),
        "nonzero_parameters": sum(int(torch.count_nonzero(p)) for p in parameters),
        "size_bytes": tensor_bytes(model),
    }


def depth_of(model: Any, data: Prepared) -> list[dict[str, float]]:
    """Variance of the residual stream after every block, on a few validation rows."""
    try:
        values = residual_variance(model, [{"input_ids": windows(data.valid_tokens, data.context)[:16]}])
    except ModelError:
        return []
    return [{"block": i, "variance": float(v)} for i, v in enumerate(values)]
