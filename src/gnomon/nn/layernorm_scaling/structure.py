"""Finds the pre-norms of a model's blocks by watching what consumes them, on a copy without storage.

A norm is a pre-norm when the tensor it returns is what attention, a feed-forward layer or a mixer is called with.
Nothing is looked up by a family's names: the model runs once on two tokens with fake tensors (no memory, no
arithmetic, no random numbers), and every module call inside a block is noted.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.pytorch_utils import Conv1D

from gnomon.common.layers import family, unwrap
from gnomon.errors import ModelError

__all__ = ["Block", "Branch", "find_blocks"]


@dataclass(frozen=True)
class Branch:
    """One sub-layer of a block.

    Attributes
    ----------
    norm : str
        Name of the norm in front of it.
    end : str
        Name of the module whose output is added to the residual stream.
    output : str, optional
        Name of the linear layer or norm that gives that output as it is; None where it cannot be told.
    post_norm : bool
        Whether `end` is a norm (Gemma 2).
    adds_stream : bool
        Whether the sub-layer adds the residual stream itself (Bloom), so that its output is not the branch alone.
    """

    norm: str
    end: str
    output: str | None
    post_norm: bool = False
    adds_stream: bool = False


@dataclass(frozen=True)
class Block:
    """One transformer block.

    Attributes
    ----------
    name, stack : str
        Its name and that of the list it stands in.
    depths : tuple of int
        The depths in its stack, counted from 1, at which it is called: several for a shared block.
    branches : tuple of Branch
        Its sub-layers in call order.
    parallel : bool
        Whether all branches read the block's own input (GPT-NeoX, GPT-J, Phi), so that there is one residual sum.
    """

    name: str
    stack: str
    depths: tuple[int, ...]
    branches: tuple[Branch, ...]
    parallel: bool = False

    @property
    def norms(self) -> tuple[str, ...]:
        """Names of its pre-norms, each once, in call order."""
        return tuple(dict.fromkeys(branch.norm for branch in self.branches))


def find_blocks(model: nn.Module) -> list[Block]:
    """Return the Pre-LN blocks of a model, stack by stack, in the order in which they are called.

    Parameters
    ----------
    model : PreTrainedModel
        On any device, also ``meta``; wrappers (PEFT, DDP) are looked through. It is not changed.

    Returns
    -------
    list of Block
        Names are relative to ``unwrap(model)``.

    Raises
    ------
    ModelError
        When the model has no such blocks: Post-LN, norms behind the sub-layers, or no norms; the message names
        the family and the reason.
    """
    inner = unwrap(model)
    kind = family(inner)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        skeleton = _skeleton(inner, mode)
    except Exception as error:  # whatever a module's own __deepcopy__ raises
        raise ModelError(
            f"The structure of this {kind!r} model ({type(inner).__name__}) cannot be copied: {type(error).__name__}: "
            f"{_first_line(error)}. Apply the method before fully_shard and other wrapping of its blocks."
        ) from error
    watcher = _Watcher(skeleton)
    with watcher.watching():
        try:
            with _no_fake_logs(), mode, torch.device("cpu"), torch.no_grad():
                skeleton(**_inputs(skeleton))
        except Exception as error:  # whatever a model's own code raises on two tokens
            if not watcher.finished:
                raise ModelError(
                    f"The blocks of this {kind!r} model ({type(inner).__name__}) could not be watched: a forward pass "
                    f"on two tokens failed with {type(error).__name__}: {_first_line(error)}. Allowed: models whose "
                    "forward takes input_ids or pixel_values alone."
                ) from error
    if not watcher.notes:
        raise ModelError(
            f"This {kind!r} model ({type(inner).__name__}) has no list of transformer blocks that its forward pass "
            "calls. Give a model such as Llama, Qwen, Mistral, GPT-2 or GPT-NeoX."
        )
    return [_resolve(note, kind) for note in watcher.notes.values()]


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0].rstrip(".")


def _skeleton(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """A deep copy in which every parameter and buffer is a fake tensor; bfloat16 suits every fused kernel."""
    memo: dict[int, Any] = {}

    def fake(tensor: Tensor) -> Tensor:
        dtype = torch.bfloat16 if tensor.is_floating_point() else tensor.dtype
        return torch.empty(tensor.shape, dtype=dtype, device="cpu")

    with mode, torch.device("cpu"):
        for parameter in model.parameters():
            memo[id(parameter)] = nn.Parameter(fake(parameter), requires_grad=False)
        for buffer in model.buffers():
            memo[id(buffer)] = fake(buffer)
        skeleton = copy.deepcopy(model, memo)
    for module in skeleton.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return skeleton.eval()


def _inputs(model: nn.Module) -> dict[str, Any]:
    """Two tokens (or one picture), in the form the model's forward takes."""
    accepted = inspect.signature(model.forward).parameters
    config: Any = getattr(model, "config", None)
    if getattr(model, "main_input_name", "input_ids") == "pixel_values":
        size = getattr(config, "image_size", 32)
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        pixels = torch.zeros(1, getattr(config, "num_channels", 3), height, width, dtype=torch.bfloat16)
        return {"pixel_values": pixels}
    ids = torch.zeros(1, 2, dtype=torch.long)
    inputs: dict[str, Any] = {"input_ids": ids}
    if "decoder_input_ids" in accepted:
        inputs["decoder_input_ids"] = ids
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    return inputs


@contextmanager
def _no_fake_logs() -> Iterator[None]:
    """Silence torch's own report of an operator without a fake kernel; the error says it already."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def _main(value: Any) -> Tensor | None:
    return next(_tensors(value), None)


@dataclass
class _Event:
    """A call inside a block: of a norm, of something fed by one, or of another module with parameters."""

    name: str
    fed_by: tuple[str, ...]
    is_norm: bool
    reads_stream: bool = False
    output: str | None = None
    adds_stream: bool = False  # it is given the residual stream beside the norm's output
    wide: bool = False  # its output is as wide as the residual stream
    holds: bool = False  # other events stand inside it: a container, not a layer


@dataclass
class _Note:
    """What was seen of one block."""

    name: str
    stack: str
    depths: list[int]
    stream: Tensor
    events: list[_Event] = field(default_factory=list)
    given: set[int] = field(default_factory=set)  # ids of its other inputs: masks, rotary and encoder states
    closing_norm: str | None = None


class _Watcher:
    """Notes module calls by hooks; tensors are told apart by identity and kept alive meanwhile."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.notes: dict[str, _Note] = {}
        self.finished = False
        self._stacks = dict(_stacks(model))
        self._calls: dict[str, int] = {}
        self._running: _Note | None = None  # the block that is being called for the first time
        self._consumer: str | None = None  # calls inside a consumer are its own affair
        self._nested: list[_Event] = []
        self._norm_of: dict[int, str] = {}  # tensors that are a norm's output; only norms outside consumers
        self._any_norm_of: dict[int, str] = {}
        self._layer_of: dict[int, str] = {}  # tensors that are a linear layer's output
        self._version_of: dict[int, int] = {}  # and whether anything was added to them in place since
        self._alive: list[Any] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        handles = []
        for name, module in self.model.named_modules():
            handles.append(module.register_forward_pre_hook(self._enter(name), with_kwargs=True))
            handles.append(module.register_forward_hook(self._leave(name), with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            self._alive.append((args, kwargs))
            inputs = [*_tensors(args), *_tensors(list(kwargs.values()))]
            if self._running is None and name in self._stacks and inputs:
                self._begin_block(name, inputs)
            elif self._running is not None and self._consumer is None:
                self._begin_call(self._running, name, module, inputs)

        return hook

    def _begin_block(self, name: str, inputs: list[Tensor]) -> None:
        stack = self._stacks[name]
        depth = self._calls[stack] = self._calls.get(stack, 0) + 1
        if name in self.notes:
            self.notes[name].depths.append(depth)
        else:
            given = {id(t) for t in inputs if t is not inputs[0]}
            self._running = self.notes[name] = _Note(name, stack, [depth], inputs[0], given=given)

    def _begin_call(self, note: _Note, name: str, module: nn.Module, inputs: list[Tensor]) -> None:
        fed_by = tuple(dict.fromkeys(self._norm_of[id(t)] for t in inputs if id(t) in self._norm_of))
        is_norm = _is_norm(module, note.stream.shape[-1])
        event = _Event(name, fed_by, is_norm, reads_stream=any(t is note.stream for t in inputs))
        event.adds_stream = any(
            t.shape == note.stream.shape and id(t) not in note.given and id(t) not in self._norm_of for t in inputs
        )
        if is_norm or _has_parameters(module):
            note.events.append(event)
        if fed_by and not is_norm and _has_parameters(module):
            self._consumer = name
        if is_norm or self._consumer == name:
            for outer in self._nested:
                outer.holds = True
        self._nested.append(event)

    def _leave(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            self._alive.append(output)
            note, result = self._running, _main(output)
            if note is None:
                self.finished = self.finished or module is self.model
            elif name == note.name:
                note.closing_norm = self._any_norm_of.get(id(result))
                self._running = None
                self._norm_of.clear()
                self._any_norm_of.clear()
                self._layer_of.clear()
            else:
                if result is not None:
                    self._know(note, name, module, _main(args), result)
                if self._consumer in (None, name):
                    self._end_call(note, name, result)

        return hook

    def _know(self, note: _Note, name: str, module: nn.Module, given: Tensor | None, result: Tensor) -> None:
        """Remember where a tensor comes from; what leaves a dropout is what entered it."""
        if isinstance(module, (nn.Linear, Conv1D)):
            self._layer_of[id(result)] = name
            self._version_of[id(result)] = result._version
        elif isinstance(module, (nn.Dropout, nn.Identity)):
            for table in (self._norm_of, self._any_norm_of, self._layer_of):
                if id(given) in table:
                    table[id(result)] = table[id(given)]
        elif _is_norm(module, note.stream.shape[-1]):
            self._any_norm_of[id(result)] = name

    def _end_call(self, note: _Note, name: str, result: Tensor | None) -> None:
        event = self._nested.pop()
        if result is None:
            return
        if self._consumer == name:
            self._consumer = None
        event.wide = result.shape[-1] == note.stream.shape[-1]
        if event.is_norm:
            event.output = self._norm_of[id(result)] = name
        elif self._version_of.get(id(result), result._version) == result._version:
            event.output = self._layer_of.get(id(result))


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _is_norm(module: nn.Module, width: int) -> bool:
    """A leaf that holds one gain (and perhaps one bias) a feature, or is called a norm and holds nothing."""
    if next(module.children(), None) is not None:
        return False
    parameters = list(module.parameters())
    if not parameters:
        return "norm" in type(module).__name__.lower()
    return all(p.dim() == 1 and p.shape[0] == width for p in parameters)


def _stacks(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield (block name, list name) for the outermost module lists whose members hold norms."""
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) > 0]
    outermost = [n for n in lists if not any(n.startswith(f"{other}.") for other in lists)]
    for stack in outermost:
        members = dict(model.get_submodule(stack).named_children())
        for key, block in members.items():
            if any("norm" in n.lower() or "ln" in n.lower() for n, _ in block.named_modules()) or any(
                p.dim() == 1 for p in block.parameters()
            ):
                yield f"{stack}.{key}", stack


def _resolve(note: _Note, kind: str) -> Block:
    """Turn what was seen of one block into its branches, or refuse it with the reason."""
    if note.closing_norm is not None:
        raise ModelError(
            f"This {kind!r} model is Post-LN: the output of its block {note.name!r} is that of the norm "
            f"{note.closing_norm!r}, so its residual stream does not grow with depth and there is no pre-norm to "
            "scale. Allowed: Pre-LN models such as Llama, Qwen, Mistral, GPT-2, GPT-NeoX."
        )
    branches: list[Branch] = []
    used = {norm for event in note.events for norm in event.fed_by if not event.is_norm}
    for event in note.events:
        if event.fed_by and not event.is_norm:
            branches.append(Branch(event.fed_by[-1], event.name, event.output, adds_stream=event.adds_stream))
        elif branches and event.wide and not event.holds and event.name not in used:
            branches[-1] = Branch(branches[-1].norm, event.name, event.output, event.is_norm, branches[-1].adds_stream)
    if not branches:
        raw = [event.name for event in note.events if event.reads_stream and not event.is_norm]
        outer = [n.rpartition(".")[2] for n in raw if not any(n.startswith(f"{other}.") for other in raw)]
        reads = f"{', '.join(outer)} reads the residual stream itself" if outer else "no norm feeds a sub-layer"
        raise ModelError(
            f"This {kind!r} model has no pre-norm in its block {note.name!r}: {reads}, and the norms stand behind "
            "the sub-layers or are missing. LayerNorm scaling multiplies pre-norms. Allowed: Pre-LN models such as "
            "Llama, Qwen, Mistral, GPT-2, GPT-NeoX."
        )
    reading = {event.name for event in note.events if event.is_norm and event.reads_stream}
    parallel = len(branches) > 1 and all(branch.norm in reading for branch in branches)
    return Block(note.name, note.stack, tuple(note.depths), tuple(branches), parallel)
