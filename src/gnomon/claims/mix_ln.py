"""Mix-LN against Pre-LN: loss of a byte-level Llama trained from scratch, and its gradients before training."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import torch

from gnomon.claims.deep_llama import CONTEXT, WIDE, streams, train, untrained
from gnomon.claims.experiment import experiment
from gnomon.common.depth import gradient_norms, token_loss
from gnomon.nn.mix_ln import apply_norm_placement

_PLACEMENTS: dict[str, Literal["pre", "mix", "post"]] = {"pre": "pre", "mix": "mix", "post": "post"}


@lru_cache(maxsize=64)
def _loss(arm: str, seed: int, scale: str) -> float:
    placement, _, setting = arm.partition("_")
    wide = WIDE if setting == "wide" else None
    model = apply_norm_placement(untrained(seed), _PLACEMENTS[placement], embed_std=wide)
    return token_loss(train(model, seed, scale), streams()[1], batch_size=64)


@experiment(
    arms=("pre", "mix", "pre_wide", "mix_wide"),
    relation="mix < pre by 0.1",
    unit="validation loss, nats per byte",
    paper={"mix": 26.07, "pre": 26.78},
    seeds=(0, 1, 2),
)
def lower_loss(arm: str, seed: int, scale: str) -> float:
    """Validation loss after training from scratch; the paper's figures are perplexities of LLaMA-130M on C4."""
    return _loss(arm, seed, scale)


@experiment(
    arms=("pre", "mix", "post"),
    relation="mix < 0.8 * pre",
    unit="gradient norm, first over last block",
    seeds=(0, 1, 2),
)
def even_gradients(arm: str, seed: int, scale: str) -> float:
    """Gradient norm of the first block over that of the last at initialisation."""
    stream, _ = streams()
    rows = {"small": 64, "medium": 256, "large": 1024}[scale]
    starts = torch.randint(0, len(stream) - CONTEXT, (rows,), generator=torch.Generator().manual_seed(seed))
    model = apply_norm_placement(untrained(seed), _PLACEMENTS[arm])
    norms = gradient_norms(model, stream[starts[:, None] + torch.arange(CONTEXT)], batch_size=16)
    return float(norms[0] / norms[-1])
