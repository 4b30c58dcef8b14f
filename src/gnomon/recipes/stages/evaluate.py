"""Measuring a model: perplexity with its windows, and any metric of the catalog."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gnomon.common.pairs import Example
from gnomon.evals.completions import exact_match
from gnomon.evals.perplexity import perplexity
from gnomon.recipes.options import bind, call_of
from gnomon.recipes.schema import EvaluateStage
from gnomon.recipes.stages.context import Prepared, StageContext

__all__ = ["evaluate"]


def _figure(value: float, low: float | None = None, high: float | None = None) -> dict[str, float | None]:
    def finite(x: float | None) -> float | None:
        return float(x) if x is not None and math.isfinite(x) else None

    return {"value": finite(value), "low": finite(low), "high": finite(high)}


def _within(data: Prepared, tokens: int) -> list[Example]:
    """Return the first validation rows with no more tokens than that in all; one at least."""
    ends = np.cumsum([len(example.ids) for example in data.valid_examples])
    return list(data.valid_examples[: max(1, int(np.searchsorted(ends, tokens, side="right")))])


def evaluate(stage: EvaluateStage, model: Any, context: StageContext) -> dict[str, Any]:
    """Return ``{"metrics": {name: {value, low, high}}, "windows": {...}}``; the model is left as it was."""
    metrics: dict[str, dict[str, float | None]] = {}
    windows: dict[str, list[float]] = {}
    for use in stage.metrics:
        if use.uses == "perplexity":
            tokens: Any = context.data.valid_tokens[: stage.tokens]
            options = {"context": min(context.data.context, tokens.numel()), **use.with_}
            if context.data.paired:
                tokens = [{"input_ids": e.ids, "labels": e.labels} for e in _within(context.data, stage.tokens)]
            found = perplexity(model, tokens, engine=context.engine, **options)
            metrics["perplexity"] = _figure(found.value, found.low, found.high)
            windows = {"nll": found.window_nll.tolist(), "tokens": found.window_tokens.tolist()}
            continue
        if use.uses == "accuracy":
            pairs = context.data.valid_pairs[: stage.texts]
            answers = exact_match(
                model,
                context.data.tokenizer,
                [pair.prompt for pair in pairs],
                [pair.completion for pair in pairs],
                **use.with_,
            )
            metrics["accuracy"] = _figure(answers.value, answers.low, answers.high)
            continue
        entry = call_of(use.uses, "evaluate")
        offered = {
            "model": model,
            "tokenizer": context.data.tokenizer,
            "texts": context.data.valid_texts[: stage.texts],
            "seed": context.seed,
            "engine": context.engine,
        }
        summary = entry(**bind(entry, offered, use.with_)).summary()
        metrics |= {f"{use.uses}.{name}": _figure(value) for name, value in summary.items()}
    return {"metrics": metrics, "windows": windows}
