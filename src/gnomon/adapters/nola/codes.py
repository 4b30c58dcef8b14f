"""Coefficients in few bits: min-max uniform codes, packed, and their straight-through form for training."""

from __future__ import annotations

import struct

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from gnomon.errors import MethodError

__all__ = ["COEFF_BITS", "dequantize", "pack", "quantize", "straight_through", "unpack"]

COEFF_BITS = (2, 3, 4, 5, 6, 7, 8, 16)


def check_bits(bits: int) -> None:
    """Raise MethodError for a width that is not offered."""
    if bits not in COEFF_BITS or isinstance(bits, bool):
        raise MethodError(
            f"coeff_bits = {bits!r}. Allowed: {', '.join(map(str, COEFF_BITS))} (16 is float16), or None for float32."
        )


def quantize(coefficients: Float[Tensor, " k"], bits: int) -> tuple[UInt8[Tensor, " k"], float, float]:
    """Return the codes q in {0 .. 2^bits - 1} of a vector, and its least and greatest value.

    c is coded as the nearest of lo + q (hi - lo) / (2^bits - 1).

    Parameters
    ----------
    coefficients : Tensor (k,)
    bits : int
        2 to 8.

    Raises
    ------
    MethodError
        When a value is not finite, or the width is not between 2 and 8.

    Examples
    --------
    >>> quantize(torch.tensor([-1.0, 0.0, 2.0]), 2)
    (tensor([0, 1, 3], dtype=torch.uint8), -1.0, 2.0)
    """
    if not 2 <= bits <= 8:
        raise MethodError(f"bits = {bits!r}: integer codes have 2 to 8 bits.")
    _check_finite(coefficients)
    c = coefficients.detach().to(torch.float32).double()
    lo, hi = float(c.min()), float(c.max())
    if hi == lo:
        return torch.zeros(c.shape, dtype=torch.uint8, device=c.device), lo, hi
    return ((c - lo) * ((2**bits - 1) / (hi - lo))).round().to(torch.uint8), lo, hi


def _check_finite(coefficients: Tensor) -> None:
    bad = ~torch.isfinite(coefficients.detach())
    if bad.any():
        raise MethodError(
            f"{int(bad.sum())} of {bad.numel()} coefficients are not finite, so they cannot be coded. "
            "The training diverged: lower the learning rate."
        )


def dequantize(codes: UInt8[Tensor, " k"], lo: float, hi: float, bits: int) -> Float[Tensor, " k"]:
    """Return lo + q (hi - lo) / (2^bits - 1), float32; the ends are exact, so coding it again gives the same codes."""
    values = lo + codes.double() * ((hi - lo) / (2**bits - 1))
    return values.masked_fill(codes == 2**bits - 1, hi).float()


def straight_through(coefficients: Float[Tensor, " k"], bits: int) -> Float[Tensor, " k"]:
    """Return the coefficients as `bits` bits hold them, with the gradient of the identity."""
    if bits == 16:
        rounded = _half(coefficients).to(coefficients)
    else:
        rounded = dequantize(*quantize(coefficients, bits), bits).to(coefficients)
    return rounded + (coefficients - coefficients.detach())  # adds exact zeros, so the value is the stored one


def _half(coefficients: Tensor) -> Tensor:
    _check_finite(coefficients)
    half = coefficients.detach().to(torch.float16)
    if not torch.isfinite(half).all():
        raise MethodError(
            f"the largest coefficient is {float(coefficients.detach().abs().max()):.3g}; 16 bits hold up to 65504. "
            "Store 8 bits or float32 (coeff_bits=None), or lower the learning rate."
        )
    return half


def pack(coefficients: Float[Tensor, " k"], bits: int) -> Tensor:
    """Return a vector as it is stored: float16 at 16 bits, else bytes (lo and hi as float32, then the codes).

    Parameters
    ----------
    coefficients : Tensor (k,)
    bits : int
        One of `COEFF_BITS`.

    Returns
    -------
    Tensor
        float16 (k,), or uint8 (8 + ceil(k bits / 8),).
    """
    if bits == 16:
        return _half(coefficients).cpu()
    codes, lo, hi = quantize(coefficients, bits)
    planes = np.unpackbits(codes.cpu().numpy()[:, None], axis=1)[:, 8 - bits :]
    stored = struct.pack("<ff", lo, hi) + np.packbits(planes.reshape(-1)).tobytes()
    return torch.frombuffer(bytearray(stored), dtype=torch.uint8)


def unpack(stored: Tensor, count: int, bits: int) -> Float[Tensor, " k"]:
    """Return the `count` coefficients of a stored vector as float32.

    Raises
    ------
    MethodError
        When the length does not fit.
    """
    if stored.dtype != torch.uint8:
        return stored.float()
    if stored.numel() != 8 + -(-count * bits // 8):
        raise MethodError(
            f"a stored vector has {stored.numel()} bytes; {count} coefficients of {bits} bits take "
            f"{8 + -(-count * bits // 8)}. The file is damaged, or of another adapter."
        )
    raw = stored.cpu().numpy()
    lo, hi = struct.unpack("<ff", raw[:8].tobytes())
    planes = np.zeros((count, 8), dtype=np.uint8)
    planes[:, 8 - bits :] = np.unpackbits(raw[8:], count=count * bits).reshape(count, bits)
    return dequantize(torch.from_numpy(np.packbits(planes, axis=1)[:, 0]), lo, hi, bits)
