"""Whole models: base pruning and its refinement, block by block, in one pass of statistics."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gnomon.common.calibration import LayerInputs, walk_blocks
from gnomon.common.layers import attention_and_mlp, linear_layers, set_weight, weight_of
from gnomon.compress.dsnot.bases import check_weight, inverse_factor, magnitude_mask, sparsegpt_layer, wanda_mask
from gnomon.compress.dsnot.checks import (
    Base,
    Method,
    block_linears,
    check_choice,
    check_model,
    check_options,
    named,
    twins_of,
    warn_of_fused_experts,
    zeros,
)
from gnomon.compress.dsnot.refine import dsnot_layer, scaled_cycles, scaled_threshold
from gnomon.compress.dsnot.report import layer_error
from gnomon.compress.dsnot.selection import Budget, score_mask
from gnomon.errors import DataError, NoEffectWarning

__all__ = ["dsnot", "prune"]

OnLayer = Callable[[str, dict[str, float]], None]
_DAMPING = 0.01


class _Factors:
    """The inverse Hessian's factor of each distinct input of one block, computed once."""

    def __init__(self) -> None:
        self._found: dict[int, Tensor] = {}

    def of(self, inputs: LayerInputs, damping: float) -> Tensor:
        if id(inputs) not in self._found:
            self._found[id(inputs)] = inverse_factor(inputs, damping)
        return self._found[id(inputs)]


# (name, weight (out, in), inputs, whether in the attention module, factors) -> new weight, facts
Decide = Callable[[str, Tensor, LayerInputs, bool, _Factors], tuple[Tensor, dict[str, float]]]


def prune(
    model: nn.Module,
    calibration: Any = None,
    method: Method = "wanda",
    sparsity: float | str | None = None,
    pattern: str | None = None,
    *,
    block_size: int = 128,
    damping: float = _DAMPING,
    batch_size: int = 8,
    on_layer: OnLayer | None = None,
) -> nn.Module:
    """Prune the linear layers of a model's blocks with magnitude, Wanda or SparseGPT.

    Block by block: inputs are measured with the block as it was, its layers are pruned, and the next block sees what
    the pruned block gives. Embeddings, norms, biases and the head are left alone; the model stays a stock model with
    zeros in its weights.

    Parameters
    ----------
    model : PreTrainedModel or PeftModel
        Changed in place. Of a PEFT model the base layers are pruned.
    calibration : LongTensor (n, T), mapping, or iterable
        Token ids, see `gnomon.common.calibration.as_batches`; the papers take 128 sequences of 2048 tokens of C4.
        Not needed for "magnitude".
    method : {"wanda", "magnitude", "sparsegpt"}, default "wanda"
        `wanda_mask`, `magnitude_mask` or `sparsegpt_layer` (which also updates the weights it keeps).
    sparsity : float, default 0.5
        Share of zeros in [0, 1), or a pattern as text.
    pattern : str, optional
        ``"n:m"``: n of every m consecutive inputs are pruned.
    block_size : int, default 128
    damping : float, default 0.01
        SparseGPT's; defaults of its authors.
    batch_size : int, default 8
        Sequences per forward pass.
    on_layer : callable (name, facts), optional
        Called after each layer with its ``sparsity`` and, where inputs were measured, ``error`` (squared output error
        relative to the output) and the parts that `layer_errors` explains. Makes the run collect Gram matrices.

    Returns
    -------
    nn.Module
        `model`.

    Raises
    ------
    MethodError
        For an unknown method, a sparsity outside [0, 1), a pattern that does not fit a layer, weights or activations
        that are not finite; the message names the layer.
    ModelError
        When the model is quantised, still has frozen masks, or no decoder blocks are found.
    DataError
        When the calibration set is missing, empty or no token ids.

    Examples
    --------
    >>> from gnomon.common.models import tiny
    >>> model = prune(tiny(num_layers=1), torch.arange(64).view(2, 32), "wanda", 0.5)
    >>> float((model.model.layers[0].self_attn.q_proj.weight == 0).float().mean())
    0.5
    """
    check_choice("method", method, Method)
    budget = Budget(sparsity, pattern)
    check_model(model, budget)
    warn_of_fused_experts(model)
    choice = (budget.sparsity, budget.pattern)

    def decide(
        name: str, weight: Tensor, inputs: LayerInputs, attention: bool, factors: _Factors
    ) -> tuple[Tensor, dict[str, float]]:
        if method == "sparsegpt":
            factor = factors.of(inputs, damping)
            new, _ = sparsegpt_layer(weight, inputs, *choice, block_size=block_size, damping=damping, factor=factor)
            return new, {}
        keep = wanda_mask(weight, inputs, *choice) if method == "wanda" else magnitude_mask(weight, *choice)
        return weight.masked_fill(~keep, 0), {}

    if method == "magnitude" and (calibration is None or on_layer is None):
        _prune_by_magnitude(model, budget, on_layer)
        return model
    _sweep(
        model, calibration, decide, gram=method == "sparsegpt" or on_layer is not None, batch_size=batch_size,
        on_layer=on_layer,
    )  # fmt: skip
    return model


def dsnot(
    model: nn.Module,
    calibration: Any,
    *,
    base: Base = "wanda",
    sparsity: float | str | None = None,
    pattern: str | None = None,
    max_cycles: int | Literal["scaled"] = "scaled",
    threshold: float | Literal["scaled"] = "scaled",
    power: float = 1.0,
    without_same_sign: bool = True,
    refine: Literal["attention", "all"] = "attention",
    original_model: nn.Module | None = None,
    batch_size: int = 8,
    on_layer: OnLayer | None = None,
) -> nn.Module:
    """Prune a model and re-choose its masks so that each layer's expected output error vanishes (DSnoT).

    Base pruning and refinement use the same pass of statistics. No weight is updated: kept weights have their dense
    values, pruned ones are zero, and each row (each block of a pattern) has as many zeros as the base gave it.

    Parameters
    ----------
    model : PreTrainedModel or PeftModel
        Changed in place. Of a PEFT model the base layers are pruned.
    calibration : LongTensor (n, T), mapping, or iterable
        Token ids, see `gnomon.common.calibration.as_batches`; the paper takes 128 sequences of 2048 tokens of C4.
    base : {"wanda", "magnitude", "sparsegpt", "current"}, default "wanda"
        Score whose smallest entries of each row are pruned first: ``|W| sqrt(q)``, ``|W|`` or ``W^2 / diag(U)^2``.
        "current" starts from the zeros `model` has, of whatever origin, and takes dense values from
        `original_model`.
    sparsity : float, default 0.5
        Share of zeros in every row, or a pattern as text. Not with base "current".
    pattern : str, optional
        ``"n:m"``: n of every m consecutive inputs are pruned.
    max_cycles : int or "scaled", default "scaled"
        Swaps per row; the paper's 50, but at most 1.25 % of a row (`scaled_cycles`), which at 4096 inputs is the same.
        0 gives the base alone.
    threshold : float or "scaled", default "scaled"
        Expected error per sequence at which a row stops; the paper's 0.1 is meant for 2048 tokens and "scaled" is
        0.1 T / 2048.
    power : float, default 1.0
        Power of the variance in the growing criterion.
    without_same_sign : bool, default True
        Go on when a row's error changes its sign (a pattern never does).
    refine : {"attention", "all"}, default "attention"
        Which layers are refined; the others get the plain base mask. "attention" is the authors' default.
    original_model : nn.Module, optional
        The dense model; needed for base "current" alone.
    batch_size : int, default 8
        Sequences per forward pass.
    on_layer : callable (name, facts), optional
        Called after each layer with ``sparsity``, ``swaps`` (per row, on average), ``error`` (squared output error
        relative to the output) and the parts that `layer_errors` explains. Makes the run collect Gram matrices.

    Returns
    -------
    nn.Module
        `model`.

    Raises
    ------
    MethodError
        For an unknown base, a sparsity outside [0, 1), a pattern that does not fit a layer (or that the current zeros
        break), weights or activations that are not finite; the message names the layer.
    ModelError
        When the model is quantised, still has frozen masks, or does not match `original_model`.
    DataError
        When the calibration set is empty or no token ids.

    Examples
    --------
    >>> from gnomon.common.models import tiny
    >>> model = dsnot(tiny(num_layers=1), torch.arange(64).view(2, 32), sparsity="2:4")
    >>> float((model.model.layers[0].mlp.up_proj.weight == 0).float().mean())
    0.5
    """
    budget = check_options(
        model, base=base, sparsity=sparsity, pattern=pattern, max_cycles=max_cycles, threshold=threshold, refine=refine
    )
    warn_of_fused_experts(model)
    twins = twins_of(model, original_model) if base == "current" else {}

    def decide(
        name: str, weight: Tensor, inputs: LayerInputs, attention: bool, factors: _Factors
    ) -> tuple[Tensor, dict[str, float]]:
        dense = twins[name] if twins else weight
        if base == "sparsegpt":
            scale = factors.of(inputs, _DAMPING).diagonal().double().reciprocal()
        elif base == "magnitude":
            scale = torch.ones(weight.shape[1])
        else:
            scale = inputs.mean_square.sqrt()
        check_weight(dense, inputs)
        keep = weight != 0 if twins else score_mask(dense, scale, budget)
        refined = keep
        if attention or refine == "all":
            refined = dsnot_layer(
                dense, inputs, keep, pattern=budget.pattern, power=power, without_same_sign=without_same_sign,
                max_cycles=scaled_cycles(inputs.features) if isinstance(max_cycles, str) else max_cycles,
                threshold=scaled_threshold(inputs) if isinstance(threshold, str) else threshold, scale=scale,
            )  # fmt: skip
        return dense.masked_fill(~refined, 0), {"swaps": float((refined & ~keep).sum() / max(len(keep), 1))}

    _sweep(
        model, calibration, decide, gram=base == "sparsegpt" or on_layer is not None, batch_size=batch_size,
        on_layer=on_layer, dense=twins,
    )  # fmt: skip
    return model


@torch.no_grad()
def _prune_by_magnitude(model: nn.Module, budget: Budget, on_layer: OnLayer | None) -> None:
    for name, layer in block_linears(model).items():
        weight = weight_of(layer)
        keep = magnitude_mask(weight, budget.sparsity, budget.pattern)
        set_weight(layer, weight.masked_fill(~keep, 0))
        if on_layer is not None:
            on_layer(name, {"sparsity": zeros(weight)})


def _sweep(
    model: nn.Module,
    calibration: Any,
    decide: Decide,
    *,
    gram: bool,
    batch_size: int,
    on_layer: OnLayer | None,
    dense: dict[str, Tensor] | None = None,
) -> None:
    """Decide on every linear of every block and write its new weight."""
    if calibration is None:
        raise DataError("There is no calibration set. Give token ids of shape (n, tokens); only magnitude needs none.")

    def visit(index: int, prefix: str, block: nn.Module, inputs: dict[str, LayerInputs]) -> None:
        attention = {id(layer) for layer in linear_layers(attention_and_mlp(block)[0]).values()}
        factors = _Factors()
        for short, layer in linear_layers(block).items():
            name = f"{prefix}.{short}"
            before = weight_of(layer)
            if name not in inputs:
                warnings.warn(f"No token reached {name!r}: it stays dense.", NoEffectWarning, stacklevel=2)
                if on_layer is not None:
                    on_layer(name, {"sparsity": zeros(before), "tokens": 0.0})
                continue
            with named(name):
                new, facts = decide(name, before, inputs[name], id(layer) in attention, factors)
            facts = {"sparsity": zeros(new), "tokens": float(inputs[name].tokens), **facts}
            if on_layer is not None:
                facts |= layer_error(dense[name] if dense else before, new, inputs[name])
            set_weight(layer, new)
            if on_layer is not None:
                on_layer(name, facts)

    walk_blocks(model, calibration, visit, gram=gram, batch_size=batch_size)
