"""The measures during training: one fixed set of texts, measured at each evaluation."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gnomon.errors import DataError
from gnomon.evals.matrix_nuclear_norm.report import RepresentationReport, RepresentationWarning, representation_report

__all__ = ["RepresentationCallback"]


class RepresentationCallback(TrainerCallback):
    """Logs the measures of a fixed set of texts whenever the `Trainer` evaluates.

    The numbers join the evaluation's metrics (so `metric_for_best_model` may name them) and the log history.
    A callback cannot reach the trainer's trackers by itself: give `log=trainer.log` for W&B, TensorBoard and
    the like.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
    texts : sequence of str
        The probe; the same texts each time, so that lengths do not change between measurements.
    prefix : str, default "eval_"
        Prefix of the logged names.
    log : callable, optional
        Such as ``trainer.log``; default: append to ``state.log_history``.
    **report_options
        For `representation_report`: `layers`, `max_length`, `skip_first`, `batch_size`, `spectra`...

    Attributes
    ----------
    reports : list of (int, RepresentationReport)
        Step and report of each evaluation.

    Raises
    ------
    DataError
        When there are no texts.

    Examples
    --------
    >>> callback = RepresentationCallback(tokenizer=None, texts=["one text"])
    >>> callback.reports
    []
    """

    def __init__(
        self,
        tokenizer: Any,
        texts: Sequence[str],
        *,
        prefix: str = "eval_",
        log: Callable[[dict[str, float]], None] | None = None,
        **report_options: Any,
    ) -> None:
        if isinstance(texts, str) or not texts:
            raise DataError("The probe must be a list of at least one text.")
        self.tokenizer = tokenizer
        self.texts = list(texts)
        self.prefix = prefix
        self.log = log
        self.report_options = report_options
        self.reports: list[tuple[int, RepresentationReport]] = []

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure the model and hand the numbers on."""
        with warnings.catch_warnings():
            if self.reports:  # said at the first evaluation; the texts have not changed
                warnings.simplefilter("ignore", RepresentationWarning)
            report = representation_report(kwargs["model"], self.tokenizer, self.texts, **self.report_options)
        self.reports.append((state.global_step, report))
        numbers = {self.prefix + name: value for name, value in report.summary().items()}
        metrics = kwargs.get("metrics")
        if metrics is not None:
            metrics.update(numbers)
        if self.log is not None:
            self.log(dict(numbers))
        elif state.is_world_process_zero:
            state.log_history.append({**numbers, "epoch": state.epoch or 0, "step": state.global_step})
