"""A model run block by block over a calibration set, with the inputs of each block's linears measured."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gnomon.common.calibration.batches import as_batches
from gnomon.common.calibration.statistics import LayerInputs
from gnomon.common.layers import backbone, decoder_blocks, family, linear_layers, unwrap
from gnomon.errors import DataError, ModelError

__all__ = ["walk_blocks"]

Batch = dict[str, Tensor]
Visit = Callable[[int, str, nn.Module, "dict[str, LayerInputs]"], None]


@dataclass
class _Call:
    """What the model passes to one block for one batch, without the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hidden_key: str | None

    def run(self, block: nn.Module, hidden: Tensor) -> Any:
        if self.hidden_key is None:
            return block(hidden, *self.args, **self.kwargs)
        return block(*self.args, **{self.hidden_key: hidden, **self.kwargs})


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, (tuple, list)) else output


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; on exit every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _replaced_forwards(blocks: nn.ModuleList, make: Callable[[int, Any], Callable[..., Any]]) -> Iterator[None]:
    own = [block.__dict__.get("forward") for block in blocks]
    for index, block in enumerate(blocks):
        block.__dict__["forward"] = make(index, block.forward)
    try:
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            if forward is None:
                del block.__dict__["forward"]
            else:
                block.__dict__["forward"] = forward


def _record_calls(
    model: nn.Module, blocks: nn.ModuleList, batches: list[Batch]
) -> tuple[list[Tensor], list[list[_Call]]]:
    """Run the model with its blocks left out; return the first hidden states and calls[batch][block]."""
    hidden: list[Tensor] = []
    calls: list[list[_Call]] = []
    shape: list[Any] = []  # the first block's output, once: what this family's blocks return

    def make(index: int, forward: Any) -> Callable[..., Any]:
        first_parameter = next(iter(inspect.signature(forward).parameters))

        def record(*args: Any, **kwargs: Any) -> Any:
            key = None if args else first_parameter
            state = args[0] if args else kwargs.pop(first_parameter)
            calls[-1].append(_Call(args[1:], dict(kwargs), key))
            if index == 0:
                hidden.append(state)
            if not shape:
                shape.append(_Call(args[1:], kwargs, key).run(forward, state))
            return (state, *shape[0][1:]) if isinstance(shape[0], tuple) else state

        return record

    base = backbone(model)
    with _replaced_forwards(blocks, make):
        for batch in batches:
            calls.append([])
            base(**batch, use_cache=False)
    if any(len(one) != len(blocks) for one in calls):
        raise ModelError(
            f"A {family(model)!r} model called {len(calls[0])} of its {len(blocks)} blocks once. "
            "Block-by-block calibration needs a decoder that calls each block exactly once, in order."
        )
    _share_equal_tensors(calls)
    return hidden, calls


def _share_equal_tensors(calls: list[list[_Call]]) -> None:
    """Let batches that pass equal masks and position embeddings hold one copy of them."""
    for before, after in itertools.pairwise(calls):
        for old, new in zip(before, after, strict=True):
            for key, value in new.kwargs.items():
                new.kwargs[key] = _same(old.kwargs.get(key), value)
            new.args = tuple(_same(a, b) for a, b in zip(old.args, new.args, strict=True))


def _same(old: Any, new: Any) -> Any:
    if isinstance(old, tuple) and isinstance(new, tuple) and len(old) == len(new):
        return tuple(_same(a, b) for a, b in zip(old, new, strict=True))
    if isinstance(old, Tensor) and isinstance(new, Tensor) and old is not new:
        same = old.dtype == new.dtype and old.device == new.device and old.shape == new.shape
        return old if same and torch.equal(old, new) else new
    return new


class _Collector:
    """Forward pre-hooks on one block's linears; layers reading the same tensor share one `LayerInputs`."""

    def __init__(self, layers: dict[str, nn.Module], gram: bool) -> None:
        self.layers = layers
        self.gram = gram
        self.leader: dict[str, str] = {}
        self.found: dict[str, LayerInputs] = {}
        self.seen: dict[int, tuple[str, Tensor]] = {}
        self.mask: Tensor | None = None
        self.shape: tuple[int, int] = (0, 0)

    def _hook(self, name: str) -> Callable[..., None]:
        def collect(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            first = self.seen.setdefault(id(x), (name, x))[0]  # holding x keeps its id from being given again
            if self.leader.setdefault(name, first) != first:
                raise ModelError(
                    f"Layer {name!r} shared its input with {self.leader[name]!r} in one batch and with "
                    f"{first!r} in another. Calibration needs a fixed flow of tensors through a block."
                )
            if first == name:
                self._update(name, x)

        return collect

    def _update(self, name: str, x: Tensor) -> None:
        sequences, tokens = self.shape
        if name not in self.found:
            self.found[name] = LayerInputs(x.shape[-1], gram=self.gram)
        if x.numel() == sequences * tokens * x.shape[-1]:
            self.found[name].update(x.reshape(sequences, tokens, -1), self.mask, name=name)
        else:  # tokens routed to an expert: which sequence each came from is not known
            self.found[name].update(x.reshape(-1, x.shape[-1]), name=name, sequences=sequences)

    @contextmanager
    def attached(self) -> Iterator[None]:
        handles = [
            layer.register_forward_pre_hook(self._hook(name), with_kwargs=True) for name, layer in self.layers.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def start(self, hidden: Tensor, mask: Tensor | None) -> None:
        self.seen.clear()
        self.mask = mask
        self.shape = (hidden.shape[0], hidden.shape[1])

    def inputs(self) -> dict[str, LayerInputs]:
        return {name: self.found[self.leader[name]] for name in self.layers if name in self.leader}


def _check_ids(model: nn.Module, batches: list[Batch]) -> None:
    config = getattr(unwrap(model), "config", None)
    vocabulary = getattr(config, "vocab_size", None)
    longest = getattr(config, "max_position_embeddings", None)
    low = min(int(batch["input_ids"].min()) for batch in batches)
    high = max(int(batch["input_ids"].max()) for batch in batches)
    if vocabulary is not None and (low < 0 or high >= vocabulary):
        raise DataError(
            f"The calibration set holds token id {low if low < 0 else high}; the model knows 0 to "
            f"{vocabulary - 1}. Tokenize with the model's own tokenizer."
        )
    width = max(batch["input_ids"].shape[1] for batch in batches)
    if longest is not None and width > longest:
        raise DataError(
            f"Calibration sequences are {width} tokens long, the model's context is {longest}. "
            f"Cut them into windows of at most {longest} tokens."
        )


def walk_blocks(
    model: nn.Module,
    calibration: Any,
    visit: Visit,
    *,
    gram: bool = True,
    sequential: bool = True,
    batch_size: int = 8,
) -> None:
    """Visit a decoder block by block, each time with the statistics of its linears' inputs.

    The calibration set is embedded once. For each block in turn, its linears' inputs are collected with
    the block as it is; `visit` may then change the block; the next block sees the outputs of the changed
    block (`sequential`) or of the unchanged one. The model is in eval mode without gradients meanwhile,
    and afterwards in the mode it was in. In memory at any time: the hidden states of the calibration set
    once, and the statistics of one block.

    Parameters
    ----------
    model : nn.Module
        A decoder of `transformers`, wrapped by PEFT or not. Llama, Qwen, Mistral, Gemma, OLMo, GPT-2,
        GPT-NeoX and look-alikes.
    calibration : LongTensor (n, T), mapping, or iterable
        See `as_batches`.
    visit : callable (index, name, block, inputs)
        Called once per block: its index, its name in `model.named_modules()`, the block, and a dict from
        the full name of each of its linears (as in ``linear_layers(model)``) to its `LayerInputs`. Layers
        reading the same tensor (query, key and value; gate and up) share one object. A layer no token
        reached (an idle expert) is not in it.
    gram : bool, default True
        Whether to collect X^T X.
    sequential : bool, default True
        Whether blocks see the outputs of the changed blocks before them.
    batch_size : int, default 8
        Sequences per forward pass.

    Raises
    ------
    DataError
        When the calibration set is empty, has ids outside the vocabulary or sequences beyond the model's
        context.
    ModelError
        When the model has no list of blocks, or does not call each once.
    MethodError
        When a layer's inputs are NaN or infinite; the message names it.

    Examples
    --------
    >>> from gnomon.common.models import tiny
    >>> def show(index, name, block, inputs):
    ...     print(index, name, len(inputs))
    >>> walk_blocks(tiny(num_layers=2), torch.zeros(2, 8, dtype=torch.long), show)
    0 model.layers.0 7
    1 model.layers.1 7
    """
    blocks = decoder_blocks(model)
    device = next(backbone(model).parameters()).device
    batches = as_batches(calibration, batch_size, device)
    _check_ids(model, batches)
    layer_names = {id(layer): name for name, layer in linear_layers(model).items()}
    block_names = {id(module): name for name, module in model.named_modules()}
    masks = [batch.get("attention_mask") for batch in batches]
    with _evaluating(model):
        hidden, calls = _record_calls(model, blocks, batches)
        for index, block in enumerate(blocks):
            layers = {layer_names[id(layer)]: layer for layer in linear_layers(block).values()}
            collector = _Collector(layers, gram)
            with collector.attached():
                for i, state in enumerate(hidden):
                    collector.start(state, masks[i])
                    output = _first(calls[i][index].run(block, state))
                    if not sequential:
                        hidden[i] = output
            collector.seen.clear()
            visit(index, block_names[id(block)], block, collector.inputs())
            if sequential and index + 1 < len(blocks):
                for i, state in enumerate(hidden):
                    hidden[i] = _first(calls[i][index].run(block, state))
            for one in calls:  # what was recorded for this block is not needed again
                one[index] = _Call((), {}, None)
