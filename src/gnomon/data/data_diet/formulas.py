"""Squared norms of per-row weight gradients, from what enters a layer and the gradient of what leaves it.

Notation: B rows, T positions of a row, h what enters, d the gradient of the loss with respect to what leaves.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers.pytorch_utils import Conv1D

__all__ = ["Lookup", "Outer", "Rule", "Tied", "Vector", "lookup_squares", "outer_squares", "rule_of", "squares_of"]

_BUDGET = 1 << 22  # floats in the largest temporary array
_TRIANGLE = 128  # positions in one block of a Gram matrix


@dataclass
class Vector:
    """A gradient small enough to form: one vector a row, (B, ...)."""

    value: Tensor


@dataclass
class Outer:
    """A gradient ``sum_t d_t h_t^T`` that is not formed; (B, G, T, in) and (B, G, T, out), G groups side by side."""

    h: Tensor
    d: Tensor


@dataclass
class Patches:
    """The gradient of a convolution: an `Outer` over patches of x (padded; (B, in, H, W)) that are not cut out yet."""

    x: Tensor
    d: Tensor
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def unfolded(self) -> Outer:
        """Cut out the patches, (B, G, positions, in / G * kernel), as a copy of views: faster than im2col."""
        rows, positions = len(self.d), self.d.shape[2] * self.d.shape[3]
        views = self.x
        for axis in (0, 1):
            reach = self.dilation[axis] * (self.kernel[axis] - 1) + 1
            views = views.unfold(2 + axis, reach, self.stride[axis])
        views = views[..., :: self.dilation[0], :: self.dilation[1]]
        patches = views.permute(0, 1, 4, 5, 2, 3).reshape(rows, -1, positions)
        h = patches.reshape(rows, self.groups, -1, positions).transpose(2, 3)
        return Outer(h, self.d.reshape(rows, self.groups, -1, positions).transpose(2, 3))

    def squares(self) -> Tensor:
        """Return the squared norms (B,); of patches too large to hold, one place of the kernel after the other."""
        rows, out, *size = self.d.shape
        positions, outs, ins = size[0] * size[1], out // self.groups, self.x.shape[1] // self.groups
        m = ins * self.kernel[0] * self.kernel[1]
        small = rows * self.groups * positions * m <= _BUDGET or ins < 8
        if small or positions * (m + outs) <= m * outs:
            return _grouped_squares([self.unfolded()])
        d = self.d.reshape(rows * self.groups, outs, positions)
        total = d.new_zeros(rows)
        for place in itertools.product(*map(range, self.kernel)):
            cut = tuple(
                slice(at * step, at * step + stride * (count - 1) + 1, stride)
                for at, step, stride, count in zip(place, self.dilation, self.stride, size, strict=True)
            )
            x = self.x[:, :, cut[0], cut[1]].reshape(rows * self.groups, ins, positions)
            total += torch.bmm(d, x.transpose(1, 2)).square().reshape(rows, -1).sum(1)
        return total


@dataclass
class Lookup:
    """The gradient of an embedding: ``d_t`` is added to line ``ids_t``; (B, T) and (B, T, dim)."""

    ids: Tensor
    d: Tensor


@dataclass
class Tied:
    """An `Outer` reduced to what its tied embedding will need: h and the columns of d that the row's ids name."""

    h: Tensor
    d_at_ids: Tensor
    squares: Tensor


Contribution = Vector | Outer | Patches | Lookup | Tied
Rule = Callable[[nn.Module, Tensor, Tensor, int], dict[str, Contribution]]


def outer_squares(h: Float[Tensor, "B T m"], d: Float[Tensor, "B T n"]) -> Float[Tensor, " B"]:
    """Return ``||sum_t d_t h_t^T||_F^2`` of each of B rows, in whichever of two exact forms is cheaper.

    ``sum_{t,t'} (h_t . h_t') (d_t . d_t')`` when T (m + n) <= m n, else the product itself, a few columns at a time.
    Neither holds more than a fixed number of floats at once, whatever the size of the weight.

    Examples
    --------
    >>> outer_squares(torch.ones(1, 2, 3), torch.ones(1, 2, 5))
    tensor([60.])
    """
    rows, length, m = h.shape
    n = d.shape[-1]
    if length == 1:
        return h.square().sum((1, 2)) * d.square().sum((1, 2))
    if length * (m + n) <= m * n:
        return _by_gram(h, d)
    if m > n:
        h, d, m, n = d, h, n, m
    step = max(1, _BUDGET // max(1, rows * m))
    turned = h.transpose(1, 2)
    parts = [torch.bmm(turned, d[:, :, start : start + step]).square().sum((1, 2)) for start in range(0, n, step)]
    return torch.stack(parts).sum(0)


def _by_gram(h: Tensor, d: Tensor) -> Tensor:
    rows, length = h.shape[:2]
    step = max(1, min(length if length <= 2 * _TRIANGLE else _TRIANGLE, _BUDGET // (rows * length)))
    total = h.new_zeros(rows)
    for start in range(0, length, step):
        stop = min(start + step, length)
        part = _gram_sum(h[:, start:stop], h[:, start:], d[:, start:stop], d[:, start:])
        total += 2 * part.sum(2).sum(1) - part[:, :, : stop - start].sum((1, 2))  # the blocks below are mirror images
    return total.clamp(min=0)


def _gram_sum(h: Tensor, h_rest: Tensor, d: Tensor, d_rest: Tensor) -> Tensor:
    return torch.bmm(h, h_rest.transpose(1, 2)).mul_(torch.bmm(d, d_rest.transpose(1, 2)))


def lookup_squares(ids: Int[Tensor, "B T"], d: Float[Tensor, "B T dim"]) -> Float[Tensor, " B"]:
    """Return the squared norm of each row's embedding gradient: the sum of ``d`` per token id, then the norm.

    Examples
    --------
    >>> lookup_squares(torch.tensor([[7, 7, 1]]), torch.ones(1, 3, 1))
    tensor([5.])
    """
    rows = len(ids)
    base = int(ids.max()) + 1 if ids.numel() else 1
    keys = ids + base * torch.arange(rows, device=ids.device)[:, None]
    unique, place = keys.reshape(-1).unique(return_inverse=True)
    sums = d.new_zeros(len(unique), d.shape[-1]).index_add_(0, place, d.reshape(-1, d.shape[-1]))
    return d.new_zeros(rows).index_add_(0, unique // base, sums.square().sum(1))


def squares_of(parts: Sequence[Contribution]) -> Tensor:
    """Return the squared norm (B,) of the sum of several contributions to one parameter.

    All vectors are added; outer products are one product over more positions; an embedding tied to a linear layer
    adds twice the inner product of the two gradients.
    """
    vectors = [part.value for part in parts if isinstance(part, Vector)]
    if vectors:
        return torch.stack(vectors).sum(0).flatten(1).square().sum(1)
    if len(parts) == 1 and isinstance(parts[0], Patches):
        return parts[0].squares()
    outers = [
        part.unfolded() if isinstance(part, Patches) else part for part in parts if isinstance(part, (Outer, Patches))
    ]
    tied = [part for part in parts if isinstance(part, Tied)]
    lookups = [part for part in parts if isinstance(part, Lookup)]
    if not lookups:
        return _grouped_squares(outers) if outers else torch.stack([part.squares for part in tied]).sum(0)
    ids, d = torch.cat([part.ids for part in lookups], 1), torch.cat([part.d for part in lookups], 1)
    total = lookup_squares(ids, d)
    if outers:
        whole = Outer(torch.cat([part.h for part in outers], 2), torch.cat([part.d for part in outers], 2))
        tied = [tie(whole, ids)]
    for part in tied:
        total = total + part.squares + 2 * (torch.bmm(part.h, d.transpose(1, 2)) * part.d_at_ids).sum((1, 2))
    return total.clamp(min=0)


def tie(part: Outer, ids: Int[Tensor, "B S"]) -> Tied:
    """Keep of a head's gradient what its tied embedding needs: (B, T, S) numbers instead of (B, T, vocabulary)."""
    h, d = part.h[:, 0], part.d[:, 0]
    at_ids = d.gather(2, ids[:, None, :].expand(-1, d.shape[1], -1))
    return Tied(h, at_ids, outer_squares(h, d))


def _grouped_squares(parts: list[Outer]) -> Tensor:
    h, d = (
        torch.cat([getattr(p, side) for p in parts], 2) if len(parts) > 1 else getattr(parts[0], side) for side in "hd"
    )
    rows, groups = h.shape[:2]
    return outer_squares(h.flatten(0, 1), d.flatten(0, 1)).reshape(rows, groups).sum(1)


def _working(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _by_row(x: Tensor, rows: int, *shape: int) -> Tensor:
    """Bring (B, ..., *shape), or (B * T, *shape) with the positions of a row side by side, to (B, T, *shape)."""
    return _working(x).reshape(rows, -1, *shape)


def _linear(module: Any, x: Tensor, d: Tensor, rows: int) -> dict[str, Contribution]:
    d = _by_row(d, rows, d.shape[-1])
    return {"weight": Outer(_by_row(x, rows, x.shape[-1])[:, None], d[:, None]), "bias": Vector(d.sum(1))}


def _embedding(module: Any, x: Tensor, d: Tensor, rows: int) -> dict[str, Contribution]:
    ids, d = x.reshape(len(x), -1).expand(rows, -1), _by_row(d, rows, d.shape[-1])
    if module.padding_idx is not None:
        d = d * (ids != module.padding_idx)[..., None]
    scale = getattr(module, "embed_scale", None)
    return {"weight": Lookup(ids, d if scale is None else d * float(scale))}


def is_scaled_lookup(module: Any, ids: Tensor, output: Tensor) -> bool:
    """Tell whether an embedding of its own class (Gemma, BART) is a lookup times ``embed_scale``."""
    scale = getattr(module, "embed_scale", None)
    if scale is None or output.shape[:-1] != ids.shape:
        return False
    expected = F.embedding(ids, module.weight.detach()) * scale
    return bool(torch.isclose(expected, output.detach(), rtol=1e-2).all())


def _convolution(module: Any, x: Tensor, d: Tensor, rows: int) -> dict[str, Contribution]:
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x, d = F.pad(_working(x), module._reversed_padding_repeated_twice, mode=mode), _working(d)
    bias = Vector(d.flatten(2).sum(2))
    kernel, stride, dilation = module.kernel_size, module.stride, module.dilation
    if isinstance(module, nn.Conv1d):
        x, d, kernel, stride, dilation = x[:, :, None], d[:, :, None], (1, *kernel), (1, *stride), (1, *dilation)
    return {"weight": Patches(x, d, kernel, stride, dilation, module.groups), "bias": bias}


def _affine(normalised: Tensor, d: Tensor, kept: Sequence[int]) -> dict[str, Contribution]:
    """Scale and shift of a norm, summed over every axis but the rows' and those of the parameter."""
    axes = [axis for axis in range(1, d.dim()) if axis not in kept]
    weight = d * normalised
    return {"weight": Vector(weight.sum(axes) if axes else weight), "bias": Vector(d.sum(axes) if axes else d)}


def _layer_norm(module: Any, x: Tensor, d: Tensor, rows: int) -> dict[str, Contribution]:
    shape = tuple(module.normalized_shape)
    x, d = _by_row(x, rows, *shape), _by_row(d, rows, *shape)
    if isinstance(module, nn.LayerNorm):
        return _affine(F.layer_norm(x, shape, eps=module.eps), d, range(2, d.dim()))
    return _affine(F.rms_norm(x, shape, eps=module.eps), d, range(2, d.dim()))


def _batch_norm(module: Any, x: Tensor, d: Tensor, rows: int) -> dict[str, Contribution]:
    x, d = _working(x), _working(d)
    shape = (1, -1) + (1,) * (x.dim() - 2)
    normalised = (x - module.running_mean.reshape(shape)) * (module.running_var.reshape(shape) + module.eps).rsqrt()
    if len(x) != rows:
        normalised, d = (t.reshape(rows, -1, t.shape[1]).transpose(1, 2) for t in (normalised, d))
    return _affine(normalised, d, (1,))


def _group_norm(module: Any, x: Tensor, d: Tensor, rows: int) -> dict[str, Contribution]:
    return _affine(F.group_norm(_working(x), module.num_groups, eps=module.eps), _working(d), (1,))


def root_mean_square(module: Any, x: Tensor) -> Tensor:
    """Return x over its root mean square, as the RMS norms of transformers compute it."""
    x = _working(x)
    return x * (x.square().mean(-1, keepdim=True) + _epsilon(module)).rsqrt()


def _epsilon(module: Any) -> float:
    return float(getattr(module, "variance_epsilon", getattr(module, "eps", 0.0)))


def _rms_norm(module: Any, x: Tensor, d: Tensor, rows: int) -> dict[str, Contribution]:
    width = x.shape[-1]
    return _affine(_by_row(root_mean_square(module, x), rows, width), _by_row(d, rows, width), (2,))


def is_rms_norm(module: Any, x: Tensor, output: Tensor) -> bool:
    """Tell whether a module of another class is ``w x / rms(x)`` or ``(1 + w) x / rms(x)``, by what it returned."""
    weight = module.weight
    if weight.shape != x.shape[-1:] or output.shape != x.shape:
        return False
    scaled = root_mean_square(module, x.detach()).to(output.dtype)
    tolerance = 1e-5 if output.dtype in (torch.float32, torch.float64) else 3e-2
    size = float(output.detach().abs().amax())
    return any(
        float((scaled * gain.detach().to(output.dtype) - output.detach()).abs().amax()) <= tolerance * size
        for gain in (weight, 1 + weight)
    )


_RULES: dict[object, tuple[str, Rule]] = {
    nn.Linear.forward: ("linear", _linear),
    Conv1D.forward: ("linear", _linear),
    nn.Embedding.forward: ("embedding", _embedding),
    nn.Conv1d.forward: ("convolution", _convolution),
    nn.Conv2d.forward: ("convolution", _convolution),
    nn.LayerNorm.forward: ("norm", _layer_norm),
    nn.RMSNorm.forward: ("norm", _layer_norm),
    nn.BatchNorm2d.forward: ("norm", _batch_norm),
    nn.GroupNorm.forward: ("norm", _group_norm),
}


def rule_of(module: Any, x: Tensor, output: Tensor, rows: int) -> tuple[str, Rule] | None:
    """Return the name and the formula for one call of a module, or None when there is none for it.

    Parameters
    ----------
    module : nn.Module
    x, output : Tensor
        What entered and what left.
    rows : int
        B. What enters has B rows, or B times T of them in a layer that sees positions as rows.
    """
    found = _RULES.get(type(module).forward)
    if found is None and isinstance(module, nn.Embedding) and is_scaled_lookup(module, x, output):
        found = _RULES[nn.Embedding.forward]
    if found is None:
        names = [name for name, p in module._parameters.items() if p is not None]
        plain = names == ["weight"] and not module._modules and _epsilon(module) > 0
        return ("norm", _rms_norm) if plain and _fits(x, rows) and is_rms_norm(module, x, output) else None
    if isinstance(module, nn.Embedding):
        shared = x.dim() == 2 and len(x) == 1
        return found if (shared or (x.dim() and len(x) == rows)) and not module.scale_grad_by_freq else None
    if found[1] in (_convolution, _group_norm):
        dims = module.weight.dim() if found[1] is _convolution else x.dim()  # one less: the axis of the rows is missing
        return found if len(x) == rows and x.dim() == dims else None
    return found if _fits(x, rows) else None


def _fits(x: Tensor, rows: int) -> bool:
    return x.dim() >= 2 and (len(x) == rows or (x.dim() == 2 and len(x) % rows == 0))
