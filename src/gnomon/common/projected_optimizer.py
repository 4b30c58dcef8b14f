"""The machinery of optimizers that keep their state in a low-rank projection of the gradient (GaLore and kin).

`ProjectedOptimizer` is a `torch.optim.Optimizer` whose groups may carry the key ``rank``: their matrices are
projected, all other groups are stepped in full. It owns what such optimizers share: checks of the groups, refresh
of the projector, sharded and replicated parameters, state that loads bit for bit, stepping inside the backward
pass. A method adds its arithmetic by overriding `_moments`, `_directions`, `_step_size` and, if need be, `_apply`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from gnomon.common import projection
from gnomon.common.projected_groups import check_projected_group, warn_of_sharded_moments
from gnomon.common.projection import FULL, LEFT, RIGHT
from gnomon.common.quantized_state import SMALLEST, load_moment, store_moment
from gnomon.common.tensors import full_tensor
from gnomon.errors import MethodError

__all__ = ["ProjectedOptimizer"]


class ProjectedOptimizer(Optimizer):
    """An optimizer whose groups with the key ``rank`` keep their state in a projection of the gradient.

    Group keys beside ``rank``: ``update_proj_gap`` (steps between two projectors, default 200), ``alpha`` (GaLore's
    ``scale``, also read under that name; default 1), ``proj_type``, ``align``, ``refresh`` (see
    `gnomon.common.projection`) and ``broadcast`` (default true: ranks of a process group share the first rank's
    projector; false where ranks hold different parameters, as in pipeline stages).

    Parameters
    ----------
    params : iterable of parameters, of (name, parameter) or of groups
        Names, where given, appear in messages and diagnostics.
    defaults : dict
        Must hold ``lr, weight_decay, maximize, foreach, bits, seed``.
    """

    _proj_types: tuple[str, ...] = projection.PROJ_TYPES
    _rotated: tuple[str, ...] = ("exp_avg",)  # moments that `align="rotate"` carries over
    _decays = True  # decoupled weight decay, after the update

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        self._start_over()
        super().__init__(params, defaults)

    def _start_over(self) -> None:
        self._handles: list[Any] = []
        self._stepped: set[int] = set()
        self._facts: dict[Tensor, dict[str, Tensor]] = {}
        self._warned = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        # copies and pickles carry groups and state only
        super().__setstate__(state)
        if "_handles" not in self.__dict__:
            self._start_over()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group after checking it; see the class for its keys.

        Raises
        ------
        MethodError
            When a parameter is complex or, in a projected group, no matrix, or an option is out of range.
        """
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
        except MethodError:
            self.param_groups.pop()
            raise

    def _check_group(self, group: dict[str, Any]) -> None:
        for p in group["params"]:
            if p.is_complex():
                raise MethodError(f"{self._name(p)} is complex ({p.dtype}); only real parameters can be optimized.")
            if p.dtype == torch.float16:
                raise MethodError(
                    f"{self._name(p)} is in float16, which cannot hold the squares of small gradients. Keep the "
                    "weights in float32 or bfloat16; autocast to float16 works with float32 weights."
                )
        if group.get("rank") is None:
            group.pop("rank", None)
        elif check_projected_group(group, self._name, type(self).__name__, self._proj_types, not self._warned):
            self._warned = True
        warn_of_sharded_moments(group, self._name)

    def _position(self, parameter: Tensor) -> tuple[int, str]:
        """Return a parameter's number over all groups and what to call it in a message."""
        number = 0
        for g, group in enumerate(self.param_groups):
            for i, p in enumerate(group["params"]):
                if p is parameter:
                    names = group.get("param_names")
                    return number, f"parameter {names[i] if names else f'{i} of group {g}'!r}"
                number += 1
        return number, "a parameter"

    def _name(self, parameter: Tensor) -> str:
        return self._position(parameter)[1]

    # ---- stepping -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform one step.

        Parameters
        ----------
        closure : callable, optional
            Re-evaluates the model and returns the loss.

        Returns
        -------
        The closure's result, or None.

        Raises
        ------
        MethodError
            On a sparse gradient, and on one with NaN or infinite entries when its projector is due.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._stepped.clear()
        if not self._handles:
            for group in self.param_groups:
                self._step_group(group, [p for p in group["params"] if p.grad is not None])
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, as in `torch.optim.Optimizer`."""
        self._stepped.clear()
        super().zero_grad(set_to_none)

    def step_in_backward(self, *, gradient_accumulation_steps: int = 1) -> Callable[[], None]:
        """Step every parameter as soon as its gradient is there and free the gradient (layer-wise mode).

        No two gradients are then held at once. `step` only marks the end of a step, for schedulers; gradients
        cannot be clipped over the whole model, unscaled or accumulated.

        Parameters
        ----------
        gradient_accumulation_steps : int, default 1
            What the training loop uses; anything but 1 is refused, here or at the second backward pass.

        Returns
        -------
        callable
            Call it without arguments to go back to stepping in `step`.

        Raises
        ------
        MethodError
            With gradient accumulation, in a process group of several ranks, or when it is on already.
        """
        if gradient_accumulation_steps != 1:
            raise MethodError(
                f"gradient_accumulation_steps = {gradient_accumulation_steps}: stepping inside the backward pass "
                "uses each gradient before the next is added. Use 1 with a larger batch, or leave this mode."
            )
        if self._handles:
            raise MethodError("This optimizer steps inside the backward pass already.")
        self._refuse_several_ranks()
        for i, group in enumerate(self.param_groups):
            for p in group["params"]:
                self._handles.append(p.register_post_accumulate_grad_hook(partial(self._step_now, i)))

        def stop() -> None:
            while self._handles:
                self._handles.pop().remove()

        return stop

    @staticmethod
    def _refuse_several_ranks() -> None:
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise MethodError(
                f"Stepping inside the backward pass would use gradients that the {dist.get_world_size()} ranks have "
                "not averaged yet. Call step() after backward() under DDP and FSDP."
            )

    @torch.no_grad()
    def _step_now(self, group_number: int, p: Tensor) -> None:
        if id(p) in self._stepped:
            raise MethodError(
                f"A second backward pass reached {self._name(p)} before step(): gradients cannot be accumulated "
                "while stepping inside the backward pass. Call step() after every backward()."
            )
        self._refuse_several_ranks()
        self._stepped.add(id(p))
        self._step_group(self.param_groups[group_number], [p])
        p.grad = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state so that training goes on bit for bit.

        torch casts floating state to the parameter's dtype and everything to its device; here the state keeps
        the dtype it was saved in.
        """
        super().load_state_dict(state_dict)
        saved = [key for group in state_dict["param_groups"] for key in group["params"]]
        own = [p for group in self.param_groups for p in group["params"]]
        for key, p in zip(saved, own, strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                if isinstance(value, Tensor):
                    self.state[p][name] = value.to(device=p.device)

    def _step_group(self, group: dict[str, Any], params: list[Tensor]) -> None:
        for p in params:
            if p.grad is not None and p.grad.layout != torch.strided:
                raise MethodError(
                    f"{self._name(p)} has a sparse gradient; {type(self).__name__} needs dense ones. "
                    "Create its embedding with sparse=False, or give it to torch.optim.SparseAdam."
                )
            self.state[p].setdefault("step", 0)
        if "rank" in group:
            for p in params:
                self._step_projected(group, p)
        elif params:
            self._step_plain(group, params)

    def _step_projected(self, group: dict[str, Any], p: Tensor) -> None:
        grad = full_tensor(p.grad)  # type: ignore[arg-type]
        low_rank, direction = self._project(group, p, grad)
        self._apply(group, p, grad, low_rank, direction, self._step_size(group, self.state[p]["step"]))

    def _project(self, group: dict[str, Any], p: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Count the step; return the low-rank coordinates of a whole gradient and the method's direction in them."""
        state = self.state[p]
        if "proj" not in state or state["step"] % group["update_proj_gap"] == 0:
            self._refresh(group, p, state, grad)
        low_rank = projection.project(grad, self._basis(state), state["side"])
        if group["maximize"]:
            low_rank.neg_()
        state["step"] += 1
        return low_rank, self._directions_of(group, [p], [low_rank], [low_rank])[0]

    @staticmethod
    def _basis(state: dict[str, Any]) -> list[Tensor]:
        return [state["proj"], state["proj_right"]] if state["side"] == FULL else [state["proj"]]

    def _refresh(self, group: dict[str, Any], p: Tensor, state: dict[str, Any], grad: Tensor) -> None:
        """Take a new projector from the gradient and store it, with the first moments carried over if asked for."""
        old = self._basis(state) if "proj" in state else None
        if old is not None and not bool(grad.any()):
            return  # a gradient of zeros says nothing about directions
        side = projection.side_of(grad.shape, group["proj_type"])
        number, name = self._position(p)
        # seeded by what it is for, so that a resumed run draws the same directions
        generator = torch.Generator().manual_seed((group["seed"] * 1_000_003 + number) * 1_000_003 + state["step"])
        try:
            new = projection.gradient_basis(
                -grad if group["maximize"] else grad,
                min(group["rank"], *grad.shape),
                side,
                refresh=group["refresh"],
                previous=old,
                generator=generator,
            )
        except MethodError as error:
            raise MethodError(
                f"The gradient of {name} cannot be projected at step {state['step']}: {error}. "
                "Skip such steps (torch.amp.GradScaler does), lower the learning rate or clip."
            ) from error
        if group["broadcast"]:
            projection.broadcast_from_first(new, p)
        if old is not None and group["align"] == "rotate":
            for moment in self._rotated:
                self._rotate(group, state, moment, old, new, grad)
        state["side"] = side
        state["proj"] = new[0]
        if side == FULL:
            state["proj_right"] = new[1]

    def _rotate(
        self,
        group: dict[str, Any],
        state: dict[str, Any],
        name: str,
        old: list[Tensor],
        new: list[Tensor],
        grad: Tensor,
    ) -> None:
        if name not in state and f"{name}_codes" not in state:
            return
        side, rank = state["side"], old[0].shape[1] if state["side"] != RIGHT else old[0].shape[0]
        shape = {LEFT: (rank, grad.shape[1]), RIGHT: (grad.shape[0], rank), FULL: (rank, rank)}[side]
        moment = load_moment(state, name, grad.new_empty(shape))
        store_moment(state, name, projection.rotate(moment, old, new, side), bits=group["bits"])

    # ---- moments --------------------------------------------------------------------------------------------

    def _directions_of(
        self, group: dict[str, Any], owners: list[Tensor], like: list[Tensor], grads: list[Tensor]
    ) -> list[Tensor]:
        """Load the moments of some parameters, let the method update them, store them; return its directions."""
        signs = self._moments(group)
        moments = {
            name: [load_moment(self.state[p], name, x, signed=signed) for p, x in zip(owners, like, strict=True)]
            for name, signed in signs.items()
        }
        shards = {name: [projection.local_tensor(m) for m in values] for name, values in moments.items()}
        directions = self._directions(group, shards, grads)
        for name, values in moments.items():
            for p, value in zip(owners, values, strict=True):
                # blocks of 8-bit values could not be resharded, so sharded moments stay in full precision
                bits = 32 if isinstance(value, DTensor) else group["bits"]
                store_moment(self.state[p], name, value, bits=bits, signed=signs[name])
        return directions

    def _step_plain(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Step the parameters of a group without a rank by multi-tensor operations."""
        batches: defaultdict[Any, list[Tensor]] = defaultdict(list)
        for p in params:
            self.state[p]["step"] += 1
            # one batch for each step count, since a parameter without a gradient falls behind
            alone = group["foreach"] is False or (group["bits"] == 8 and p.numel() >= SMALLEST)
            batches[self.state[p]["step"], id(p) if alone else None].append(p)
        lr = float(group["lr"])
        for (step, _), batch in batches.items():
            grads = [projection.local_tensor(p.grad, p) for p in batch]  # type: ignore[arg-type]
            if group["maximize"]:
                grads = list(torch._foreach_neg(grads))
            directions = self._directions_of(group, batch, batch, grads)
            if lr == 0.0:
                continue
            weights = [projection.local_tensor(p) for p in batch]
            torch._foreach_add_(weights, directions, alpha=-self._step_size(group, step))
            if group["weight_decay"] > 0 and self._decays:
                torch._foreach_add_(weights, weights, alpha=-lr * group["weight_decay"])

    # ---- what a method fills in -----------------------------------------------------------------------------

    def _moments(self, group: dict[str, Any]) -> dict[str, bool]:
        """Return the names of the moments and whether each can be negative."""
        raise NotImplementedError

    def _directions(self, group: dict[str, Any], moments: dict[str, list[Tensor]], grads: list[Tensor]) -> list[Tensor]:
        """Update the moments in place and return fresh direction tensors, one a gradient."""
        raise NotImplementedError

    def _step_size(self, group: dict[str, Any], step: int) -> float:
        """Return the factor of the direction at a step counted from 1."""
        return float(group["lr"])

    def _apply(
        self, group: dict[str, Any], p: Tensor, grad: Tensor, low_rank: Tensor, direction: Tensor, step_size: float
    ) -> None:
        """Change the weight: W <- W - step_size * alpha * back(direction), then weight decay."""
        self._add(group, p, direction, step_size)

    def _local(self, p: Tensor, like: Tensor, low_rank: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return this rank's parts of low-rank coordinates and of the basis for a weight placed as `like` is."""
        side, basis = self.state[p]["side"], self._basis(self.state[p])
        part = partial(projection.local_part, like=like)
        low_rank = part(low_rank, rows=0 if side == RIGHT else None, columns=1 if side == LEFT else None)
        sides = [LEFT, RIGHT] if side == FULL else [side]
        return low_rank, [
            part(b, rows=0 if s == LEFT else None, columns=1 if s == RIGHT else None)
            for b, s in zip(basis, sides, strict=True)
        ]

    def _add(
        self,
        group: dict[str, Any],
        p: Tensor,
        low_rank: Tensor,
        step_size: float,
        dense: tuple[Tensor, Tensor, float] | None = None,
    ) -> None:
        """Subtract step_size * (alpha * back(low_rank) + factor * D * v) from a weight or this rank's shard of it."""
        lr = float(group["lr"])
        if lr == 0.0:
            return
        side = self.state[p]["side"]
        low_rank, basis = self._local(p, p, low_rank)
        if isinstance(p, DTensor) and dense is not None:
            part = partial(projection.local_part, like=p)
            D, v, factor = dense
            v = part(v, rows=None, columns=0) if v.ndim == 1 else part(v, rows=0, columns=None)
            dense = (part(D, rows=0, columns=1), v, factor)
        weight = projection.local_tensor(p)
        projection.add_low_rank_(weight, low_rank, basis, side, alpha=group["alpha"], step_size=step_size, dense=dense)
        if group["weight_decay"] > 0 and self._decays:
            weight.add_(weight, alpha=-lr * group["weight_decay"])
