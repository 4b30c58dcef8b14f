"""Where the factors of each position and kind stand, as (module name, hook) pairs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from gnomon.common.layers import family, unwrap
from gnomon.errors import MethodError, ModelError
from gnomon.nn.layernorm_scaling.hooks import DepthHook, InputScale, LearnedScale, OutputScale, attached
from gnomon.nn.layernorm_scaling.structure import Block, Branch

__all__ = ["GAMMA", "MODEL_TYPE", "SLUG", "Attached", "Kind", "Position", "block_count", "constants", "depth_scale",
           "depth_scales", "learned"]  # fmt: skip

SLUG = "layernorm-scaling"
MODEL_TYPE = "lns_llama"
GAMMA = "depth_gamma"
Position = Literal["norm", "attention_norm", "mlp_norm", "before_norm", "branch", "residual"]
Kind = Literal["depth", "layer_scale", "skip_init"]
Attached = tuple[str, DepthHook]


def depth_scale(depth: int) -> float:
    """Return the scale of the block at `depth`, counted from 1: ``1 / sqrt(depth)``.

    Raises
    ------
    MethodError
        When `depth` is under 1.

    Examples
    --------
    >>> [round(depth_scale(l), 4) for l in (1, 2, 3, 4)]
    [1.0, 0.7071, 0.5774, 0.5]
    """
    if depth < 1:
        raise MethodError(f"depth = {depth}. Blocks are counted from 1: the first has scale 1.")
    return 1.0 / math.sqrt(depth)


def depth_scales(model: nn.Module) -> dict[str, tuple[float, ...]]:
    """Return the constants a model carries: module name -> the factor of each of its calls in one pass.

    Examples
    --------
    >>> from gnomon.common.models import tiny
    >>> depth_scales(tiny("llama"))
    {}
    """
    return {
        name: hook.scales for name, _, hook in attached(unwrap(model)) if isinstance(hook, (InputScale, OutputScale))
    }


def block_count(found: Sequence[Block]) -> int:
    """Return the number of block calls in one forward pass, over all stacks."""
    return sum(len(block.depths) for block in found)


def constants(model: PreTrainedModel, found: Sequence[Block], position: str) -> Iterator[Attached]:
    """Yield (module name, hook) of the constants at a position."""
    for block in found:
        scales = [depth_scale(depth) for depth in block.depths]
        if position == "branch":
            for branch in block.branches:
                _check_branch(model, branch, position)
                yield branch.end, OutputScale(scales)
        elif position == "residual":
            yield from _residual(model, block, scales)
        else:
            norms = block.norms
            if position in ("attention_norm", "mlp_norm"):
                if len(norms) < 2:
                    raise ModelError(
                        f"The block {block.name!r} of this {family(model)!r} model has one norm ({norms[0]!r}) for "
                        f"attention and MLP together, so position = {position!r} does not exist. Use position='norm'."
                    )
                norms = norms[:-1] if position == "attention_norm" else norms[-1:]
            for name in norms:
                yield name, InputScale(scales) if position == "before_norm" else OutputScale(scales)


def _residual(model: PreTrainedModel, block: Block, scales: Sequence[float]) -> Iterator[Attached]:
    """Scale each residual sum: the sum is no module, so its terms are scaled, and the norms read them unscaled."""
    last = 0 if block.parallel else len(block.branches) - 1
    yield block.name, OutputScale(scales)
    if last == 0:
        return
    yield block.name, InputScale([s**last for s in scales])
    for i, branch in enumerate(block.branches[:last]):
        _check_branch(model, branch, "residual")
        yield branch.norm, InputScale([s ** (i - last) for s in scales])
        yield branch.end, OutputScale([s ** (last - i) for s in scales])


def _check_branch(model: PreTrainedModel, branch: Branch, what: str) -> None:
    if branch.adds_stream:
        raise ModelError(
            f"{branch.end!r} of this {family(model)!r} model adds the residual stream itself, so what it returns is "
            f"not the branch alone and {what!r} cannot scale it. Use position='norm'."
        )


def learned(model: PreTrainedModel, found: Sequence[Block], kind: str, init: float | None) -> Iterator[Attached]:
    """Yield (module name, hook) of the learned factors, after registering their parameters."""
    for block in found:
        for branch in block.branches:
            _check_branch(model, branch, kind)
    for block in found:
        for branch in block.branches:
            end = model.get_submodule(branch.end)
            like = next(end.parameters())
            width = model.config.get_text_config().hidden_size if kind == "layer_scale" else 1
            value = init
            if value is None:
                value = 1e-5 if kind == "layer_scale" else 1 / math.sqrt(block_count(found))
            start = torch.full((width,), value, dtype=like.dtype, device=like.device)
            end.register_parameter(GAMMA, nn.Parameter(start))
            yield branch.end, LearnedScale(GAMMA)
