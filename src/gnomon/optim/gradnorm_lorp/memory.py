"""What training takes in memory, counted from the shapes: weights, optimizer state, gradients, working space."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor, nn

from gnomon.common.projection import FULL, LEFT, side_of
from gnomon.common.quantized_state import BLOCK, SMALLEST
from gnomon.optim.gradnorm_lorp.groups import gradnorm_lorp_groups

__all__ = ["TrainingMemory", "training_memory"]


class TrainingMemory(NamedTuple):
    """Bytes, without activations.

    Attributes
    ----------
    weights : int
        Parameters and buffers.
    state : int
        What `GradNormLoRP` keeps between steps, in the mode "weightnorm".
    gradients : int
        All of them, or the largest one when stepping inside the backward pass.
    workspace : int
        The largest temporary tensors of one matrix's step.
    adam_state : int
        What Adam would keep for the same parameters: two moments each, in float32.
    """

    weights: int
    state: int
    gradients: int
    workspace: int
    adam_state: int

    @property
    def total(self) -> int:
        """Weights, state, gradients and workspace together."""
        return self.weights + self.state + self.gradients + self.workspace


def training_memory(
    model: nn.Module,
    rank: int = 8,
    *,
    bits: int = 32,
    step_in_backward: bool = False,
    **options: Any,
) -> TrainingMemory:
    """Count what training a model by `GradNormLoRP` takes, without running it.

    Parameters
    ----------
    model : nn.Module
        In the dtype it is to be trained in. May stand on the meta device, so that no memory is needed for counting.
    rank : int, default 8
    bits : {32, 8}, default 32
    step_in_backward : bool, default False
        Whether each weight is stepped as its gradient arrives (`GradNormLoRP.step_in_backward`).
    **options
        Of `gradnorm_lorp_groups`.

    Returns
    -------
    TrainingMemory
        The state is exact (held against measured states in the tests); the workspace counts full-size tensors only.

    Examples
    --------
    >>> import torch
    >>> with torch.device("meta"):
    ...     model = nn.ModuleDict({"mlp": nn.Linear(1024, 4096, bias=False, dtype=torch.bfloat16)})
    >>> memory = training_memory(model, rank=256, bits=8)
    >>> memory.weights, memory.state, round(memory.state / memory.adam_state, 3)
    (8388608, 2686976, 0.08)
    """
    state = 0
    trainable: list[Tensor] = []
    workspace = 0
    for group in gradnorm_lorp_groups(model, rank, **options):
        for _, p in group["params"]:
            trainable.append(p)
            if "rank" in group:
                normalised = group.get("weight_norm", True)
                rows_first = p.t() if group.get("fan_in_fan_out") else p
                state += _projected_bytes(rows_first, group, bits, normalised)
                workspace = max(workspace, _workspace(p, normalised))
            else:
                state += 2 * _moment_bytes(p.numel(), p.element_size(), bits)
    sizes = [p.numel() * p.element_size() for p in trainable]
    return TrainingMemory(
        weights=sum(x.numel() * x.element_size() for x in (*model.parameters(), *model.buffers())),
        state=state,
        gradients=max(sizes) if step_in_backward else sum(sizes),
        workspace=workspace,
        adam_state=sum(8 * p.numel() for p in trainable),
    )


def _moment_bytes(count: int, item: int, bits: int) -> int:
    """One byte an entry and a float32 scale a block, or the full dtype."""
    return count + 4 * math.ceil(count / BLOCK) if bits == 8 and count >= SMALLEST else count * item


def _projected_bytes(p: Tensor, group: dict[str, Any], bits: int, normalised: bool) -> int:
    """Projector, two low-rank moments and, of a normalised matrix, two moments of its magnitudes."""
    (m, n), item = p.shape, p.element_size()
    rank = min(group["rank"], m, n)
    side = side_of(p.shape, group["proj_type"])
    if side == FULL:
        basis, moment = rank * (m + n), rank * rank
    else:
        basis, moment = (rank * m, rank * n) if side == LEFT else (rank * n, rank * m)
    magnitudes = 2 * m * max(item, 4) if normalised else 0
    return basis * item + 2 * _moment_bytes(moment, item, bits) + magnitudes


def _workspace(p: Tensor, normalised: bool) -> int:
    """Full-size temporaries: the tangent gradient and one product; in half precision their float32 forms too."""
    half = p.element_size() < 4
    if not normalised:
        return p.numel() * p.element_size()
    return p.numel() * (3 * 4 if half else 2 * p.element_size())
