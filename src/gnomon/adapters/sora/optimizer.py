"""An optimizer around any other that moves the gates by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from gnomon.adapters.sora.gates import GateStep
from gnomon.adapters.sora.proximal import Prox
from gnomon.errors import MethodError

__all__ = ["SoRAProximal"]


class SoRAProximal(Optimizer):
    """Any optimizer for A, B and a head, with Adam and the proximal map for the gates.

    It shares parameter groups and state with the optimizer it wraps, so schedulers, `GradScaler`, `Trainer`
    (``optimizers=(SoRAProximal(...), None)``) and FSDP2 take it like that one, and its `state_dict` is that one's. The
    gates belong into its groups like every other parameter; they follow the learning rate of theirs, and neither its
    update nor its weight decay touches them. There is no step count to know in advance and nothing to call in the loop.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        With all trained parameters of the model, gates included.
    model : PeftModel
        With a SoRA adapter.
    xi : float, default 3e-4
        Threshold of the proximal map (authors' scripts: 3e-4, and 0 to 7e-4 with a schedule, of their own map, which
        prunes about twice as fast). Can be set between steps: ``optimizer.xi = ...``.
    lambda1 : float, default 1e-3
        Weight of the L1 term lambda1 / p sum |g| over all p gates (authors' scripts: 1e-3 with a schedule, 10 without).
        Its gradient is added in `step`; a loop that clips calls `penalise` before it clips.
    prox : {"soft", "authors"}, default "soft"
        The paper's map, or that of the authors' code (`prox_authors`).
    xi_times_lr : bool, default False
        Multiply the threshold by the learning rate of the step (a second optimizer file of the authors).
    gate_lr : float, optional
        Learning rate of the gates at the peak of the schedule; default that of their parameter group.
    betas : pair of float, default (0.9, 0.999)
    eps : float, default 1e-6
    adapter : str, optional
        Default the active one.

    Raises
    ------
    MethodError
        When an option is not allowed, or a gate is in no parameter group.
    ModelError
        When the model has no SoRA layers.

    Examples
    --------
    >>> from gnomon.adapters import apply_sora
    >>> from gnomon.common.models import tiny
    >>> model = apply_sora(tiny("llama"), r=4)
    >>> trained = [p for p in model.parameters() if p.requires_grad]
    >>> optimizer = SoRAProximal(torch.optim.AdamW(trained, lr=1e-3), model, xi=1e-3)
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        xi: float = 3e-4,
        lambda1: float = 1e-3,
        *,
        prox: Prox = "soft",
        xi_times_lr: bool = False,
        gate_lr: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        adapter: str | None = None,
    ) -> None:
        if not isinstance(optimizer, Optimizer) or isinstance(optimizer, SoRAProximal):
            raise MethodError(
                f"optimizer is a {type(optimizer).__name__}. Allowed: a torch.optim.Optimizer that is not a "
                "SoRAProximal, made of all trained parameters."
            )
        self.gates = GateStep(
            model,
            xi,
            lambda1,
            prox=prox,
            xi_times_lr=xi_times_lr,
            gate_lr=gate_lr,
            betas=betas,
            eps=eps,
            adapter=adapter,
        )
        self.gates.check(optimizer)
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self.optimizer = optimizer
        self._share()

    def _share(self) -> None:
        self.param_groups, self.state = self.optimizer.param_groups, self.optimizer.state
        self.defaults = self.optimizer.defaults

    @property
    def xi(self) -> float:
        """The threshold."""
        return self.gates.xi

    @xi.setter
    def xi(self, value: float) -> None:
        if not 0 <= value < float("inf"):
            raise MethodError(f"xi = {value!r}: the threshold is a number of at least 0, such as 3e-4.")
        self.gates.xi = float(value)

    def penalise(self, scale: float = 1.0) -> None:
        """Add the gradient of the L1 term now, before clipping; `step` then does not add it again.

        Parameters
        ----------
        scale : float, default 1
            The loss scale, where gradients are still multiplied by one.
        """
        self.gates.penalise(scale)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Let the wrapped optimizer step, then the gates."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        taken = self.gates.take(self.optimizer)
        self.optimizer.step()
        self.gates.apply(self.optimizer, taken)
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the wrapped optimizer."""
        if "optimizer" in self.__dict__:
            self.optimizer.add_param_group(param_group)
        else:
            super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Return the wrapped optimizer's state, which holds that of the gates."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of the wrapped optimizer."""
        self.optimizer.load_state_dict(state_dict)
        self._share()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "optimizer": self.optimizer, "gates": self.gates}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "optimizer" in state:
            self._share()
