"""RMSProp in the low-rank coordinates: the inner optimizer of Fira-RMSProp."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from gnomon.common.projected_groups import check_hyperparameters
from gnomon.common.projected_optimizer import ProjectedOptimizer
from gnomon.errors import MethodError, NoEffectWarning

__all__ = ["ProjectedRMSProp"]


class ProjectedRMSProp(ProjectedOptimizer):
    """RMSProp whose groups with a ``rank`` keep their moments in a projection; see `FiraRMSProp`."""

    _rotated = ("momentum_buffer",)  # grad_avg stays with square_avg, or the variance could turn negative
    _decays = False

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        smoothing: float = 0.9,
        eps: float = 1e-6,
        *,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        bits: int = 32,
        foreach: bool | None = None,
        maximize: bool = False,
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "smoothing": smoothing,
            "eps": eps,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "centered": centered,
            "bits": bits,
            "foreach": foreach,
            "maximize": maximize,
            "seed": seed,
        }
        super().__init__(params, defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        check_hyperparameters(**{key: group[key] for key in ("lr", "eps", "weight_decay", "bits")})
        for key in ("smoothing", "momentum"):
            if not 0.0 <= group[key] < 1.0:
                raise MethodError(f"{key} = {group[key]}; it must lie in [0, 1).")
        if group["centered"] and group["bits"] == 8:
            raise MethodError(
                "centered = True with bits = 8: the variance is a difference that 8-bit moments cannot hold. "
                "Use one of them."
            )
        if group["weight_decay"] > 0:
            warnings.warn(
                f"weight_decay = {group['weight_decay']} has no effect: Fira's RMSProp form has none.",
                NoEffectWarning,
                stacklevel=6,
            )
        super()._check_group(group)

    def _moments(self, group: dict[str, Any]) -> dict[str, bool]:
        names = {"square_avg": False}
        if group["centered"]:
            names["grad_avg"] = True
        if group["momentum"] > 0:
            names["momentum_buffer"] = True
        return names

    def _directions(self, group: dict[str, Any], moments: dict[str, list[Tensor]], grads: list[Tensor]) -> list[Tensor]:
        v = moments["square_avg"]
        torch._foreach_mul_(v, group["smoothing"])
        torch._foreach_addcmul_(v, grads, grads, value=1 - group["smoothing"])
        if group["centered"]:
            mean = moments["grad_avg"]
            torch._foreach_lerp_(mean, grads, 1 - group["smoothing"])
            roots = list(torch._foreach_addcmul(v, mean, mean, value=-1))
            torch._foreach_clamp_min_(roots, 0.0)  # rounding must not make a variance negative
            torch._foreach_sqrt_(roots)
        else:
            roots = list(torch._foreach_sqrt(v))
        torch._foreach_add_(roots, group["eps"])
        directions = [torch.div(g, root, out=root) for g, root in zip(grads, roots, strict=True)]
        if group["momentum"] == 0:
            return directions
        buffer = moments["momentum_buffer"]
        torch._foreach_mul_(buffer, group["momentum"])
        torch._foreach_add_(buffer, directions)
        return [b.clone() for b in buffer]
