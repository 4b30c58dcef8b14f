"""Groups of projected optimizers: which weights of a model they hold, which options, what is refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D
from transformers.trainer_utils import check_target_module_exists

from gnomon.common.projection import PROJ_TYPES
from gnomon.common.quantized_state import SMALLEST
from gnomon.errors import GnomonWarning, MethodError, ModelError, nearest

__all__ = [
    "PROJECTION_DEFAULTS",
    "check_hyperparameters",
    "check_projected_group",
    "split_parameters",
    "warn_of_sharded_moments",
]

PROJECTION_DEFAULTS: dict[str, Any] = {
    "update_proj_gap": 200,
    "alpha": 1.0,
    "proj_type": "std",
    "align": "none",
    "refresh": "auto",
    "broadcast": True,
}
"""What a group with a ``rank`` gets where it does not say: GaLore's and Fira's own defaults."""

_CHOICES = {
    "proj_type": PROJ_TYPES,
    "align": ("none", "rotate"),
    "refresh": ("auto", "exact", "randomized"),
}


def check_hyperparameters(
    *, lr: float | Tensor, betas: tuple[float, ...] = (), eps: float = 0.0, weight_decay: float = 0.0, bits: int = 32
) -> None:
    """Refuse values outside their range: lr, eps, weight_decay >= 0, betas in [0, 1), bits 32 or 8.

    Raises
    ------
    MethodError
        Naming the value and the range.
    """
    for name, value in (("lr", float(lr)), ("eps", eps), ("weight_decay", weight_decay)):
        if not value >= 0.0:
            raise MethodError(f"{name} = {value}; it must be 0 or more.")
    for i, beta in enumerate(betas):
        if not 0.0 <= beta < 1.0:
            raise MethodError(f"betas[{i}] = {beta}; it must lie in [0, 1).")
    if bits not in (8, 32):
        raise MethodError(f"bits = {bits}; the moments are kept in 32 (full precision) or 8 bits.")


def split_parameters(
    model: nn.Module, target_modules: list[str] | tuple[str, ...] | str
) -> tuple[list[tuple[str, nn.Parameter]], list[tuple[str, nn.Parameter]]]:
    """Split the trainable parameters of a model into the weights of target layers and the rest.

    Parameters
    ----------
    model : nn.Module
    target_modules : list of str or str
        As the Trainer's ``optim_target_modules``: parts of module names or regular expressions, one regular
        expression, or ``"all-linear"``. Only `nn.Linear` and `Conv1D` layers count.

    Returns
    -------
    targets, rest : two lists of (name, parameter)
        In the model's order; frozen parameters are in neither, a shared one is in one only.

    Raises
    ------
    ModelError
        When no trainable layer matches; the message lists layer names of the model.
    """
    everything = isinstance(target_modules, str) and target_modules.replace("_", "-") == "all-linear"
    wanted = target_modules if isinstance(target_modules, str) else list(target_modules)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
    found = {n: m for n, m in linears.items() if everything or check_target_module_exists(wanted, n)}
    chosen = {id(m.weight) for m in found.values()}
    targets: list[tuple[str, nn.Parameter]] = []
    rest: list[tuple[str, nn.Parameter]] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (targets if id(parameter) in chosen else rest).append((name, parameter))
    if not targets:
        some = ", ".join(list(linears)[:3]) or "none"
        reason = "match but are frozen" if found else "match"
        raise ModelError(
            f"target_modules = {wanted!r}: {'all layers that' if found else 'no linear layers'} {reason}. "
            f"The model has {len(linears)} linear layers ({some}, ...). Give parts of such names."
        )
    return targets, rest


def check_projected_group(
    group: dict[str, Any],
    name: Callable[[Tensor], str],
    optimizer: str,
    proj_types: tuple[str, ...] = PROJ_TYPES,
    warn: bool = True,
) -> bool:
    """Check a group that has a ``rank`` and fill in the options it lacks.

    Parameters
    ----------
    group : dict
        Changed in place; GaLore's ``scale`` becomes ``alpha``.
    name : callable
        Gives the name of a parameter for messages.
    optimizer : str
        The optimizer's class, for messages.
    proj_types : tuple of str
        The projections that it can work with.
    warn : bool, default True
        Warn of a rank above a matrix's smaller dimension.

    Returns
    -------
    bool
        Whether it warned.

    Raises
    ------
    MethodError
        When an option is out of range or a parameter is no matrix.
    """
    if "scale" in group and "alpha" not in group:
        group["alpha"] = group.pop("scale")
    for key, value in PROJECTION_DEFAULTS.items():
        group.setdefault(key, value)
    for key, choices in _CHOICES.items():
        if group[key] not in choices:
            raise MethodError(f"{key} = {group[key]!r}. {nearest(str(group[key]), choices, noun='value')}")
    if group["proj_type"] not in proj_types:
        raise MethodError(
            f"proj_type = {group['proj_type']!r} does not work with {optimizer}: its scaling factors need one "
            f"side at full size. Use one of {', '.join(proj_types)}, or GaLoreAdamW."
        )
    for key in ("rank", "update_proj_gap"):
        if isinstance(group[key], bool) or not isinstance(group[key], int) or group[key] < 1:
            raise MethodError(f"{key} = {group[key]!r}; it must be a whole number of at least 1.")
    if not group["alpha"] > 0:
        raise MethodError(f"alpha = {group['alpha']}; the scale of the projected update must be above 0.")
    above = None
    for p in group["params"]:
        if p.ndim != 2:
            raise MethodError(
                f"{name(p)} has the shape {tuple(p.shape)}; a group with a rank takes matrices only. "
                "Move it to a group without 'rank'. (FSDP1 flattens parameters: use FSDP2, fully_shard.)"
            )
        if above is None and group["rank"] > min(p.shape):
            above = p
    if above is None or not warn:
        return False
    warnings.warn(
        f"rank = {group['rank']} is above the smaller dimension of {name(above)} {tuple(above.shape)}; "
        "such matrices use their full rank.",
        GnomonWarning,
        stacklevel=6,
    )
    return True


def warn_of_sharded_moments(group: dict[str, Any], name: Callable[[Tensor], str]) -> None:
    """Say which moments stay in full precision although ``bits`` is 8: those of sharded weights without a ``rank``."""
    if group["bits"] != 8 or "rank" in group:
        return
    sharded = [p for p in group["params"] if isinstance(p, DTensor) and p.numel() >= SMALLEST]
    if sharded:
        warnings.warn(
            f"bits = 8 does not reach {name(sharded[0])} and {len(sharded) - 1} further sharded weights without a "
            "rank: blocks of 8-bit values could not be resharded, so their moments stay in full precision.",
            GnomonWarning,
            stacklevel=6,
        )
