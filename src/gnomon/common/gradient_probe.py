"""Gradients of chosen weights over a few batches, without the gradients of all weights standing on the device.

What initialisations by the gradient share: the weights are probed once before training, and each gradient is handed
out by itself, summed over the batches and over the ranks.

A hook takes every gradient as soon as the backward pass has finished it, adds it to a buffer on the CPU and frees it.
So the device holds the weights, the activations and the gradient of one layer. The buffers hold one full gradient; with
``passes = p`` the layers are probed in p groups, the batches are gone through p times, and the buffers hold a p-th of
it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from gnomon.common.layers import unwrap
from gnomon.common.ranks import ranks
from gnomon.errors import MethodError, ModelError

__all__ = ["first_samples", "probe_gradients"]

Batch = Mapping[str, Any]
Loss = Callable[[nn.Module, Batch], Tensor]


def probe_gradients(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Iterable[Batch] | Callable[[], object],
    *,
    loss: Loss | None = None,
    passes: int = 1,
    seed: int = 0,
) -> Iterator[tuple[str, Float[Tensor, "out in"] | None]]:
    """Yield the gradient of every layer's weight, summed over batches and ranks, one layer at a time.

    Every batch of n rows adds the gradient of its mean loss / n. The model runs in training mode; dropout draws from
    the seed. When the generator ends or is closed, training modes, `requires_grad` flags and gradients are as before.

    Parameters
    ----------
    model : nn.Module
        On every rank the same. Its call takes a batch as keywords.
    layers : mapping of str to nn.Module
        `nn.Linear` or `Conv1D` by name; the order of the mapping is that of the results.
    batches : iterable of mappings, or callable
        The batches of this rank, read once and kept. A callable without arguments runs forward and backward itself,
        once for every pass.
    loss : callable (model, batch) -> Tensor (), optional
        Default ``model(**batch).loss``.
    passes : int, default 1
        Groups the layers are probed in.
    seed : int, default 0

    Yields
    ------
    (str, Tensor of shape (out, in) or None)
        float32 (float64 for a float64 weight), on the device of the weight; None where no gradient arrived on any
        rank.

    Raises
    ------
    MethodError
        When there are no batches on any rank, a batch is no mapping, there is no loss, `passes` is below 1, or a
        gradient holds NaN.
    ModelError
        When a weight has no gradient (integers, quantised), is sharded, or two layers share one.

    Examples
    --------
    >>> from gnomon.common.models import tiny
    >>> model = tiny("llama")
    >>> ids = torch.arange(16).reshape(2, 8)
    >>> layers = {"q": model.model.layers[0].self_attn.q_proj}
    >>> [(name, list(g.shape)) for name, g in probe_gradients(model, layers, [{"input_ids": ids, "labels": ids}])]
    [('q', [64, 64])]
    """
    if passes < 1:
        raise MethodError(f"passes = {passes}; the layers are probed in at least 1 group.")
    _check_layers(layers)
    runs = _runner(model, batches, loss)
    names = list(layers)
    size = -(-len(names) // passes)
    for first in range(0, len(names), size):
        group = {name: layers[name] for name in names[first : first + size]}
        buffers = _one_pass(model, group, runs, seed)
        for name, layer in group.items():
            yield name, _over_ranks(name, layer, buffers.pop(name, None))


def first_samples(batches: Iterable[Batch], count: int | None) -> list[Batch]:
    """Return this rank's batches with the first `count` rows of all ranks together, the last one cut to fit.

    Rank k of w takes ``count // w`` rows, one more where k < count mod w.

    Parameters
    ----------
    batches : iterable of mappings
        Tensors and lists as long as the batch are cut.
    count : int or None
        None keeps all.

    Raises
    ------
    MethodError
        When count is below 1, a batch is no mapping, or there are fewer rows.

    Examples
    --------
    >>> [len(b["input_ids"]) for b in first_samples([{"input_ids": torch.ones(4, 2)}] * 3, 6)]
    [4, 2]
    """
    if count is None:
        return [_checked(batch) for batch in batches]
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise MethodError(f"num_samples = {count!r}; a whole number of at least 1, such as 50.")
    state = ranks()
    wanted = left = count // state.num_processes + (state.process_index < count % state.num_processes)
    kept: list[Batch] = []
    for batch in batches if left else ():
        rows = _rows(_checked(batch))
        kept.append(batch if rows <= left else _cut(batch, rows, left))
        left -= min(rows, left)
        if not left:
            break
    if _largest(left):  # on every rank alike: one that raised alone would leave the others waiting
        place = f" on rank {state.process_index} of {state.num_processes}" if state.num_processes > 1 else ""
        raise MethodError(
            f"num_samples = {count}, but the batches{place} hold {wanted - left} of the {wanted} rows it asks for "
            "there. Give more rows, or a smaller num_samples (a thousandth of the training rows is enough)."
        )
    return kept


def _checked(batch: Any) -> Batch:
    if not isinstance(batch, Mapping):
        raise MethodError(
            f"a batch is a {type(batch).__name__}. Batches are mappings such as "
            '{"input_ids": ..., "attention_mask": ..., "labels": ...}; a collator makes them.'
        )
    return batch


def _rows(batch: Batch) -> int:
    first = batch.get("input_ids", next((v for v in batch.values() if isinstance(v, Tensor)), None))
    if not isinstance(first, Tensor) or first.ndim == 0 or not len(first):
        raise MethodError(f"a batch with the keys {', '.join(map(str, batch)) or '(none)'} holds no rows of tensors.")
    return len(first)


def _cut(batch: Batch, rows: int, kept: int) -> Batch:
    return {
        key: value[:kept] if isinstance(value, (Tensor, list)) and _length(value) == rows else value
        for key, value in batch.items()
    }


def _length(value: Any) -> int:
    return 0 if isinstance(value, Tensor) and value.ndim == 0 else len(value)


def _runner(
    model: nn.Module, batches: Iterable[Batch] | Callable[[], object], loss: Loss | None
) -> Callable[[], object]:
    """Return what runs forward and backward over all batches."""
    if callable(batches) and not isinstance(batches, Iterable):
        return batches
    assert isinstance(batches, Iterable)
    kept = [_checked(batch) for batch in batches]
    if not _largest(len(kept)):
        raise MethodError("there are no batches to probe with: the loader is empty. Give at least one.")

    def run() -> None:
        device = next(model.parameters()).device
        for batch in kept:
            moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
            value = getattr(model(**moved), "loss", None) if loss is None else loss(model, moved)
            if value is None:
                raise MethodError(
                    f"the model gave no loss for a batch with the keys {', '.join(map(str, batch))}. Add 'labels' "
                    "(for a causal language model a copy of input_ids, padding as -100), or give loss=."
                )
            (value / _rows(batch)).backward()

    return run


def _check_layers(layers: Mapping[str, nn.Module]) -> None:
    seen: dict[int, str] = {}
    for name, layer in layers.items():
        weight = layer.weight
        assert isinstance(weight, Tensor)
        if not weight.is_floating_point() or hasattr(layer, "quant_state") or weight.device.type == "meta":
            raise ModelError(
                f"{name}: there is no gradient of a weight of {weight.dtype} in a {type(layer).__name__} on "
                f"{weight.device}. Probe the model in float32, bfloat16 or float16 before it is quantised."
            )
        if isinstance(weight, DTensor):
            raise ModelError(
                f"{name}: the weight is sharded. Probe the model before fully_shard or tensor parallelism."
            )
        if id(weight) in seen:
            raise ModelError(f"{name} and {seen[id(weight)]} share one weight. Probe only one of them.")
        seen[id(weight)] = name


def _one_pass(
    model: nn.Module, layers: Mapping[str, nn.Module], run: Callable[[], object], seed: int
) -> dict[str, Tensor]:
    """Run all batches once and return the sums of these layers' gradients on the CPU, as the weights lie."""
    buffers: dict[str, Tensor] = {}

    def taker(name: str) -> Callable[[Tensor], None]:
        def take(weight: Tensor) -> None:
            gradient, weight.grad = weight.grad, None
            assert gradient is not None
            wide = gradient.detach().to("cpu", torch.float64 if gradient.dtype == torch.float64 else torch.float32)
            if name in buffers:
                buffers[name].add_(wide)
            else:
                buffers[name] = wide

        return take

    with _only(model, layers) as weights:
        hooks: list[Any] = [w.register_post_accumulate_grad_hook(taker(name)) for name, w in weights.items()]
        hooks.extend(_open_checkpoints(model))
        try:
            devices = sorted({w.device.index for w in weights.values() if w.device.type == "cuda"})
            with torch.random.fork_rng(devices=devices), torch.enable_grad():
                torch.manual_seed(seed)
                run()
        finally:
            for hook in hooks:
                hook.remove()
    return buffers


@contextmanager
def _only(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Training mode and gradients for the weights of these layers alone; all as before afterwards."""
    modes = {module: module.training for module in model.modules()}
    weights: dict[str, Any] = {name: layer.weight for name, layer in layers.items()}
    parameters = {id(p): p for p in (*model.parameters(), *weights.values())}.values()
    flags = [(p, p.requires_grad, p.grad) for p in parameters]
    try:
        model.train()
        for p, _, _ in flags:
            p.requires_grad_(False)
        for w in weights.values():
            w.requires_grad_(True)
            w.grad = None
        yield weights
    finally:
        for module, mode in modes.items():
            module.training = mode
        for p, flag, gradient in flags:
            p.requires_grad_(flag)
            p.grad = gradient


def _open_checkpoints(model: nn.Module) -> list[Any]:
    """Reentrant checkpoints pass gradients on only if their input asks for one: let the embeddings ask."""
    if not any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        return []
    embeddings = getattr(unwrap(model), "get_input_embeddings", lambda: None)()
    if embeddings is None:
        return []
    return [embeddings.register_forward_hook(lambda module, args, out: out.requires_grad_(True))]


def _over_ranks(name: str, layer: nn.Module, buffer: Tensor | None) -> Tensor | None:
    """Sum a buffer over the ranks and return it as (out, in) on the weight's device."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if not _largest(int(buffer is not None)):
        return None
    if buffer is None:
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        buffer = torch.zeros(weight.shape, dtype=wide)
    gradient = buffer.to(weight.device)
    if ranks().num_processes > 1:
        dist.all_reduce(gradient)
    if bool(gradient.isnan().any()):
        raise MethodError(
            f"the gradient of {name} holds NaN. Probe in bfloat16 or float32 (float16 overflows), and look at the "
            "loss of every batch."
        )
    return gradient.T if isinstance(layer, Conv1D) else gradient


def _largest(value: int) -> int:
    """Return the largest value of all ranks."""
    state = ranks()
    if state.num_processes == 1:
        return value
    found = torch.tensor(value, device=state.device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return int(found)
