"""The dense and the compressed model side by side: their layers, whether they fit, the PEFT configuration."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gnomon.common.layers import backbone, decoder_blocks, family, linear_layers, unwrap, weight_of
from gnomon.errors import GnomonWarning, MethodError, ModelError, nearest

__all__ = [
    "DenseLayer",
    "block_linears",
    "check_pair",
    "compressed_weight",
    "layer_ranks",
    "lora_config",
    "resolve_targets",
    "update_config",
]

_CHUNK = 1024


class DenseLayer(NamedTuple):
    """Weight (out, in) and bias of one linear layer of the dense model."""

    weight: Tensor
    bias: Tensor | None


def block_linears(model: nn.Module) -> dict[str, DenseLayer]:
    """Return the linear layers of all transformer blocks of a dense model by full name, in order."""
    base = unwrap(model)
    inside = {id(layer) for block in decoder_blocks(base) for layer in linear_layers(block).values()}
    return {
        name: DenseLayer(weight_of(layer).detach(), getattr(layer, "bias", None))
        for name, layer in linear_layers(base).items()
        if id(layer) in inside
    }


@torch.no_grad()
def compressed_weight(layer: nn.Module) -> Tensor:
    """Return a layer's weight as (out, in); a layer with packed weights is asked by sending the identity through it."""
    weight = getattr(layer, "weight", None)
    plain = isinstance(layer, (nn.Linear, Conv1D)) and type(weight) in (nn.Parameter, Tensor)
    if plain and weight is not None and weight.is_floating_point():
        return weight_of(layer).detach()
    size = int(layer.in_features)  # type: ignore[arg-type]
    tensors = [*layer.parameters(), *layer.buffers()]
    bias = getattr(layer, "bias", None)
    dtype = next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)
    rows = []
    for start in range(0, size, _CHUNK):
        part = torch.zeros(min(_CHUNK, size - start), size, device=tensors[0].device, dtype=dtype)
        part.diagonal(start).fill_(1.0)
        rows.append(layer(part).float() - (0.0 if bias is None else bias.float()))
    return torch.cat(rows).T


def _shape(layer: nn.Module) -> tuple[int, int]:
    if isinstance(layer, Conv1D):
        return int(weight_of(layer).shape[0]), int(weight_of(layer).shape[1])
    return int(layer.out_features), int(layer.in_features)  # type: ignore[arg-type]


def _refuse_adapters(model: nn.Module, which: str) -> None:
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            state = "merged into" if module.merged else "attached to"
            raise ModelError(
                f"The {which} model has PEFT adapters {state} its weights (first at {name!r}), so W - W_compressed is "
                "not the error of the compression alone. Give the plain model (peft_model.unload()), or use "
                "initialize_eora to fill an adapter that exists."
            )


def check_pair(compressed: nn.Module, original: nn.Module, dense: Mapping[str, DenseLayer]) -> None:
    """Refuse two models that are not the same architecture, layer by layer, apart from their linears' weights."""
    for model, which in ((compressed, "compressed"), (original, "original")):
        _refuse_adapters(model, which)
    if unwrap(compressed) is unwrap(original):
        raise ModelError(
            "compressed_model and original_model are the same object. Keep a dense copy (copy.deepcopy) before "
            "compressing in place, or load the dense checkpoint again."
        )
    ours, theirs = unwrap(compressed), unwrap(original)
    counts = len(decoder_blocks(ours)), len(decoder_blocks(theirs))
    if counts[0] != counts[1]:
        raise ModelError(
            f"The compressed model ({family(ours)!r}) has {counts[0]} blocks, the original ({family(theirs)!r}) "
            f"{counts[1]}. EoRA pairs layers by name; a model with dropped blocks cannot be compensated."
        )
    modules = dict(ours.named_modules())
    for name, layer in dense.items():
        if name not in modules:
            raise ModelError(
                f"The compressed model ({family(ours)!r}) has no layer {name!r}, the original ({family(theirs)!r}) "
                f"has one. {nearest(name, (n for n in modules if n), noun='layer')} Both must have one architecture."
            )
        if _shape(modules[name]) != tuple(layer.weight.shape):
            raise ModelError(
                f"Layer {name!r}: the compressed weight is {_shape(modules[name])} (out, in), the dense one "
                f"{tuple(layer.weight.shape)}. EoRA needs both in the same shape and column order; a structurally "
                "pruned layer cannot be compensated."
            )
    _check_rest(ours, theirs, dense)


def _check_rest(ours: nn.Module, theirs: nn.Module, dense: Mapping[str, DenseLayer]) -> None:
    mine = dict(backbone(ours).named_parameters())
    linears = {id(t) for layer in linear_layers(theirs).values() for t in layer.parameters()}
    for name, wanted in backbone(theirs).named_parameters():
        found = mine.get(name)
        if id(wanted) in linears or found is None or not found.is_floating_point():
            continue
        if found.shape != wanted.shape:
            raise ModelError(
                f"{name!r} is {tuple(found.shape)} in the compressed model and {tuple(wanted.shape)} in the original. "
                "Both must come from the same checkpoint."
            )
        a, b = found.detach().float(), wanted.detach().to(found.device).float()
        if bool(((a != b) & ~((a - b).abs() <= 1e-2 * b.abs().max())).any()):
            raise ModelError(
                f"{name!r} is no linear layer and differs between the compressed and the original model. EoRA repairs "
                "linear layers that see the same inputs; scales folded into norms (AWQ, SmoothQuant) must be unfolded "
                "first, and both models must come from the same checkpoint."
            )


def resolve_targets(names: Iterable[str], targets: str | Sequence[str]) -> list[str]:
    """Return the layers that `targets` means: ``"all-linear"``, a regular expression, or names and endings of names."""
    names = list(names)
    if targets == "all-linear":
        return names
    if isinstance(targets, str):
        found = [name for name in names if re.fullmatch(targets, name)]
        wanting = [] if found else [targets]
    else:
        found = [name for name in names if any(name == t or name.endswith(f".{t}") for t in targets)]
        wanting = [t for t in targets if not any(name == t or name.endswith(f".{t}") for name in names)]
        if not targets:
            raise MethodError("targets is empty: give 'all-linear', a regular expression or names of linear layers.")
    if wanting:
        endings = {name.rpartition(".")[2] for name in names}
        raise MethodError(
            f"targets: no linear layer of the blocks matches {wanting[0]!r}. "
            f"{nearest(wanting[0], endings, noun='layer name')} Embeddings and the output head are never compensated."
        )
    return found


def layer_ranks(
    dense: Mapping[str, DenseLayer], targets: Sequence[str], rank: int, rank_pattern: Mapping[str, int] | None
) -> dict[str, int]:
    """Return each target's rank: lowered to min(out, in) with one warning; 0 in the pattern drops the layer."""
    pattern = dict(rank_pattern or {})
    for key, value in (("rank", rank), *((f"rank_pattern[{k!r}]", v) for k, v in pattern.items())):
        least = 1 if key == "rank" else 0
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise MethodError(f"{key} = {value!r}: a whole number >= {least} is needed.")
    used = {name: get_pattern_key(list(pattern), name) for name in targets}
    for key in set(pattern) - set(used.values()):
        raise MethodError(f"rank_pattern: {key!r} matches none of the targets, such as {targets[0]!r}.")
    wanted = {name: pattern.get(used[name], rank) for name in targets}
    ranks = {name: min(value, *dense[name].weight.shape) for name, value in wanted.items() if value > 0}
    lowered = [name for name in ranks if ranks[name] < wanted[name]]
    if lowered:
        first = lowered[0]
        warnings.warn(
            f"rank {wanted[first]} exceeds min(out, in) of {len(lowered)} layers and is lowered there, for example to "
            f"{ranks[first]} for {first!r}: at that rank the error is repaired wholly.",
            GnomonWarning,
            stacklevel=3,
        )
    if not ranks:
        raise MethodError("rank_pattern gives every target rank 0, so there is nothing to compute.")
    return ranks


def _compact(values: Mapping[str, int], everyone: Iterable[str], default: int) -> dict[str, int]:
    """Write per-layer values by the last part of the name where all layers of that ending agree."""
    by_ending: dict[str, set[int]] = {}
    for name in values:
        by_ending.setdefault(name.rpartition(".")[2], set()).add(values[name])
    others = {name.rpartition(".")[2] for name in everyone if name not in values}
    short = {end: v.copy().pop() for end, v in by_ending.items() if len(v) == 1 and end not in others}
    pattern = {}
    for name, value in values.items():
        ending = name.rpartition(".")[2]
        if value != default:
            pattern[ending if ending in short else name] = value
    return pattern


def _patterns(base: nn.Module, ranks: Mapping[str, int], rank: int) -> dict[str, Any]:
    default = rank if rank in ranks.values() else max(ranks.values())
    everyone = [name for name, _ in base.named_modules()]
    pattern = _compact(ranks, everyone, default)
    endings = _compact(dict.fromkeys(ranks, 1), everyone, 0)
    return {
        "r": default,
        "lora_alpha": default,
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
        "target_modules": set(endings),
    }


def lora_config(base: nn.Module, ranks: Mapping[str, int], rank: int) -> LoraConfig:
    """Return the plain LoRA configuration of an adapter with these ranks and scaling 1."""
    generates = getattr(base, "can_generate", lambda: False)()
    return LoraConfig(
        **_patterns(base, ranks, rank),
        lora_dropout=0.0,
        bias="none",
        use_rslora=False,
        fan_in_fan_out=any(isinstance(base.get_submodule(name), Conv1D) for name in ranks),
        task_type="CAUSAL_LM" if generates else None,
    )


def update_config(config: LoraConfig, base: nn.Module, ranks: Mapping[str, int], rank: int) -> None:
    """Write into a configuration that only these layers carry an adapter."""
    for key, value in _patterns(base, ranks, rank).items():
        setattr(config, key, value)
