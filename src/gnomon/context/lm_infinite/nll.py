"""The loss of a model by the position of the token it predicts: where does a long text break it?"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gnomon.common.corpora import windows
from gnomon.common.depth import evaluating
from gnomon.common.layers import family, unwrap
from gnomon.errors import DataError, MethodError, ModelError

__all__ = ["PositionNLL", "evaluate_nll_by_position"]


class PositionNLL(NamedTuple):
    """Negative log-likelihood by position.

    Attributes
    ----------
    edges : tuple of int
        Bin b holds the tokens at positions ``edges[b] <= p < edges[b + 1]``; position p has p tokens before it.
    nll : np.ndarray of float64, shape (bins,)
        Mean nats per token of each bin.
    by_position : np.ndarray of float64, shape (length,)
        Mean over texts at each position; NaN at 0, which nothing precedes.
    texts : int
        Texts that were scored.
    """

    edges: tuple[int, ...]
    nll: np.ndarray[Any, np.dtype[np.float64]]
    by_position: np.ndarray[Any, np.dtype[np.float64]]
    texts: int


def evaluate_nll_by_position(
    model: nn.Module,
    text: str | Tensor,
    tokenizer: Any = None,
    *,
    length: int,
    edges: Sequence[int] | None = None,
    max_texts: int = 16,
    batch_size: int = 4,
    chunk: int = 1024,
    on_progress: Callable[[int, int], None] | None = None,
) -> PositionNLL:
    """Score texts of `length` tokens and return the loss by position.

    The model reads `chunk` tokens at a time through its cache, so that neither logits nor (with lm-infinite) keys grow
    with the length.

    Parameters
    ----------
    model : PreTrainedModel or PeftModel
        With lm-infinite or without, to compare. Left as it was.
    text : str or LongTensor
        A text, or token ids: (tokens,) is one stream, cut into texts of `length`; (n, tokens) are n texts of at least
        `length` tokens.
    tokenizer : optional
        Needed for a str.
    length : int
        Tokens per text, at least 2.
    edges : sequence of int, optional
        Ascending bin edges from 1 to `length`; default 1, 2, 4, ... and `length`.
    max_texts, batch_size, chunk : int
        How many texts are scored, how many at once, how many tokens of them at once.
    on_progress : callable, optional
        Called with texts done and texts in all.

    Returns
    -------
    PositionNLL

    Raises
    ------
    DataError
        When the text is shorter than `length`.
    MethodError
        For sizes or edges out of range, or a str without tokenizer.

    Examples
    --------
    >>> from gnomon.common.models import tiny
    >>> found = evaluate_nll_by_position(tiny("llama"), torch.arange(200) % 7, length=40, edges=(1, 20, 40))
    >>> found.nll.shape, found.texts
    ((2,), 5)
    """
    for name, value, least in (("length", length, 2), ("max_texts", max_texts, 1), ("batch_size", batch_size, 1),
                               ("chunk", chunk, 1)):  # fmt: skip
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise MethodError(f"{name} = {value!r}: allowed is a whole number from {least}.")
    bins = _edges(edges, length)
    rows = _rows(text, tokenizer, length)[:max_texts]
    device = next(model.parameters()).device
    total = np.zeros(length)
    with evaluating(model):
        for start in range(0, len(rows), batch_size):
            total += _losses(model, rows[start : start + batch_size].to(device), chunk)
            if on_progress is not None:
                on_progress(min(start + batch_size, len(rows)), len(rows))
    mean = total / len(rows)
    mean[0] = np.nan
    binned = np.array([mean[a:b].mean() for a, b in itertools.pairwise(bins)])
    return PositionNLL(bins, binned, mean, len(rows))


def _edges(edges: Sequence[int] | None, length: int) -> tuple[int, ...]:
    if edges is None:
        return (*(2**n for n in range((length - 1).bit_length())), length)
    found = tuple(int(e) for e in edges)
    if len(found) < 2 or any(a >= b for a, b in itertools.pairwise(found)):
        raise MethodError(f"edges = {found}: allowed are two or more ascending positions, such as (1, 2048, 4096).")
    if found[0] < 1 or found[-1] > length:
        raise MethodError(f"edges = {found}: allowed are positions from 1 to length = {length}.")
    return found


def _rows(text: str | Tensor, tokenizer: Any, length: int) -> Tensor:
    if isinstance(text, str):
        if tokenizer is None:
            raise MethodError("text is a str and tokenizer is missing. Give the model's tokenizer, or token ids.")
        text = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    tokens = text.shape[-1]
    if text.dim() not in (1, 2) or text.is_floating_point():
        raise MethodError(
            f"text is a {text.dtype} tensor of shape {tuple(text.shape)}: allowed are token ids, (tokens,) or "
            "(n, tokens)."
        )
    if tokens < length:
        raise DataError(
            f"the text has {tokens} tokens, length = {length} needs more. Give more text or a smaller length."
        )
    return windows(text, length) if text.dim() == 1 else text[:, :length]


@torch.no_grad()
def _losses(model: nn.Module, rows: Tensor, chunk: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Sum over rows of the loss at each position."""
    count, length = rows.shape
    total = np.zeros(length)
    cache = None
    for start in range(0, length - 1, chunk):
        stop = min(start + chunk, length - 1)
        output = model(input_ids=rows[:, start:stop], cache=cache, use_cache=True)
        logits, cache = getattr(output, "logits", None), getattr(output, "cache", None)
        if logits is None or (cache is None and stop < length - 1):
            missing = "language-model head" if logits is None else "key/value cache"
            raise ModelError(
                f"A {family(model)!r} model ({type(unwrap(model)).__name__}) has no {missing}. Give a ...ForCausalLM."
            )
        targets = rows[:, start + 1 : stop + 1]
        losses = cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
        total[start + 1 : stop + 1] = losses.view(count, -1).double().sum(0).cpu().numpy()
    return total
