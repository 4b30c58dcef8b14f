"""Reads the parts of a block and makes sure that it computes the Pre-LN equations before they are changed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gnomon.common.layers import attention_and_mlp, backbone, decoder_blocks, family, unwrap
from gnomon.errors import ModelError

__all__ = ["BlockParts", "check_pre_ln", "read_blocks"]

_NORM_PAIRS = (
    ("input_layernorm", "post_attention_layernorm"),
    ("ln_1", "ln_2"),
    ("ln1", "ln2"),
    ("norm1", "norm2"),
    ("attention_norm", "ffn_norm"),
)
_ALLOWED = (
    "Allowed: decoders whose blocks compute h = x + Attn(N1(x)), y = h + MLP(N2(h)), such as Llama, Qwen, Mistral, "
    "GPT-2, and GPT-NeoX with use_parallel_residual=False."
)


@dataclass(frozen=True)
class BlockParts:
    """Names of a stock block's children.

    Attributes
    ----------
    attention, mlp : str
    norms : tuple of two str
        In front of attention and of the feed-forward layer.
    dropouts : tuple of str
        Behind attention and behind the feed-forward layer, or none.
    """

    attention: str
    mlp: str
    norms: tuple[str, str]
    dropouts: tuple[str, ...] = ()


def read_blocks(model: nn.Module) -> list[BlockParts]:
    """Return the parts of every block of a decoder, found by what a block contains.

    Raises
    ------
    ModelError
        When blocks hold other things than attention, a feed-forward layer, two norms and dropouts, share their
        weights, or run their sub-layers in parallel; the message names the family.
    """
    blocks, kind = decoder_blocks(model), family(model)
    if len({id(block) for block in blocks}) < len(blocks):
        raise ModelError(
            f"Blocks of this {kind!r} model share their weights, so they cannot have placements of their own. "
            "Give a model with a block for each depth."
        )
    return [_read(block, kind) for block in blocks]


def _read(block: nn.Module, kind: str) -> BlockParts:
    cls = type(block).__name__
    try:
        attention, mlp = attention_and_mlp(block)
    except ModelError as error:
        raise ModelError(f"mix-ln does not support {kind!r} models: {error} {_ALLOWED}") from error
    children = dict(block.named_children())
    names = {id(module): name for name, module in children.items()}
    if id(attention) not in names or id(mlp) not in names:
        raise ModelError(
            f"mix-ln does not support {kind!r} models: the sub-layers of a {cls} are no modules. {_ALLOWED}"
        )
    pair = next((p for p in _NORM_PAIRS if p[0] in children and p[1] in children), None)
    dropouts = tuple(name for name, module in children.items() if isinstance(module, nn.Dropout))
    known = {names[id(attention)], names[id(mlp)], *(pair or ()), *dropouts}
    extra = [name for name in children if name not in known]
    if pair is None or extra or len(dropouts) not in (0, 2):
        has = ", ".join(children)
        raise ModelError(
            f"mix-ln does not support {kind!r} models ({cls}): a block must hold attention, a feed-forward layer, the "
            f"norm in front of each and nothing else; this one has {has}. {_ALLOWED}"
        )
    if getattr(block, "use_parallel_residual", False):
        raise _parallel(kind)
    return BlockParts(names[id(attention)], names[id(mlp)], pair, dropouts)


def _parallel(kind: str) -> ModelError:
    return ModelError(
        f"The blocks of this {kind!r} model run attention and MLP in parallel on the block's input (parallel "
        "residual): there is one sum, so the two norms cannot be placed around two. Build the model with "
        f"use_parallel_residual=False. {_ALLOWED}"
    )


@dataclass
class _Seen:
    """Inputs and outputs of one block's parts in one pass, by name; ``""`` is the block."""

    given: dict[str, Tensor] = field(default_factory=dict)
    returned: dict[str, Tensor] = field(default_factory=dict)


def check_pre_ln(model: PreTrainedModel, parts: Sequence[BlockParts]) -> None:
    """Run the model on two tokens and hold every block against the Pre-LN equations, bit for bit.

    Nothing is done for a model without storage (``meta``). The random state and every module's mode are left alone.

    Raises
    ------
    ModelError
        When a block computes something else, with the family and what was seen; when the parameters are sharded.
    """
    kind, blocks = family(model), decoder_blocks(model)
    parameter = next(backbone(model).parameters())
    if any(hasattr(p, "full_tensor") for p in model.parameters()):
        raise ModelError(f"The parameters of this {kind!r} model are sharded. Apply mix-ln before fully_shard.")
    if parameter.is_meta:
        return
    seen = [_Seen() for _ in blocks]
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    ids = torch.tensor([[1 % vocabulary, 2 % vocabulary]], device=parameter.device)
    with _watching(blocks, parts, seen), _training(model, parameter.device), torch.no_grad():
        try:
            backbone(model)(input_ids=ids, use_cache=False)
        except Exception as error:  # whatever a model's own code raises on two tokens
            first = (str(error).strip().splitlines() or [""])[0]
            raise ModelError(
                f"This {kind!r} model ({type(unwrap(model)).__name__}) could not be run on two tokens: "
                f"{type(error).__name__}: {first}. {_ALLOWED}"
            ) from error
    for index, (one, note) in enumerate(zip(parts, seen, strict=True)):
        _hold(kind, index, one, note)


@contextmanager
def _watching(blocks: nn.ModuleList, parts: Sequence[BlockParts], seen: Sequence[_Seen]) -> Iterator[None]:
    handles = []
    for block, one, note in zip(blocks, parts, seen, strict=True):
        watched = {"": block} | {n: block.get_submodule(n) for n in (one.attention, one.mlp, *one.norms, *one.dropouts)}
        for name, module in watched.items():
            observe = _observer(note, name, several=name in ("", one.attention))
            handles.append(module.register_forward_hook(observe, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _observer(note: _Seen, name: str, *, several: bool) -> Any:
    """A hook that notes one part's input and output; only where `several` may it return more than the tensor."""

    def observe(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        result = output[0] if several and isinstance(output, (tuple, list)) else output
        if tensors and isinstance(result, Tensor):
            note.given[name], note.returned[name] = tensors[0], result

    return observe


@contextmanager
def _training(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Training mode, so that a dropout outside the known modules shows; modes and random state are restored."""
    modes = [(module, module.training) for module in model.modules()]
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        model.train()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


def _hold(kind: str, index: int, parts: BlockParts, seen: _Seen) -> None:
    """Compare one block's tensors with h = x + Attn(N1(x)), y = h + MLP(N2(h))."""
    needed = ("", parts.attention, parts.mlp, *parts.norms, *parts.dropouts)
    missing = [name or "the block" for name in needed if name not in seen.returned]
    where = f"Block {index} of this {kind!r} model"
    if missing:
        raise ModelError(f"{where} did not run {', '.join(missing)} on one tensor that gives one tensor. {_ALLOWED}")
    first, second = parts.norms
    ends = parts.dropouts or (parts.attention, parts.mlp)
    stream = seen.given[""]
    if seen.given[parts.attention] is not seen.returned[first] or seen.given[first] is not stream:
        raise ModelError(
            f"{where} does not feed attention with {first!r} of its input: it is not Pre-LN, so there is no pre-norm "
            f"to move. {_ALLOWED}"
        )
    if seen.given[second] is stream:
        raise _parallel(kind)
    middle = seen.given[second]
    if (
        seen.given[parts.mlp] is not seen.returned[second]
        or not torch.equal(middle, stream + seen.returned[ends[0]])
        or not torch.equal(seen.returned[""], middle + seen.returned[ends[1]])
    ):
        raise ModelError(
            f"{where} does not compute h = x + Attn(N1(x)), y = h + MLP(N2(h)): something else scales, drops or adds "
            f"to its branches. {_ALLOWED}"
        )
