"""How far a pruned layer's outputs are from the dense layer's, and which part of that DSnoT can reach."""

from __future__ import annotations

from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from gnomon.common.calibration import LayerInputs, walk_blocks
from gnomon.common.layers import linear_layers, weight_of
from gnomon.compress.dsnot.masks import plain_name
from gnomon.compress.dsnot.selection import row_chunks
from gnomon.errors import ModelError

__all__ = ["layer_error", "layer_errors"]


@torch.no_grad()
def layer_error(
    weight: Float[Tensor, "out in"], pruned: Float[Tensor, "out in"], inputs: LayerInputs
) -> dict[str, float]:
    """Split the squared output error of one layer into the part of the mean and the part of the covariance.

    With D = weight - pruned, mu the mean and C the covariance of the inputs, ``E[(D x)^2] = (D mu)^2 + D C D^T`` for
    every output. DSnoT works on the first term.

    Parameters
    ----------
    weight, pruned : Tensor (out, in)
        The dense and the pruned weight.
    inputs : LayerInputs
        Statistics of the layer's inputs; without a Gram matrix only the terms of the mean are given.

    Returns
    -------
    dict
        ``mse`` (per token and output), ``mean_term``, ``covariance_term``; ``error``: mse relative to the mean square
        of the dense outputs; ``expected_error``: the square of the error summed over a sequence, which DSnoT drives to
        zero, averaged over outputs.

    Examples
    --------
    >>> inputs = LayerInputs.from_tensor(torch.tensor([[[1.0], [3.0]]]))
    >>> layer_error(torch.ones(1, 1), torch.zeros(1, 1), inputs)["mse"]
    5.0
    """
    tokens = max(inputs.tokens, 1)
    wide = inputs.sums.dtype
    mean, sums = inputs.sums / tokens, inputs.mean_sum
    totals = {"mean_term": 0.0, "expected_error": 0.0}
    square = dense_square = 0.0
    for part in row_chunks(*weight.shape):
        dense = weight[part].to(wide)
        delta = dense - pruned[part].to(wide)
        totals["mean_term"] += float((delta @ mean).square().sum())
        totals["expected_error"] += float((delta @ sums).square().sum())
        if inputs.gram is not None:
            square += _quadratic(delta, inputs.gram)
            dense_square += _quadratic(dense, inputs.gram)
    totals = {key: value / len(weight) for key, value in totals.items()}
    if inputs.gram is not None:
        mse = square / tokens / len(weight)
        totals |= {"mse": mse, "covariance_term": max(0.0, mse - totals["mean_term"])}
        totals["error"] = square / dense_square if dense_square > 0 else 0.0
    return totals


def _quadratic(rows: Tensor, gram: Tensor) -> float:
    rows = rows.to(gram.dtype)
    return float(((rows @ gram) * rows).sum(dtype=torch.float64 if gram.device.type != "mps" else None))


def layer_errors(model: nn.Module, original_model: nn.Module, calibration: Any, *, batch_size: int = 8) -> pd.DataFrame:
    """Compare a pruned model with the dense one layer by layer, on the inputs the pruned model's layers get.

    Parameters
    ----------
    model, original_model : nn.Module
        The pruned and the dense model; neither is changed.
    calibration : LongTensor (n, T), mapping, or iterable
        Token ids, see `gnomon.common.calibration.as_batches`.
    batch_size : int, default 8

    Returns
    -------
    DataFrame
        One row per linear layer: ``layer``, ``sparsity``, and what `layer_error` returns.

    Raises
    ------
    ModelError
        When a layer has no match in the dense model.
    """
    dense = {plain_name(name): layer for name, layer in linear_layers(original_model).items()}
    rows: list[dict[str, Any]] = []

    def visit(index: int, prefix: str, block: nn.Module, inputs: dict[str, LayerInputs]) -> None:
        for short, layer in linear_layers(block).items():
            name = f"{prefix}.{short}"
            twin = dense.get(plain_name(name))
            if twin is None or weight_of(twin).shape != weight_of(layer).shape:
                raise ModelError(f"Layer {name!r} has no match in original_model. Give the model it was pruned from.")
            weight = weight_of(layer)
            facts = layer_error(weight_of(twin), weight, inputs[name]) if name in inputs else {}
            rows.append({"layer": name, "sparsity": float((weight == 0).float().mean()), **facts})

    walk_blocks(model, calibration, visit, sequential=False, batch_size=batch_size)
    return pd.DataFrame(rows)
