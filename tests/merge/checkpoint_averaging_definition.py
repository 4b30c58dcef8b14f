"""The method's equations as the shortest faithful loop in float64, and small models to hold the library against it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gnomon.common.models import tiny


def mean_of(states: Sequence[Mapping[str, Tensor]], weights: Sequence[float] | None = None) -> dict[str, Tensor]:
    """theta = sum_i w_i theta_i over floating tensors; the rest from the last state."""
    weights = weights or [1 / len(states)] * len(states)
    out = {}
    for name, last in states[-1].items():
        if last.is_floating_point():
            out[name] = torch.zeros(last.shape, dtype=torch.float64)
            for state, w in zip(states, weights, strict=True):
                out[name] += w * state[name].double()
        else:
            out[name] = last
    return out


def seeded_states(count: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[dict[str, Tensor]]:
    """States as a run leaves them: one start and small moves; odd shapes, a scalar, an empty tensor, integers."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"embed.weight": (37, 5), "layer.weight": (7, 13), "layer.bias": (13,), "scale": (), "none": (0, 3)}
    start = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    states = []
    for i in range(count):
        state = {k: (v + 0.1 * torch.randn(v.shape, generator=generator)).to(dtype) for k, v in start.items()}
        states.append({**state, "position_ids": torch.arange(4) + i, "mask": torch.tensor([i % 2 == 0, True])})
    return states


def moved(model: PreTrainedModel, seed: int, size: float = 0.01) -> PreTrainedModel:
    """Move every parameter a little, as training does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)
    return model


def save_run(folder: Path, count: int, family: str = "llama", **options: object) -> list[Path]:
    """Save snapshots of one run: checkpoint-100, checkpoint-200, ..."""
    paths = []
    for i in range(count):
        model = moved(tiny(family, hidden_size=32, num_layers=2, vocab_size=64), seed=i + 1)
        paths.append(folder / f"checkpoint-{100 * (i + 1)}")
        model.save_pretrained(paths[-1], **options)
    return paths
