"""Calibration data of any form, brought into batches a model can take."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from gnomon.errors import DataError, MethodError

__all__ = ["as_batches"]


def _rows(item: Any, row: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield (ids (T,), mask (T,) or None) for each sequence of a tensor, a list or a mapping."""
    mask = None
    if isinstance(item, Mapping):
        if "input_ids" not in item:
            raise DataError(
                f"Calibration item {row} has no 'input_ids', only {', '.join(map(str, item)) or 'nothing'}. "
                "Tokenize the texts first: tokenizer(text, return_tensors='pt')."
            )
        mask = item.get("attention_mask")
        item = item["input_ids"]
    if isinstance(item, str):
        raise DataError(f"Calibration item {row} is text. Tokenize it first: tokenizer(text, return_tensors='pt').")
    try:
        ids = torch.as_tensor(item)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"Calibration item {row} is a {type(item).__name__} that does not make a tensor of token ids "
            f"({error}). Give token ids of shape (n, tokens), or dicts with 'input_ids'."
        ) from error
    if ids.numel() == 0:
        ids = ids.long()
    if ids.dim() not in (1, 2) or ids.is_floating_point() or ids.dtype == torch.bool:
        raise DataError(
            f"Calibration item {row} has shape {tuple(ids.shape)} and dtype {ids.dtype}. Token ids are "
            "integers of shape (tokens,) or (n, tokens)."
        )
    ids = ids.long() if ids.dim() == 2 else ids.long()[None]
    masks: Iterable[Tensor | None] = [None] * len(ids)
    if mask is not None:
        mask = torch.as_tensor(mask).bool()
        mask = mask if mask.dim() == 2 else mask[None]
        if mask.shape != ids.shape:
            raise DataError(
                f"Calibration item {row}: attention_mask has shape {tuple(mask.shape)}, input_ids "
                f"{tuple(ids.shape)}. They must be equal, with 1 for tokens and 0 for padding."
            )
        masks = mask
    yield from zip(ids, masks, strict=True)


def _items(calibration: Any) -> Iterator[Any]:
    if isinstance(calibration, Tensor):
        if calibration.dim() != 2:
            raise DataError(
                f"Calibration ids have shape {tuple(calibration.shape)}. Cut the stream into windows first: "
                "a LongTensor of shape (n, tokens)."
            )
        yield calibration
    elif isinstance(calibration, Mapping):
        yield calibration
    elif isinstance(calibration, str) or not (hasattr(calibration, "__iter__") or hasattr(calibration, "__getitem__")):
        raise DataError(
            f"Calibration data is a {type(calibration).__name__}. Give a LongTensor (n, tokens), a dict with "
            "'input_ids', or an iterable of such dicts (a DataLoader, a Dataset)."
        )
    elif hasattr(calibration, "__iter__"):
        yield from calibration
    else:
        yield from (calibration[i] for i in range(len(calibration)))


def as_batches(
    calibration: Any, batch_size: int = 8, device: torch.device | str | None = None
) -> list[dict[str, Tensor]]:
    """Bring calibration data into a list of batches a model can take.

    Parameters
    ----------
    calibration : LongTensor (n, T), mapping, or iterable
        Token ids; or a dict / `BatchEncoding` with ``input_ids`` (n, T) and perhaps ``attention_mask``; or an
        iterable of such dicts or tensors, batched or single rows (a `DataLoader`, a `datasets.Dataset`).
        Other columns are ignored. Rows of unequal length are padded on the right and masked.
    batch_size : int, default 8
        Sequences per batch.
    device : torch.device or str, optional
        Where the batches are put; default: where they are.

    Returns
    -------
    list of dict
        Each with ``input_ids`` (b, T) int64 and, only where there is padding, ``attention_mask`` (b, T)
        int64. Sequences without a single token are left out.

    Raises
    ------
    DataError
        When there is nothing in it, or something that is no token ids.

    Examples
    --------
    >>> [b["input_ids"].shape for b in as_batches(torch.zeros(5, 16, dtype=torch.long), batch_size=4)]
    [torch.Size([4, 16]), torch.Size([1, 16])]
    """
    if batch_size < 1:
        raise MethodError(f"batch_size = {batch_size}. It must be at least 1.")
    rows = [pair for row, item in enumerate(_items(calibration), start=1) for pair in _rows(item, row)]
    rows = [(ids, mask) for ids, mask in rows if len(ids) and (mask is None or bool(mask.any()))]
    if not rows:
        raise DataError(
            "The calibration set is empty: no sequence with a token in it. Give at least one window of "
            "token ids, shape (n, tokens)."
        )
    batches = []
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        width = max(len(ids) for ids, _ in part)
        ids = torch.zeros(len(part), width, dtype=torch.long)
        mask = torch.zeros(len(part), width, dtype=torch.long)
        for i, (row_ids, row_mask) in enumerate(part):
            ids[i, : len(row_ids)] = row_ids
            mask[i, : len(row_ids)] = 1 if row_mask is None else row_mask
        batch = {"input_ids": ids} if bool(mask.all()) else {"input_ids": ids, "attention_mask": mask}
        target = part[0][0].device if device is None else device
        batches.append({key: value.to(target) for key, value in batch.items()})
    return batches
