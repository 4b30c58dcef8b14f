"""What the approximation does to a whole model: the gradient of every LoRA factor, beside the exact one."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from gnomon.adapters.lora_limits.attention import MAX_FEATURES, poly_attention
from gnomon.adapters.lora_limits.capture import AttentionCall, attend_with, obstacle
from gnomon.adapters.lora_limits.visible import causality
from gnomon.common.calibration import as_batches
from gnomon.common.depth import evaluating
from gnomon.common.layers import unwrap
from gnomon.common.lora import lora_pairs
from gnomon.errors import ModelError

__all__ = ["lora_gradient_errors"]


def lora_gradient_errors(
    model: nn.Module,
    batch: Any,
    degree: int = 2,
    *,
    adapter: str | None = None,
    center: bool = True,
    chunk: int | None = None,
    max_features: int = MAX_FEATURES,
) -> pd.DataFrame:
    """Compare the gradients of all LoRA factors with polynomial attention in every layer to the exact ones.

    Parameters
    ----------
    model : nn.Module
        A `PeftModel` with LoRA and a loss. It is left as it was; its ``.grad`` fields are not touched.
    batch : LongTensor (n, tokens), or mapping with ``input_ids`` and perhaps ``attention_mask`` and ``labels``
        Without labels the tokens themselves are predicted.
    degree : int, default 2
    adapter : str, optional
        Default the active one.
    center, chunk, max_features
        As in `poly_attention`.

    Returns
    -------
    DataFrame
        One row per factor: ``name, factor`` ("A" or "B"), ``norm`` (of the exact gradient), ``error`` (relative,
        Frobenius), ``largest_error`` (largest entry of the difference over the largest entry). Errors add up over the
        layers through which a gradient has passed.

    Raises
    ------
    MethodError
        When `poly_attention` refuses, such as for too many features.
    ModelError
        When there is no LoRA, no loss, or a layer's scores are more than dot products.

    Examples
    --------
    >>> import peft
    >>> from gnomon.common.models import tiny
    >>> model = peft.get_peft_model(tiny("llama", num_layers=1), peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
    >>> len(lora_gradient_errors(model, torch.arange(24)[None], degree=2))
    4
    """
    pairs = lora_pairs(model, adapter)
    inner: Any = unwrap(model)
    inputs = as_batches(batch, 1 << 30, inner.get_input_embeddings().weight.device)[0]
    mask = inputs.get("attention_mask")
    labels = batch.get("labels") if hasattr(batch, "get") else None
    ids = inputs["input_ids"]
    if labels is None:
        labels = ids if mask is None else ids.masked_fill(mask == 0, -100)
    key_mask = None if mask is None else mask.bool()
    factors = [(pair.name, letter, factor) for pair in pairs for letter, factor in (("A", pair.a), ("B", pair.b))]

    def gradients() -> list[Tensor]:
        loss = getattr(model(**inputs, labels=labels.to(ids.device)), "loss", None)
        if loss is None:
            raise ModelError(f"{type(inner).__name__} gives no loss. Use a model with a language-model head.")
        found = torch.autograd.grad(loss, [f for _, _, f in factors], allow_unused=True)
        return [torch.zeros_like(f) if g is None else g for g, (_, _, f) in zip(found, factors, strict=True)]

    def attend(name: str, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, None]:
        module, query, key, value = args[:4]
        rest = {k: v for k, v in kwargs.items() if k not in ("scaling", "attention_mask")}
        shown = args[4] if len(args) > 4 else kwargs.get("attention_mask")
        scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
        causal = _plain(AttentionCall(name, module, query, key, value, shown, scale, rest), key_mask)
        out = poly_attention(query, key, value, degree, center=center, causal=causal, key_mask=key_mask,
                             scale=scale, chunk=chunk, max_features=max_features)  # fmt: skip
        return out.transpose(1, 2).contiguous(), None

    with evaluating(model), torch.enable_grad(), _trainable([f for _, _, f in factors]):
        exact = gradients()
        with attend_with(inner, attend):
            found = gradients()
    return pd.DataFrame([_row(n, f, a, b) for (n, f, _), a, b in zip(factors, found, exact, strict=True)])


def _plain(call: AttentionCall, key_mask: Tensor | None) -> bool:
    """Return whether the layer is causal; refuse what polynomial attention cannot do."""
    tokens = call.query.shape[2]
    every = torch.arange(tokens, device=call.query.device)
    kept = [every] * len(call.query) if key_mask is None else [row.nonzero().flatten() for row in key_mask]
    reason = obstacle(call, tokens)
    found = {reason or causality(call, i, places) for i, places in enumerate(kept) if len(places) > 1}
    reasons = [each for each in found if isinstance(each, str)]
    if reasons or len(found) != 1:
        raise ModelError(
            f"{call.name} cannot be approximated by a polynomial of q . k: {(reasons or ['mixed masks'])[0]}. "
            "lora_norm_bound lists the layers that can."
        )
    return bool(found.pop())


class _trainable:  # noqa: N801 - used as a context manager only
    """Let frozen factors have gradients for a while."""

    def __init__(self, factors: list[nn.Parameter]) -> None:
        self.frozen = [f for f in factors if not f.requires_grad]

    def __enter__(self) -> None:
        for factor in self.frozen:
            factor.requires_grad_(True)

    def __exit__(self, *_: object) -> None:
        for factor in self.frozen:
            factor.requires_grad_(False)


def _row(name: str, factor: str, found: Tensor, exact: Tensor) -> dict[str, Any]:
    difference = (found - exact).float()
    norm, largest = float(exact.float().norm()), float(exact.abs().max())
    size = float(difference.norm())
    return {
        "name": name,
        "factor": factor,
        "norm": norm,
        "error": size / norm if norm else (math.inf if size else 0.0),
        "largest_error": float(difference.abs().max()) / largest if largest else (math.inf if size else 0.0),
    }
