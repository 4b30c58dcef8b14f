"""What stands on the residual stream: its variance and the angles between the inputs of blocks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gnomon.common.calibration import as_batches
from gnomon.common.depth.running import Batch, device_of, evaluating, first_tensor
from gnomon.common.layers import decoder_blocks, family
from gnomon.errors import MethodError, ModelError

__all__ = [
    "angular_distance",
    "angular_distances",
    "for_plotting",
    "output_variance",
    "residual_variance",
    "stream_statistics",
]

Measured = TypeVar("Measured")


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
    return stream_statistics(model, batches, max_distance=0, batch_size=batch_size)[0]


@torch.no_grad()
def stream_statistics(
    model: nn.Module, batches: Any, *, max_distance: int | None = None, batch_size: int = 8
) -> tuple[Float[Tensor, " layers"], Float[Tensor, "layers distances"]]:
    """Return `residual_variance` and `angular_distances` from one pass over the batches.

    Of each block's states only the variance and the last token's vector are kept.

    Parameters
    ----------
    model : PreTrainedModel
    batches : LongTensor (n, T), mapping, or iterable
    max_distance : int, optional
        Greatest distance; default the number of blocks, 0 for no angles.
    batch_size : int, default 8

    Returns
    -------
    tuple of Tensor (layers,), Tensor (layers, max_distance)
        float64, on the CPU.

    Raises
    ------
    MethodError
        When `max_distance` is not between 0 and the number of blocks.

    Examples
    --------
    >>> from gnomon.common.models import tiny
    >>> variance, angles = stream_statistics(tiny("llama"), torch.zeros(2, 8, dtype=torch.long))
    >>> variance.shape, angles.shape
    (torch.Size([4]), torch.Size([4, 4]))
    """
    blocks = decoder_blocks(model)
    length = len(blocks)
    reach = length if max_distance is None else max_distance
    if not 0 <= reach <= length:
        raise _no_distance(reach, length)
    variances = torch.zeros(length, dtype=torch.float64)
    angles = torch.zeros(length + 1, length + 1, dtype=torch.float64)
    prepared = as_batches(batches, batch_size, device_of(model))
    rows = 0
    for batch in prepared:
        last = _last_token(batch)
        pick = torch.arange(len(last), device=last.device)
        mask = batch.get("attention_mask")

        def measure(
            given: Tensor, output: Tensor, pick: Tensor = pick, last: Tensor = last, mask: Tensor | None = mask
        ) -> tuple[Tensor, Tensor, Tensor]:
            return output_variance(output, mask), given[pick, last].double(), output[pick, last].double()

        states = _block_states(model, blocks, batch, measure)
        variances += torch.stack([variance for variance, _, _ in states]).double().cpu()
        rows += len(last)
        if reach:
            points = torch.stack([given.to(last.device) for _, given, _ in states] + [states[-1][2].to(last.device)], 1)
            angles += _all_angles(points).sum(dim=0).cpu()
    distances = torch.full((length, reach), torch.nan, dtype=torch.float64)
    for n in range(1, reach + 1):
        distances[: length + 1 - n, n - 1] = angles.diagonal(n) / rows
    return variances / len(prepared), distances


def _all_angles(points: Float[Tensor, "batch points features"]) -> Float[Tensor, "batch points points"]:
    """Angular distance of every pair of points of one sequence: one product a sequence, not one a pair."""
    unit = points / points.norm(dim=-1, keepdim=True)  # a zero vector becomes NaN
    return torch.arccos((unit @ unit.mT).clamp(-1.0, 1.0)) / math.pi


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
    if max_distance is not None and max_distance < 1:
        raise _no_distance(max_distance, len(decoder_blocks(model)))
    return stream_statistics(model, batches, max_distance=max_distance, batch_size=batch_size)[1]


def _no_distance(given: int, length: int) -> MethodError:
    return MethodError(f"max_distance = {given}. It must be between 1 and the number of blocks, {length}.")


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
    model: nn.Module, blocks: nn.ModuleList, batch: Batch, measure: Callable[[Tensor, Tensor], Measured]
) -> list[Measured]:
    """Run the model once; return ``measure(input, output)`` of every block call, in call order."""
    states: list[Measured] = []

    def note(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        given = first_tensor(args) if args else first_tensor(list(kwargs.values()))
        states.append(measure(given.detach(), first_tensor(output).detach()))

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
