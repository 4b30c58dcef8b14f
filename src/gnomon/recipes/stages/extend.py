"""The extend stage: change the trained model's structure for inference."""

from __future__ import annotations

from typing import Any

from gnomon.recipes.schema import ExtendStage
from gnomon.recipes.stages.context import StageContext

__all__ = ["extend"]


def extend(stage: ExtendStage, model: Any, context: StageContext) -> tuple[Any, dict[str, Any]]:
    """Apply the stage's architecture methods in order."""
    layers: list[dict[str, Any]] = []
    for use in stage.methods:
        model, found = context.apply(use, model, {})
        layers.extend(found)
    return model, {"layers": layers} if layers else {}
