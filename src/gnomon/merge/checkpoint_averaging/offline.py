"""Averaging checkpoints on disk, in one pass over their bytes and a few megabytes of memory."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from gnomon.common.files import atomic_folder, write_json
from gnomon.errors import GnomonWarning, MethodError, ModelError, nearest
from gnomon.merge.checkpoint_averaging import lora
from gnomon.merge.checkpoint_averaging.checkpoints import Checkpoint, check_together, choose, open_checkpoint
from gnomon.merge.checkpoint_averaging.running import accumulator_dtype, check_weights, update_mean
from gnomon.merge.checkpoint_averaging.storage import Reader, ShardWriter

__all__ = ["average_checkpoints"]

PIECE = 1 << 18  # elements: the float32 accumulator of one piece (1 MiB) stays in the processor's cache
APART = 0.3  # mean cosine between checkpoints under which they are taken to have started apart
_SIDE_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".py", ".spm", ".bpe", ".tiktoken"}
_NOT_COPIED = {"trainer_state.json", "averaging.json", "all_results.json", "train_results.json", "eval_results.json"}
Pieces = Callable[[str], Iterator[Tensor]]
Plan = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


def average_checkpoints(
    paths: str | Path | Sequence[str | Path],
    out: str | Path,
    weights: list[float] | None = None,
    *,
    normalise: bool = False,
    skip_first: int = 0,
    last_k: int | None = None,
    space: Literal["weights", "delta"] = "weights",
    rank: int | None = None,
    base: str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Average the weights of checkpoints into a new one: ``theta = sum_i w_i theta_i`` over all parameters.

    Tensors are read, summed in float32 and written piece by piece; no model is built. Configuration and tokenizer
    come from the last checkpoint, and so do integer tensors; optimizer and trainer states are left behind.

    Parameters
    ----------
    paths : sequence of str or Path, or one folder
        Checkpoints of one run: folders written by the `Trainer` or ``save_pretrained`` (safetensors or ``.bin``,
        whole models or PEFT adapters), hub ids, or one run's folder, which stands for all its ``checkpoint-STEP``.
        Folders of one run are sorted by their step.
    out : str or Path
        Folder of the result; replaced when it holds an earlier model.
    weights : list of float, optional
        One for each of `paths` (of a folder: for each snapshot, by step), each 0 or more; those that are used sum
        to 1. Default: equal.
    normalise : bool, default False
        Divide the weights by their sum.
    skip_first : int, default 0
        Leave out that many of the earliest snapshots (the paper leaves out none).
    last_k : int, optional
        Take only that many of the latest snapshots (the paper takes all).
    space : {"weights", "delta"}, default "weights"
        For LoRA adapters: ``"weights"`` averages the factors, right for snapshots of one run; ``"delta"`` averages
        the products B A and factors the mean again by truncated SVD, right for any adapters of one base model.
    rank : int, optional
        Rank of the result with ``space="delta"``; default the adapters' own. N times theirs loses nothing.
    base : str, optional
        With ``space="delta"``: merge the mean delta into this base model; `out` is then a whole model.
    on_progress : callable, optional
        Called with the tensors done and their number.

    Returns
    -------
    Path
        `out`, which loads with ``from_pretrained``. ``averaging.json`` in it says what was averaged.

    Raises
    ------
    MethodError
        An empty list, weights that do not fit, fewer than two snapshots in a run's folder, `out` over an input.
    ModelError
        A path that is no checkpoint; checkpoints that do not fit together, are quantised, or hold values that are
        not finite (the message names file and tensor).

    Warns
    -----
    GnomonWarning
        When dtypes, configurations or tokenizers differ, steps are not equidistant, histories show different runs,
        or matrices point in unrelated directions, as they do after different initialisations.
    NoEffectWarning
        With a single checkpoint.

    Examples
    --------
    >>> import tempfile
    >>> from gnomon.common.models import load_model, tiny
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for step in (1, 2):
    ...         tiny("llama").save_pretrained(f"{folder}/checkpoint-{step}")
    ...     result = average_checkpoints([f"{folder}/checkpoint-1", f"{folder}/checkpoint-2"], f"{folder}/average")
    ...     load_model(result).config.model_type
    'llama'
    """
    chosen, places, count = choose(paths, skip_first, last_k)
    checkpoints = [open_checkpoint(path) for path in chosen]
    shares = _shares(weights, places, count, normalise)
    _check_options(checkpoints, space, rank, base)
    check_together(checkpoints)
    adapters = [one.folder / "adapter" for one in checkpoints if (one.folder / "adapter").is_dir()]
    if adapters and len(adapters) < len(checkpoints):
        raise ModelError(f"Only {len(adapters)} of {len(checkpoints)} checkpoints have an adapter beside the model.")
    target = Path(out)
    _check_target(target, chosen)
    tell = on_progress or (lambda done, total: None)
    with atomic_folder(target) as part:
        if space == "delta":
            facts, source = lora.average_deltas(checkpoints, shares, part, rank, base, write_shards, tell)
        else:
            facts, source = _average_weights(checkpoints, shares, part, tell), checkpoints[-1].folder
        copy_side_files(source, part)
        if adapters:
            average_checkpoints(adapters, part / "adapter", shares)
        record = {"paths": [str(p) for p in chosen], "weights": shares, "steps": [c.step for c in checkpoints]}
        write_json(part / "averaging.json", {"method": "checkpoint-averaging", **record, "space": space, **facts})
    return target


def _shares(weights: Sequence[float] | None, places: Sequence[int], count: int, normalise: bool) -> list[float]:
    """Return the weights of the chosen checkpoints, in their order."""
    if weights is None:
        return check_weights(None, len(places))
    if len(weights) != count:
        check_weights(weights, count)
    return check_weights([weights[i] for i in places], len(places), normalise=normalise)


def _check_options(checkpoints: Sequence[Checkpoint], space: str, rank: int | None, base: str | None) -> None:
    if space not in ("weights", "delta"):
        raise MethodError(f"space = {space!r} is unknown. {nearest(space, ('weights', 'delta'), noun='space')}")
    if space == "weights" and (rank is not None or base is not None):
        raise MethodError(f"rank = {rank} and base = {base!r} need space='delta'; with space='weights' leave them out.")
    if rank is not None and rank < 1:
        raise MethodError(f"rank = {rank}. Allowed: 1 or more.")
    if space == "delta" and any(one.kind == "model" for one in checkpoints):
        raise ModelError(
            f"space = 'delta' averages LoRA adapters, but {checkpoints[0].folder} is a whole model. "
            "Use space='weights'."
        )


def _check_target(target: Path, inputs: Sequence[Path]) -> None:
    where = target.absolute().resolve()
    for path in inputs:
        held = path.absolute().resolve()
        if held == where or where in held.parents:
            raise MethodError(f"out = {target} would replace the input {path}. Choose another folder.")
    if target.is_file():
        raise MethodError(f"out = {target} is a file. Give a folder.")
    if target.is_dir() and any(target.iterdir()):
        held_model = any(target.glob("*.safetensors")) or (target / "averaging.json").is_file()
        if not held_model or any(target.glob("checkpoint-*")):
            raise MethodError(f"out = {target} is not empty and holds no averaged model. Choose another folder.")


def _average_weights(
    checkpoints: Sequence[Checkpoint], weights: Sequence[float], part: Path, tell: Callable[[int, int], None]
) -> dict[str, object]:
    """Write the weighted mean of all tensors in the last checkpoint's files; return what to put on record."""
    first = checkpoints[0].entries
    cosines: dict[str, float] = {}

    def pieces(name: str) -> Iterator[Tensor]:
        return mean_pieces(name, checkpoints, weights, cosines)

    plan = {
        name: (entry.dtype if entry.dtype.is_floating_point else checkpoints[-1].entries[name].dtype, entry.shape)
        for name, entry in first.items()
    }
    write_shards(part, checkpoints[-1].layout(), plan, pieces, tell)
    apart = {name: cosine for name, cosine in cosines.items() if cosine < APART}
    if apart:
        worst = ", ".join(f"{name} ({cosine:.2f})" for name, cosine in list(apart.items())[:5])
        warnings.warn(
            f"{len(apart)} of {len(cosines)} matrices point in different directions in the checkpoints (mean cosine "
            f"under {APART}): {worst}. They seem to start from different initial weights, and the average of such "
            "models does not work. Average snapshots of one run, or runs from one start with a shared head.",
            GnomonWarning,
            stacklevel=4,
        )
    return {"mean_cosine": min(cosines.values())} if cosines else {}


def mean_pieces(
    name: str, checkpoints: Sequence[Checkpoint], weights: Sequence[float], cosines: dict[str, float]
) -> Iterator[Tensor]:
    """Yield the weighted mean of one tensor, piece after piece, and note how far the checkpoints agree in it."""
    entries = [one.entries[name] for one in checkpoints]
    first = entries[0]
    if not first.dtype.is_floating_point:
        entries, weights = entries[-1:], [1.0]
    equal = len(set(weights)) == 1  # a running mean of weights 1 is the same and rounds less
    kept = [(entry, 1.0 if equal else w) for entry, w in zip(entries, weights, strict=True) if w > 0]
    everything = sum(w for _, w in kept)
    dtype = accumulator_dtype(*(entry.dtype for entry, _ in kept))
    with ExitStack() as stack:
        readers = [stack.enter_context(Reader(entry, PIECE)) for entry, _ in kept]
        for begin in range(0, first.numel, PIECE):
            end = min(begin + PIECE, first.numel)
            if not first.dtype.is_floating_point:
                yield readers[0].read(begin, end)
                continue
            mean = torch.empty(0, dtype=dtype)
            total = squares = 0.0
            compared = begin == 0 and len(kept) > 1 and len(first.shape) > 1 and end >= 256
            for reader, (_, w) in zip(readers, kept, strict=True):
                values = reader.read(begin, end).to(dtype)
                total += w
                if total == w:
                    mean = values.clone()
                else:
                    update_mean([mean], [values], total / w - 1)
                if compared:
                    squares += w / everything * float(values.dot(values))
            _refuse_not_finite(name, mean, kept, begin, end)
            if compared and squares > 0:
                self_share = sum((w / everything) ** 2 for _, w in kept)
                cosines[name] = (float(mean.dot(mean)) / squares - self_share) / (1 - self_share)
            yield mean.to(first.dtype)


def _refuse_not_finite(name: str, mean: Tensor, kept: Sequence[tuple[object, float]], begin: int, end: int) -> None:
    if mean.numel() == 0:
        return
    low, high = torch.aminmax(mean)
    if bool((high - low).isfinite()):
        return
    for entry, _ in kept:
        values = entry.read().reshape(-1)[begin:end]  # type: ignore[attr-defined]
        if not bool(values.isfinite().all()):
            raise ModelError(
                f"{entry.file}: {name!r} holds values that are not finite, which would spoil the average. "  # type: ignore[attr-defined]
                "Leave this checkpoint out and look at the run's loss."
            )


def write_shards(
    part: Path, layout: Mapping[str, str], plan: Plan, pieces: Pieces, tell: Callable[[int, int], None]
) -> None:
    """Write tensors into the ``.safetensors`` files `layout` names, and the index when there are several."""
    files: dict[str, list[str]] = {}
    for name in plan:
        files.setdefault(layout[name], []).append(name)
    done, size = 0, 0
    for file, names in files.items():
        with ShardWriter(part / file, [(name, *plan[name]) for name in names]) as writer:
            size += writer.bytes
            for name in writer.order:
                for piece in pieces(name):
                    writer.write(piece)
                done += 1
                tell(done, len(plan))
    if len(files) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": {name: layout[name] for name in sorted(plan)}}
        write_json(part / "model.safetensors.index.json", index)


def copy_side_files(source: Path, part: Path) -> None:
    """Copy configuration and tokenizer, no weights and nothing that belongs to the training run."""
    for file in sorted(source.iterdir()):
        wanted = file.suffix in _SIDE_SUFFIXES and not file.name.endswith(".index.json")
        if file.is_file() and wanted and file.name not in _NOT_COPIED and not (part / file.name).exists():
            shutil.copyfile(file, part / file.name)
    templates = source / "additional_chat_templates"
    if templates.is_dir():
        shutil.copytree(templates, part / templates.name)
