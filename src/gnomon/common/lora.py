"""The factors of a PEFT LoRA as plain tensors, and norms of their product without forming it.

For a linear layer W (m out, n in) PEFT holds A (r x n), B (m x r) and a scale s; the layer computes W x + s B A x.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from gnomon.common.tensors import wide
from gnomon.errors import MethodError, ModelError, nearest

__all__ = ["LoraPair", "lora_pairs", "product_inner", "product_row_norms"]


@dataclass(frozen=True, eq=False)
class LoraPair:
    """The two factors that one adapter has at one linear layer; read anew at every access.

    Parameters
    ----------
    name : str
        Path of the layer in the model.
    layer : peft.tuners.lora.LoraLayer
    adapter : str
    """

    name: str
    layer: Any
    adapter: str

    @property
    def a(self) -> nn.Parameter:
        """A, (r, in)."""
        factor: nn.Parameter = self.layer.lora_A[self.adapter].weight
        return factor

    @property
    def b(self) -> nn.Parameter:
        """B, (out, r)."""
        factor: nn.Parameter = self.layer.lora_B[self.adapter].weight
        return factor

    @property
    def scaling(self) -> float:
        """s, by which the product B A is multiplied in the forward pass."""
        return float(self.layer.scaling[self.adapter])

    @property
    def weight(self) -> Tensor:
        """The base weight as (out, in), also where the layer stores it the other way (Conv1D)."""
        weight: Tensor = self.layer.get_base_layer().weight
        return weight.T if self.layer.fan_in_fan_out else weight

    def delta(self) -> Float[Tensor, "out in"]:
        """Return s B A, in the dtype of the factors."""
        return self.scaling * (self.b @ self.a)


def lora_pairs(model: nn.Module, adapter: str | None = None) -> list[LoraPair]:
    """Return the LoRA factors at every linear layer of a model, in the model's order.

    Parameters
    ----------
    model : nn.Module
        A `PeftModel`, or a module inside one.
    adapter : str, optional
        Default the active one.

    Returns
    -------
    list of LoraPair
        Embeddings and convolutions are left out: their factors multiply otherwise.

    Raises
    ------
    ModelError
        When there is no LoRA at a linear layer, the adapter is merged into the weights, or something stands between
        its factors (SoRA's gates). LoRA variants such as DoRA are returned: their factors are not all they change.
    MethodError
        When several adapters are active and none is named, or the named one does not exist.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer) and len(m.lora_A)}
    if not layers:
        raise ModelError(
            "the model has no LoRA at a linear layer. Attach one first: peft.get_peft_model(model, "
            'peft.LoraConfig(r=8, target_modules="all-linear")).'
        )
    if adapter is None:
        active = sorted({name for layer in layers.values() for name in layer.active_adapters})
        if len(active) != 1:
            raise MethodError(
                f"{len(active)} adapters are active ({', '.join(active) or 'none'}). Name one, or activate one with "
                "set_adapter."
            )
        adapter = active[0]
    pairs = [
        LoraPair(name, layer, adapter)
        for name, layer in layers.items()
        if adapter in layer.lora_A and isinstance(layer.lora_A[adapter], nn.Linear)
    ]
    if not pairs:
        known = sorted({name for layer in layers.values() for name in layer.lora_A})
        raise MethodError(f"there is no LoRA adapter {adapter!r}. {nearest(adapter, known, noun='adapter')}")
    gated = [pair.name for pair in pairs if hasattr(pair.layer, "lora_gate")]
    if gated:
        raise ModelError(
            f"the adapter {adapter!r} has gates between A and B at {gated[0]}, so it is no plain LoRA. Prune it first "
            "(gnomon.adapters.prune_sora)."
        )
    merged = [pair.name for pair in pairs if adapter in pair.layer.merged_adapters]
    if merged:
        raise ModelError(
            f"the adapter {adapter!r} is merged into {merged[0]} and {len(merged) - 1} further layers. Call "
            "unmerge_adapter() first."
        )
    return pairs


def product_row_norms(b: Float[Tensor, "out r"], a: Float[Tensor, "r in"]) -> Float[Tensor, " out"]:
    """Return the Euclidean norm of every row of B A without forming it: sqrt(B_i (A A^T) B_i^T).

    Parameters
    ----------
    b, a : Tensor (out, r), (r, in)

    Returns
    -------
    Tensor (out,)
        float32 (float64 where a factor is); rounding below zero counts as zero.

    Examples
    --------
    >>> product_row_norms(torch.tensor([[3.0], [0.0]]), torch.tensor([[0.6, 0.8]]))
    tensor([3., 0.])
    """
    b, a = wide(b), wide(a)
    return ((b @ (a @ a.T)) * b).sum(dim=1).clamp(min=0.0).sqrt()


def product_inner(
    b: Float[Tensor, "out r"], a: Float[Tensor, "r in"], d: Float[Tensor, "out q"], c: Float[Tensor, "q in"]
) -> Float[Tensor, ""]:
    """Return <B A, D C>, the sum over the entries of both products, without forming them: tr(B^T D C A^T).

    Parameters
    ----------
    b, a, d, c : Tensor (out, r), (r, in), (out, q), (q, in)

    Returns
    -------
    Tensor ()
        float32, or float64 where a factor is.
    """
    b, a, d, c = wide(b), wide(a), wide(d), wide(c)
    return ((b.T @ d) * (a @ c.T)).sum()
