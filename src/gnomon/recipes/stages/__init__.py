"""The stages: each takes a model and a context, changes the model, and returns it with what is worth reporting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gnomon.recipes.schema import Stage
from gnomon.recipes.stages.compress import compress
from gnomon.recipes.stages.context import StageContext
from gnomon.recipes.stages.extend import extend
from gnomon.recipes.stages.merge import merge
from gnomon.recipes.stages.select import select
from gnomon.recipes.stages.train import train

__all__ = ["StageContext", "run_stage"]

_STAGES: dict[str, Callable[..., tuple[Any, dict[str, Any]]]] = {
    "select": select,
    "train": train,
    "compress": compress,
    "extend": extend,
    "merge": merge,
}


def run_stage(kind: str, stage: Stage, model: Any, context: StageContext) -> tuple[Any, dict[str, Any]]:
    """Run one stage other than `evaluate`; return the model and the details for the report."""
    if kind not in _STAGES:  # evaluation changes no model
        return model, {}
    return _STAGES[kind](stage, model, context)
