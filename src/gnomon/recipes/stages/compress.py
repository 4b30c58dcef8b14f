"""The compress stage: prune, quantise, repair, with a few calibration rows."""

from __future__ import annotations

from typing import Any

from gnomon.recipes.options import Lazy
from gnomon.recipes.schema import CompressStage
from gnomon.recipes.stages.context import StageContext

__all__ = ["compress"]


def compress(stage: CompressStage, model: Any, context: StageContext) -> tuple[Any, dict[str, Any]]:
    """Apply the stage's compressors in order; `original_model` is the model as it came into the stage."""
    layers: list[dict[str, Any]] = []
    model.eval()
    calibration = Lazy(lambda: context.calibration(stage.calibration))
    for use in stage.methods:
        model, found = context.apply(use, model, {"calibration": calibration})
        layers.extend(found)
    return model, {"layers": layers}
