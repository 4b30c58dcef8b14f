"""What is checked of a model and of options before anything is changed."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

from torch import Tensor, nn
from torch.nn.utils import parametrize

from gnomon.common.layers import decoder_blocks, family, linear_layers, unwrap, weight_of
from gnomon.compress.dsnot.bases import check_weight
from gnomon.compress.dsnot.masks import plain_name
from gnomon.compress.dsnot.selection import Budget
from gnomon.errors import MethodError, ModelError, NoEffectWarning, nearest

__all__ = ["Base", "Method", "block_linears", "check_choice", "check_model", "check_options", "named", "twins_of"]

Base = Literal["wanda", "magnitude", "sparsegpt", "current"]
Method = Literal["magnitude", "wanda", "sparsegpt"]


def check_options(
    model: nn.Module,
    *,
    base: Base = "wanda",
    sparsity: float | str | None = None,
    pattern: str | None = None,
    max_cycles: int | str = "scaled",
    threshold: float | str = "scaled",
    refine: str = "attention",
    **others: Any,
) -> Budget:
    """Check the options of `dsnot` against a model before anything runs; return what is to be pruned.

    Raises
    ------
    MethodError, ModelError
        As `dsnot`.
    """
    check_choice("base", base, Base)
    if refine not in ("attention", "all"):
        raise MethodError(f"refine = {refine!r}. Allowed are 'attention' and 'all'.")
    for option, value in (("max_cycles", max_cycles), ("threshold", threshold)):
        if value != "scaled" and (isinstance(value, str) or not value >= 0):
            raise MethodError(f"{option} = {value!r}. Allowed are a number of at least 0 and 'scaled'.")
    if base == "current" and sparsity is not None:
        raise MethodError(
            f"sparsity = {sparsity} with base = 'current': the model's own zeros decide how many there are. "
            "Leave it out."
        )
    budget = Budget(sparsity, pattern)
    check_model(model, budget)
    return budget


def check_choice(option: str, value: str, allowed: Any) -> None:
    """Raise `MethodError` when a value is none of a Literal's."""
    if value not in get_args(allowed):
        raise MethodError(f"{option} = {value!r}. {nearest(str(value), get_args(allowed), noun=option)}")


def block_linears(model: nn.Module) -> dict[str, nn.Module]:
    """Return every linear layer inside a model's blocks by its full name."""
    inside = {id(layer) for block in decoder_blocks(model) for layer in linear_layers(block).values()}
    return {name: layer for name, layer in linear_layers(model).items() if id(layer) in inside}


def check_model(model: nn.Module, budget: Budget) -> None:
    """Refuse a model that is quantised, still has frozen masks, is not finite, or has rows no pattern fits."""
    inner = unwrap(model)
    if not block_linears(model):
        raise ModelError(
            f"this {type(inner).__name__} has no dense linear layers in its blocks, so there is nothing to prune. Fold "
            "what replaced them first (gnomon.export_model writes the folded model)."
        )
    if getattr(inner, "is_quantized", False) or getattr(getattr(inner, "config", None), "quantization_config", None):
        raise ModelError(
            f"This {family(model)!r} model is quantised. Pruning needs plain weights: load it without quantisation, or "
            "dequantise it first (model.dequantize())."
        )
    for name, layer in block_linears(model).items():
        if parametrize.is_parametrized(layer, "weight"):
            raise ModelError(
                f"Layer {name!r} has a frozen mask or another parametrisation on its weight. Call remove() on what "
                "freeze_masks returned before pruning again."
            )
        with named(name):
            check_weight(weight_of(layer))
            budget.check(weight_of(layer).shape[1])


def warn_of_fused_experts(model: nn.Module) -> None:
    """Tell of expert weights that are no linear layers."""
    fused = [name for name, parameter in decoder_blocks(model).named_parameters() if parameter.dim() == 3]
    if fused:
        warnings.warn(
            f"{len(fused)} weights hold several experts in one tensor ({fused[0]}, ...); they are no linear layers and "
            "stay dense.",
            NoEffectWarning,
            stacklevel=3,
        )


@contextmanager
def named(name: str) -> Iterator[None]:
    """Put the layer's name before whatever `MethodError` is raised inside."""
    try:
        yield
    except MethodError as error:
        raise MethodError(f"Layer {name!r}: {error}") from error


def twins_of(model: nn.Module, original: nn.Module | None) -> dict[str, Tensor]:
    """Return the dense weight of each of the model's linears, from the dense model, by the model's names."""
    if original is None:
        raise MethodError("base = 'current' needs the dense weights: give original_model, the model before pruning.")
    dense = {plain_name(name): weight_of(layer) for name, layer in block_linears(original).items()}
    twins = {}
    for name, layer in block_linears(model).items():
        found = dense.get(plain_name(name))
        if found is None or found.shape != weight_of(layer).shape:
            seen = "none" if found is None else str(tuple(found.shape))
            raise ModelError(
                f"Layer {name!r} of shape {tuple(weight_of(layer).shape)} has no match in original_model ({seen}). "
                "Give the model this one was pruned from."
            )
        twins[name] = found
    if all(bool((weight_of(layer) != 0).all()) for layer in block_linears(model).values()):
        warnings.warn("base = 'current', but no weight of the model is zero: nothing to refine.", NoEffectWarning, 3)
    return twins


def zeros(weight: Tensor) -> float:
    return float((weight == 0).sum()) / max(weight.numel(), 1)
