"""LoRA adapters: the mean of the products B A, which is not the product of the means."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gnomon.common.files import write_json
from gnomon.errors import GnomonWarning, MethodError, ModelError
from gnomon.merge.checkpoint_averaging.checkpoints import Checkpoint, open_checkpoint
from gnomon.merge.checkpoint_averaging.storage import Entry

__all__ = ["average_deltas", "mean_delta"]

_MARKS = {".lora_A.": ".lora_B.", ".lora_embedding_A": ".lora_embedding_B"}
_PREFIX = "base_model.model."


def mean_delta(
    A: Sequence[Float[Tensor, "r n"]],
    B: Sequence[Float[Tensor, "m r"]],
    weights: Sequence[float],
    rank: int,
) -> tuple[Float[Tensor, "k n"], Float[Tensor, "m k"], float]:
    """Factor the weighted mean of products, ``sum_i w_i B_i A_i``, again into rank `rank`.

    The mean has rank N r at most, so its SVD follows from QR decompositions of the stacked factors and one SVD of
    size N r: the m x n matrix is never formed.

    Parameters
    ----------
    A, B : sequences of Tensor
        Factors (r, n) and (m, r) of each adapter; ranks may differ.
    weights : sequence of float
        One per adapter, 0 or more.
    rank : int
        Rank k of the result.

    Returns
    -------
    A, B : Tensor
        (k, n) and (m, k) in float32: the best approximation of rank k, singular values divided evenly.
    lost : float
        Norm of what the truncation leaves out, as a share of the mean's norm.

    Examples
    --------
    >>> import torch
    >>> a, b, lost = mean_delta([torch.ones(1, 3)] * 2, [torch.ones(2, 1)] * 2, [0.5, 0.5], 1)
    >>> (b @ a).allclose(torch.ones(2, 3)), round(lost, 6)
    (True, 0.0)
    """
    left = torch.cat([b.double() * math.sqrt(w) for b, w in zip(B, weights, strict=True)], dim=1)
    right = torch.cat([a.double() * math.sqrt(w) for a, w in zip(A, weights, strict=True)], dim=0)
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.T)
    U, S, Vh = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    k = min(rank, len(S))
    root = S[:k].sqrt()
    new_B = left.new_zeros(left.shape[0], rank)
    new_A = right.new_zeros(rank, right.shape[1])
    new_B[:, :k] = q_left @ (U[:, :k] * root)
    new_A[:k] = (root[:, None] * Vh[:k]) @ q_right.T
    norm = float(S.norm())
    lost = float(S[k:].norm()) / norm if norm > 0 else 0.0
    return new_A.float(), new_B.float(), lost


def average_deltas(
    checkpoints: Sequence[Checkpoint],
    weights: Sequence[float],
    part: Path,
    rank: int | None,
    base: str | None,
    write_shards: Callable[..., None],
    tell: Callable[[int, int], None],
) -> tuple[dict[str, Any], Path]:
    """Write the averaged adapter, or the base model with the mean delta merged in.

    Return what to put on record, and the folder whose configuration the result takes.
    """
    _check_lora(checkpoints, rank, base)
    last = checkpoints[-1]
    pairs = {name: _partner(name) for name in last.entries if _partner(name)}
    if base is not None:
        merged = _Merged(checkpoints, weights, pairs, base)
        write_shards(part, merged.layout, merged.plan, merged.pieces, tell)
        return {"base": base}, merged.base.folder
    made: dict[str, Tensor] = {}
    lost: dict[str, float] = {}
    for name in last.entries:
        if name in pairs:
            own = rank or last.entries[name].shape[0]
            made[name], made[pairs[name]], lost[name] = mean_delta(*_factors(checkpoints, name, pairs), weights, own)
        elif name not in pairs.values():
            made[name] = _mean(checkpoints, weights, name)
    first = checkpoints[0].entries
    plan = {name: (first[name].dtype, tuple(t.shape)) for name, t in made.items()}
    write_shards(part, last.layout(), plan, lambda name: iter([made[name].to(plan[name][0])]), tell)
    write_json(part / "adapter_config.json", _resized(last.config, rank))
    worst = max(lost, key=lambda name: lost[name])
    if lost[worst] > 0.1:
        warnings.warn(
            f"Truncation to rank {rank or last.config.get('r')} loses {lost[worst]:.0%} of the mean delta's norm in "
            f"{worst}. Raise it: rank={len(checkpoints) * int(last.config.get('r', 1))} loses nothing.",
            GnomonWarning,
            stacklevel=4,
        )
    return {"lost_norm": lost[worst]}, last.folder


def _partner(name: str) -> str:
    for a, b in _MARKS.items():
        if a in name:
            return name.replace(a, b)
    return ""


def _check_lora(checkpoints: Sequence[Checkpoint], rank: int | None, base: str | None) -> None:
    first, last = checkpoints[0], checkpoints[-1]
    if not any(_partner(name) for name in last.entries):
        raise ModelError(f"{last.folder} holds no LoRA factors. space='delta' is for LoRA adapters.")
    for one in checkpoints:
        for key in ("lora_alpha", "r", "use_rslora", "alpha_pattern", "rank_pattern"):
            if one.config.get(key) != first.config.get(key):
                raise ModelError(
                    f"{key} is {first.config.get(key)!r} in {first.folder} and {one.config.get(key)!r} in "
                    f"{one.folder}; their products B A are scaled differently. Average adapters of one configuration."
                )
    if any("lora_magnitude_vector" in name for name in last.entries):
        raise ModelError(
            f"{last.folder} is a DoRA adapter; its delta is no product B A. Use space='weights' for snapshots of one "
            "run, or merge the adapters and average the models."
        )
    wide = next((n for n in last.entries if _partner(n) and len(last.entries[n].shape) != 2), None)
    if wide:
        raise ModelError(f"{last.folder}: {wide!r} is a convolution's factor. Use space='weights', or merge adapters.")
    if (rank is not None or base is not None) and (last.config.get("rank_pattern") or last.config.get("alpha_pattern")):
        raise MethodError(
            f"{last.folder} has ranks or scales of its own per layer (rank_pattern, alpha_pattern). Leave rank and "
            "base out: each layer then keeps its rank."
        )


def _resized(config: dict[str, Any], rank: int | None) -> dict[str, Any]:
    """The adapter's configuration with another rank and the same scale of B A."""
    if rank is None:
        return config
    ratio = rank / config["r"]
    alpha = config["lora_alpha"] * (math.sqrt(ratio) if config.get("use_rslora") else ratio)
    return {**config, "r": rank, "lora_alpha": int(alpha) if alpha == int(alpha) else alpha}


def _factors(checkpoints: Sequence[Checkpoint], name: str, pairs: dict[str, str]) -> tuple[list[Tensor], list[Tensor]]:
    found = [[_finite(one, key) for one in checkpoints] for key in (name, pairs[name])]
    return found[0], found[1]


def _finite(one: Checkpoint, name: str) -> Tensor:
    tensor = one.entries[name].read()
    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        raise ModelError(
            f"{one.entries[name].file}: {name!r} holds values that are not finite, which would spoil the average. "
            "Leave this checkpoint out and look at the run's loss."
        )
    return tensor


def _mean(checkpoints: Sequence[Checkpoint], weights: Sequence[float], name: str) -> Tensor:
    """The weighted mean of one whole tensor."""
    if not checkpoints[0].entries[name].dtype.is_floating_point:
        return checkpoints[-1].entries[name].read()
    parts = [w * _finite(one, name).float() for one, w in zip(checkpoints, weights, strict=True)]
    return torch.stack(parts).sum(0)


class _Merged:
    """A base model whose tensors get the mean delta added as they are copied."""

    def __init__(
        self, checkpoints: Sequence[Checkpoint], weights: Sequence[float], pairs: dict[str, str], base: str
    ) -> None:
        self.base = open_checkpoint(base)
        self._checkpoints, self._weights, self._pairs = checkpoints, weights, pairs
        config = checkpoints[-1].config
        r = config["r"]
        self._scale = config["lora_alpha"] / (math.sqrt(r) if config.get("use_rslora") else r)
        self._transposed = bool(config.get("fan_in_fan_out"))
        entries = self.base.entries
        self._delta: dict[str, str] = {}
        self._replaced: dict[str, str] = {}
        for name in checkpoints[-1].entries:
            if name in pairs:
                module = name.split(".lora_A.")[0].split(".lora_embedding_A")[0]
                self._delta[self._known(module.removeprefix(_PREFIX) + ".weight", entries)] = name
            elif ".lora_" not in name:
                self._replaced[name.removeprefix(_PREFIX)] = name
            elif name not in pairs.values():
                raise ModelError(f"{name!r} cannot be merged into a base model. Leave base out.")
        self.layout = self.base.layout()
        self.plan = {key: (entry.dtype, entry.shape) for key, entry in entries.items()}
        for key, name in self._replaced.items():
            held = checkpoints[0].entries[name]
            self.plan[key] = (held.dtype, held.shape)
            self.layout.setdefault(key, next(iter(self.layout.values())))

    def _known(self, key: str, entries: dict[str, Entry]) -> str:
        if key not in entries:
            raise ModelError(
                f"The base model {self.base.folder} has no {key!r}, which the adapters change. Give the model they "
                "were trained on."
            )
        return key

    def pieces(self, name: str) -> Iterator[Tensor]:
        """Yield the tensor `name` of the merged model, whole."""
        if name in self._replaced:
            tensor = _mean(self._checkpoints, self._weights, self._replaced[name])
        else:
            tensor = self.base.entries[name].read()
        if name in self._delta:
            key = self._delta[name]
            A, B = _factors(self._checkpoints, key, self._pairs)
            products = (w * (b.float() @ a.float()) for a, b, w in zip(A, B, self._weights, strict=True))
            delta = torch.stack(list(products)).sum(0) * self._scale
            turned = self._transposed or ".lora_embedding_A" in key
            tensor = tensor.float() + (delta.T if turned else delta)
        yield tensor.to(self.plan[name][0])
