"""Rotations: what takes a rotated key or query from one position to another, in each family's own layout.

The frequencies are read from the model's rotary module, which has applied any scaling to them (linear, llama3, yarn).
Only differences of positions are applied here, so a factor on cosines and sines stays in the tensors as it is.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.models.codegen.modeling_codegen import CodeGenRotaryEmbedding
from transformers.models.gptj.modeling_gptj import GPTJRotaryEmbedding

__all__ = ["INTERLEAVED", "UNBOUNDED", "Turn", "frequencies", "turn_by", "turned"]

INTERLEAVED = ("cohere", "codegen", "glm", "gptj", "helium")
"""Families that rotate neighbouring channels; the others rotate channel i with channel i + half."""


class Turn(NamedTuple):
    """Cosines and sines of a rotation, (..., rotary size / 2), and the layout of the channels."""

    cos: Tensor
    sin: Tensor
    interleaved: bool

    def to(self, device: torch.device) -> Turn:
        """Return the rotation on another device."""
        return Turn(self.cos.to(device), self.sin.to(device), self.interleaved)


def frequencies(rotary: Any) -> Float[Tensor, " half"]:
    """Return the angle per position of each pair of channels, float32."""
    if hasattr(rotary, "inv_freq"):
        found: Tensor = rotary.inv_freq.float()
        return found
    return _table_frequencies(rotary.pos_embd_dim).to(rotary.embed_positions.device)


def _table_frequencies(size: int) -> Tensor:
    return 1.0 / (10000 ** (torch.arange(0, size, 2, dtype=torch.int64) / size))


def turn_by(
    offsets: Int[Tensor, "*shape"], inv_freq: Float[Tensor, " half"], interleaved: bool, dtype: torch.dtype
) -> Turn:
    """Return the rotation by `offsets` positions (any sign); angles are computed in float64 where the device has it."""
    exact = torch.float32 if offsets.device.type == "mps" else torch.float64
    angles = offsets.to(exact)[..., None] * inv_freq.to(offsets.device, exact)
    kept = torch.promote_types(dtype, torch.float32)
    return Turn(angles.cos().to(kept), angles.sin().to(kept), interleaved)


def turned(x: Float[Tensor, "*batch h"], turn: Turn) -> Float[Tensor, "*batch h"]:
    """Rotate the first channels of `x`; the others pass.

    Examples
    --------
    >>> quarter = Turn(torch.tensor([0.0]), torch.tensor([1.0]), False)
    >>> turned(torch.tensor([[1.0, 0.0, 5.0]]), quarter).tolist()
    [[0.0, 1.0, 5.0]]
    """
    cos, sin, interleaved = turn
    size = 2 * cos.shape[-1]
    if interleaved:
        a, b = x[..., 0:size:2], x[..., 1:size:2]
        front = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = x[..., : size // 2], x[..., size // 2 : size]
        front = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    front = front.to(x.dtype)
    return front if size == x.shape[-1] else torch.cat((front, x[..., size:]), dim=-1)


class _Unbounded:
    """Computes the angles of positions that the table does not hold."""

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        if int(position_ids.max()) < self.max_positions:  # type: ignore[attr-defined]
            found: tuple[Tensor, Tensor] = super().forward(x, position_ids)  # type: ignore[misc]
            return found
        angles = position_ids.float()[..., None] * frequencies(self).to(position_ids.device)
        return angles.sin().to(x.dtype), angles.cos().to(x.dtype)


class UnboundedGPTJ(_Unbounded, GPTJRotaryEmbedding):
    """GPT-J's table of sines and cosines, without its end."""


class UnboundedCodeGen(_Unbounded, CodeGenRotaryEmbedding):
    """CodeGen's table of sines and cosines, without its end."""


UNBOUNDED: dict[type[nn.Module], type[nn.Module]] = {
    GPTJRotaryEmbedding: UnboundedGPTJ,
    CodeGenRotaryEmbedding: UnboundedCodeGen,
}
