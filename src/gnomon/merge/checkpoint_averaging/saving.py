"""Saving a model with other values in some of its tensors, and the callback's state in a Trainer's checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from gnomon.common.files import atomic_folder
from gnomon.common.models import load_model
from gnomon.errors import DataError
from gnomon.merge.checkpoint_averaging.tensors import assign, local, settle, shard, whole

__all__ = ["STATE_FILE", "SavedState", "load_average", "pending_file", "read_state", "save_weights", "write_state"]

STATE_FILE = "checkpoint_averaging.safetensors"


def save_weights(model: nn.Module, folder: Path, changed: Mapping[str, Tensor], *, main: bool) -> None:
    """Save the model, or its adapter, with the tensors in `changed` in place of its own.

    Every rank calls; the first one writes. On the other ranks `changed` may be empty.
    """
    settle(model)
    ties = _ties(model)
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        source = name if name in changed else ties.get(name, name)
        if source in changed:
            state[name] = changed[source].to(tensor.dtype)
        else:
            gathered = whole(tensor, local(tensor))  # all ranks take part, the first one keeps it
            state.update({name: gathered} if main else {})
    if main:
        _write(model, folder, state, ties)


def _write(model: Any, folder: Path, state: dict[str, Tensor], ties: Mapping[str, str]) -> None:
    with atomic_folder(folder) as part:
        if isinstance(model, PeftModel):
            model.peft_config[model.active_adapter].save_pretrained(part)
            kept = get_peft_model_state_dict(model, state_dict=state, save_embedding_layers=False)
            save_file(
                {k: v.contiguous() for k, v in kept.items()}, part / "adapter_model.safetensors", {"format": "pt"}
            )
        elif isinstance(model, PreTrainedModel):
            for name, source in ties.items():
                state[name] = state[source]  # one object, so that save_pretrained sees the tie
            model.save_pretrained(part, state_dict=state)
        else:
            plain = {k: v.contiguous() for k, v in state.items() if k not in ties}
            save_file(plain, part / "model.safetensors", {"format": "pt"})


def _ties(model: nn.Module) -> dict[str, str]:
    """The names of the state dict that stand for a parameter known by another name."""
    first: dict[int, str] = {}
    found = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in first:
            found[name] = first[id(parameter)]
        first.setdefault(id(parameter), name)
    return found


@torch.no_grad()
def load_average(model: nn.Module, folder: Path) -> None:
    """Put the weights saved in `folder` by `save_weights` into the model."""
    if isinstance(model, PeftModel):
        set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
        return
    if isinstance(model, PreTrainedModel):
        values: Mapping[str, Tensor] = load_model(folder).state_dict()
    else:
        values = load_file(folder / "model.safetensors")
    for name, tensor in model.state_dict().items():
        if name in values:
            assign(tensor, shard(tensor, values[name]))


@dataclass(frozen=True)
class SavedState:
    """What a checkpoint says of the average: steps, snapshots seen, options; the mean on ranks that keep one."""

    steps: list[int]
    seen: int
    options: dict[str, Any]
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)


def write_state(
    file: Path,
    tensors: Mapping[str, Tensor],
    dtypes: Mapping[str, torch.dtype],
    steps: list[int],
    seen: int,
    options: Mapping[str, Any],
) -> None:
    """Write the state into a file, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    about = {
        "steps": steps,
        "seen": seen,
        "options": dict(options),
        "dtypes": {name: str(dtype).removeprefix("torch.") for name, dtype in dtypes.items()},
    }
    part = file.with_name(f".{file.name}.part")
    save_file({k: v.contiguous() for k, v in tensors.items()}, part, {"checkpoint_averaging": json.dumps(about)})
    with open(part, "rb") as handle:
        os.fsync(handle.fileno())
    os.replace(part, file)


def pending_file(output: Path, step: int) -> Path:
    """Return where the state waits for the checkpoint at `step` to be written."""
    return output / f".{STATE_FILE.removesuffix('.safetensors')}-{step}.safetensors"


def read_state(folder: Path, step: int, targets: Mapping[str, Tensor], holds: bool) -> SavedState:
    """Read the state of the checkpoint at `step`; the mean only where this rank keeps one, and of it only its shards.

    Raises
    ------
    DataError
        When the checkpoint has none, or it does not fit the model.
    """
    file = folder / STATE_FILE
    waiting = pending_file(folder.parent, step)
    if not file.is_file() and waiting.is_file():
        file = waiting
    if not file.is_file():
        raise DataError(
            f"training resumes at step {step}, but there is no state of the average here. Give the folder with "
            "resume_from=..., or start a new average of the snapshots still to come with resume_from='nothing'.",
            file=file,
        )
    try:
        with safe_open(file, framework="pt") as held:
            about = json.loads(held.metadata()["checkpoint_averaging"])
            names = list(held.keys())
            if names and set(names) != set(targets):
                raise DataError("the average in this checkpoint is of other tensors than the model trains.", file=file)
            for name in names:
                shape = tuple(held.get_slice(name).get_shape())
                if shape != tuple(targets[name].shape):
                    raise DataError(
                        f"{name!r} has the shape {shape}, the model's is {tuple(targets[name].shape)}. Resume with "
                        "the model of this checkpoint.",
                        file=file,
                    )
            found = {name: shard(targets[name], held.get_tensor(name)).clone() for name in names} if holds else {}
    except (SafetensorError, KeyError, TypeError) as error:
        raise DataError(
            f"the state of the average is damaged ({error}). Resume from another checkpoint.", file=file
        ) from error
    dtypes = {name: getattr(torch, dtype) for name, dtype in about["dtypes"].items()}
    return SavedState(about["steps"], about["seen"], about["options"], dtypes, found)
