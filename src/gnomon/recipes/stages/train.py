"""The train stage: `transformers.Trainer` with the recipe's methods plugged in."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from gnomon import catalog
from gnomon.common.layers import linear_layers
from gnomon.common.memory import tensor_bytes
from gnomon.common.pairs import Example, pad
from gnomon.common.ranks import ranks
from gnomon.errors import ConfigError
from gnomon.progress import Task
from gnomon.recipes.options import bind, call_of, callback_of, split_options
from gnomon.recipes.schema import TrainStage
from gnomon.recipes.stages.context import Prepared, StageContext

__all__ = ["build_optimizer", "steps_of", "tokens_per_row", "train"]

COMPLETE = "gnomon_complete"


class _Rows(Dataset[Any]):
    """Windows of token ids, or prompts with completions, as training rows."""

    def __init__(self, rows: torch.Tensor | Sequence[Example]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> torch.Tensor | Example:
        return self.rows[index]


def _stack(items: list[Any]) -> dict[str, torch.Tensor]:
    if isinstance(items[0], Example):
        return pad(items)
    rows = torch.stack(items)
    return {"input_ids": rows, "labels": rows}


class _Batches:
    """The rows of one epoch as batches in a seeded order; can be gone through again."""

    def __init__(self, rows: torch.Tensor | Sequence[Example], batch_size: int, seed: int) -> None:
        self.rows, self.batch_size, self.seed = rows, batch_size, seed

    def __len__(self) -> int:
        return math.ceil(len(self.rows) / self.batch_size)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        order = torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(self.seed)).tolist()
        for start in range(0, len(order), self.batch_size):
            batch = _stack([self.rows[i] for i in order[start : start + self.batch_size]])
            yield {"attention_mask": torch.ones_like(batch["input_ids"]), **batch}


class _Trainer(Trainer):
    """`Trainer` whose optimizer is made from the recipe when the model stands on its devices."""

    def __init__(self, *, stage: TrainStage, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._stage = stage
        self.optimizer: torch.optim.Optimizer | None

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = build_optimizer(self._stage, self.model if model is None else model)
        return self.optimizer


def with_own_lr(stage: TrainStage) -> TrainStage:
    """Return the stage with the learning rate that its adapter brings, taken out of the adapter's options."""
    for place, use in enumerate(stage.methods):
        if catalog.get(use.uses).plugs == "adapter" and "lr" in use.with_:
            rest = {name: value for name, value in use.with_.items() if name != "lr"}
            methods = list(stage.methods)
            methods[place] = use.model_copy(update={"with_": rest})
            return stage.model_copy(update={"methods": methods, "lr": use.with_["lr"]})
    return stage


def build_optimizer(stage: TrainStage, model: torch.nn.Module) -> torch.optim.Optimizer:
    """Make the optimizer a train stage asks for: its method of that kind, or AdamW.

    An optimizer's options go to its parameter-group function where that takes them, else to its constructor;
    the learning rate is the stage's unless the method brings its own.
    """
    stage = with_own_lr(stage)
    use = next((u for u in stage.methods if catalog.get(u.uses).plugs == "optimizer"), None)
    if use is None:
        decayed = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
        plain = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": stage.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=stage.lr)
    own, of_groups = split_options(use.uses, use.with_)
    make_groups = catalog.get(use.uses).recipe.get("groups")
    if make_groups:
        parameters: Any = catalog.resolve(make_groups)(model, **of_groups)
    else:
        parameters = [p for p in model.parameters() if p.requires_grad]
    return catalog.load(use.uses)(parameters, **{"lr": stage.lr, **own})


def steps_of(stage: TrainStage, rows: int, tokens_per_row: float) -> int:
    """Return the number of optimizer steps of a stage: its tokens over the tokens of one step, rounded up.

    Parameters
    ----------
    stage : TrainStage
    rows : int
        Training rows; decides with `epochs`.
    tokens_per_row : float
        The context, or the mean length of prompts with completions; decides with `tokens`.
    """
    if stage.epochs is not None:
        return math.ceil(stage.epochs * rows / stage.batch_size)
    return math.ceil((stage.tokens or 0) / (stage.batch_size * tokens_per_row))


def tokens_per_row(data: Prepared) -> float:
    """Return the mean number of tokens in a training row."""
    return len(data.train_tokens) / len(data.train_examples) if data.paired else data.context


class _Watch(TrainerCallback):
    """Progress, the run's events, and a mark in each checkpoint that is whole."""

    def __init__(self, context: StageContext, task: Task) -> None:
        self.context = context
        self.task = task

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.task.update(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs and state.is_world_process_zero:
            self.task.update(state.global_step, f"loss {float(logs['loss']):.3f}")
            self.context.event({"event": "train", "step": state.global_step, "loss": float(logs["loss"])})

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE).touch()


class _KeepZeros(TrainerCallback):
    """Sets the weights that an earlier stage pruned back to zero after every step."""

    def __init__(self, model: torch.nn.Module, least: float = 0.1) -> None:
        self.pruned: list[tuple[torch.Tensor, torch.Tensor]] = []
        for layer in linear_layers(model).values():
            weight: Any = layer.weight
            zero = weight.detach() == 0
            if float(zero.float().mean()) >= least:
                self.pruned.append((weight, zero))

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for weight, zero in self.pruned:
            weight.masked_fill_(zero.to(weight.device), 0.0)


def _last_whole_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint that was written to the end; remove what a kill left behind."""
    whole: list[Path] = []
    for path in folder.glob("checkpoint-*"):
        if (path / COMPLETE).exists():
            whole.append(path)
        else:
            shutil.rmtree(path, ignore_errors=True)
    return max(whole, key=lambda p: int(p.name.rpartition("-")[2]), default=None)


@contextmanager
def _own_randomness() -> Iterator[None]:
    """The Trainer seeds globally; outside the stage the random state is as it was before."""
    import random

    import numpy as np

    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 (the Trainer seeds this one)
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


def train(stage: TrainStage, model: Any, context: StageContext) -> tuple[Any, dict[str, Any]]:
    """Train the model; resumes from the last whole checkpoint in the stage's folder."""
    stage = with_own_lr(stage)
    rows: Any = context.data.train_examples or context.rows()
    steps = steps_of(stage, len(rows), tokens_per_row(context.data))
    offered = {
        "batches": _Batches(rows, stage.batch_size, context.seed),
        "lr": stage.lr,
        "num_training_steps": steps,
    }
    for use in stage.methods:
        if catalog.get(use.uses).plugs in ("architecture", "adapter"):
            model, _ = context.apply(use, model, offered)
    offered |= {"model": model, "seed": context.seed}
    with _own_randomness(), context.progress.task(context.label, steps) as task:
        trainer = _Trainer(
            stage=stage,
            model=model.train(),
            args=_arguments(stage, context, steps),
            train_dataset=_Rows(rows),
            data_collator=_stack,
            # last, so that a checkpoint is marked whole only when every method has saved its own part
            callbacks=[*_callbacks(stage, offered), _Watch(context, task)],
        )
        # The default printers would write their own progress and log lines between ours.
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        checkpoint = _last_whole_checkpoint(Path(trainer.args.output_dir))
        if checkpoint is not None:
            context.progress.say(f"{context.label}: going on at {checkpoint.name}")
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    curve = [[int(e["step"]), float(e["loss"])] for e in trainer.state.log_history if "loss" in e]
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    details: dict[str, Any] = {
        "loss_curve": curve,
        "steps": steps,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "weight_bytes": tensor_bytes(model),
        "optimizer_bytes": _state_bytes(optimizer),
    }
    return trainer.accelerator.unwrap_model(trainer.model).cpu().eval(), details


def _state_bytes(optimizer: Any) -> int:
    return tensor_bytes(list(optimizer.state.values())) if optimizer is not None else 0


def _callbacks(stage: TrainStage, offered: Mapping[str, Any]) -> list[TrainerCallback]:
    found: list[TrainerCallback] = []
    for use in stage.methods:
        kind = catalog.get(use.uses).plugs
        make = callback_of(use.uses)
        if make is not None:
            made = make(**bind(make, offered, split_options(use.uses, use.with_)[1]))
            found += [] if made is None else [made]
        elif kind not in ("architecture", "adapter", "optimizer"):
            make = call_of(use.uses, "train")
            found.append(make(**bind(make, offered, use.with_)))
    if stage.keep_zeros:
        keep = _KeepZeros(offered["model"])
        found += [keep] if keep.pruned else []
    return found


def _arguments(stage: TrainStage, context: StageContext, steps: int) -> TrainingArguments:
    world = ranks().num_processes
    rows, rest = divmod(stage.batch_size, world * stage.accumulate)
    if rest or rows == 0:
        raise ConfigError(
            f"train.batch_size = {stage.batch_size} does not divide among {world} processes x {stage.accumulate} "
            f"accumulated passes. Make it a multiple of {world * stage.accumulate}."
        )
    return TrainingArguments(
        output_dir=str(context.work / "checkpoints"),
        max_steps=steps,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=stage.accumulate,
        learning_rate=stage.lr,
        lr_scheduler_type=stage.schedule,
        warmup_steps=round(stage.warmup * steps),
        weight_decay=stage.weight_decay,
        max_grad_norm=stage.max_grad_norm,
        bf16=stage.precision == "bfloat16",
        activation_checkpointing=stage.gradient_checkpointing,
        logging_strategy="steps",
        logging_steps=max(1, steps // 50),
        save_strategy="steps",
        save_steps=stage.checkpoint_every or max(10, steps // 10),
        save_total_limit=2,
        report_to=stage.report_to or "none",
        seed=context.seed,
        data_seed=context.seed,
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
        remove_unused_columns=False,
    )
