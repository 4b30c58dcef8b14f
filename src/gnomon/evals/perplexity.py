"""Perplexity of a causal language model: token-weighted, with an interval, over windows of any stride.

    nll = sum over windows, over their scored tokens, of -log p(token | the tokens before it in the window) / tokens
    perplexity = exp(nll)

Windows weigh by their number of scored tokens, so padding, a short last window and the batch size do not move the
value. A stream of tokens is cut into windows of `context` tokens that start every `stride` tokens; each token is
scored once, in the first window that contains it. The first token of the stream (with ``stride == context``: of every
window) is not scored, since nothing precedes it. A small stride gives each token more context and costs
``context / stride`` times the work. The interval is a bootstrap over windows, which keeps the dependence between
neighbouring tokens.

Logits are brought to float32 (or kept in float64) one sequence at a time; no more than one batch of logits exists.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import stats
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from gnomon import catalog
from gnomon.common.engine import Engine, run_all
from gnomon.common.layers import unwrap
from gnomon.common.surgery import recorded
from gnomon.errors import DataError, MethodError, ModelError
from gnomon.evals._inference import check_vocabulary, evaluating, input_device, pad_right

__all__ = ["Perplexity", "perplexity"]

LONGEST_DEFAULT = 2048
"""Tokens per window when `context` is not given and the model allows more."""

RESAMPLES = 2000

BATCHES_PER_TASK = 16
"""Batches of windows in one task of ``engine="ray"``: each task reads the model once."""


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of one model on one text, with what is needed to compare it with another model's.

    Attributes
    ----------
    value : float
        Perplexity, ``exp(nll)``.
    low, high : float
        Bootstrap interval of `value` over windows; NaN with a single window.
    nll : float
        Mean negative log-likelihood in nats per scored token.
    tokens : int
        Number of scored tokens.
    window_nll : np.ndarray of float64, shape (windows,)
        Sum of the negative log-likelihoods of each window.
    window_tokens : np.ndarray of int64, shape (windows,)
        Number of scored tokens of each window.
    confidence : float
        Level of the interval.
    """

    value: float
    low: float
    high: float
    nll: float
    tokens: int
    window_nll: np.ndarray[Any, np.dtype[np.float64]] = field(repr=False)
    window_tokens: np.ndarray[Any, np.dtype[np.int64]] = field(repr=False)
    confidence: float = 0.95

    def summary(self) -> dict[str, float]:
        """Return the numbers as plain floats; the interval is left out where one window gives none."""
        numbers = {"perplexity": self.value, "nll": self.nll, "tokens": float(self.tokens)}
        if math.isfinite(self.low) and math.isfinite(self.high):
            numbers |= {"perplexity_low": self.low, "perplexity_high": self.high}
        return numbers

    def paired_difference(self, other: Perplexity) -> tuple[float, float, float]:
        """Return how much higher this model's nll is than `other`'s, on the same windows.

        Windows are resampled for both models together (seed 0), so what makes a window hard for both cancels.

        Parameters
        ----------
        other : Perplexity
            The result of another model on the same windows (same text, context and stride).

        Returns
        -------
        (difference, low, high) : tuple of float
            Nats per token; low and high are NaN with a single window.

        Raises
        ------
        MethodError
            When the windows are not the same.
        """
        if not np.array_equal(self.window_tokens, other.window_tokens):
            raise MethodError(
                f"The two results are not on the same windows: {len(self.window_tokens)} windows with "
                f"{self.tokens} scored tokens against {len(other.window_tokens)} with {other.tokens}. "
                "Score both models on the same text with the same context, stride and tokenizer."
            )
        gaps = self.window_nll - other.window_nll
        low, high = _interval(gaps, self.window_tokens, self.confidence)
        return float(gaps.sum() / self.tokens), low, high


@dataclass(frozen=True)
class _Window:
    """One forward pass: token ids, and which of them are scored (never the first)."""

    ids: Int[Tensor, " tokens"]
    scored: Tensor


def perplexity(
    model: nn.Module,
    tokens_or_dataset: Any,
    *,
    context: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    confidence: float = 0.95,
    on_progress: Callable[[int, int], None] | None = None,
    engine: Engine = "local",
) -> Perplexity:
    """Return the perplexity of a causal language model, token-weighted, with its interval.

    Parameters
    ----------
    model : PreTrainedModel or PeftModel
        Any model with causal `logits`, in any dtype. It is left as it was: weights, training flags, random
        state.
    tokens_or_dataset : LongTensor, mapping or iterable
        A 1-D tensor of token ids (one stream); a tensor (n, tokens) whose rows are texts of their own; a
        mapping with `input_ids` and, optionally, `attention_mask` (0: padding, on either side) and `labels`
        (-100: context only, not scored); or an iterable of any of these (a list, a `DataLoader`, a
        `datasets.Dataset`).
    context : int, optional
        Tokens per window; default: what the model allows, at most 2048.
    stride : int, optional
        Tokens between the starts of two windows, 1 to `context`; default `context`.
    batch_size : int, default 8
        Windows per forward pass; changes speed and memory only.
    confidence : float, default 0.95
        Level of the bootstrap interval.
    on_progress : callable, optional
        Called as the work goes on with the windows done and the windows in all.
    engine : {"local", "ray"}, default "local"
        ``"ray"`` spreads the batches over a Ray cluster (see `gnomon.common.engine.run_all`); the numbers are the
        same.

    Returns
    -------
    Perplexity

    Raises
    ------
    DataError
        When there is nothing to score, a row has no `input_ids`, or a token id is not in the model's
        vocabulary.
    MethodError
        When an option is out of its range.
    ModelError
        When the model is not a causal language model or allows fewer positions than `context`.

    Examples
    --------
    >>> from gnomon.common.models import tiny
    >>> result = perplexity(tiny("llama"), torch.arange(200), context=64, stride=32)
    >>> result.tokens
    199
    """
    _check_options(batch_size, confidence)
    _check_causal(model)
    context = _checked_context(model, context)
    stride = context if stride is None else stride
    if not 1 <= stride <= context:
        raise MethodError(f"stride is {stride}; it must be from 1 to context ({context}), or tokens would be skipped.")
    windows = [w for text in _texts(tokens_or_dataset) for w in _windows(text, context, stride) if w.scored.any()]
    if not windows:
        raise DataError("There is no token to score: a text needs 2 tokens or more, since the first has no context.")
    check_vocabulary(model, (w.ids for w in windows))
    # Windows of like length share a batch, so that little is spent on padding.
    order = sorted(range(len(windows)), key=lambda i: -len(windows[i].ids))
    step = batch_size * (BATCHES_PER_TASK if engine == "ray" else 1)
    parts = [order[start : start + step] for start in range(0, len(order), step)]
    sums = np.zeros(len(windows))
    done = 0

    def enter(position: int, found: list[float]) -> None:
        nonlocal done
        sums[parts[position]] = found
        done += len(found)
        if on_progress is not None:
            on_progress(done, len(order))

    with evaluating(model):
        run_all(
            partial(_score_in_batches, model, batch_size),
            [[windows[i] for i in part] for part in parts],
            engine=engine,
            on_result=enter,
        )
    counts = np.array([int(w.scored.sum()) for w in windows], dtype=np.int64)
    nll = float(sums.sum() / counts.sum())
    low, high = _interval(sums, counts, confidence)
    with np.errstate(over="ignore"):
        value, low, high = (float(np.exp(x)) for x in (nll, low, high))
    return Perplexity(value, low, high, nll, int(counts.sum()), sums, counts, confidence)


def _check_options(batch_size: int, confidence: float) -> None:
    if batch_size < 1:
        raise MethodError(f"batch_size is {batch_size}; it must be 1 or more.")
    if not 0 < confidence < 1:
        raise MethodError(f"confidence is {confidence}; it must lie between 0 and 1, such as 0.95.")


def _check_causal(model: nn.Module) -> None:
    inner: Any = unwrap(model)
    name, config = type(inner).__name__, getattr(inner, "config", None)
    causal = name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{name} is an encoder-decoder; perplexity scores causal (decoder-only) language models.")
    if name in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values() and not causal:
        raise ModelError(f"{name} is a masked language model: it sees the token it predicts. Use a causal model.")
    if not hasattr(inner, "get_output_embeddings") or inner.get_output_embeddings() is None:
        raise ModelError(f"{name} has no language-model head, so no logits. Load it with AutoModelForCausalLM.")


def _checked_context(model: nn.Module, context: int | None) -> int:
    limit: int | None = getattr(unwrap(model).config, "max_position_embeddings", None)
    if context is None:
        return min(limit or LONGEST_DEFAULT, LONGEST_DEFAULT)
    if context < 2:
        raise MethodError(f"context is {context}; a window needs 2 tokens or more: one to condition on, one to score.")
    stretched = any(catalog.get(entry["slug"]).pillar == "context" for entry in recorded(model))
    if limit is not None and context > limit and not stretched:
        raise ModelError(
            f"context is {context}, but {type(unwrap(model)).__name__} has {limit} positions. Take "
            f"context={limit} or less, or extend the model first (a method of gnomon.context, or "
            "config.max_position_embeddings)."
        )
    return context


def _texts(source: Any) -> Iterator[_Window]:
    """Yield every text as ids without padding and the mask of tokens that may be scored."""
    if isinstance(source, str):
        raise DataError("Perplexity takes token ids, not text. Tokenise first: tokenizer(text)['input_ids'].")
    if isinstance(source, Mapping):
        yield from _rows(source)
    elif isinstance(source, (Tensor, np.ndarray)):
        yield from _rows({"input_ids": source})
    elif isinstance(source, Iterable):
        items = list(source)
        if items and all(isinstance(item, (int, np.integer)) for item in items):
            yield from _rows({"input_ids": items})
        else:
            for item in items:
                yield from _texts(item)
    else:
        raise DataError(
            f"Cannot read token ids from a {type(source).__name__}. Give a LongTensor, a mapping with "
            "input_ids, or an iterable of these."
        )


def _rows(batch: Mapping[str, Any]) -> Iterator[_Window]:
    if "input_ids" not in batch:
        raise DataError(f"No 'input_ids' among {', '.join(map(str, batch)) or 'no columns'}. Tokenise the text first.")
    ids = _ids(batch["input_ids"], "input_ids")
    mask = _ids(batch["attention_mask"], "attention_mask") if "attention_mask" in batch else torch.ones_like(ids)
    labels = _ids(batch["labels"], "labels") if batch.get("labels") is not None else ids
    for name, other in (("attention_mask", mask), ("labels", labels)):
        if other.shape != ids.shape:
            raise DataError(f"{name} has shape {tuple(other.shape)}, input_ids {tuple(ids.shape)}; they must agree.")
    rows = zip(*(torch.atleast_2d(x) for x in (ids, mask.bool(), labels)), strict=True)
    for row, keep, label in rows:
        yield _Window(row[keep], label[keep] != -100)


def _ids(values: Any, name: str) -> Tensor:
    try:
        tensor = torch.as_tensor(values).cpu()
    except (ValueError, TypeError) as error:
        raise DataError(f"{name} is ragged or not numeric ({error}). Give one row per text, or pad.") from error
    if tensor.numel() == 0:
        tensor = tensor.long()  # an empty list becomes float
    if tensor.is_floating_point() or tensor.is_complex() or not 1 <= tensor.ndim <= 2:
        raise DataError(
            f"{name} must be integers of shape (tokens,) or (texts, tokens); got {tensor.dtype} of shape "
            f"{tuple(tensor.shape)}."
        )
    return tensor.long()


def _windows(text: _Window, context: int, stride: int) -> Iterator[_Window]:
    """Cut one text; a token is scored in the first window that has it, the first token of a window never."""
    length, scored_to = len(text.ids), 0
    for begin in range(0, length, stride):
        end = min(begin + context, length)
        scored = text.scored[begin:end].clone()
        scored[: max(scored_to - begin, 1)] = False
        yield _Window(text.ids[begin:end], scored)
        scored_to = end
        if end == length:
            return


def _score_in_batches(model: nn.Module, batch_size: int, windows: list[_Window]) -> list[float]:
    with torch.no_grad():  # a worker of another process is not inside the caller's `evaluating`
        return [
            nll
            for start in range(0, len(windows), batch_size)
            for nll in _score(model, windows[start : start + batch_size])
        ]


def _score(model: nn.Module, windows: list[_Window]) -> list[float]:
    """Return the summed negative log-likelihood of each window."""
    ids, mask = pad_right([w.ids for w in windows], input_device(model))
    first = min(int(w.scored.int().argmax()) for w in windows) - 1
    keep = ids.shape[1] - first
    extra = {"logits_to_keep": keep} if _keeps_logits(model) else {}
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **extra).logits[:, -keep:]
    return [
        _sequence_nll(row[: len(w.ids) - first - 1], w.ids[first + 1 :], w.scored[first + 1 :])
        for row, w in zip(logits, windows, strict=True)
    ]


def _keeps_logits(model: nn.Module) -> bool:
    return "logits_to_keep" in inspect.signature(unwrap(model).forward).parameters


def _sequence_nll(logits: Float[Tensor, "tokens vocab"], targets: Int[Tensor, " tokens"], scored: Tensor) -> float:
    scored = scored.to(logits.device)
    exact = logits[scored].to(torch.promote_types(logits.dtype, torch.float32))
    losses = cross_entropy(exact, targets.to(logits.device)[scored], reduction="none")
    return float(losses.double().sum())


def _interval(
    sums: np.ndarray[Any, np.dtype[np.float64]],
    counts: np.ndarray[Any, np.dtype[np.int64]],
    confidence: float,
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of sums.sum() / counts.sum() over windows, seed 0."""
    if len(sums) < 2 or not np.isfinite(sums).all():
        return math.nan, math.nan
    batch = max(1, 4_000_000 // len(sums))
    interval = stats.bootstrap(
        (sums, counts),
        lambda s, c, axis: s.sum(axis=axis) / c.sum(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=batch,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(interval.low), float(interval.high)
