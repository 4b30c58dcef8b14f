"""Optimizer moments in 8 bits: block-wise quantisation with a dynamic map (Dettmers et al., 2022).

A tensor is cut into blocks of 256 entries; each block is divided by its largest magnitude and every quotient is
replaced by the nearest of 256 values in [-1, 1] (or [0, 1] for a moment that is never negative). The values form
the *dynamic map*: powers of ten down to 1e-7, each decade split linearly, twice as finely as the one below, so
that large entries are kept precisely and small ones keep their order of magnitude.

One byte an entry plus four a block. Where bitsandbytes is installed its kernels do the work (same map, same blocks,
same stored form, several times as fast); no package beyond torch is needed.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from gnomon.errors import MethodError

__all__ = ["BLOCK", "SMALLEST", "dequantize", "dynamic_map", "load_moment", "quantize", "store_moment"]

BLOCK = 256
"""Entries that share one scale."""

SMALLEST = 4096
"""Moments with fewer entries stay in full precision: their bytes do not matter and their error would."""


def dynamic_map(signed: bool = True) -> Float32[Tensor, " 256"]:
    """Return the 256 values of the dynamic map, ascending.

    Parameters
    ----------
    signed : bool, default True
        Values in [-1, 1]; otherwise in [0, 1] with twice the resolution.

    Returns
    -------
    Tensor of shape (256,), float32
        Zero and one are among them. The decade that ends at 10^-k is split into 2^(6-k) cells (2^(7-k) when
        unsigned), represented by their centres.

    Examples
    --------
    >>> values = dynamic_map()
    >>> len(values), float(values[-1]), float(values.abs().min())
    (256, 1.0, 0.0)
    """
    positive: list[float] = []
    for power in range(7):
        cells = 2**power if signed else 2 ** (power + 1)
        edges = torch.linspace(0.1, 1.0, cells + 1, dtype=torch.float64)
        positive += ((edges[:-1] + edges[1:]) / 2 * 10.0 ** (power - 6)).tolist()
    values = [*positive, *(-v for v in positive if signed), 0.0, 1.0]
    return torch.tensor(sorted(values), dtype=torch.float32)


@lru_cache(maxsize=8)
def _tables(signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the map and the midpoints between its neighbours, on `device`."""
    values = dynamic_map(signed)
    return values.to(device), ((values[1:] + values[:-1]) / 2).to(device)


def quantize(
    x: Float[Tensor, " ..."], *, signed: bool = True, block: int = BLOCK
) -> tuple[UInt8[Tensor, "blocks block"], Float32[Tensor, " blocks"]]:
    """Quantise a tensor block by block to the nearest value of the dynamic map.

    Parameters
    ----------
    x : Tensor of any shape
        Taken in row-major order; the last block is filled up with zeros.
    signed : bool, default True
        False for a tensor without negative entries.
    block : int, default 256
        Entries that share one scale.

    Returns
    -------
    codes : uint8 Tensor of shape (numel,)
        Index into `dynamic_map(signed)`.
    absmax : float32 Tensor of shape (ceil(numel / block),)

    Raises
    ------
    MethodError
        When the block is below 1.

    Examples
    --------
    >>> codes, absmax = quantize(torch.tensor([0.5, -2.0, 0.0]))
    >>> dequantize(codes, absmax, (3,)).tolist()[1:]
    [-1.9859..., 0.0]
    """
    if block < 1:
        raise MethodError(f"block = {block}; it must be at least 1 (256 is usual).")
    flat = x.detach().reshape(-1).float()
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % block)).view(-1, block)
    absmax = blocks.abs().amax(dim=1)
    scaled = blocks / torch.where(absmax == 0, 1.0, absmax)[:, None]
    _, midpoints = _tables(signed, x.device)
    codes = torch.bucketize(scaled, midpoints, out_int32=True).to(torch.uint8)
    return codes.view(-1)[: flat.numel()].clone(), absmax


def dequantize(
    codes: UInt8[Tensor, " n"],
    absmax: Float32[Tensor, " blocks"],
    shape: tuple[int, ...] | torch.Size,
    *,
    signed: bool = True,
    block: int = BLOCK,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, " ..."]:
    """Return the values behind `quantize`, in the given shape and dtype."""
    values, _ = _tables(signed, codes.device)
    flat = values[codes.int()]
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % block)).view(-1, block)
    return (padded * absmax[:, None]).view(-1)[: flat.numel()].view(shape).to(dtype)


@lru_cache(maxsize=1)
def _kernels() -> Any:
    """Return bitsandbytes' functions, or None where it is not installed or does not load."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return None
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)  # what it lacks for 4-bit products does not matter here
    try:
        return importlib.import_module("bitsandbytes.functional")
    except (ImportError, OSError, RuntimeError):
        return None
    finally:
        logger.setLevel(level)


def _encode(value: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    kernels = _kernels()
    if kernels is None:
        return quantize(value, signed=signed)
    code, _ = _tables(signed, value.device)
    codes, found = kernels.quantize_blockwise(value.detach().float().contiguous(), code=code, blocksize=BLOCK)
    return codes.view(-1), found.absmax


def _decode(codes: Tensor, absmax: Tensor, like: Tensor, signed: bool) -> Tensor:
    kernels = _kernels()
    if kernels is None:
        return dequantize(codes, absmax, like.shape, signed=signed, dtype=like.dtype)
    code, _ = _tables(signed, codes.device)
    value: Tensor = kernels.dequantize_blockwise(codes, absmax=absmax, code=code, blocksize=BLOCK)
    return value.view(like.shape).to(like.dtype)


def load_moment(state: dict[str, Any], name: str, like: Tensor, *, signed: bool = True) -> Tensor:
    """Return a moment from an optimizer state, whichever way it is stored.

    Parameters
    ----------
    state : dict
        The state of one parameter.
    name : str
        Such as ``"exp_avg"``.
    like : Tensor
        Gives shape, dtype and device of a moment that does not exist yet (zeros).
    signed : bool, default True
        Which map an 8-bit moment was stored with.

    Returns
    -------
    Tensor
        The stored tensor itself in full precision, to be changed in place, or a copy of an 8-bit one.
        Either way `store_moment` writes it back.

    Raises
    ------
    MethodError
        When codes are stored in another dtype than uint8: something has cast the state.
    """
    if f"{name}_codes" in state:
        codes, absmax = state[f"{name}_codes"], state[f"{name}_absmax"]
        if codes.dtype != torch.uint8:
            raise MethodError(
                f"The 8-bit codes of {name!r} are stored as {codes.dtype}: something (a wrapper's preparation, a cast "
                "of the whole state) promoted them, and the memory they save is gone. They must be torch.uint8; load "
                "the state by this optimizer's own load_state_dict and cast no optimizer state."
            )
        return _decode(codes, absmax, like, signed)
    if name in state:
        moment: Tensor = state[name]
        return moment
    return torch.zeros_like(like, memory_format=torch.contiguous_format)


def store_moment(state: dict[str, Any], name: str, value: Tensor, *, bits: int = 32, signed: bool = True) -> None:
    """Write a moment into an optimizer state, quantised when `bits` is 8 and it has at least 4096 entries."""
    if bits == 8 and value.numel() >= SMALLEST:
        state[f"{name}_codes"], state[f"{name}_absmax"] = _encode(value, signed)
        state.pop(name, None)
    else:
        state[name] = value
        state.pop(f"{name}_codes", None)
        state.pop(f"{name}_absmax", None)
