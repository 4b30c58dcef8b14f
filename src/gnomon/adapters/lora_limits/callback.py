"""The bounds during training: do updates push heads over the threshold?"""

from __future__ import annotations

from typing import Any

import pandas as pd
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gnomon.adapters.lora_limits.bound import lora_norm_bound
from gnomon.adapters.lora_limits.report import summarised
from gnomon.common.trainer_logs import add_to_logs, is_measured
from gnomon.errors import MethodError, ModelError

__all__ = ["LimitsCallback"]


class LimitsCallback(TrainerCallback):
    """Measures the heads every few optimizer steps and adds the summary to what the Trainer logs.

    Parameters
    ----------
    every : int, optional
        Optimizer steps between two measurements; default as often as the Trainer logs. A measurement is one more
        forward pass (with adapters, their attention layers twice) and the errors of a few degrees.
    batches : LongTensor, mapping or iterable, optional
        A fixed probe, measured also before the first step. Default: the last batch of the step that is measured.
    prefix : str, default "limits/"
        Of the logged names.
    **options
        For `lora_norm_bound`: `eps`, `max_degree`, `crossover`, ...

    Attributes
    ----------
    tables : list of (int, DataFrame)
        Step and table of each measurement.

    Raises
    ------
    MethodError
        When `every` is not positive.

    Examples
    --------
    >>> LimitsCallback(every=10).tables
    []
    """

    def __init__(
        self, every: int | None = None, batches: Any = None, *, prefix: str = "limits/", **options: Any
    ) -> None:  # fmt: skip
        if every is not None and every < 1:
            raise MethodError(f"every = {every}: give a number of steps of at least 1, or None for the Trainer's own.")
        self.every = every
        self.batches = batches
        self.prefix = prefix
        self.options = options
        self.tables: list[tuple[int, pd.DataFrame]] = []
        self._due = False
        self._last: dict[str, Any] | None = None
        self._hook: Any = None
        self._fresh: dict[str, float] = {}

    def history(self) -> pd.DataFrame:
        """Return all tables as one, with the column ``step`` in front."""
        parts = [table.assign(step=step) for step, table in self.tables]
        whole = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame({"step": []})
        return whole[["step", *(name for name in whole.columns if name != "step")]]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:  # fmt: skip
        """Measure the probe, or start to look at batches."""
        model: nn.Module = kwargs["model"]
        if self.batches is not None:
            self._measure(model, self.batches, state.global_step)
            return

        def keep(_: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            if self._due and "input_ids" in named:
                self._last = {n: named[n] for n in ("input_ids", "attention_mask") if named.get(n) is not None}

        self._hook = model.register_forward_pre_hook(keep, with_kwargs=True)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:  # fmt: skip
        """Note whether the step that begins is one to measure."""
        self._due = is_measured(args, state, self.every)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:  # fmt: skip
        """Measure the model after its update."""
        if not self._due:
            return
        self._due = False
        batches = self.batches if self.batches is not None else self._last
        self._last = None
        if batches is None:
            raise ModelError(
                "LimitsCallback saw no batch with input_ids in this step. Give it a fixed probe: "
                "LimitsCallback(every=..., batches=...)."
            )
        self._measure(kwargs["model"], batches, state.global_step)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the last measurement to what is logged."""
        logs = kwargs.get("logs")
        if self._fresh and logs is not None and "loss" in logs:
            add_to_logs(state, logs, self._fresh)
            self._fresh = {}

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:  # fmt: skip
        """Stop looking at batches."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _measure(self, model: nn.Module, batches: Any, step: int) -> None:
        table = lora_norm_bound(model, batches, **self.options)
        self.tables.append((step, table))
        self._fresh = {self.prefix + name: value for name, value in summarised(table).items()}
