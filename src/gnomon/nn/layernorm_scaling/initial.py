"""Initialisations that shrink the output projections by depth: baselines of the paper, and how to notice them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from gnomon.common.layers import family, linear_layers, set_weight, weight_of
from gnomon.errors import ModelError
from gnomon.nn.layernorm_scaling.structure import Block

__all__ = ["init_factors", "initialised_by_depth", "rescale_init"]


def init_factors(found: Sequence[Block], kind: str) -> dict[str, float]:
    """Return, per output projection, the factor of the ``"scaled"`` or ``"depth"`` initialisation."""
    lengths: dict[str, int] = {}
    for block in found:
        lengths[block.stack] = max(lengths.get(block.stack, 0), *block.depths)
    return {
        branch.output: 1 / math.sqrt(2 * (lengths[block.stack] if kind == "scaled" else min(block.depths)))
        for block in found
        for branch in block.branches
        if branch.output is not None and not branch.post_norm
    }


@torch.no_grad()
def initialised_by_depth(model: nn.Module, found: Sequence[Block]) -> str | None:
    """Return ``"scaled"`` or ``"depth"`` when the output projections were initialised that way, else None."""
    ratios: dict[str, float] = {}
    for block in found:
        outputs = [b.output for b in block.branches if b.output is not None and not b.post_norm]
        layers = {f"{block.name}.{n}": m for n, m in linear_layers(model.get_submodule(block.name)).items()}
        others = [weight_of(m).float().std() for n, m in layers.items() if n not in outputs]
        if not others or any(s.is_meta for s in others):
            return None
        usual = float(torch.stack(others).median())
        for name in outputs:
            ratios[name] = float(weight_of(model.get_submodule(name)).float().std()) / usual if usual > 0 else 0.0
    for kind in ("scaled", "depth"):
        expected = init_factors(found, kind)
        if ratios and all(abs(ratios[name] / factor - 1) < 0.15 for name, factor in expected.items()):
            return kind
    return None


def rescale_init(model: nn.Module, found: Sequence[Block], kind: str) -> None:
    """Bring the output projections from the initialisation they have to another; see `scale_init`."""
    present = initialised_by_depth(model, found) or "plain"
    if present == kind:
        raise ModelError(
            f"The output projections of this {family(model)!r} model have the {kind!r} initialisation already; "
            "rescaling them again would do it twice."
        )
    before = init_factors(found, present) if present != "plain" else {}
    after = init_factors(found, kind) if kind != "plain" else {}
    for name in before or after:
        layer = model.get_submodule(name)
        set_weight(layer, weight_of(layer) * (after.get(name, 1.0) / before.get(name, 1.0)))
