"""What callbacks that measure during training share: which steps count, and values among the Trainer's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import TrainerState, TrainingArguments

__all__ = ["add_to_logs", "is_measured"]


def is_measured(args: TrainingArguments, state: TrainerState, every: int | None = None) -> bool:
    """Return whether the optimizer step that begins now is one to measure.

    Parameters
    ----------
    args, state
        As callbacks get them at the beginning of a step.
    every : int, optional
        Steps between two measurements; default as often as the Trainer logs, with its first
        step where it logs that.
    """
    step = state.global_step + 1
    interval = int(every or state.logging_steps)
    return (bool(args.logging_first_step) and step == 1) or (interval > 0 and step % interval == 0)


def add_to_logs(state: TrainerState, logs: dict[str, Any] | None, values: Mapping[str, Any]) -> None:
    """Add values to what the Trainer logs now, and to the copy it has filed already.

    Nothing is added to entries without a training loss (evaluations, the summary at the end).
    """
    if logs is None or "loss" not in logs:
        return
    logs.update(values)
    if state.log_history and state.log_history[-1].get("step") == state.global_step:
        state.log_history[-1].update(values)
