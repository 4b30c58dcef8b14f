"""The setting in which claims about depth are measured: a byte-level Llama of twelve blocks trained from scratch."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from gnomon.common import corpora
from gnomon.common.models import tiny

__all__ = ["CONTEXT", "SCALES", "WIDE", "learning_rate", "streams", "train", "untrained"]

CONTEXT = 64
WIDE = math.sqrt(2 / 5)  # standard deviation of the embeddings in the "scaled embed" setting
# steps, sequences a batch, learning rate; small has more steps of smaller batches, so that all runs leave the
# plateau at the frequencies of the bytes within a claim's time
SCALES = {"small": (600, 4, 3e-3), "medium": (220, 16, 3e-3), "large": (2000, 32, 1e-3)}


@lru_cache(maxsize=1)
def streams() -> tuple[Int[Tensor, " bytes"], Int[Tensor, "windows tokens"]]:
    """Return the training stream and 128 validation windows of python-docs, as bytes."""
    corpus = corpora.load("python-docs")
    train, valid = (
        torch.frombuffer(bytearray("\n\n".join(texts).encode()), dtype=torch.uint8).long()
        for texts in (corpus.train, corpus.valid)
    )
    return train, corpora.windows(valid, CONTEXT)[:: max(1, len(valid) // CONTEXT // 128)][:128]


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Return the rate of a step: a linear warm-up over 10 %, then a cosine to 10 % of the peak."""
    warmup = max(1, steps // 10)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))))


def untrained(seed: int) -> PreTrainedModel:
    """Return twelve blocks of width 64 with the usual initial weights, embeddings of 0.02 included."""
    return tiny("llama", num_layers=12, intermediate_size=172, seed=seed)


def train(model: PreTrainedModel, seed: int, plan: tuple[int, int, float]) -> PreTrainedModel:
    """Train with Adam on the batches that belong to a seed; `plan` is steps, sequences a batch, peak rate."""
    steps, rows, peak = plan
    stream, _ = streams()
    optimizer = torch.optim.Adam(model.parameters(), lr=peak, betas=(0.9, 0.999), fused=True)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        starts = torch.randint(0, len(stream) - CONTEXT, (rows,), generator=generator)
        ids = stream[starts[:, None] + torch.arange(CONTEXT)]
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model
