"""Which keys a query sees, read from the mask that a model hands to its attention function."""

from __future__ import annotations

import torch
from torch import Tensor

from gnomon.adapters.lora_limits.capture import AttentionCall

__all__ = ["causality"]


def causality(call: AttentionCall, row: int, kept: Tensor) -> bool | str:
    """Return whether the kept tokens of one sequence see earlier ones only (True) or all (False), or an obstacle.

    Parameters
    ----------
    call : AttentionCall
    row : int
        The sequence in the batch.
    kept : Tensor (tokens,)
        Places of the tokens that are no padding.

    Returns
    -------
    bool or str
        A sentence where the mask is neither of the two, or holds a bias.
    """
    mask = call.mask
    if mask is None or mask.dim() != 4:
        return call.causal
    mask = mask[min(row, len(mask) - 1)]  # (heads or 1, queries, keys)
    if mask.shape[-1] != call.key.shape[2] or mask.shape[-2] not in (1, call.query.shape[2]):
        return "a mask of another shape"
    mask = mask[..., kept]
    mask = mask[:, kept] if mask.shape[-2] > 1 else mask.expand(-1, len(kept), -1)
    seen = mask
    if mask.dtype != torch.bool:
        seen = mask > torch.finfo(mask.dtype).min / 2
        if bool((mask[seen] != 0).any()):
            return "a bias is added to scores"
    if bool(seen.all()):
        return False
    lower = torch.ones_like(seen[0]).tril()
    return True if bool((seen == lower).all()) else "a mask that is neither causal nor padding"
