"""Which checkpoints are averaged: found, opened, put in order, and checked against each other."""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from gnomon.common.files import read_json
from gnomon.errors import GnomonWarning, MethodError, ModelError, NoEffectWarning
from gnomon.merge.checkpoint_averaging.running import first_difference
from gnomon.merge.checkpoint_averaging.storage import Entry, entries_of

__all__ = ["Checkpoint", "check_together", "choose", "find_checkpoints", "open_checkpoint"]

_MODEL_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_SHARDED = ("pytorch_model_fsdp_*", "global_step*", "distcp", "*.distcp")
_NOT_WEIGHTS = re.compile(r"optimizer|scheduler|scaler|rng_state|training_args|trainer_state|checkpoint_averaging")
_VOLATILE = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "name_or_path"}
_IDENTITY = ("model_type", "architectures", "gnomon", "peft_type", "target_modules", "fan_in_fan_out", "use_dora")


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint: its folder, whether it is a whole model or an adapter, its tensors and its configuration."""

    folder: Path
    kind: Literal["model", "adapter"]
    entries: dict[str, Entry]
    step: int | None
    config: dict[str, Any]

    def layout(self) -> dict[str, str]:
        """Return the name of the ``.safetensors`` file of each tensor, as the checkpoint divides them."""
        return {
            name: entry.file.name.replace("pytorch_model", "model").removesuffix(".bin").removesuffix(".safetensors")
            + ".safetensors"
            for name, entry in self.entries.items()
        }


def step_of(path: Path) -> int | None:
    """Return the number at the end of a folder's name: ``checkpoint-1000`` -> 1000."""
    found = re.search(r"-(\d+)$", path.name)
    return int(found[1]) if found else None


def find_checkpoints(folder: str | Path) -> list[Path]:
    """Return the snapshots of a run, first step first.

    Parameters
    ----------
    folder : str or Path
        The `output_dir` of a `transformers.Trainer`, or any folder of ``checkpoint-STEP`` or ``snapshot-STEP``.

    Returns
    -------
    list of Path
        Sorted by step as a number: ``checkpoint-200`` comes before ``checkpoint-1000``.
    """
    paths = [p for name in ("checkpoint-*", "snapshot-*") for p in Path(folder).glob(name) if p.is_dir()]
    return sorted((p for p in paths if step_of(p) is not None), key=lambda p: (step_of(p) or 0, p.name))


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Read what a checkpoint holds, without its tensors.

    Parameters
    ----------
    path : str or Path
        A folder with ``model.safetensors``, ``adapter_model.safetensors``, sharded safetensors or torch ``.bin``
        weights; one such file; or the id of a model on the Hugging Face hub.

    Returns
    -------
    Checkpoint

    Raises
    ------
    ModelError
        When there are no weights, or they are sharded by a training framework, quantised or damaged.
    """
    place = Path(path)
    if not place.exists():
        place = _from_hub(str(path))
    if place.is_file():
        if _NOT_WEIGHTS.search(place.name) or place.suffix not in (".safetensors", ".bin"):
            raise ModelError(
                f"{place} is no file of model weights (optimizer and trainer states are never averaged). "
                "Give the checkpoint's folder."
            )
        return _checked(place.parent, place.name.startswith("adapter_model"), entries_of(place))
    whole = [name for name in _MODEL_FILES if (place / name).is_file()]
    adapter = [name for name in _ADAPTER_FILES if (place / name).is_file()]
    if whole and adapter:
        raise ModelError(
            f"{place} holds a whole model ({whole[0]}) and an adapter ({adapter[0]}). Give the file that is meant."
        )
    if not whole and not adapter:
        if any(next(place.glob(pattern), None) is not None for pattern in _SHARDED):
            raise ModelError(
                f"{place} holds weights divided among ranks. Save consolidated ones: fsdp_state_dict_type "
                "FULL_STATE_DICT, or zero_to_fp32.py for DeepSpeed, and average those."
            )
        raise ModelError(
            f"{place} is no checkpoint: it has none of {', '.join((*_MODEL_FILES, *_ADAPTER_FILES))}. "
            "Give folders written by save_pretrained or the Trainer."
        )
    name = (whole or adapter)[0]
    if not name.endswith(".index.json"):
        return _checked(place, bool(adapter), entries_of(place / name))
    entries: dict[str, Entry] = {}
    index = read_json(place / name)["weight_map"]
    for file in dict.fromkeys(index.values()):
        if not (place / file).is_file():
            raise ModelError(f"{place}: the shard {file} named by {name} is missing. Copy the checkpoint again.")
        held = entries_of(place / file)
        entries.update({key: held[key] for key in index if index[key] == file and key in held})
    absent = first_difference(index, entries)
    if absent:
        raise ModelError(f"{place}: its shards do not hold what {name} says ({absent}). Copy the checkpoint again.")
    return _checked(place, False, entries)


def _from_hub(name: str) -> Path:
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        import huggingface_hub

        try:
            return Path(huggingface_hub.snapshot_download(name, allow_patterns=["*.safetensors*", "*.json", "*.txt"]))
        except Exception as error:  # the hub raises a family of unrelated types when offline or absent
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ModelError(f"{name!r} is neither a folder nor on the hub ({first}). Give a folder.") from error
    raise ModelError(f"{name} is no checkpoint: there is no such folder. Give folders written by save_pretrained.")


def _checked(folder: Path, adapter: bool, entries: dict[str, Entry]) -> Checkpoint:
    name = "adapter_config.json" if adapter else "config.json"
    config = read_json(folder / name) if (folder / name).is_file() else {}
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise ModelError(
            f"{folder} is quantised ({method}); a mean of codes means nothing. Average the unquantised checkpoints "
            "and quantise the result."
        )
    for key, entry in entries.items():
        if entry.dtype.is_complex:
            raise ModelError(f"{folder}: {key!r} is {entry.dtype}. Complex tensors are not averaged.")
        low = entry.dtype.itemsize == 1 and entry.dtype != torch.bool
        packed = key.endswith(("qweight", "qzeros")) or (low and key.endswith(("weight", ".SCB", ".absmax")))
        if packed or entry.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
            raise ModelError(
                f"{folder}: {key!r} is quantised ({entry.dtype}); a mean of codes means nothing. Average the "
                "unquantised checkpoints and quantise the result."
            )
    if not entries:
        raise ModelError(f"{folder} holds no tensors. Leave it out.")
    return Checkpoint(folder, "adapter" if adapter else "model", entries, step_of(folder), config)


def choose(
    paths: str | Path | Sequence[str | Path], skip_first: int = 0, last_k: int | None = None
) -> tuple[list[Path], list[int], int]:
    """Return the checkpoints meant, in order, the place each had in `paths`, and how many those were.

    A run's folder stands for all its snapshots. Snapshots that lie in one folder are sorted by step; others keep
    the order they were given in.

    Raises
    ------
    MethodError
        When none are left, a run kept fewer than two, or `skip_first` and `last_k` do not fit.
    """
    listed = [Path(paths)] if isinstance(paths, (str, Path)) else [Path(p) for p in paths]
    if not listed:
        raise MethodError("There are no checkpoints to average: the list is empty. Give two or more folders.")
    if len(listed) == 1 and listed[0].is_dir():
        listed = _expanded(listed[0])
    places = list(range(len(listed)))
    one_run = len({p.absolute().parent for p in listed}) == 1 and all(step_of(p) is not None for p in listed)
    if one_run:
        places.sort(key=lambda i: step_of(listed[i]) or 0)
    if (skip_first or last_k is not None) and not one_run:
        raise MethodError(
            f"skip_first = {skip_first} and last_k = {last_k} choose among the snapshots of one run, but these "
            "folders are not checkpoint-STEP folders of one run. List the ones to average."
        )
    if skip_first < 0 or skip_first >= len(places):
        raise MethodError(f"skip_first = {skip_first} of {len(places)} snapshots. Allowed: 0 to {len(places) - 1}.")
    places = places[skip_first:]
    if last_k is not None:
        if not 1 <= last_k <= len(places):
            raise MethodError(f"last_k = {last_k} of {len(places)} snapshots. Allowed: 1 to {len(places)}.")
        places = places[-last_k:]
    if len(places) == 1:
        warnings.warn(
            f"Only {listed[places[0]]} is averaged: the result is a copy of it.", NoEffectWarning, stacklevel=4
        )
    return [listed[i] for i in places], places, len(listed)


def _expanded(folder: Path) -> list[Path]:
    found = find_checkpoints(folder)
    if len(found) >= 2:
        return found
    if not found and any((folder / name).is_file() for name in (*_MODEL_FILES, *_ADAPTER_FILES)):
        return [folder]
    held = f"only {found[0].name}" if found else "no checkpoint-STEP folder"
    raise MethodError(
        f"{folder} holds {held}; an average needs two snapshots or more. TrainingArguments(save_total_limit=...) "
        "deletes the earlier ones: leave it out and set save_strategy='epoch', or average while training with "
        "CheckpointAveraging(keep='online'), which needs no disk."
    )


def check_together(checkpoints: Sequence[Checkpoint]) -> None:
    """Check that checkpoints have the same tensors and look like snapshots of one run.

    Raises
    ------
    ModelError
        Adapters beside whole models; other names, shapes or kinds of tensors; another kind of model.

    Warns
    -----
    GnomonWarning
        When dtypes, configurations, tokenizers or training histories differ, or the steps are not equidistant.
    """
    first = checkpoints[0]
    for other in checkpoints[1:]:
        if other.kind != first.kind:
            adapter, whole = (other, first) if other.kind == "adapter" else (first, other)
            raise ModelError(
                f"{adapter.folder} is an adapter, {whole.folder} a whole model. Average adapters with adapters, or "
                "merge them into their base model first (merge_and_unload)."
            )
        difference = first_difference(first.entries, other.entries)
        if difference:
            raise ModelError(
                f"{other.folder} has other tensors than {first.folder} ({difference}). Average checkpoints of one run."
            )
        for name, entry in first.entries.items():
            _check_pair(name, entry, other.entries[name], first.folder, other.folder)
        _warn_of_dtypes(first, other)
        _compare_configs(first, other)
    for group in _runs(checkpoints):
        _warn_of_gaps(group)
        _warn_of_histories(group)
    _warn_of_tokenizers(checkpoints)


def _check_pair(name: str, entry: Entry, other: Entry, folder: Path, other_folder: Path) -> None:
    if entry.shape != other.shape:
        raise ModelError(
            f"{name!r} has the shape {entry.shape} in {folder} and {other.shape} in {other_folder}. "
            "Was the vocabulary resized in between? Average checkpoints of one shape."
        )
    if entry.dtype.is_floating_point != other.dtype.is_floating_point:
        raise ModelError(
            f"{name!r} is {entry.dtype} in {folder} and {other.dtype} in {other_folder}; one cannot be averaged with "
            "the other. Save both in one format."
        )


def _warn_of_dtypes(first: Checkpoint, other: Checkpoint) -> None:
    differ = [name for name, entry in first.entries.items() if entry.dtype != other.entries[name].dtype]
    if differ:
        name = differ[0]
        warnings.warn(
            f"{len(differ)} tensors differ in dtype: {name!r} is {first.entries[name].dtype} in {first.folder} and "
            f"{other.entries[name].dtype} in {other.folder}. The average takes the first one's.",
            GnomonWarning,
            stacklevel=4,
        )


def _compare_configs(first: Checkpoint, other: Checkpoint) -> None:
    keys = sorted((set(first.config) | set(other.config)) - _VOLATILE)
    if not first.config or not other.config:
        return
    for key in keys:
        a, b = first.config.get(key), other.config.get(key)
        if isinstance(a, list) and key == "target_modules":  # peft writes a set
            a, b = sorted(a), sorted(b or [])
        if a == b:
            continue
        seen = f"{key} is {a!r} in {first.folder} and {b!r} in {other.folder}"
        if key in _IDENTITY:
            raise ModelError(f"{seen}: these are different kinds of model. Average checkpoints of one run.")
        warnings.warn(f"{seen}. The average takes the last checkpoint's.", GnomonWarning, stacklevel=4)


def _runs(checkpoints: Sequence[Checkpoint]) -> Iterator[list[Checkpoint]]:
    groups: dict[Path, list[Checkpoint]] = {}
    for one in checkpoints:
        if one.step is not None:
            groups.setdefault(one.folder.absolute().parent, []).append(one)
    for group in groups.values():
        yield sorted(group, key=lambda one: one.step or 0)


def _warn_of_gaps(group: Sequence[Checkpoint]) -> None:
    steps = sorted({one.step or 0 for one in group})
    gaps = [b - a for a, b in itertools.pairwise(steps)]
    # a run may end before the next snapshot is due, so the last gap may be shorter
    if len(gaps) >= 2 and (len(set(gaps[:-1])) > 1 or gaps[-1] > gaps[0]):
        warnings.warn(
            f"The steps {steps} in {group[0].folder.parent} are not equidistant: is a snapshot missing "
            "(save_total_limit)? The method averages equidistant snapshots with equal weights.",
            GnomonWarning,
            stacklevel=4,
        )


def _warn_of_histories(group: Sequence[Checkpoint]) -> None:
    known: list[Any] = []
    for one in group:
        file = one.folder / "trainer_state.json"
        history = read_json(file).get("log_history", []) if file.is_file() else []
        if known and history and history[: len(known)] != known[: len(history)]:
            warnings.warn(
                f"{one.folder} logs another history than the snapshots before it: they seem to belong to different "
                "runs. Averaging needs snapshots of one run, or runs from one start with a shared head.",
                GnomonWarning,
                stacklevel=4,
            )
            return
        known = history if len(history) > len(known) else known


def _warn_of_tokenizers(checkpoints: Sequence[Checkpoint]) -> None:
    for name in ("tokenizer.json", "vocab.json", "vocab.txt", "added_tokens.json"):
        contents = {(c.folder / name).read_bytes(): c.folder for c in checkpoints if (c.folder / name).is_file()}
        if len(contents) > 1:
            a, b = list(contents.values())[:2]
            warnings.warn(
                f"{name} differs between {a} and {b}: the same row of the embedding may stand for different tokens. "
                "The average takes the last checkpoint's tokenizer.",
                GnomonWarning,
                stacklevel=4,
            )
