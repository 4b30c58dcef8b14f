"""Random matrices behind a seed, and sums over them: drawn when needed, chunk by chunk, never held.

Two generators, both of fixed definition:

- ``"mt19937"``: the Mersenne Twister behind `torch.Generator` on the CPU, seeded with the low 32 bits of the seed
  (Matsumoto and Nishimura's ``init_genrand``); an entry takes one 32-bit output x and is
  (x mod 2^24) 2^-23 - 1. It has an order, so it runs on the CPU and the entries are moved.
- ``"philox"``: Philox4x32-10 (Salmon et al., 2011) with the 64-bit seed as key. Entry i is lane i mod 4 at counter
  i div 4, (x div 2^8) 2^-23 - 1. Any part is computed on the device where it is needed, with the same bits everywhere.

Letters: k bases of a rows and b columns; M coefficient vectors at once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from gnomon.errors import MethodError

__all__ = ["GENERATORS", "Bases", "contract", "derive_seed", "mix", "philox"]

Generator = Literal["mt19937", "philox"]
GENERATORS: tuple[str, ...] = ("mt19937", "philox")

_CHUNK = {"cpu": 1 << 18, "other": 1 << 24}  # entries drawn at a time: a share of the cache, 64 MB of device memory


@dataclass(frozen=True)
class Bases:
    """`count` random matrices of `rows` x `columns`, entries uniform on (-1, 1) / divisor.

    Parameters
    ----------
    seed : int
        0 up to 2^63 - 1.
    count, rows, columns : int
        k, a, b.
    divisor : float, default 1.0
    generator : {"mt19937", "philox"}, default "mt19937"

    Examples
    --------
    >>> Bases(4404687391, 16, 4, 20, divisor=4.0).draw(0, 1)[0, 0, :3]
    tensor([ 0.0971, -0.0344,  0.0618])
    """

    seed: int
    count: int
    rows: int
    columns: int
    divisor: float = 1.0
    generator: Generator = "mt19937"

    @property
    def size(self) -> int:
        """Entries of one matrix."""
        return self.rows * self.columns

    def draw(
        self, start: int = 0, stop: int | None = None, device: torch.device | str = "cpu"
    ) -> Float[Tensor, "part a b"]:
        """Return the bases from `start` to `stop`, float32."""
        stop = self.count if stop is None else stop
        parts = [part for _, part in self.chunks(device=torch.device(device), start=start, stop=stop)]
        flat = torch.cat([part.clone() for part in parts]) if parts else torch.empty(0, self.size, device=device)
        return flat.reshape(-1, self.rows, self.columns) / self.divisor

    def chunks(
        self,
        device: torch.device,
        *,
        entries: int | None = None,
        start: int = 0,
        stop: int | None = None,
    ) -> Iterator[tuple[int, Float[Tensor, "part ab"]]]:
        """Yield (index of the first matrix, matrices as rows), uniform on (-1, 1), before the divisor.

        Parameters
        ----------
        device : torch.device
        entries : int, optional
            Entries in a chunk; default 2^18 on the CPU, 2^24 elsewhere. One matrix at least.
        start, stop : int
            Part of the bases.

        Notes
        -----
        A chunk is overwritten by the next one.
        """
        stop = self.count if stop is None else stop
        entries = entries or _CHUNK["cpu" if device.type == "cpu" else "other"]
        step = max(1, entries // self.size)
        if self.generator == "philox":
            for first in range(start, stop, step):
                last = min(first + step, stop)
                flat = _philox_uniform(self.seed, first * self.size, last * self.size, device)
                yield first, flat.reshape(last - first, self.size)
            return
        generator = torch.Generator().manual_seed(self.seed & 0xFFFFFFFF)
        buffer = torch.empty(min(step, self.count), self.size)
        for first in range(0, stop, step):
            last = min(first + step, stop)
            part = buffer[: last - first].uniform_(-1.0, 1.0, generator=generator)
            if last > start:
                skipped = max(0, start - first)
                yield first + skipped, part[skipped:].to(device)


def derive_seed(seed: int, *parts: object) -> int:
    """Return the seed of one set of bases: the top 63 bits of the SHA-256 of ``"seed/part/part..."``.

    Examples
    --------
    >>> derive_seed(0, "model.layers.0.self_attn.q_proj", "a") == derive_seed(0, "model.layers.0.self_attn.q_proj", "b")
    False
    """
    text = "/".join(str(part) for part in (seed, *parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def mix(coefficients: Float[Tensor, "M k"], bases: Bases, *, entries: int | None = None) -> Float[Tensor, "M a b"]:
    """Return sum_i c_i U_i for M coefficient vectors in one pass over the bases.

    Parameters
    ----------
    coefficients : Tensor (M, k)
        float32 or float64; the entries are drawn in float32 in either case.
    bases : Bases
    entries : int, optional
        Entries in a chunk.

    Returns
    -------
    Tensor (M, a, b)
        In the dtype and on the device of the coefficients.

    Examples
    --------
    >>> mix(torch.zeros(1, 5), Bases(0, 5, 2, 3)).abs().sum()
    tensor(0.)
    """
    scaled = coefficients / bases.divisor
    out = coefficients.new_zeros(len(coefficients), bases.size)
    for first, part in bases.chunks(coefficients.device, entries=entries):
        out.addmm_(scaled[:, first : first + len(part)], part.to(out.dtype))
    return out.reshape(-1, bases.rows, bases.columns)


def contract(gradients: Float[Tensor, "M a b"], bases: Bases, *, entries: int | None = None) -> Float[Tensor, "M k"]:
    """Return <G, U_i> for M matrices and all bases in one pass: the gradient of `mix` with respect to c.

    Parameters
    ----------
    gradients : Tensor (M, a, b)
        float32 or float64.
    bases : Bases
    entries : int, optional
        Entries in a chunk.

    Returns
    -------
    Tensor (M, k)
    """
    flat = gradients.reshape(len(gradients), bases.size)
    out = flat.new_empty(len(flat), bases.count)
    for first, part in bases.chunks(flat.device, entries=entries):
        out[:, first : first + len(part)] = flat @ part.to(flat.dtype).T
    return out / bases.divisor


_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(counter: tuple[Int64[Tensor, " n"], ...], key: tuple[int, int]) -> tuple[Int64[Tensor, " n"], ...]:
    """Return the four 32-bit outputs of Philox4x32-10 as int64 tensors.

    Parameters
    ----------
    counter : four int64 tensors (n,)
        Words of 32 bits, lowest first.
    key : two int
        Words of 32 bits.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # 64 bits; the sign bit is masked away below
        c0, c1 = ((p1 >> 32) & _WORD) ^ c1 ^ k0, p1 & _WORD
        c2, c3 = ((p0 >> 32) & _WORD) ^ c3 ^ k1, p0 & _WORD
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def _philox_uniform(seed: int, start: int, stop: int, device: torch.device) -> Float[Tensor, " n"]:
    """Entries `start` to `stop` of the stream of a seed, uniform on (-1, 1)."""
    first = start // 4
    counter = torch.arange(first, -(-stop // 4), device=device, dtype=torch.int64)
    zero = torch.zeros_like(counter)
    words = philox((counter & _WORD, counter >> 32, zero, zero), (seed & _WORD, seed >> 32))
    flat = torch.stack(words, dim=1).flatten()[start - 4 * first : stop - 4 * first]
    return (flat >> 8).to(torch.float32).mul_(2.0**-23).sub_(1.0)


def check_generator(name: str) -> None:
    """Raise MethodError for a generator that does not exist."""
    if name not in GENERATORS:
        raise MethodError(f"generator = {name!r}. Allowed: {', '.join(map(repr, GENERATORS))}.")
