"""What stands on the residual stream: its variance and the angles between the inputs of blocks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gnomon.common.calibration import as_batches
from gnomon.common.depth.running import Batch, device_of, evaluating, first_tensor
from gnomon.common.layers import decoder_blocks, family
from gnomon.errors import MethodError, ModelError

__all__ = ["angular_distance", "angular_distances", "for_plotting", "output_variance", "residual_variance"]


def output_variance(
    hidden: Float[Tensor, "batch tokens features"], mask: Int[Tensor, "batch tokens"] | None = None
) -> Float[Tensor, ""]:
    """Return the population variance over all elements (batch, token, feature), padding left out.

    Parameters
    ----------
    hidden : Tensor (batch, tokens, features)
    mask : Tensor (batch, tokens), optional
        1 for tokens, 0 for padding.

    Returns
    -------
    Tensor
        A float32 scalar (float64 for float64 input).

    Examples
    --------
    >>> float(output_variance(torch.tensor([[[1.0, 3.0]]])))
    1.0
    """
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    return wide.var(correction=0) if mask is None else wide[mask.bool()].var(correction=0)


@torch.no_grad()
def residual_variance(model: nn.Module, batches: Any, *, batch_size: int = 8) -> Float[Tensor, " layers"]:
    """Return, per block, the variance of its output over batch, token and feature, averaged over batches.

    Parameters
    ----------
    model : PreTrainedModel
    batches : LongTensor (n, T), mapping, or iterable
    batch_size : int, default 8

    Returns
    -------
    Tensor (layers,)
        float64, on the CPU.

    Examples
    --------
    >>> from gnomon.common.models import tiny
    >>> residual_variance(tiny("llama"), torch.zeros(2, 8, dtype=torch.long)).shape
    torch.Size([4])
    """
    blocks = decoder_blocks(model)
    total = torch.zeros(len(blocks), dtype=torch.float64)
    prepared = as_batches(batches, batch_size, device_of(model))
    for batch in prepared:
        mask = batch.get("attention_mask")

        def keep(x: Tensor, mask: Tensor | None = mask) -> Tensor:
            return output_variance(x, mask)

        for index, (_, variance) in enumerate(_block_states(model, blocks, batch, keep)):
            total[index] += float(variance)
    return total / len(prepared)


def angular_distance(a: Float[Tensor, "... features"], b: Float[Tensor, "... features"]) -> Float[Tensor, " ..."]:
    """Return ``arccos(cos(a, b)) / pi`` of vectors, in [0, 1]; NaN where one of them is zero.

    Parameters
    ----------
    a, b : Tensor (..., features)

    Returns
    -------
    Tensor (...)
        float64.

    Notes
    -----
    The authors' code gives a zero vector the cosine 0.5; an angle to nothing does not exist, hence NaN.

    Examples
    --------
    >>> x, y = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])
    >>> float(angular_distance(x, y)), float(angular_distance(x, -x))
    (0.5, 1.0)
    """
    a, b = a.double(), b.double()
    norms = a.norm(dim=-1) * b.norm(dim=-1)
    cosine = ((a * b).sum(dim=-1) / norms).clamp(-1.0, 1.0)
    return torch.where(norms > 0, torch.arccos(cosine) / math.pi, torch.nan)


@torch.no_grad()
def angular_distances(
    model: nn.Module, batches: Any, *, max_distance: int | None = None, batch_size: int = 8
) -> Float[Tensor, "layers distances"]:
    """Return d(l, n): the mean angular distance between the inputs of blocks l and l + n at the last token.

    Parameters
    ----------
    model : PreTrainedModel
    batches : LongTensor (n, T), mapping, or iterable
        With padding, the last token that is none.
    max_distance : int, optional
        Greatest n; default the number of blocks.
    batch_size : int, default 8

    Returns
    -------
    Tensor (layers, max_distance)
        float64; column n - 1 holds distance n. The input of "block L" is the output of the last block; beyond it,
        and where a vector is zero, stands NaN.

    Raises
    ------
    MethodError
        When `max_distance` is not between 1 and the number of blocks.
    """
    blocks = decoder_blocks(model)
    length = len(blocks)
    reach = length if max_distance is None else max_distance
    if not 1 <= reach <= length:
        raise MethodError(f"max_distance = {max_distance}. It must be between 1 and the number of blocks, {length}.")
    sums = torch.zeros(length, reach, dtype=torch.float64)
    rows = 0
    for batch in as_batches(batches, batch_size, device_of(model)):
        last = _last_token(batch)
        pick = torch.arange(len(last), device=last.device)

        def keep(x: Tensor, pick: Tensor = pick, last: Tensor = last) -> Tensor:
            return x[pick, last].double()

        states = _block_states(model, blocks, batch, keep)
        points = [given for given, _ in states] + [states[-1][1]]
        rows += len(last)
        for i in range(length):
            for n in range(1, min(reach, length - i) + 1):
                sums[i, n - 1] += angular_distance(points[i], points[i + n]).sum().cpu()
    distance = torch.arange(1, reach + 1)[None, :] + torch.arange(length)[:, None]
    return torch.where(distance <= length, sums / rows, torch.nan)


def for_plotting(distances: Float[Tensor, "layers distances"]) -> Float[Tensor, "layers distances"]:
    """Return distances with each row clipped to its 1st and 99th percentile and stretched to [0, 1].

    For pictures only; a row of equal values becomes zeros, NaN stays NaN.
    """
    rows = []
    for row in distances:
        seen = row[~row.isnan()]
        if len(seen) == 0:
            rows.append(row)
            continue
        low, high = torch.quantile(seen, torch.tensor([0.01, 0.99], dtype=row.dtype))
        span = high - low
        rows.append((row.clamp(low, high) - low) / span if span > 0 else row * 0)
    return torch.stack(rows)


def _last_token(batch: Batch) -> Int[Tensor, " batch"]:
    """Position of the last token that is no padding."""
    ids = batch["input_ids"]
    mask = batch.get("attention_mask", torch.ones_like(ids)).bool()
    places = torch.arange(ids.shape[1], device=ids.device)
    return torch.where(mask, places, -1).max(dim=1).values


def _block_states(
    model: nn.Module, blocks: nn.ModuleList, batch: Batch, keep: Callable[[Tensor], Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """Run the model once; return ``keep`` of the input and of the output of every block call, in call order."""
    states: list[tuple[Tensor, Tensor]] = []

    def note(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        given = first_tensor(args) if args else first_tensor(list(kwargs.values()))
        states.append((keep(given.detach()), keep(first_tensor(output).detach())))

    handles = [block.register_forward_hook(note, with_kwargs=True) for block in dict.fromkeys(blocks)]
    try:
        with evaluating(model), torch.no_grad():
            model(**batch, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    if len(states) != len(blocks):
        raise ModelError(
            f"A {family(model)!r} model called its blocks {len(states)} times, but has {len(blocks)} of them. "
            "Give a decoder that calls each block once."
        )
    return states
