"""The Trainer callback: snapshots while training, one mean, put into the model at the end."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist
from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainerCallback

from gnomon.errors import GnomonWarning, MethodError, ModelError, nearest
from gnomon.merge.checkpoint_averaging import tensors as model_tensors
from gnomon.merge.checkpoint_averaging.running import RunningAverage
from gnomon.merge.checkpoint_averaging.saving import (
    STATE_FILE,
    load_average,
    pending_file,
    read_state,
    save_weights,
    write_state,
)
from gnomon.merge.checkpoint_averaging.snapshots import SnapshotFolder
from gnomon.merge.checkpoint_averaging.timing import Timing

__all__ = ["CheckpointAveraging"]


class CheckpointAveraging(TrainerCallback):
    """Average equidistant snapshots of a training run into one model.

    Parameters
    ----------
    every : {"auto", "epoch"} or int, default "auto"
        When a snapshot is taken: ``"epoch"``, at the end of each epoch (the paper), or after every so many optimizer
        steps. ``"auto"``: each epoch when the run has two whole ones, else ten times in equal distance.
    per_epoch : int, default 1
        Snapshots in an epoch (the paper's few-shot runs take 2).
    snapshots : int, optional
        Instead of `every`: so many snapshots, equidistant over the steps of the run, the last one at its end.
    skip_first : int, default 0
        Leave out that many of the earliest (the paper leaves out none).
    last_k : int, optional
        Average only that many of the latest; needs ``keep="disk"``.
    keep : {"online", "disk"}, default "online"
        ``"online"``: one running mean in float32 in main memory, no disk. ``"disk"``: each snapshot is also a
        checkpoint under ``output_dir/snapshots`` that loads by itself, for choosing among them.
    out : str, optional
        Folder in which the average is saved at the end. Default: none, or ``output_dir/average`` when it is not
        loaded into the model.
    load_at_end : bool, default True
        Put the average into the model when training ends, in place of the last weights and of what
        ``load_best_model_at_end`` loaded.
    space : {"weights", "delta"}, default "weights"
        For LoRA with ``keep="disk"``: see `average_checkpoints`.
    resume_from : str, optional
        Folder of the checkpoint that training resumes from, where it is not ``output_dir/checkpoint-STEP``;
        ``"nothing"`` starts a new average there.
    on_snapshot : callable, optional
        Called with the step and the model after each snapshot, on every rank, such as to score it.

    Attributes
    ----------
    average : RunningAverage
        With ``keep="online"``; on ranks other than the first it is empty unless the model is sharded.
    steps : list of int
        At which the snapshots in the average were taken.

    Raises
    ------
    MethodError
        On options that contradict each other, and when training begins with too few steps for two snapshots.

    Warns
    -----
    GnomonWarning
        With ``load_best_model_at_end``, with BatchNorm layers, and when training ended before a snapshot was due.

    Examples
    --------
    >>> from transformers import Trainer
    >>> callback = CheckpointAveraging(snapshots=10)
    >>> # Trainer(model, args, train_dataset=data, callbacks=[callback]).train()
    >>> callback.average.count
    0
    """

    def __init__(
        self,
        every: Literal["auto", "epoch"] | int = "auto",
        *,
        per_epoch: int = 1,
        snapshots: int | None = None,
        skip_first: int = 0,
        last_k: int | None = None,
        keep: Literal["online", "disk"] = "online",
        out: str | None = None,
        load_at_end: bool = True,
        space: Literal["weights", "delta"] = "weights",
        resume_from: str | None = None,
        on_snapshot: Callable[[int, nn.Module], None] | None = None,
    ) -> None:
        self.timing = Timing(every, per_epoch, snapshots, skip_first)
        if keep not in ("online", "disk"):
            raise MethodError(f"keep = {keep!r} is unknown. {nearest(str(keep), ('online', 'disk'), noun='keep')}")
        if last_k is not None and (last_k < 1 or keep != "disk"):
            raise MethodError(
                f"last_k = {last_k} with keep = {keep!r}: a running mean cannot forget snapshots. Use keep='disk' and "
                "a number of 1 or more, or skip_first."
            )
        if space not in ("weights", "delta"):
            raise MethodError(
                f"space = {space!r} is unknown. {nearest(str(space), ('weights', 'delta'), noun='space')}"
            )
        if space == "delta" and keep != "disk":
            raise MethodError("space = 'delta' averages adapters on disk. Use keep='disk' with it.")
        self.last_k, self.keep, self.out = last_k, keep, out
        self.load_at_end, self.space, self.resume_from = load_at_end, space, resume_from
        self.on_snapshot = on_snapshot
        self.average = RunningAverage()
        self.steps: list[int] = []
        self._seen = 0
        self._written = -1
        self._folder: SnapshotFolder | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Start afresh, or take the state back when training resumes."""
        model = model_tensors.bare(model)
        model_tensors.refuse_split(model)
        self.average, self.steps, self._seen, self._written = RunningAverage(), [], 0, -1
        self.timing.begin(state, args, kwargs.get("train_dataloader"))
        self._folder = SnapshotFolder(Path(args.output_dir) / "snapshots") if self.keep == "disk" else None
        if state.global_step > 0 and self.resume_from != "nothing":
            self._resume(args, state, model)
        if (
            self._folder is not None
            and isinstance(model, PeftModel)
            and model_tensors.is_sharded(dict(model.named_parameters()))
        ):
            raise ModelError("keep = 'disk' cannot load the average into a sharded PEFT model. Use keep='online'.")
        if state.is_world_process_zero:
            self._clear(args, state)
        if args.load_best_model_at_end and self.load_at_end:
            warnings.warn(
                "load_best_model_at_end and CheckpointAveraging both want the model at the end: it will hold the "
                "average; the best checkpoint stays on disk. Set load_at_end=False to keep the best one in the model.",
                GnomonWarning,
                stacklevel=2,
            )
        if any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats for m in model.modules()):
            warnings.warn(
                "The model has BatchNorm layers; the mean of their statistics is not the statistics of the mean. Run "
                "torch.optim.swa_utils.update_bn on the averaged model.",
                GnomonWarning,
                stacklevel=2,
            )

    def _clear(self, args: Any, state: Any) -> None:
        """Remove what an earlier, longer attempt at this run left behind."""
        if self._folder is not None:
            self._folder.keep_only(self._used())
        for file in Path(args.output_dir).glob(pending_file(Path(), 0).name.replace("-0.", "-*.")):
            file.unlink()

    def _resume(self, args: Any, state: Any, model: nn.Module) -> None:
        """Read the state of the checkpoint that training resumes from."""
        named = self.resume_from or (
            args.resume_from_checkpoint if isinstance(args.resume_from_checkpoint, str) else None
        )
        folder = Path(named or Path(args.output_dir) / f"checkpoint-{state.global_step}")
        held = read_state(folder, state.global_step, model_tensors.snapshot_tensors(model), self._holds(model, state))
        self.timing.check_same(held.options, folder)
        self.steps, self._seen = held.steps, held.seen
        if held.tensors:
            self.average.restore(held.tensors, held.dtypes, len(held.steps))
        if self._folder is not None:
            self._folder.check_present(self._used())

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remember where in the epoch the step starts."""
        self.timing.before_step(state)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Take a snapshot when one is due; an epoch's end is seen here, before a checkpoint is written."""
        if self.timing.due(state):
            self._take(args, state, model)
        if control.should_save:
            self._write_state(args, state, model)

    def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Take the snapshot of an epoch whose length was not known."""
        if self.timing.due_at_epoch_end(state, control):
            self._take(args, state, model)
        if control.should_save:
            self._write_state(args, state, model)

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Move mean and count into the checkpoint that was just written.

        They are written before it, so that a run killed in between has them all the same.
        """
        self._write_state(args, state, model)
        waiting = pending_file(Path(args.output_dir), state.global_step)
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and waiting.is_file() and folder.is_dir():
            os.replace(waiting, folder / STATE_FILE)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Put the average into the model, save it, or both."""
        model = model_tensors.bare(model)
        if not self.steps:
            warnings.warn(
                f"Training ended at step {state.global_step} before a snapshot was due ({self.timing.says()}); the "
                "model keeps its last weights.",
                GnomonWarning,
                stacklevel=2,
            )
            return
        out = self.out or (None if self.load_at_end else str(Path(args.output_dir) / "average"))
        if self._folder is not None:
            self._end_on_disk(model, state, Path(out or Path(args.output_dir) / "average"))
        else:
            self._end_online(model, state, out)

    def _end_online(self, model: nn.Module, state: Any, out: str | None) -> None:
        targets = model_tensors.snapshot_tensors(model)
        sharded = model_tensors.is_sharded(targets)
        held = {**self.average.mean, **self.average.latest}
        if out is not None:
            changed = {name: model_tensors.whole(targets[name], part) for name, part in held.items()}
            save_weights(model, Path(out), changed, main=state.is_world_process_zero)
        if self.load_at_end:
            for name, part in held.items():
                model_tensors.assign(targets[name], part)
            if model_tensors.world() > 1 and not sharded:
                model_tensors.broadcast(targets)
        _wait()

    def _end_on_disk(self, model: nn.Module, state: Any, out: Path) -> None:
        assert self._folder is not None
        _wait()
        if state.is_world_process_zero:
            self._folder.average(self._used(), out, self.space)
        _wait()
        if self.load_at_end:
            load_average(model, out)

    def _used(self) -> list[int]:
        return self.steps if self.last_k is None else self.steps[-self.last_k :]

    def _take(self, args: Any, state: Any, model: Any) -> None:
        """Take one snapshot, unless it is one of the first that are skipped."""
        self._seen += 1
        self._written = -1
        if self._seen <= self.timing.skip_first:
            return
        model = model_tensors.bare(model)
        held = model_tensors.snapshot_tensors(model)
        if self._folder is not None:
            save_weights(model, self._folder.path(state.global_step), {}, main=state.is_world_process_zero)
        elif self._holds(model, state):
            parts: dict[str, Tensor] = {key: model_tensors.local(t) for key, t in held.items()}
            self.average.update(parts, name=f"the snapshot at step {state.global_step}")
        self.steps.append(state.global_step)
        if self._folder is not None and self.last_k is not None and state.is_world_process_zero:
            self._folder.keep_only(self._used())
        if self.on_snapshot is not None:
            self.on_snapshot(state.global_step, model)

    def _holds(self, model: nn.Module, state: Any) -> bool:
        """Whether this rank keeps a mean: the first one, and every one when each has its own shards."""
        return bool(state.is_world_process_zero) or model_tensors.is_sharded(model_tensors.snapshot_tensors(model))

    def _write_state(self, args: Any, state: Any, model: Any) -> None:
        if self._written == state.global_step or state.is_hyper_param_search:
            return
        model = model_tensors.bare(model)
        targets = model_tensors.snapshot_tensors(model)
        held = {**self.average.mean, **self.average.latest}
        whole = {name: model_tensors.whole(targets[name], part) for name, part in held.items()}
        if state.is_world_process_zero:
            dtypes = {name: targets[name].dtype for name in held}
            file = pending_file(Path(args.output_dir), state.global_step)
            write_state(file, whole, dtypes, self.steps, self._seen, self.timing.options())
        self._written = state.global_step


def _wait() -> None:
    if model_tensors.world() > 1:
        dist.barrier()
