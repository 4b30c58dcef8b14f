"""Contractive compressors: what a worker sends in place of a vector, and how everyone reads it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from gnomon.common.linalg import randomized_svd
from gnomon.errors import MethodError, nearest

__all__ = ["COMPRESSORS", "Compressor", "Identity", "LowRank", "RandK", "Rounding", "ScaledSign", "TopK", "make"]

_SAMPLED_ABOVE = 200_000  # entries; below, looking at all of them is as fast
_SAMPLE = 0.01


class Compressor:
    """A map C with ``E ||C(x) - x||^2 <= (1 - delta) ||x||^2``, 0 < delta <= 1, and its message.

    A message is a tuple of tensors whose shapes and dtypes depend on the shape of x alone, so that workers can gather
    it. `add` reads it.
    """

    name = ""
    random = False

    def encode(self, x: Tensor, seed: int = 0) -> tuple[Tensor, ...]:
        """Return the message for `x`, of any shape; `seed` is used by random compressors only."""
        raise NotImplementedError

    def add(self, out: Tensor, message: tuple[Tensor, ...], alpha: float = 1.0) -> Tensor:
        """Add ``alpha * C(x)`` to `out` in place; `out` is contiguous and of the shape of x."""
        raise NotImplementedError

    def delta(self, shape: tuple[int, ...]) -> float:
        """Return the contraction that is guaranteed for every x of this shape."""
        raise NotImplementedError

    def __call__(self, x: Tensor, seed: int = 0) -> Tensor:
        """Return C(x)."""
        return self.add(torch.zeros_like(x, memory_format=torch.contiguous_format), self.encode(x, seed))

    def message_bytes(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> int:
        """Return the size of a message."""
        return sum(part.nbytes for part in self.encode(torch.zeros(shape, dtype=dtype)))


class Identity(Compressor):
    """Sends everything; delta = 1."""

    name = "identity"

    def encode(self, x: Tensor, seed: int = 0) -> tuple[Tensor, ...]:
        """Return the values."""
        return (x.reshape(-1).contiguous(),)

    def add(self, out: Tensor, message: tuple[Tensor, ...], alpha: float = 1.0) -> Tensor:
        """Add the values."""
        return out.add_(message[0].to(out.dtype).view_as(out), alpha=alpha)

    def delta(self, shape: tuple[int, ...]) -> float:
        """Return 1."""
        return 1.0


def top_indices(x: Float[Tensor, " d"], k: int) -> Tensor:
    """Return the positions of the k largest absolute values, ascending, int64; ties go to the lowest position.

    Large vectors are first cut down by a threshold estimated on 1 % of the entries; the result is the same.
    """
    size = x.abs()
    if size.numel() > _SAMPLED_ABOVE and k < size.numel() // 4:
        stride = round(1 / _SAMPLE)
        sample = size[::stride]
        wanted = min(sample.numel(), math.ceil(1.2 * k * sample.numel() / size.numel()) + 8)
        candidates = torch.nonzero(size >= sample.topk(wanted).values[-1]).flatten()
        if candidates.numel() >= k:
            return candidates[_top(size[candidates], k)]
    return _top(size, k)


def _top(size: Tensor, k: int) -> Tensor:
    smallest = size.topk(k).values[-1]
    chosen = size > smallest
    ties = torch.nonzero(size == smallest).flatten()
    chosen[ties[: k - int(chosen.sum())]] = True
    return torch.nonzero(chosen).flatten()


class TopK(Compressor):
    """Sends the K largest absolute values with their positions; delta = K/d.

    Parameters
    ----------
    ratio : float, default 0.01
        K = ceil(ratio * d), at least 1.
    values : torch.dtype, optional
        Dtype of the values on the wire, such as ``torch.bfloat16``; default that of x. What is sent is what enters
        the memory too, so rounding is fed back as well.
    """

    name = "topk"

    def __init__(self, ratio: float = 0.01, values: torch.dtype | None = None) -> None:
        self.ratio = _checked_ratio(ratio)
        self.values = values

    def count(self, shape: tuple[int, ...]) -> int:
        """Return K."""
        d = math.prod(shape)
        return min(d, max(1, math.ceil(self.ratio * d)))

    def encode(self, x: Tensor, seed: int = 0) -> tuple[Tensor, ...]:
        """Return positions (int32) and values."""
        flat = x.reshape(-1)
        index = top_indices(flat, self.count(tuple(x.shape)))
        return index.to(torch.int32), flat[index].to(self.values or x.dtype)

    def add(self, out: Tensor, message: tuple[Tensor, ...], alpha: float = 1.0) -> Tensor:
        """Add the values at their positions."""
        index, values = message
        out.view(-1).index_add_(0, index.long(), values.to(out.dtype), alpha=alpha)
        return out

    def delta(self, shape: tuple[int, ...]) -> float:
        """Return K/d."""
        return self.count(shape) / math.prod(shape)


class RandK(TopK):
    """Sends K random entries, not rescaled, and the seed of their positions; delta = K/d in expectation."""

    name = "randk"
    random = True

    @staticmethod
    def _positions(seed: int, d: int, k: int) -> Tensor:
        return torch.randperm(d, generator=torch.Generator().manual_seed(seed))[:k]

    def encode(self, x: Tensor, seed: int = 0) -> tuple[Tensor, ...]:
        """Return the seed (int64) and the values."""
        flat = x.reshape(-1)
        index = self._positions(seed, flat.numel(), self.count(tuple(x.shape))).to(x.device)
        return torch.tensor([seed], dtype=torch.int64, device=x.device), flat[index].to(self.values or x.dtype)

    def add(self, out: Tensor, message: tuple[Tensor, ...], alpha: float = 1.0) -> Tensor:
        """Draw the positions again and add the values there."""
        index = self._positions(int(message[0]), out.numel(), message[1].numel()).to(out.device)
        out.view(-1).index_add_(0, index, message[1].to(out.dtype), alpha=alpha)
        return out


class ScaledSign(Compressor):
    """Sends ``(||x||_1 / d) * sign(x)`` with sign(0) = 0; delta = ``||x||_1^2 / (d ||x||_2^2)``, at least 1/d.

    Five signs of three values share a byte: 1.6 bits an entry.
    """

    name = "sign"

    def encode(self, x: Tensor, seed: int = 0) -> tuple[Tensor, ...]:
        """Return packed signs (uint8) and the scale."""
        flat = x.reshape(-1)
        digits = torch.sign(flat).to(torch.int16) + 1
        digits = torch.nn.functional.pad(digits, (0, -flat.numel() % 5)).view(-1, 5)
        packed = (digits * torch.tensor([1, 3, 9, 27, 81], dtype=torch.int16, device=x.device)).sum(1)
        return packed.to(torch.uint8), flat.abs().mean().reshape(1)

    def add(self, out: Tensor, message: tuple[Tensor, ...], alpha: float = 1.0) -> Tensor:
        """Unpack the signs and add them times the scale."""
        packed, scale = message
        powers = torch.tensor([1, 3, 9, 27, 81], dtype=torch.int16, device=out.device)
        digits = (packed.to(torch.int16)[:, None] // powers) % 3 - 1
        signs = digits.view(-1)[: out.numel()].view_as(out).to(out.dtype)
        return out.add_(signs * scale.to(out.dtype), alpha=alpha)

    def delta(self, shape: tuple[int, ...]) -> float:
        """Return 1/d, the worst case."""
        return 1 / math.prod(shape)


class LowRank(Compressor):
    """Sends the best approximation of rank r of a matrix; delta = r / min(m, n). Vectors are sent whole.

    Tensors of more than two dimensions are matrices of their first dimension by the rest. A randomised SVD with
    power iterations stands in for the exact one (as PowerSGD's single iteration does, more closely).

    Parameters
    ----------
    rank : int, default 4
    """

    name = "lowrank"

    def __init__(self, rank: int = 4) -> None:
        if not isinstance(rank, int) or rank < 1:
            raise MethodError(f"rank = {rank!r}: allowed is a whole number of at least 1, such as 4.")
        self.rank = rank

    def _rank(self, shape: tuple[int, ...]) -> int:
        return 0 if len(shape) < 2 else min(self.rank, shape[0], math.prod(shape[1:]))

    def encode(self, x: Tensor, seed: int = 0) -> tuple[Tensor, ...]:
        """Return U S (m, r) and V^T (r, n), or the values of a vector."""
        rank = self._rank(tuple(x.shape))
        if rank == 0:
            return (x.reshape(-1).contiguous(),)
        matrix = x.reshape(x.shape[0], -1)
        if not bool(matrix.any()):
            return matrix.new_zeros(matrix.shape[0], rank), matrix.new_zeros(rank, matrix.shape[1])
        u, s, vh = randomized_svd(matrix, rank)
        return (u * s).to(x.dtype).contiguous(), vh.to(x.dtype).contiguous()

    def add(self, out: Tensor, message: tuple[Tensor, ...], alpha: float = 1.0) -> Tensor:
        """Add the product of the factors."""
        if len(message) == 1:
            return out.add_(message[0].to(out.dtype).view_as(out), alpha=alpha)
        left, right = (part.to(out.dtype) for part in message)
        out.view(out.shape[0], -1).addmm_(left, right, alpha=alpha)
        return out

    def delta(self, shape: tuple[int, ...]) -> float:
        """Return r / min(m, n); 1 for vectors."""
        rank = self._rank(shape)
        return rank / min(shape[0], math.prod(shape[1:])) if rank else 1.0


class Rounding(Compressor):
    """Rounds to b bits between plus and minus the largest absolute value.

    ``delta >= 1 - d / (4 L^2)`` with L = 2^(b-1) - 1 levels a side where that is positive; for larger d only
    ``delta > 0`` holds, since no entry moves by more than half a level and zeros stay.

    Parameters
    ----------
    bits : {8, 4, 2}, default 8
    """

    name = "rounding"

    def __init__(self, bits: int = 8) -> None:
        if bits not in (2, 4, 8):
            raise MethodError(f"bits = {bits!r}: allowed are 8, 4 and 2, which fill bytes.")
        self.bits = bits
        self.levels = 2 ** (bits - 1) - 1

    def encode(self, x: Tensor, seed: int = 0) -> tuple[Tensor, ...]:
        """Return packed codes (uint8) and the largest absolute value."""
        flat = x.reshape(-1)
        top = flat.abs().max().reshape(1)
        codes = torch.round(flat / top.clamp_min(torch.finfo(x.dtype).tiny) * self.levels).to(torch.int16)
        each = 8 // self.bits
        codes = torch.nn.functional.pad(codes + self.levels, (0, -flat.numel() % each)).view(-1, each)
        shifts = torch.arange(each, dtype=torch.int16, device=x.device) * self.bits
        return (codes << shifts).sum(1).to(torch.uint8), top

    def add(self, out: Tensor, message: tuple[Tensor, ...], alpha: float = 1.0) -> Tensor:
        """Unpack the codes and add their values."""
        packed, top = message
        shifts = torch.arange(8 // self.bits, dtype=torch.int16, device=out.device) * self.bits
        codes = ((packed.to(torch.int16)[:, None] >> shifts) & (2**self.bits - 1)) - self.levels
        values = codes.view(-1)[: out.numel()].view_as(out).to(out.dtype)
        return out.add_(values * (top.to(out.dtype) / self.levels), alpha=alpha)

    def delta(self, shape: tuple[int, ...]) -> float:
        """Return the bound, or 1/d where it is not positive."""
        d = math.prod(shape)
        return max(1 - d / (4 * self.levels**2), 1 / d)


COMPRESSORS: dict[str, Callable[..., Compressor]] = {
    "identity": Identity,
    "topk": TopK,
    "randk": RandK,
    "sign": ScaledSign,
    "lowrank": LowRank,
    "rounding": Rounding,
}
Name = Literal["identity", "topk", "randk", "sign", "lowrank", "rounding"]


def make(compressor: str | Compressor, ratio: float = 0.01, **options: Any) -> Compressor:
    """Return a compressor by name; `ratio` goes to ``"topk"`` and ``"randk"``.

    Raises
    ------
    MethodError
        On an unknown name or an option out of range.
    """
    if isinstance(compressor, Compressor):
        return compressor
    if compressor not in COMPRESSORS:
        raise MethodError(f"compressor = {compressor!r}. {nearest(str(compressor), COMPRESSORS, noun='compressor')}")
    if compressor in ("topk", "randk"):
        options["ratio"] = ratio
    return COMPRESSORS[compressor](**options)


def _checked_ratio(ratio: float) -> float:
    if not 0 < ratio <= 1:
        raise MethodError(f"ratio = {ratio!r}: allowed is a share above 0 and at most 1, such as 0.01.")
    return float(ratio)
