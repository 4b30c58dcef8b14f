"""A Trainer callback that logs how the residual stream grows with depth."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gnomon.common.depth import output_variance
from gnomon.common.layers import decoder_blocks, unwrap
from gnomon.common.trainer_logs import add_to_logs, is_measured
from gnomon.errors import MethodError

__all__ = ["ResidualStreamMonitor"]


class ResidualStreamMonitor(TrainerCallback):
    """Logs the variance of every block's output, and on request the gradient norm of every block.

    Values are taken in the steps whose metrics the Trainer logs, from its own training batches; other steps cost
    nothing but an idle hook. They go into the log entry of the step (``state.log_history``, ``trainer_state.json``),
    into the ``logs`` that callbacks behind this one receive, and into `history`.

    Parameters
    ----------
    every : int, optional
        Measure every so many optimizer steps instead of in the steps the Trainer logs.
    gradients : bool, default False
        Log ``gradient_norm/block_<l>`` as well: the norm over all parameters of the block, before clipping.
    prefix : str, default "residual_variance"
        Values are named ``<prefix>/block_<l>`` with l from 1.

    Attributes
    ----------
    history : list of dict
        One entry a measured step: ``{"step": ..., "residual_variance/block_1": ..., ...}``.

    Notes
    -----
    To let a reporter that comes with ``report_to`` see the values, put the monitor in front of it:
    ``trainer.callback_handler.callbacks.insert(0, monitor)``. Under DDP each rank measures its own batches.

    Examples
    --------
    >>> from gnomon.nn.layernorm_scaling import ResidualStreamMonitor
    >>> monitor = ResidualStreamMonitor(every=10)
    >>> monitor.history
    []
    """

    def __init__(self, *, every: int | None = None, gradients: bool = False, prefix: str = "residual_variance") -> None:
        if every is not None and every < 1:
            raise MethodError(
                f"every = {every}. It must be at least 1 optimizer step; None follows the Trainer's logs."
            )
        self.every = every
        self.gradients = gradients
        self.prefix = prefix
        self.history: list[dict[str, float]] = []
        self.active = False
        self._sums: dict[int, Tensor] = {}
        self._counts: dict[int, int] = {}
        self._squares: dict[tuple[int, int], Tensor] = {}
        self._handles: list[Any] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put a hook on every block."""
        self._remove()
        for index, block in enumerate(decoder_blocks(kwargs["model"])):
            self._handles.append(block.register_forward_hook(self._observer(index)))
            if self.gradients:
                for number, parameter in enumerate(p for p in block.parameters() if p.requires_grad):
                    hook = self._gradient_observer(index, number)
                    self._handles.append(parameter.register_post_accumulate_grad_hook(hook))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Decide whether this optimizer step is measured."""
        self._sums.clear()
        self._counts.clear()
        self._squares.clear()
        self.active = bool(unwrap(kwargs["model"]).training) and is_measured(args, state, self.every)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take the values of this step."""
        if not self.active:
            return
        self.active = False
        values: dict[str, float] = {
            f"{self.prefix}/block_{i + 1}": float(total) / self._counts[i] for i, total in sorted(self._sums.items())
        }
        blocks: dict[int, float] = {}
        for (index, _), square in self._squares.items():
            blocks[index] = blocks.get(index, 0.0) + float(square)
        values |= {f"gradient_norm/block_{i + 1}": total**0.5 for i, total in sorted(blocks.items())}
        self.history.append({"step": state.global_step, **values})

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the values to the Trainer's entry of the same step."""
        if not self.history or self.history[-1]["step"] != state.global_step:
            return
        add_to_logs(state, logs, {k: v for k, v in self.history[-1].items() if k != "step"})

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remove the hooks."""
        self._remove()

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.active = False

    def _observer(self, index: int) -> Any:
        def observe(module: nn.Module, args: Any, output: Any) -> None:
            if self.active and module.training:
                hidden = output[0] if isinstance(output, tuple) else output
                with torch.no_grad():
                    variance = output_variance(hidden.detach())
                self._sums[index] = self._sums.get(index, torch.zeros_like(variance)) + variance
                self._counts[index] = self._counts.get(index, 0) + 1

        return observe

    def _gradient_observer(self, index: int, number: int) -> Any:
        def observe(parameter: Tensor) -> None:
            if self.active and parameter.grad is not None:
                grad = parameter.grad.detach()
                grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
                self._squares[index, number] = grad.float().square().sum()

        return observe
