"""SoRA in `transformers.Trainer` with any optimizer: the proximal step, the schedule, ranks in the logs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Literal

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback

from gnomon.adapters.sora.gates import GateStep
from gnomon.adapters.sora.optimizer import SoRAProximal
from gnomon.adapters.sora.proximal import Prox, check_options
from gnomon.adapters.sora.pruning import repack_sora, sora_summary
from gnomon.adapters.sora.schedule import SparsifyingSchedule, Stage
from gnomon.adapters.sora.tuner import sora_layers
from gnomon.common.trainer_logs import add_to_logs
from gnomon.errors import MethodError, ModelError, NoEffectWarning

__all__ = ["SoRACallback", "sora_callback"]

_STAGE = "sora_stage"


class SoRACallback(TrainerCallback):
    """Trains the gates of a SoRA adapter beside whatever optimizer the `Trainer` has.

    The gates' gradients are taken away from that optimizer before it steps, and the gates move by Adam and the proximal
    map after it. The L1 term is added before the first backward pass of a step, so clipping, accumulation and the loss
    scale see it as if it were part of the loss. The state of the gates is part of the optimizer's, so resuming needs
    nothing.

    With a `SoRAProximal` as the Trainer's optimizer, that one's options count, and this callback adds the L1 term
    before clipping, the schedule and the logs.

    Logs get ``sora_gates`` (not zero), ``sora_kept`` (their share), ``sora_parameters`` and ``sora_xi``; the end of a
    stage enters the log history with its record.

    Parameters
    ----------
    xi, lambda1, prox, xi_times_lr, gate_lr, adapter
        As in `SoRAProximal`.
    schedule : SparsifyingSchedule, optional
        Its thresholds in place of `xi`; the steps of the run are divided among its stages.
    measure : callable, optional
        Takes the model, returns its train and eval metric; called in evaluation mode at the end of every stage.
    repack_after : int, optional
        Drop ranks that have been zero for so many steps (`repack_sora`); one process only. Default never.

    Raises
    ------
    MethodError
        When an option is not allowed.

    Examples
    --------
    >>> callback = SoRACallback(xi=1e-3, schedule=SparsifyingSchedule.spaced(0.0, 1e-3, 5))
    >>> # Trainer(model, ..., callbacks=[callback])
    """

    def __init__(
        self,
        xi: float = 3e-4,
        lambda1: float = 1e-3,
        *,
        prox: Prox = "soft",
        xi_times_lr: bool = False,
        gate_lr: float | None = None,
        schedule: SparsifyingSchedule | None = None,
        measure: Callable[[nn.Module], tuple[float, float]] | None = None,
        repack_after: int | None = None,
        adapter: str | None = None,
    ) -> None:
        check_options(xi, lambda1, prox, gate_lr, (0.9, 0.999), 1e-6)
        if repack_after is not None and (not isinstance(repack_after, int) or repack_after < 1):
            raise MethodError(f"repack_after = {repack_after!r}: a whole number of steps, at least 1, or None.")
        if measure is not None and schedule is None:
            warnings.warn(
                "measure is called at the end of the stages of a schedule, and there is none.",
                NoEffectWarning,
                stacklevel=2,
            )
        self.options: dict[str, Any] = {
            "xi": xi, "lambda1": lambda1, "prox": prox, "xi_times_lr": xi_times_lr, "gate_lr": gate_lr,
            "adapter": adapter,
        }  # fmt: skip
        self.schedule, self.measure, self.repack_after = schedule, measure, repack_after
        self.gates: GateStep | None = None
        self._optimizer: Any = None
        self._handles: list[Any] = []
        self._taken: list[Any] = []

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Find the optimizer inside the Trainer's wrappers and join it."""
        self._leave()
        inner = _inner(optimizer)
        if isinstance(inner, SoRAProximal):
            self.gates = inner.gates
        else:
            self.gates = GateStep(model, **self.options)
            self.gates.check(inner)
            self._handles = [
                inner.register_step_pre_hook(self._before),
                inner.register_step_post_hook(self._after),
            ]
        self._optimizer = inner
        if self.schedule is not None:
            self.schedule.ends(state.max_steps)  # refuses a run that is too short before it starts
            records = [entry["sora_record"] for entry in state.log_history if "sora_record" in entry]
            self.schedule.records = [Stage(**record) for record in records]

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if any(callable(value) for value in (*args[1:], *kwargs.values())):
            raise MethodError("the optimizer's step was given a closure, which SoRACallback does not allow.")
        assert self.gates is not None
        self._taken = self.gates.take(optimizer)

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        assert self.gates is not None
        self.gates.apply(optimizer, self._taken)
        self._taken = []

    def _leave(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Set the threshold of the step and add the L1 term."""
        assert self.gates is not None
        if self.schedule is not None:
            self.gates.xi = self.schedule.xi_at(state.global_step, state.max_steps)
        scaler = getattr(optimizer, "scaler", None)
        self.gates.penalised = False
        self.gates.penalise(1.0 if scaler is None else scaler.get_scale())

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Record a stage that has ended; re-pack."""
        assert self.gates is not None
        if self.schedule is not None:
            done = len(self.schedule.records)
            if done < len(self.schedule.xi) and state.global_step == self.schedule.ends(state.max_steps)[done]:
                self._record(state, model)
        if self.repack_after is not None and state.global_step % self.repack_after == 0:
            repack_sora(model, self._optimizer, self.repack_after, adapter=self.gates.adapter)

    def _record(self, state: Any, model: Any) -> None:
        assert self.schedule is not None
        assert self.gates is not None
        metrics: tuple[float | None, float | None] = (None, None)
        if self.measure is not None:
            training = model.training
            model.eval()
            with torch.no_grad():
                metrics = self.measure(model)
            model.train(training)
        record = self.schedule.record(model, *metrics, self.gates.adapter)
        state.log_history.append({"step": state.global_step, _STAGE: record.stage, "sora_record": asdict(record)})

    def on_log(
        self, args: Any, state: Any, control: Any, model: Any = None, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Add what is left to the logs."""
        if self.gates is None or logs is None or "loss" not in logs:
            return
        found = sora_summary(model, self.gates.adapter)
        values = {
            "sora_gates": found.gates,
            "sora_kept": round(found.kept, 4),
            "sora_parameters": found.parameters,
            "sora_xi": self.gates.xi,
        }
        add_to_logs(state, logs, values)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the optimizer."""
        self._leave()


def _inner(optimizer: Any) -> Optimizer:
    """The optimizer inside accelerate's wrapper."""
    found = optimizer
    while isinstance(found, AcceleratedOptimizer):
        found = found.optimizer
    if not isinstance(found, Optimizer) or "LayerWise" in type(found).__name__:
        raise ModelError(
            f"the Trainer's optimizer is a {type(found).__name__}, which does not step like a torch.optim.Optimizer. "
            "Train SoRA without DeepSpeed and layer-wise optimizers."
        )
    return found


def sora_callback(
    model: nn.Module,
    xi: float = 3e-4,
    lambda1: float = 1e-3,
    *,
    prox: Literal["soft", "authors"] = "soft",
    xi_times_lr: bool = False,
    gate_lr: float | None = None,
    xi_end: float | None = None,
    stages: int = 7,
    spacing: Literal["linear", "log_linear", "exp_linear"] = "linear",
    first: float = 50.0,
    further: float = 15.0,
    repack_after: int | None = None,
) -> TrainerCallback:
    """Return the callback that a recipe's train stage needs beside `apply_sora`.

    Parameters
    ----------
    model : PeftModel
        With a SoRA adapter.
    xi, lambda1, prox, xi_times_lr, gate_lr, repack_after
        As in `SoRACallback`.
    xi_end : float, optional
        With it the threshold rises from `xi` to `xi_end` over the run; default it stays.
    stages : int, default 7
        Thresholds, the first included (authors' script: 7).
    spacing : {"linear", "log_linear", "exp_linear"}, default "linear"
    first, further : float, default 50 and 15
        How long the first and each further stage lasts, relative to each other (authors' script: epochs).

    Raises
    ------
    MethodError
        When an option is not allowed.
    ModelError
        When the model has no SoRA layers.
    """
    sora_layers(model)
    schedule: Any = None
    if xi_end is not None:
        schedule = SparsifyingSchedule.spaced(xi, xi_end, stages, spacing, first=first, further=further)
    return SoRACallback(
        xi,
        lambda1,
        prox=prox,
        xi_times_lr=xi_times_lr,
        gate_lr=gate_lr,
        schedule=schedule,
        repack_after=repack_after,
    )
