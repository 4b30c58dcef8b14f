"""The error-feedback state machines, one message at a time, as in-place updates of a worker's memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gnomon.errors import MethodError, nearest
from gnomon.optim.econtrol.compressors import Compressor

__all__ = ["KINDS", "Kind", "Memory", "absorb", "check_kind", "default_eta", "estimates", "message_input"]

Kind = Literal["none", "ec", "ef21", "ef21-sgdm", "econtrol"]
KINDS = ("none", "ec", "ef21", "ef21-sgdm", "econtrol")
ESTIMATING = ("ef21", "ef21-sgdm", "econtrol")


@dataclass
class Memory:
    """What a worker remembers of one tensor: error `e`, gradient estimate `h`, momentum `v`; None where not used."""

    e: Tensor | None = None
    h: Tensor | None = None
    v: Tensor | None = None

    @classmethod
    def start(cls, kind: str, gradient: Tensor, *, dense: bool) -> Memory:
        """Return the memory before the first message.

        Parameters
        ----------
        kind : str
        gradient : Tensor
            The first gradient.
        dense : bool
            Whether it is exchanged uncompressed, so that ``h = g``; else ``h = 0``.
        """
        zero = torch.zeros_like(gradient)
        memory = cls()
        if kind in ("ec", "econtrol"):
            memory.e = zero.clone()
        if kind in ESTIMATING:
            memory.h = gradient.clone() if dense else zero.clone()
        if kind == "ef21-sgdm":
            memory.v = gradient.clone()
        return memory


def estimates(kind: str) -> bool:
    """Return whether everyone keeps a running estimate that the mean message is added to."""
    return kind in ESTIMATING


def check_kind(kind: str) -> str:
    """Return `kind`.

    Raises
    ------
    MethodError
        When there is none of that name.
    """
    if kind not in KINDS:
        raise MethodError(f"kind = {kind!r}. {nearest(str(kind), KINDS, noun='kind of feedback')}")
    return kind


def default_eta(delta: float) -> float:
    """Return the strength of the error signal where none is given: the contraction, within [0.01, 0.3].

    The proofs take eta = delta/400, which is far too small in practice.
    """
    return min(0.3, max(0.01, delta))


def message_input(kind: str, gradient: Tensor, memory: Memory, *, eta: float = 0.0, beta: float = 0.1) -> Tensor:
    """Return the vector that is compressed next; the memory is left as it is.

    ========== =====================
    none       g
    ec         e + g
    ef21       g - h
    ef21-sgdm  v - h, with v <- (1 - beta) v + beta g before
    econtrol   eta * e + g - h
    ========== =====================
    """
    if kind == "none":
        return gradient
    if kind == "ec":
        assert memory.e is not None
        return gradient + memory.e
    assert memory.h is not None
    if kind == "econtrol":
        assert memory.e is not None
        return torch.sub(gradient, memory.h).add_(memory.e, alpha=eta)
    if kind == "ef21-sgdm":
        assert memory.v is not None
        return torch.lerp(memory.v, gradient, beta).sub_(memory.h)
    return gradient - memory.h


def absorb(
    kind: str,
    gradient: Tensor,
    memory: Memory,
    compressor: Compressor,
    message: tuple[Tensor, ...],
    *,
    beta: float = 0.1,
) -> None:
    """Update the memory in place after the worker has sent `message` = C(input).

    ec: ``e <- e + g - C``. ef21: ``h <- h + C``. econtrol: ``e <- e + g - h - C`` with the h before, then
    ``h <- h + C``; eta stands inside C alone.
    """
    if kind in ("ec", "econtrol"):
        assert memory.e is not None
        memory.e.add_(gradient)
        if kind == "econtrol":
            assert memory.h is not None
            memory.e.sub_(memory.h)
        compressor.add(memory.e, message, -1.0)
    if memory.v is not None:
        memory.v.lerp_(gradient, beta)
    if memory.h is not None:
        compressor.add(memory.h, message)
