"""Which weights are projected: dense weights by rows, or the factors of a DoRA adapter."""

from __future__ import annotations

import warnings
from typing import Any, Literal

from torch import nn
from transformers.pytorch_utils import Conv1D

from gnomon.common.projected_groups import check_projected_group, split_parameters
from gnomon.errors import GnomonWarning, MethodError, ModelError, nearest

__all__ = ["TARGET_MODULES", "gradnorm_lorp_groups"]

TARGET_MODULES = ("attn", "mlp", "attention", "intermediate.dense", "output.dense")
"""Parts of names of the layers that the authors project: query, key, value, output and the feed-forward layers."""

_FORMS = ("auto", "dense", "adapter")
_FACTORS = r".*\.lora_[AB]\..*"
_Named = list[tuple[str, nn.Parameter]]


def gradnorm_lorp_groups(
    model: nn.Module,
    rank: int = 8,
    target_modules: list[str] | tuple[str, ...] | str | None = None,
    *,
    form: Literal["auto", "dense", "adapter"] = "auto",
    update_proj_gap: int = 200,
    alpha: float = 1.0,
    proj_type: Literal["std", "reverse_std", "left", "right", "full"] = "std",
    align: Literal["none", "rotate"] = "none",
    refresh: Literal["auto", "exact", "randomized"] = "auto",
) -> list[dict[str, Any]]:
    """Split a model's trainable parameters into projected groups and ordinary ones, for `GradNormLoRP`.

    Parameters
    ----------
    model : nn.Module
        A model, or a PEFT model with ``LoraConfig(use_dora=True)``.
    rank : int, default 8
        The authors fine-tune with 4 or 8 and pre-train with 128 or 256. In the adapter form it must lie below the
        adapter's own r to save anything.
    target_modules : list of str or str, optional
        Parts of names of linear layers, regular expressions or "all-linear", as the Trainer's
        ``optim_target_modules``. Default: attention and feed-forward layers (`TARGET_MODULES`), and in the adapter
        form every layer that has a DoRA.
    form : {"auto", "dense", "adapter"}, default "auto"
        "dense": weights themselves, normalised by the optimizer. "adapter": the paper's text; the DoRA layers
        normalise, their two factors are stepped by the projected Adam, their magnitudes and everything else that is
        trainable by Adam. "auto": "adapter" for a model with LoRA layers.
    update_proj_gap : int, default 200
        Steps between two projectors (the authors: 500 in fine-tuning, 250 in pre-training).
    alpha : float, default 1.0
        Scale of the projected update (the authors: 4 in fine-tuning, 0.25 in pre-training).
    proj_type : {"std", "reverse_std", "left", "right", "full"}, default "std"
        "std" projects a matrix's smaller dimension; "full" projects both, as the paper's text has it.
    align : {"none", "rotate"}, default "none"
        What happens to the first moment when the projector changes.
    refresh : {"auto", "exact", "randomized"}, default "auto"
        Exact SVD, or subspace iteration warm-started from the old projector.

    Returns
    -------
    list of dict
        Parameter groups with named parameters; layers that store their weight as (in, out) have their own.

    Raises
    ------
    ModelError
        When no trainable linear layer matches, or a LoRA layer has no magnitudes (``use_dora`` is off).
    MethodError
        When an option is out of range.

    Examples
    --------
    >>> groups = gradnorm_lorp_groups(nn.ModuleDict({"mlp": nn.Linear(20, 12)}), rank=4)
    >>> [name for name, _ in groups[0]["params"]], groups[0]["rank"], [name for name, _ in groups[1]["params"]]
    (['mlp.weight'], 4, ['mlp.bias'])
    """
    if form not in _FORMS:
        raise MethodError(f"form = {form!r}. {nearest(str(form), _FORMS, noun='form')}")
    options = {
        "rank": rank,
        "update_proj_gap": update_proj_gap,
        "alpha": alpha,
        "proj_type": proj_type,
        "align": align,
        "refresh": refresh,
    }
    from peft.tuners.lora import LoraLayer  # slow to import, and only this function needs it

    layers = {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}
    adapter = form == "adapter" or (form == "auto" and bool(layers))
    if adapter:
        _check_dora(layers)
        targets, rest = _factors(model, target_modules)
    else:
        targets, rest = split_parameters(model, TARGET_MODULES if target_modules is None else target_modules)
    names = {id(p): f"parameter {name!r}" for name, p in targets}
    check_projected_group(
        {"params": [p for _, p in targets], **options}, lambda p: names[id(p)], "gradnorm_lorp_groups", warn=False
    )
    if adapter:
        smallest = min(min(p.shape) for _, p in targets)
        if rank >= smallest:
            warnings.warn(
                f"rank = {rank} is not below r = {smallest} of the adapter: its factors are only rotated and no memory "
                "is saved. Choose a rank below r, or a larger r.",
                GnomonWarning,
                stacklevel=2,
            )
        kept: dict[str, Any] = {"weight_norm": False}
        groups = [{"params": targets, **options, **kept}, {"params": rest, **kept}]
    else:
        groups = [*_by_layout(model, targets, options), *_by_layout(model, rest, {})]
    return [group for group in groups if group["params"]]


def _by_layout(model: nn.Module, named: _Named, options: dict[str, Any]) -> list[dict[str, Any]]:
    """Keep the weights that are stored as (in, out) apart, so that rows are always outputs."""
    turned = {id(m.weight) for m in model.modules() if isinstance(m, Conv1D)}
    return [
        {"params": [pair for pair in named if id(pair[1]) not in turned], **options},
        {"params": [pair for pair in named if id(pair[1]) in turned], **options, "fan_in_fan_out": True},
    ]


def _check_dora(layers: dict[str, Any]) -> None:
    """Refuse LoRA layers whose trained adapters do not normalise."""
    advice = (
        "In the adapter form the DoRA layers normalise the weight: attach the adapter with "
        "peft.LoraConfig(use_dora=True, ...), or take form='dense' to normalise the trainable matrices themselves."
    )
    if not layers:
        raise ModelError(f"The model has no LoRA layers. {advice}")
    for name, layer in layers.items():
        for adapter in layer.active_adapters:
            known = adapter in layer.lora_A or adapter in layer.lora_embedding_A
            if known and adapter not in layer.lora_magnitude_vector:
                raise ModelError(f"The adapter {adapter!r} has no magnitudes at {name} (use_dora is off). {advice}")


def _factors(model: nn.Module, target_modules: list[str] | tuple[str, ...] | str | None) -> tuple[_Named, _Named]:
    """Return the factors of the linear DoRA layers (of those that match) and everything else that is trainable."""
    factors, rest = split_parameters(model, _FACTORS)
    if target_modules is None:
        return factors, rest
    matching = {id(p) for _, p in split_parameters(model, target_modules)[0]}
    chosen = [pair for pair in factors if id(pair[1]) in matching]
    if not chosen:
        raise ModelError(
            f"target_modules = {target_modules!r} matches no layer with an adapter (there is one at "
            f"{factors[0][0].partition('.lora_')[0]}, ...). Leave it out to take every such layer."
        )
    kept = {id(p) for _, p in chosen}
    return chosen, [(n, p) for n, p in model.named_parameters() if p.requires_grad and id(p) not in kept]
