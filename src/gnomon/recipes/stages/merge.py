"""The merge stage: several models become one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gnomon.common.files import atomic_folder
from gnomon.common.models import load_model, save_model
from gnomon.errors import ConfigError
from gnomon.recipes.options import Lazy
from gnomon.recipes.schema import MergeStage
from gnomon.recipes.stages.context import StageContext

__all__ = ["merge"]


def merge(stage: MergeStage, model: Any, context: StageContext) -> tuple[Any, dict[str, Any]]:
    """Apply the stage's mergers.

    A merger is offered `model`, `models` (the others, loaded), `paths` (folders: the present model and the others)
    and `out` (an empty folder). It returns a model, or writes one to `out`.
    """
    if not stage.methods:
        return model, {}
    if not stage.models:
        raise ConfigError("merge: 'models' is empty. Name the folders or hub ids to merge with the present model.")
    for use in stage.methods:
        own = context.work / "merge-input"
        save_model(model, own, context.data.tokenizer)
        with atomic_folder(context.work / "merged") as out:
            offered = {
                "models": Lazy(lambda: [load_model(path) for path in stage.models]),
                "paths": [own, *map(Path, stage.models)],
                "out": out,
            }
            result, _ = context.apply(use, model, offered)
        written = context.work / "merged"
        model = load_model(written) if (written / "config.json").is_file() else result
    return model, {"notes": [f"merged with {', '.join(stage.models)}"]}
