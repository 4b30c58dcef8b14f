"""The numbers of every head of one attention layer, sequence by sequence."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gnomon.adapters.lora_limits.capture import AttentionCall, obstacle
from gnomon.adapters.lora_limits.measure import head_scores
from gnomon.adapters.lora_limits.visible import causality
from gnomon.common.layers import attention_and_mlp, decoder_blocks, family
from gnomon.errors import ModelError

__all__ = ["layer_rows", "unseen_rows"]

_ALIBI = ("bloom", "mpt")  # model types with ALiBi always
_NOT_SEEN = "its attention does not go through transformers' attention functions"


def layer_rows(
    call: AttentionCall, kept: Sequence[Tensor], first: int, degrees: Sequence[int], seed: int
) -> list[dict[str, Any]]:
    """Return one row per sequence and head.

    Parameters
    ----------
    call : AttentionCall
    kept : sequence of Tensor
        For every sequence of the batch, the places of its tokens that are no padding; shorter ones than 2 are skipped.
    first : int
        Number of the batch's first sequence.
    degrees : sequence of int
    seed : int

    Raises
    ------
    ModelError
        When q, k or v are not finite; the message names the layer.
    """
    reason = obstacle(call, max(len(places) for places in kept))
    rows: list[dict[str, Any]] = []
    for i, places in enumerate(kept):
        if len(places) < 2:
            continue
        # a query of another sequence (cross-attention) has no such tokens; its norms are taken over all it has
        chosen = slice(None) if call.query.shape[2] != call.key.shape[2] else places
        q, k, v = _heads(call, (call.query, call.key, call.value), i, chosen)
        _refuse_not_finite(call.name, q=q, k=k, v=v)
        columns = _norms(q, k, v)
        columns |= _shares(call, i, chosen, columns)
        causal = reason or causality(call, i, places)
        stop = causal if isinstance(causal, str) else ""
        if not stop:
            scores = head_scores(q, k, v, degrees, causal=bool(causal), seed=seed)
            columns["Gamma_QK"] = (scores.largest / q.shape[-1]).sqrt()
            columns["tau"] = columns["Gamma_QK"] / math.sqrt(math.log(len(places)))
            columns["z_star"] = scores.centred
            for j, degree in enumerate(degrees):
                columns |= {f"output_{degree}": scores.output[j], f"gradient_{degree}": scores.gradient[j]}
        fixed = {"name": call.name, "layer": _number(call.name, call.module), "sequence": first + i,
                 "L": len(places), "width": q.shape[-1], "reason": stop}  # fmt: skip
        values = {name: column.tolist() for name, column in columns.items()}
        rows += [{**fixed, "head": h, **{n: c[h] for n, c in values.items()}} for h in range(len(q))]
    return rows


def _heads(call: AttentionCall, tensors: Iterable[Tensor], row: int, chosen: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k, v of one sequence (heads, tokens, width): scaled evenly over q and k, one k and v for every q."""
    root = abs(call.scaling) ** 0.5
    signs = (math.copysign(root, call.scaling), root, 1.0)
    found = []
    for tensor, factor in zip(tensors, signs, strict=True):
        x = tensor[min(row, len(tensor) - 1)][:, chosen]
        x = (x if x.dtype == torch.float64 else x.float()) * factor
        found.append(x.repeat_interleave(call.query.shape[1] // len(x), 0))
    return found[0], found[1], found[2]


def _norms(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
    return {f"Gamma_{n}": x.abs().amax((1, 2)) for n, x in (("Q", q), ("K", k), ("V", v))}


def _shares(call: AttentionCall, row: int, chosen: Any, norms: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the largest entry of what adapters add over the largest entry, of Q, K and V."""
    if call.bare is None:
        return {f"share_{n}": torch.zeros_like(norms["Gamma_Q"]) for n in "QKV"}
    added = (a - b for a, b in zip((call.query, call.key, call.value), call.bare, strict=True))
    parts = _norms(*_heads(call, added, row, chosen))
    shares = {f"share_{n}": parts[f"Gamma_{n}"] / norms[f"Gamma_{n}"] for n in "QKV"}
    return {name: share.nan_to_num(nan=0.0) for name, share in shares.items()}


def _refuse_not_finite(name: str, **tensors: Tensor) -> None:
    for letter, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ModelError(
                f"{letter} of {name} holds NaN or infinity. Run the model in float32 or bfloat16, or look for a "
                "training that has diverged."
            )


def _number(name: str, module: nn.Module) -> int:
    """Return the layer's number: what transformers gave it, else the first number in its path."""
    index = getattr(module, "layer_idx", None)
    found = re.search(r"\.(\d+)(\.|$)", name)
    return int(index) if isinstance(index, int) else int(found[1]) if found else 0


def unseen_rows(model: Any, seen: set[str], tokens: int) -> list[dict[str, Any]]:
    """Return rows without numbers for attention layers that could not be watched.

    Raises
    ------
    ModelError
        When the model has no attention that could be found at all.
    """
    config = model.config
    alibi = family(model) in _ALIBI or bool(getattr(config, "alibi", False))
    names = {module: name for name, module in model.named_modules()}
    rows: list[dict[str, Any]] = []
    try:
        blocks = list(decoder_blocks(model))
    except ModelError:
        blocks = []
    for number, block in enumerate(blocks):
        try:
            attention = names[attention_and_mlp(block)[0]]
        except ModelError:
            continue
        if any(name == attention or name.startswith(attention + ".") for name in seen):
            continue
        fixed = {"name": attention, "layer": number, "sequence": 0, "L": tokens, "width": _width(config),
                 "reason": "ALiBi adds a bias to scores" if alibi else _NOT_SEEN}  # fmt: skip
        rows += [{**fixed, "head": head} for head in range(int(config.num_attention_heads))]
    if not rows and not seen:
        raise ModelError(
            f"no attention layer was found in a {family(model)!r} model ({type(model).__name__}). Give a transformers "
            "model with softmax attention."
        )
    return rows


def _width(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
