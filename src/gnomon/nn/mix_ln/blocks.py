"""The blocks: subclasses of a family's own block class whose norms stand elsewhere.

A block keeps its attention, its feed-forward layer and its class's other attributes; what changes is ``forward`` and
the names of the norms. As a subclass it is recorded by ``output_hidden_states``, checkpointed and recognised like the
block it was.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any, ClassVar

from torch import Tensor, nn

from gnomon.errors import ModelError
from gnomon.nn.mix_ln.plan import BlockPlacement
from gnomon.nn.mix_ln.structure import BlockParts

__all__ = ["FROM_SCRATCH", "PlacedBlock", "PostNormBlock", "SandwichBlock", "place_block", "placement_of"]

FROM_SCRATCH = "Mix-LN is an architecture for training from scratch"


class PlacedBlock(nn.Module):
    """What the placements share: calling the two sub-layers of whatever family the block is of."""

    stock: ClassVar[type[nn.Module]]
    kind: ClassVar[str]
    arguments: ClassVar[tuple[str, ...]]  # what the family's blocks take behind the hidden states, in order
    parts: BlockParts
    residual_scale: float

    def _attend(self, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        named = dict(zip(self.arguments, args, strict=False))
        output = getattr(self, self.parts.attention)(hidden, **named, **kwargs)
        attended = output[0] if isinstance(output, tuple) else output
        return self._dropped(0, attended)

    def _feed(self, hidden: Tensor) -> Tensor:
        return self._dropped(1, getattr(self, self.parts.mlp)(hidden))

    def _dropped(self, which: int, branch: Tensor) -> Tensor:
        if not self.parts.dropouts:
            return branch
        dropped: Tensor = getattr(self, self.parts.dropouts[which])(branch)
        return dropped

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle by the family's class and the placement: the class itself is made on demand."""
        return _blank, (self.stock, self.kind), self.__getstate__()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        stock = f"{prefix}{self.parts.norms[0]}.weight"
        if stock in state_dict and f"{prefix}post_feedforward_layernorm.weight" not in state_dict:
            raise ModelError(
                f"These weights are those of a stock model: they have {stock!r} and no "
                f"'{prefix}post_feedforward_layernorm.weight', so the norms of this {self.kind!r} block cannot be "
                f"read from them. {FROM_SCRATCH}. Train it, or load the weights into the stock model."
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class PostNormBlock(PlacedBlock):
    """``h = N1(a x + Attn(x))``, ``y = N2(a h + MLP(h))``; a is 1 but for DeepNorm."""

    post_attention_layernorm: nn.Module
    post_feedforward_layernorm: nn.Module

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the block's output; arguments are those of the family's blocks."""
        attended = self._attend(hidden_states, args, kwargs)
        hidden: Tensor = self.post_attention_layernorm(self._kept(hidden_states) + attended)
        output: Tensor = self.post_feedforward_layernorm(self._kept(hidden) + self._feed(hidden))
        return output

    def _kept(self, hidden: Tensor) -> Tensor:
        return hidden if self.residual_scale == 1.0 else hidden * self.residual_scale


class SandwichBlock(PlacedBlock):
    """``h = x + N2(Attn(N1(x)))``, ``y = h + N4(MLP(N3(h)))``."""

    input_layernorm: nn.Module
    post_attention_layernorm: nn.Module
    pre_feedforward_layernorm: nn.Module
    post_feedforward_layernorm: nn.Module

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the block's output; arguments are those of the family's blocks."""
        attended = self._attend(self.input_layernorm(hidden_states), args, kwargs)
        hidden = hidden_states + self.post_attention_layernorm(attended)
        fed = self._feed(self.pre_feedforward_layernorm(hidden))
        output: Tensor = hidden + self.post_feedforward_layernorm(fed)
        return output


_CLASSES: dict[str, tuple[str, type[PlacedBlock]]] = {
    "post": ("PostNorm", PostNormBlock),
    "deepnorm": ("DeepNorm", PostNormBlock),
    "sandwich": ("Sandwich", SandwichBlock),
}


_MADE: dict[tuple[type[nn.Module], str], type[PlacedBlock]] = {}


def _placed_class(stock: type[nn.Module], kind: str) -> type[PlacedBlock]:
    """Return the subclass of a family's block class with a placement; always the same object."""
    if (stock, kind) not in _MADE:
        prefix, mixin = _CLASSES[kind]
        arguments = [
            name
            for name, parameter in inspect.signature(stock.forward).parameters.items()
            if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        ][2:]  # without self and the hidden states
        members = {"stock": stock, "kind": kind, "arguments": tuple(arguments), "__module__": __name__}
        _MADE[stock, kind] = type(f"{prefix}{stock.__name__}", (mixin, stock), members)
    return _MADE[stock, kind]


def _blank(stock: type[nn.Module], kind: str) -> PlacedBlock:
    """Return an object of a placed class without state, for pickle and deepcopy."""
    cls = _placed_class(stock, kind)
    return cls.__new__(cls)


def place_block(block: nn.Module, parts: BlockParts, kind: BlockPlacement, residual_scale: float = 1.0) -> None:
    """Give one stock block a placement, in place; ``"pre"`` leaves it as it is.

    The two norms keep their parameters and get the names that say where they stand; a sandwich gets copies of them
    for the other two.
    """
    if kind == "pre":
        return
    first, second = (getattr(block, name) for name in parts.norms)
    for name in parts.norms:
        delattr(block, name)
    if kind == "sandwich":
        block.input_layernorm = first
        block.post_attention_layernorm = copy.deepcopy(first)
        block.pre_feedforward_layernorm = second
        block.post_feedforward_layernorm = copy.deepcopy(second)
    else:
        block.post_attention_layernorm = first
        block.post_feedforward_layernorm = second
    placed: Any = block
    placed.parts = parts
    placed.residual_scale = float(residual_scale) if kind == "deepnorm" else 1.0
    placed.__class__ = _placed_class(type(block), kind)


def placement_of(block: nn.Module) -> str:
    """Return the placement of a block: ``"pre"`` for one this method has not changed."""
    return block.kind if isinstance(block, PlacedBlock) else "pre"
