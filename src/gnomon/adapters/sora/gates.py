"""One optimizer step of the gates beside any optimizer: takes their gradients away from it, updates them itself."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from gnomon.adapters.sora.proximal import PROX, adam_step, check_options, l1_gradient
from gnomon.adapters.sora.tuner import sora_layers
from gnomon.errors import GnomonWarning, MethodError

__all__ = ["GateStep"]

_LOOK_EVERY, _FEW = 50, 0.05


@dataclass
class _Taken:
    """A gate with the gradient that was taken from the optimizer."""

    gate: nn.Parameter
    grad: Tensor
    group: dict[str, Any]


class GateStep:
    """The step of all gates of one adapter: L1 gradient, Adam, proximal map.

    The gates stand in the parameter groups of an optimizer, whose learning rate they follow, but that optimizer never
    sees their gradients, so it neither moves nor decays them. Their state (`step`, `exp_avg`, `exp_avg_sq`,
    `zero_for`, the number of steps that a gate has been 0) is kept in its `state` and is saved with it.

    Parameters
    ----------
    model : PeftModel
    xi, lambda1, prox, xi_times_lr, gate_lr, betas, eps, adapter
        As in `SoRAProximal`.
    """

    def __init__(
        self,
        model: nn.Module,
        xi: float,
        lambda1: float,
        *,
        prox: str = "soft",
        xi_times_lr: bool = False,
        gate_lr: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        adapter: str | None = None,
    ) -> None:
        check_options(xi, lambda1, prox, gate_lr, betas, eps)
        self.adapter, self.layers = sora_layers(model, adapter)
        self.xi, self.lambda1, self.prox, self.xi_times_lr = xi, lambda1, prox, xi_times_lr
        self.gate_lr, self.betas, self.eps = gate_lr, betas, eps
        self.count = sum(layer.r[self.adapter] for layer in self.layers.values())
        self.penalised = False
        self._factor = 1.0
        self._groups: dict[int, int] = {}  # id of a parameter -> number of its group: loading a state makes new groups
        self._steps = 0
        self._warned = False

    def gates(self) -> list[nn.Parameter]:
        """Return the gates that are trained, read anew: wrappers replace parameters."""
        found = [layer.lora_gate[self.adapter] for layer in self.layers.values()]
        return [gate for gate in found if gate.requires_grad]

    def check(self, optimizer: Optimizer) -> None:
        """Find every gate's parameter group.

        Raises
        ------
        MethodError
            When a gate is in none, or the rate that `gate_lr` refers to is 0.
        """
        self._groups = {id(p): number for number, group in enumerate(optimizer.param_groups) for p in group["params"]}
        missing = [
            key
            for key, layer in self.layers.items()
            if layer.lora_gate[self.adapter].requires_grad and id(layer.lora_gate[self.adapter]) not in self._groups
        ]
        if missing:
            raise MethodError(
                f"the gate of {missing[0]} and {len(missing) - 1} further ones are in no parameter group of the "
                "optimizer. Give it every parameter with requires_grad; the gates are kept from its own update."
            )
        rates = {_rate(optimizer.param_groups[self._groups[id(gate)]], initial=True) for gate in self.gates()}
        if self.gate_lr is not None:
            if len(rates) != 1 or 0.0 in rates:
                raise MethodError(
                    f"gate_lr = {self.gate_lr!r} follows the schedule of one learning rate above 0, but the gates' "
                    f"groups have {sorted(rates)}. Put the gates into one group, or leave gate_lr out."
                )
            self._factor = self.gate_lr / rates.pop()

    @torch.no_grad()
    def penalise(self, scale: float = 1.0) -> None:
        """Add the gradient of the L1 term, once a step; before clipping, so that the clipping sees it.

        Parameters
        ----------
        scale : float, default 1
            By which the gradients are multiplied at the moment (of a `GradScaler`).
        """
        if self.penalised:
            return
        self.penalised = True
        if self.lambda1 == 0:
            return
        for gate in self.gates():
            term = l1_gradient(gate.detach(), self.lambda1 * scale, self.count)
            gate.grad = term if gate.grad is None else gate.grad + term

    @torch.no_grad()
    def take(self, optimizer: Optimizer) -> list[_Taken]:
        """Take the gradients of the gates away, so that the optimizer passes them by."""
        gates = self.gates()
        if any(id(gate) not in self._groups for gate in gates):
            self.check(optimizer)
        scale = getattr(
            optimizer, "grad_scale", None
        )  # an optimizer that unscales by itself (fused, with a GradScaler)
        if scale is not None and float(getattr(optimizer, "found_inf", 0.0)) > 0:
            for gate in gates:
                gate.grad = None
            self.penalised = False
            return []
        self.penalise(1.0 if scale is None else float(scale))
        self.penalised = False
        taken = []
        for gate in gates:
            if gate.grad is not None:
                group = optimizer.param_groups[self._groups[id(gate)]]
                taken.append(_Taken(gate, gate.grad if scale is None else gate.grad / scale, group))
                gate.grad = None
        return taken

    @torch.no_grad()
    def apply(self, optimizer: Optimizer, taken: list[_Taken]) -> None:
        """Update the gates, and put their gradients back for whoever reads them after the step."""
        buckets: dict[Any, list[_Taken]] = {}
        for item in taken:
            state = optimizer.state[item.gate]
            if "exp_avg" not in state:
                state["step"] = torch.tensor(0.0)
                for name in ("exp_avg", "exp_avg_sq", "zero_for"):
                    state[name] = torch.zeros_like(item.gate)
            lr = _rate(item.group) * self._factor
            if lr != 0:  # at rate 0 nothing moves, so nothing is thresholded either
                key = (lr, int(state["step"]), item.gate.dtype, item.gate.device)
                buckets.setdefault(key, []).append(item)
        for (lr, step, _, _), items in buckets.items():
            self._update(items, [optimizer.state[item.gate] for item in items], lr, step + 1)
        for item in taken:
            item.gate.grad = item.grad
        self._steps += 1
        if self._steps % _LOOK_EVERY == 0:
            self._look([item.gate for item in taken])

    def _update(self, items: list[_Taken], states: list[dict[str, Any]], lr: float, step: int) -> None:
        """One pass over all gates of a bucket, joined into one vector."""
        gates = [_local(item.gate) for item in items]
        parts = {name: [_local(s[name]) for s in states] for name in ("exp_avg", "exp_avg_sq", "zero_for")}
        g, grad, m, v, zero_for = (
            _joined(part) for part in (gates, [_local(item.grad) for item in items], *parts.values())
        )
        u, m, v = adam_step(g, grad, m, v, step, lr, self.betas, self.eps)
        g = PROX[self.prox](u, self.xi * lr if self.xi_times_lr else self.xi)
        zero_for = (zero_for + 1) * (g == 0)
        sizes = [gate.numel() for gate in gates]
        for to, values in ((gates, g), *zip(parts.values(), (m, v, zero_for), strict=True)):
            torch._foreach_copy_(to, list(values.split(sizes)))
        for state in states:
            state["step"] += 1

    def _look(self, gates: list[nn.Parameter]) -> None:
        values = _joined([_local(gate) for gate in gates]) if gates else torch.empty(0)
        if self._warned or not values.numel():
            return
        zero = float((values == 0).float().mean())
        if zero > 1 - _FEW:
            self._warned = True
            warnings.warn(
                f"{zero:.0%} of the gates are zero after {self._steps} steps at xi = {self.xi:g}, so little is left of "
                "the adapter. A gate that starts from N(0, 1) is at zero after |g| / xi steps: take a smaller xi or "
                "lambda1, or fewer steps.",
                GnomonWarning,
                stacklevel=4,
            )


def _rate(group: dict[str, Any], initial: bool = False) -> float:
    return float(group.get("initial_lr", group["lr"]) if initial else group["lr"])


def _local(x: Tensor) -> Tensor:
    """The part of a sharded tensor that lies here; everything done to gates is elementwise."""
    return x.to_local() if isinstance(x, DTensor) else x


def _joined(parts: list[Tensor]) -> Tensor:
    whole = torch.cat([part.detach().reshape(-1) for part in parts])
    return whole if whole.dtype == torch.float64 else whole.float()
