"""Gradient compression in `transformers.Trainer`."""

from __future__ import annotations

import gc
import os
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

from gnomon.common.ranks import ranks
from gnomon.common.trainer_logs import add_to_logs
from gnomon.errors import MethodError, ModelError, NoEffectWarning
from gnomon.optim.econtrol.feedback import Kind
from gnomon.optim.econtrol.state import ErrorFeedback

__all__ = ["EControlCallback"]


class EControlCallback(TrainerCallback):
    """Registers `econtrol_hook` on the model a `Trainer` has wrapped, and saves its memory with each checkpoint.

    Each process writes ``econtrol-<rank>.pt`` into the checkpoint folder and reads it on resume. Logs get
    ``econtrol_ratio``: bytes received over those of a ring all-reduce. With one process nothing is done, and a warning
    says so.

    Parameters
    ----------
    ratio : float, default 0.01
    eta : float, optional
    kind : {"econtrol", "ec", "ef21", "ef21-sgdm", "none"}, default "econtrol"
    compressor : {"topk", "randk", "sign", "lowrank", "rounding", "identity"}, default "topk"
    init, start_iter, granularity, dense_below, nonfinite, beta
        As for `ErrorFeedback`.

    Examples
    --------
    >>> callback = EControlCallback(ratio=0.01)
    >>> # Trainer(..., callbacks=[callback]) under torchrun
    """

    def __init__(
        self,
        ratio: float = 0.01,
        eta: float | None = None,
        kind: Kind = "econtrol",
        compressor: Literal["topk", "randk", "sign", "lowrank", "rounding", "identity"] = "topk",
        init: Literal["dense", "compressed"] = "dense",
        start_iter: int = 0,
        granularity: Literal["layerwise", "global"] = "layerwise",
        dense_below: int = 1024,
        nonfinite: Literal["raise", "skip"] = "raise",
        beta: float = 0.1,
    ) -> None:
        self.state = ErrorFeedback(
            kind,
            compressor=compressor,
            ratio=ratio,
            eta=eta,
            beta=beta,
            init=init,
            start_iter=start_iter,
            granularity=granularity,
            dense_below=dense_below,
            nonfinite=nonfinite,
        )
        self._registered = False

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        """Find the wrapper and register the hook."""
        if self._registered:
            return
        if ranks().num_processes == 1:
            warnings.warn(
                "gradient compression has nothing to do in a single process. Start several with torchrun.",
                NoEffectWarning,
                stacklevel=2,
            )
            return
        if args.fp16:
            raise MethodError(
                "fp16 = True: the Trainer's loss scale changes the units of gradients under the memory, and callbacks "
                "are not told it. Train with bf16=True, or register the state in your own loop with state.set_scale."
            )
        # A callback is given the inner model only; the wrapper is whoever holds it.
        wrapper = next((o for o in gc.get_objects() if type(o) is DistributedDataParallel and o.module is model), None)
        if wrapper is None:
            raise ModelError(
                "the Trainer has not wrapped the model in DistributedDataParallel, so gradients cannot be compressed. "
                "Train without FSDP or DeepSpeed, or leave this callback out."
            )
        self.state.register(wrapper)
        self._registered = True
        folder = _resumed_from(args, state)
        file = None if folder is None else _file(folder)
        if file is not None and not file.is_file():
            file = _file(folder, 0)  # type: ignore[arg-type]  # saved with fewer processes
        if file is not None and file.is_file():
            self.state.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write this process's memory into the checkpoint."""
        if self._registered:
            file = _file(Path(args.output_dir) / f"checkpoint-{state.global_step}")
            file.parent.mkdir(parents=True, exist_ok=True)
            part = file.with_suffix(".part")
            torch.save(self.state.state_dict(), part)
            os.replace(part, file)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Add the traffic so far to the logs."""
        if self._registered and self.state.iteration:
            add_to_logs(state, logs, {"econtrol_ratio": self.state.statistics()["ratio"]})


def _file(folder: Path, rank: int | None = None) -> Path:
    return folder / f"econtrol-{ranks().process_index if rank is None else rank}.pt"


def _resumed_from(args: Any, state: Any) -> Path | None:
    """Return the checkpoint that training goes on from, by the step it begins at."""
    if not state.global_step:
        return None
    folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
    return folder if folder.is_dir() else None
