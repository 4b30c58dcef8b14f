"""What a run would do, and about how much memory it needs, without doing it."""

from __future__ import annotations

from typing import Any

from gnomon.recipes.arms import arms_of
from gnomon.recipes.options import check_recipe
from gnomon.recipes.prepare import build_model, check_methods, prepare_data
from gnomon.recipes.schema import Recipe, TrainStage
from gnomon.recipes.stages.train import build_optimizer, steps_of, tokens_per_row

__all__ = ["plan"]


def plan(recipe: Recipe) -> dict[str, Any]:
    """Return the stages with steps and expected memory; nothing is trained and no model weights are made.

    Expected memory of training is weights, gradients and optimizer state (measured on parameters without
    storage) plus an estimate of the activations: 34 bytes per token, block and hidden unit in float32 terms
    doubled, and the logits with their gradient. Treat it as a guide.
    """
    check_recipe(recipe)
    data = prepare_data(recipe)
    model = build_model(recipe.model, vocab_size=len(data.tokenizer), context=data.context, seed=recipe.seed, meta=True)
    check_methods(recipe, model)
    parameters = sum(p.numel() for p in model.parameters())
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    stages = []
    for index, (kind, stage) in enumerate(recipe.steps):
        entry: dict[str, Any] = {
            "index": index,
            "kind": kind,
            "methods": [u.model_dump(by_alias=True) for u in getattr(stage, "methods", getattr(stage, "metrics", []))],
        }
        if isinstance(stage, TrainStage):
            length = tokens_per_row(data)
            rows = len(data.train_examples) or data.train_tokens.numel() // data.context
            entry["steps"] = steps_of(stage, rows, length)
            entry["tokens"] = round(entry["steps"] * stage.batch_size * length)
            entry["memory_bytes"] = 2 * weights + _state(stage, model) + _activations(stage, model, data.context)
        else:
            entry["memory_bytes"] = 2 * weights if kind == "compress" else weights
        stages.append(entry)
    arms = arms_of(recipe)
    return {
        "name": recipe.name,
        "parameters": parameters,
        "weight_bytes": weights,
        "data": dict(data.facts),
        "stages": stages,
        "arms": [arm.name for arm in arms],
        "seeds": recipe.seeds,
        "recipe": recipe.plain(),
    }


def _state(stage: TrainStage, model: Any) -> int:
    """Bytes of optimizer state, by the convention that groups with a `rank` keep low-rank moments."""
    total = 0
    for group in build_optimizer(stage, model).param_groups:
        for p in group["params"]:
            if "rank" in group and p.ndim == 2:
                short, long = sorted(p.shape)
                rank = min(int(group["rank"]), short)
                total += 4 * (short * rank + 2 * long * rank)
            else:
                total += 8 * p.numel()
    return total


def _activations(stage: TrainStage, model: Any, context: int) -> int:
    config = model.config
    tokens = -(-stage.batch_size // stage.accumulate) * context
    width = int(getattr(config, "hidden_size", 0) or 0)
    layers = int(getattr(config, "num_hidden_layers", 0) or 0)
    per_block = 4 if stage.gradient_checkpointing else 68
    half = 2 if stage.precision == "bfloat16" else 1
    return int(tokens * (per_block * width * layers // half + 8 * int(config.vocab_size)))
