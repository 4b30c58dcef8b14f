"""From coefficients to factors: one pass over the bases for everything that shares them, forward and backward.

A `SharedBases` serves one module (``share_basis="module"``) or all modules of one shape (``"shape"``). The factors of
all its members come out of one autograd node, so the engine calls its backward once, when the gradients of all of
them have arrived, and one pass over the bases gives the gradients of all coefficients.

The factors are kept until the coefficients change. Whether they have is decided by value: a version counter would
miss optimizers that write through ``.data``, and the buffers that FSDP fills anew.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from gnomon.adapters.nola.bases import Bases, contract, mix

__all__ = ["SharedBases"]


class Member(Protocol):
    """What a `SharedBases` needs to know of a layer."""

    def parameter(self, side: str, adapter: str) -> Tensor:
        """Return the coefficients as they are stored."""

    def coefficients(self, side: str, adapter: str) -> Tensor:
        """Return the coefficients as trained, or as coded where training sees codes."""


class SharedBases:
    """The bases of one side of one adapter, the layers that mix them, and the factors as they are now.

    Parameters
    ----------
    bases : Bases
    start : Bases, optional
        One more random matrix, which is added to every factor.
    adapter : str
    side : {"a", "b"}
    """

    def __init__(self, bases: Bases, start: Bases | None, adapter: str, side: str) -> None:
        self.bases = bases
        self.start = start
        self.adapter = adapter
        self.side = side
        self.members: list[Any] = []
        self.summing = False
        self.forget()

    def forget(self) -> None:
        """Drop the factors, the open autograd node and sums of gradients."""
        self._factors: dict[Any, Tensor] = {}
        self._seen: dict[Any, Tensor] = {}
        self._open: dict[Any, tuple[Tensor, Tensor]] = {}
        self._sums: dict[Any, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if not k.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.forget()

    def factor(self, member: Member) -> Float[Tensor, "a b"]:
        """Return the factor of one member, with its gradient if one is wanted."""
        mine = member.coefficients(self.side, self.adapter)
        if isinstance(mine, DTensor):
            mine = mine.full_tensor()
        if not self._is_fresh(member, mine):
            self._refresh(member, mine)
        if not (torch.is_grad_enabled() and mine.requires_grad):
            return self._factors[member]
        factor, parameter = self._open.pop(member, (None, None))
        if factor is None or parameter is not member.parameter(self.side, self.adapter):
            self._open_node(member, mine)
            factor, _ = self._open.pop(member)
        return factor

    def _open_node(self, member: Member, mine: Tensor) -> None:
        """Make one autograd node for all members whose factors stand; each takes its own once."""
        given = {m: mine if m is member else m.coefficients(self.side, self.adapter) for m in self._factors}
        given = {m: c for m, c in given.items() if c.requires_grad and self._is_fresh(m, c)}
        outputs = _Mix.apply(self, list(given), *given.values())
        self._open = {
            m: (output, m.parameter(self.side, self.adapter)) for m, output in zip(given, outputs, strict=True)
        }

    def _is_fresh(self, member: Member, coefficients: Tensor) -> bool:
        seen = self._seen.get(member)
        return (
            seen is not None
            and not isinstance(coefficients, DTensor)
            and seen.dtype == coefficients.dtype
            and seen.device == coefficients.device
            and torch.equal(seen, coefficients.detach())
        )

    @torch.no_grad()
    def _refresh(self, wanted: Member, mine: Tensor) -> None:
        """Mix the factors of all members whose coefficients changed and stand on this rank as whole tensors."""
        given = {m: mine if m is wanted else m.coefficients(self.side, self.adapter) for m in self.members}
        changed = {
            m: c.detach().clone()
            for m, c in given.items()
            if m is wanted
            or (
                not isinstance(c, DTensor)
                and (c.device, c.dtype) == (mine.device, mine.dtype)
                and not self._is_fresh(m, c)
            )
        }
        factors = mix(torch.stack(list(changed.values())), self.bases)
        if self.start is not None:
            factors += self.start.draw(device=factors.device).to(factors.dtype)
        for row, member in enumerate(changed):
            self._factors[member], self._seen[member] = factors[row], changed[member]
        self._open = {}

    def gradients(self, members: list[Any], of_factors: tuple[Tensor | None, ...]) -> list[Tensor | None]:
        """Return the gradients of the coefficients of `members`; while summing, keep those of the factors instead."""
        arrived = {m: g for m, g in zip(members, of_factors, strict=True) if g is not None}
        if self.summing:
            for member, gradient in arrived.items():
                self._sums[member] = self._sums[member] + gradient if member in self._sums else gradient.clone()
            return [None] * len(members)
        found = self._contracted(arrived)
        return [found.get(m) for m in members]

    def _contracted(self, of_factors: dict[Any, Tensor]) -> dict[Any, Tensor]:
        if not of_factors:
            return {}
        found = contract(torch.stack(list(of_factors.values())), self.bases)
        return dict(zip(of_factors, found, strict=True))

    def flush(self) -> None:
        """Add what was summed to the gradients of the coefficients, in one pass over the bases."""
        for member, gradient in self._contracted(self._sums).items():
            member.coefficients(self.side, self.adapter).backward(gradient)
        self._sums = {}


class _Mix(torch.autograd.Function):
    """Coefficients -> factors. Linear, so nothing is saved for the backward pass."""

    @staticmethod
    def forward(ctx: Any, shared: SharedBases, members: list[Any], *coefficients: Tensor) -> tuple[Tensor, ...]:
        ctx.shared, ctx.members = shared, members
        ctx.set_materialize_grads(False)
        return tuple(shared._factors[m].view_as(shared._factors[m]) for m in members)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        return (None, None, *ctx.shared.gradients(ctx.members, gradients))
