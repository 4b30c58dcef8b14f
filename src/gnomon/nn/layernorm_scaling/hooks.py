"""The multiplications, as forward hooks: no parameter, no module and no state-dict key is added for a constant.

The hook objects hold plain numbers, so they are pickled and deep-copied with their module, and a Python float
multiplies tensors of any dtype, DTensors and traced tensors alike: torch computes the product in float32 for
bfloat16 activations and rounds it once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["DepthHook", "InputScale", "LearnedScale", "OutputScale", "attach", "attached", "detach"]


def in_backward() -> bool:
    """Return whether autograd is running, which for a forward hook means that a checkpoint is recomputed."""
    return torch._C._current_graph_task_id() != -1


class DepthHook:
    """Base of all hooks of this method, so that they are found again.

    Parameters
    ----------
    scales : sequence of float
        The factor of each call of the module within one forward pass: one, or several for a shared block.
    """

    def __init__(self, scales: Sequence[float]) -> None:
        self.scales = tuple(float(s) for s in scales)
        self._calls = 0
        self._recomputed = 0

    def factor(self) -> float:
        """Return the factor of this call and count it; recomputation goes through the calls backwards."""
        if len(self.scales) == 1:
            return self.scales[0]
        if in_backward():
            self._recomputed += 1
            return self.scales[-(1 + (self._recomputed - 1) % len(self.scales))]
        self._calls += 1
        return self.scales[(self._calls - 1) % len(self.scales)]

    def restart(self) -> None:
        """Begin a forward pass: the next call is the first."""
        self._calls = self._recomputed = 0

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{s:.4g}' for s in self.scales)})"


class OutputScale(DepthHook):
    """Multiplies what a module returns (the first element of a tuple)."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Return the scaled output."""
        factor = self.factor()
        if isinstance(output, tuple):
            return (output[0] * factor, *output[1:])
        return output * factor


class InputScale(DepthHook):
    """Multiplies the first tensor a module is called with."""

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Return the arguments with the scaled tensor."""
        factor = self.factor()
        if args:
            return (args[0] * factor, *args[1:]), kwargs
        key = next(name for name, value in kwargs.items() if isinstance(value, Tensor))
        return args, {**kwargs, key: kwargs[key] * factor}


class LearnedScale(DepthHook):
    """Multiplies what a module returns by a parameter of that module."""

    def __init__(self, parameter: str) -> None:
        super().__init__((1.0,))
        self.parameter = parameter

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Return the scaled output."""
        gamma = getattr(module, self.parameter)
        if isinstance(output, tuple):
            return (output[0] * gamma.to(output[0].dtype), *output[1:])
        return output * gamma.to(output.dtype)


class Restart(DepthHook):
    """Tells the hooks of shared blocks that a forward pass begins."""

    def __init__(self, hooks: Sequence[DepthHook]) -> None:
        super().__init__((1.0,))
        self.hooks = list(hooks)

    def __call__(self, module: nn.Module, args: Any) -> None:
        """Restart every hook."""
        for hook in self.hooks:
            hook.restart()


def attach(module: nn.Module, hook: Any) -> None:
    """Register a hook where its kind belongs."""
    if isinstance(hook, InputScale):
        module.register_forward_pre_hook(hook, with_kwargs=True)
    elif isinstance(hook, Restart):
        module.register_forward_pre_hook(hook)
    else:
        module.register_forward_hook(hook)


def attached(model: nn.Module) -> Iterator[tuple[str, nn.Module, DepthHook]]:
    """Yield (name, module, hook) for every hook of this method below `model`."""
    for name, module in model.named_modules():
        for table in (module._forward_pre_hooks, module._forward_hooks):
            for hook in list(table.values()):
                if isinstance(hook, DepthHook):
                    yield name, module, hook


def detach(model: nn.Module) -> None:
    """Remove every hook of this method below `model`."""
    for module in model.modules():
        for table, extra in (
            (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
            (module._forward_hooks, module._forward_hooks_with_kwargs),
        ):
            for key in [k for k, hook in table.items() if isinstance(hook, DepthHook)]:
                del table[key]
                extra.pop(key, None)
