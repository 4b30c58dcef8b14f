"""Measuring a model: perplexity with its windows, and any metric of the catalog."""

from __future__ import annotations

import math
from typing import Any

from gnomon.evals.perplexity import perplexity
from gnomon.recipes.options import bind, call_of
from gnomon.recipes.schema import EvaluateStage
from gnomon.recipes.stages.context import StageContext

__all__ = ["evaluate"]


def _figure(value: float, low: float | None = None, high: float | None = None) -> dict[str, float | None]:
    def finite(x: float | None) -> float | None:
        return float(x) if x is not None and math.isfinite(x) else None

    return {"value": finite(value), "low": finite(low), "high": finite(high)}


def evaluate(stage: EvaluateStage, model: Any, context: StageContext) -> dict[str, Any]:
    """Return ``{"metrics": {name: {value, low, high}}, "windows": {...}}``; the model is left as it was."""
    metrics: dict[str, dict[str, float | None]] = {}
    windows: dict[str, list[float]] = {}
    for use in stage.metrics:
        if use.uses == "perplexity":
            tokens = context.data.valid_tokens[: stage.tokens]
            options = {"context": min(context.data.context, tokens.numel()), **use.with_}
            found = perplexity(model, tokens, engine=context.engine, **options)
            metrics["perplexity"] = _figure(found.value, found.low, found.high)
            windows = {"nll": found.window_nll.tolist(), "tokens": found.window_tokens.tolist()}
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
