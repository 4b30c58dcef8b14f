"""What a converted model keeps in memory beside its activations, in the paper's accounting."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from gnomon.errors import MethodError, ModelError
from gnomon.nn.sltrain.apply import converted_layers

__all__ = ["MemoryReport", "MemoryUse", "memory_report"]


@dataclass(frozen=True)
class MemoryUse:
    """What one way of training keeps, in bytes.

    Attributes
    ----------
    parameters : int
        Trained numbers.
    weights, moments, indices, gradients : int
        Bytes. ``moments`` holds GaLore's projectors too.
    """

    parameters: int
    weights: int
    moments: int
    indices: int = 0
    gradients: int = 0

    @property
    def total(self) -> int:
        """All bytes together."""
        return self.weights + self.moments + self.indices + self.gradients


@dataclass(frozen=True)
class MemoryReport:
    """Memory of a converted model beside its dense, low-rank and GaLore relatives.

    Attributes
    ----------
    sltrain, full, low_rank, galore : MemoryUse
        The same optimizer for all. `low_rank` is the model without the sparse parts, `galore` the dense model with
        projected moments of the same rank.
    nonzeros : int
        Sparse entries of all layers.
    stored_indices : int
        Bytes that the indices take here; the paper's accounting has 8 an entry, the layers store 4.
    """

    sltrain: MemoryUse
    full: MemoryUse
    low_rank: MemoryUse
    galore: MemoryUse
    nonzeros: int
    stored_indices: int

    def summary(self) -> dict[str, float]:
        """Return the totals in GB (1e9 bytes) and the counts in millions."""
        uses = {"sltrain": self.sltrain, "full": self.full, "low_rank": self.low_rank, "galore": self.galore}
        totals = {f"{name}_gb": use.total / 1e9 for name, use in uses.items()}
        counts = {
            "sltrain_parameters_m": self.sltrain.parameters / 1e6,
            "full_parameters_m": self.full.parameters / 1e6,
            "nonzeros_m": self.nonzeros / 1e6,
        }
        return {**totals, **counts, "saved": 1 - self.sltrain.total / self.full.total}

    def __str__(self) -> str:
        rows = (("full", self.full), ("galore", self.galore), ("low rank", self.low_rank), ("sltrain", self.sltrain))
        head = f"{'':<10}{'parameters':>12}{'weights':>10}{'moments':>10}{'indices':>10}{'gradients':>11}{'total':>10}"
        lines = [
            f"{name:<10}{use.parameters / 1e6:>10.1f} M"
            + "".join(f"{value / 1e9:>{w}.2f}" for value, w in _columns(use))
            for name, use in rows
        ]
        note = f"GB of 1e9 bytes; stored here, the indices take {self.stored_indices / 1e9:.2f}."
        return "\n".join([head, *lines, note])


def _columns(use: MemoryUse) -> tuple[tuple[int, int], ...]:
    return (use.weights, 10), (use.moments, 10), (use.indices, 10), (use.gradients, 11), (use.total, 10)


def memory_report(model: nn.Module, optim_bits: Literal[8, 16, 32] = 16, per_layer: bool = False) -> MemoryReport:
    """Count what training a converted model with Adam keeps beside the activations, as the paper counts it.

    Weights of 16 bits, two moments for every trained number, int64 indices, gradients of 16 bits unless they are
    freed at once. With 16-bit moments and ``per_layer=True`` these are the paper's figures: 6 bytes a parameter and 8
    a sparse entry.

    Parameters
    ----------
    model : nn.Module
        With `apply_sltrain` applied; may be without storage (built under ``torch.device("meta")``).
    optim_bits : {8, 16, 32}, default 16
        Of a moment; the scales of 8-bit blocks are left out.
    per_layer : bool, default False
        Every gradient is used and freed inside the backward pass (`gnomon.common.per_layer`).

    Returns
    -------
    MemoryReport

    Raises
    ------
    MethodError
        When the moments have another width.
    ModelError
        When the model has no sparse plus low-rank layers.

    Examples
    --------
    >>> from gnomon.common.models import tiny
    >>> from gnomon.nn.sltrain import apply_sltrain
    >>> report = memory_report(apply_sltrain(tiny("llama"), rank=8), optim_bits=8, per_layer=True)
    >>> report.sltrain.total < report.full.total
    True
    """
    if optim_bits not in (8, 16, 32):
        raise MethodError(f"optim_bits = {optim_bits!r}; a moment takes 8, 16 or 32 bits.")
    layers = list({id(layer): layer for layer in converted_layers(model).values()}.values())
    if not layers:
        raise ModelError(
            "This model has no sparse plus low-rank layers, so there is nothing to report. Apply apply_sltrain first; "
            "a model built under torch.device('meta') is enough."
        )
    own = sum(layer.A.numel() + layer.B.numel() + layer.values.numel() for layer in layers)
    own += sum(layer.scaling.numel() for layer in layers if layer.scaling is not None)
    everything = sum(p.numel() for p in model.parameters())
    rest = everything - own  # biases of converted layers are dense
    dense = sum(layer.in_features * layer.out_features for layer in layers)
    nonzeros = sum(layer.values.numel() for layer in layers)
    short = [sorted((layer.in_features, layer.out_features)) for layer in layers]
    ranks = [min(layer.rank, a) for layer, (a, _) in zip(layers, short, strict=True)]
    projected = sum(r * b for r, (_, b) in zip(ranks, short, strict=True))
    projectors = sum(r * a for r, (a, _) in zip(ranks, short, strict=True))

    def use(parameters: int, *, moments: int | None = None, extra: int = 0, indices: int = 0) -> MemoryUse:
        kept = 2 * (parameters if moments is None else moments) * optim_bits // 8 + extra
        return MemoryUse(parameters, 2 * parameters, kept, indices, 0 if per_layer else 2 * parameters)

    return MemoryReport(
        sltrain=use(everything, indices=8 * nonzeros),
        full=use(rest + dense),
        low_rank=use(everything - nonzeros),
        galore=use(rest + dense, moments=rest + projected, extra=2 * projectors),
        nonzeros=nonzeros,
        stored_indices=sum(layer.indices.numel() * layer.indices.element_size() for layer in layers),
    )
