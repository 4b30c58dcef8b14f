"""Per-layer updates: every parameter is stepped inside the backward pass, and its gradient freed at once.

`PerLayerOptimizer` takes any optimizer class and gives each parameter one of its own, run as soon as the parameter's
gradient is complete. No two gradients are then held at once, which saves the bytes of all the others. To schedulers,
checkpoints and the Trainer it is one optimizer: its groups hold the learning rates, its state is that of all
parameters, and ``step`` marks the end of a step, so that a scheduler counts as always. The numbers are those of the
wrapped optimizer run in the ordinary way.

What needs all gradients together cannot work and is refused: gradient accumulation (each backward pass is a step),
clipping by the norm over the model, loss scaling, and DDP, whose gradients are not averaged yet when a parameter is
stepped. FSDP2 (``fully_shard`` before the optimizer is made) works: its gradients are averaged first.

With the Trainer, ``Trainer(..., optimizers=(per_layer_optimizer(model, torch.optim.AdamW, lr=1e-3), None),
callbacks=[PerLayerCallback()])`` and ``max_grad_norm=0`` in its arguments; the callback refuses arguments that would
be without effect or wrong. Any class will do that steps each parameter from its own gradient and state alone: with
moments of 8 bits ``bitsandbytes.optim.Adam8bit``, or ``gnomon.optim.GaLoreAdamW`` with ``bits=8`` and no rank. Not
so an optimizer that keeps counts in its groups or estimates one learning rate for the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers import TrainerCallback

from gnomon.errors import MethodError, ModelError

__all__ = ["PerLayerCallback", "PerLayerOptimizer", "per_layer_optimizer"]

_NAMES = ("params", "param_names")  # of a group, what is no hyperparameter


class PerLayerOptimizer(Optimizer):
    """An optimizer a parameter, each run when the gradient of its parameter is complete.

    Parameters
    ----------
    params : iterable of parameters, of (name, parameter) or of groups
        As in `torch.optim.Optimizer`.
    cls : type
        The optimizer class to wrap.
    gradient_accumulation_steps : int, default 1
        What the training loop uses; anything but 1 is refused.
    max_grad_norm : float, default 0
        What the training loop clips to; anything but 0 is refused.
    **options
        Passed on to `cls` (``lr``, ``betas``, ...).

    Raises
    ------
    MethodError
        With gradient accumulation, clipping, or several ranks whose parameters are not sharded (DDP).

    Examples
    --------
    >>> layer = nn.Linear(2, 2)
    >>> optimizer = PerLayerOptimizer(layer.parameters(), torch.optim.SGD, lr=0.1)
    >>> layer(torch.ones(1, 2)).sum().backward()
    >>> layer.weight.grad is None, optimizer.step()
    (True, None)
    """

    def __init__(
        self,
        params: Any,
        cls: type[Optimizer],
        *,
        gradient_accumulation_steps: int = 1,
        max_grad_norm: float = 0.0,
        **options: Any,
    ) -> None:
        _refuse_accumulation(gradient_accumulation_steps)
        _refuse_clipping(max_grad_norm)
        self._cls, self._options = cls, dict(options)
        self._start_over()
        probe = cls([nn.Parameter(torch.zeros(1))], **options)  # a class may change what it is given
        super().__init__(params, dict(probe.defaults))

    def _start_over(self) -> None:
        self._inner: dict[Tensor, Optimizer] = {}
        self._handles: list[Any] = []
        self._stepped: set[int] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_cls": self._cls, "_options": self._options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_inner" not in self.__dict__:  # a copy: it has parameters and state of its own, and no hooks yet
            self._start_over()
            for index in range(len(self.param_groups)):
                self._attach(index)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in `torch.optim.Optimizer`; its parameters are stepped in the backward pass from now on."""
        super().add_param_group(param_group)
        self._attach(len(self.param_groups) - 1)

    def _attach(self, index: int) -> None:
        group = self.param_groups[index]
        for p in group["params"]:
            self._refuse_unsharded(p)
        for p in group["params"]:
            inner = self._cls([{"params": [p], **_hyperparameters(group)}], **self._options)
            inner.state = self.state
            self._inner[p] = inner
            if p.requires_grad:
                self._handles.append(p.register_post_accumulate_grad_hook(partial(self._step_now, index)))

    def detach(self) -> None:
        """Take the hooks off the parameters; ``step`` then steps them as an ordinary optimizer does."""
        while self._handles:
            self._handles.pop().remove()

    # ---- stepping -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _step_now(self, index: int, p: Tensor) -> None:
        self._refuse_unsharded(p)
        if id(p) in self._stepped:
            raise MethodError(
                f"A second backward pass reached {self._name(p)} before step(): gradients cannot be accumulated while "
                "every parameter is stepped inside the backward pass. Call step() after every backward(), with "
                "gradient_accumulation_steps = 1 and a larger batch."
            )
        self._stepped.add(id(p))
        self._step_one(index, p)
        p.grad = None

    def _step_one(self, index: int, p: Tensor) -> None:
        inner = self._inner[p]
        inner.param_groups[0].update(_hyperparameters(self.param_groups[index]))
        inner.step()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Mark the end of a step; parameters whose gradient did not come from a backward pass are stepped here.

        Parameters
        ----------
        closure : callable, optional
            Re-evaluates the model, calls backward and returns the loss.

        Returns
        -------
        The closure's result, or None.

        Raises
        ------
        MethodError
            When the parameters were exchanged after the optimizer was made.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._stepped.clear()
        for index, group in enumerate(self.param_groups):
            for p in group["params"]:
                if p not in self._inner:
                    raise MethodError(
                        f"{self._name(p)} was exchanged after the optimizer was made (by FSDP2 or a cast?), so its "
                        "hook is gone. Make the optimizer from the parameters of the model as it is trained."
                    )
                if p.grad is not None:
                    self._step_one(index, p)
                    if self._handles:
                        p.grad = None
        return loss

    def _name(self, parameter: Tensor) -> str:
        for g, group in enumerate(self.param_groups):
            for i, p in enumerate(group["params"]):
                if p is parameter:
                    names = group.get("param_names")
                    return f"parameter {names[i] if names else f'{i} of group {g}'!r}"
        return "a parameter"

    def _refuse_unsharded(self, p: Tensor) -> None:
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if several and not isinstance(p, DTensor):
            raise MethodError(
                f"Stepping inside the backward pass would use gradients that the {dist.get_world_size()} ranks have "
                "not averaged yet (DDP). Use an ordinary optimizer, or shard the model with fully_shard before making "
                "this one."
            )

    # ---- state ----------------------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; each parameter's part is read by the wrapped class, which knows how to keep its dtypes.

        Parameters
        ----------
        state_dict : dict
            From ``state_dict`` of this class, or of the wrapped class with the same groups.
        """
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        saved = [key for group in state_dict["param_groups"] for key in group["params"]]
        own = [(group, p) for group in self.param_groups for p in group["params"]]
        for key, (group, p) in zip(saved, own, strict=True):
            inner, mine = self._inner[p], state_dict["state"].get(key)
            inner.state = type(self.state)(dict)
            if mine is not None:
                groups = [{**_hyperparameters(group), "params": [0]}]
                inner.load_state_dict({"state": {0: mine}, "param_groups": groups})
                self.state[p] = inner.state[p]
            inner.state = self.state


def _hyperparameters(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in _NAMES}


def _refuse_accumulation(steps: int) -> None:
    if steps != 1:
        raise MethodError(
            f"gradient_accumulation_steps = {steps}: stepping inside the backward pass uses each gradient before the "
            "next is added, so that every pass would be a step. Use 1 with a larger batch, or an ordinary optimizer."
        )


def _refuse_clipping(norm: float | None) -> None:
    if norm is not None and norm > 0:
        raise MethodError(
            f"max_grad_norm = {norm}: clipping needs all gradients at once, and stepping inside the backward pass "
            "frees each of them before the next is there. Set it to 0, or use an ordinary optimizer."
        )


class PerLayerCallback(TrainerCallback):
    """Refuses Trainer arguments that per-layer updates cannot carry out, before the first step.

    Raises
    ------
    MethodError
        With gradient accumulation, clipping (the Trainer's default is ``max_grad_norm=1``) or float16 loss scaling.

    Examples
    --------
    >>> from transformers import TrainingArguments
    >>> PerLayerCallback().on_train_begin(TrainingArguments(max_grad_norm=0.0, report_to=[]), None, None)
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the arguments of the run."""
        _refuse_accumulation(args.gradient_accumulation_steps)
        _refuse_clipping(args.max_grad_norm)
        if args.fp16:
            raise MethodError(
                "fp16 = True scales the loss, and the gradients would be used before they are unscaled. Use bf16 = "
                "True."
            )


def per_layer_optimizer(
    model: nn.Module, cls: type[Optimizer], *, no_decay: Iterable[str] = (), **options: Any
) -> PerLayerOptimizer:
    """Return a `PerLayerOptimizer` over the trainable parameters of a model, under their names.

    Parameters
    ----------
    model : nn.Module
        On its device and in its dtype already.
    cls : type
        The optimizer class to wrap.
    no_decay : iterable of str, default ()
        Parameters whose name contains one of these get a weight decay of 0.
    **options
        As in `PerLayerOptimizer`.

    Raises
    ------
    ModelError
        When the model has no trainable parameters.

    Examples
    --------
    >>> type(per_layer_optimizer(nn.Linear(2, 2), torch.optim.AdamW, lr=1e-3)).__name__
    'PerLayerOptimizer'
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise ModelError(f"{type(model).__name__} has no trainable parameters. Unfreeze those that are to be trained.")
    spared = [(name, p) for name, p in named if any(part in name for part in no_decay)]
    decayed = [(name, p) for name, p in named if not any(part in name for part in no_decay)]
    groups: list[dict[str, Any]] = [{"params": decayed}] if decayed else []
    groups += [{"params": spared, "weight_decay": 0.0}] if spared else []
    return PerLayerOptimizer(groups, cls, **options)
