"""Adam in low-rank coordinates, as GaLore has it: what projected optimizers over Adam share.

The arithmetic is that of the Hugging Face AdamW GaLore was released with: eps is added before the bias correction and
decoupled weight decay comes after the update.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gnomon.common.projected_groups import check_hyperparameters
from gnomon.common.projected_optimizer import ProjectedOptimizer

__all__ = ["ProjectedAdam"]


class ProjectedAdam(ProjectedOptimizer):
    """A `ProjectedOptimizer` over Adam; its defaults must also hold ``betas, eps, correct_bias``."""

    def _check_group(self, group: dict[str, Any]) -> None:
        keys = ("lr", "betas", "eps", "weight_decay", "bits")
        check_hyperparameters(**{key: group[key] for key in keys})
        super()._check_group(group)

    def _moments(self, group: dict[str, Any]) -> dict[str, bool]:
        return {"exp_avg": True, "exp_avg_sq": False}

    def _directions(self, group: dict[str, Any], moments: dict[str, list[Tensor]], grads: list[Tensor]) -> list[Tensor]:
        m, v = moments["exp_avg"], moments["exp_avg_sq"]
        beta1, beta2 = group["betas"]
        torch._foreach_lerp_(m, grads, 1 - beta1)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, grads, grads, value=1 - beta2)
        roots = list(torch._foreach_sqrt(v))
        torch._foreach_add_(roots, group["eps"])
        return [torch.div(a, b, out=b) for a, b in zip(m, roots, strict=True)]

    def _step_size(self, group: dict[str, Any], step: int) -> float:
        lr, (beta1, beta2) = float(group["lr"]), group["betas"]
        return lr * math.sqrt(1 - beta2**step) / (1 - beta1**step) if group["correct_bias"] else lr
