"""The norms of every attention head beside the threshold of the theorems, and the error of the polynomial there."""

from __future__ import annotations

import inspect
import math
import warnings
from typing import Any

import pandas as pd
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from gnomon.adapters.lora_limits.capture import AttentionCall, watching
from gnomon.adapters.lora_limits.heads import layer_rows, unseen_rows
from gnomon.adapters.lora_limits.verdict import judged
from gnomon.common.calibration import as_batches
from gnomon.common.depth import evaluating
from gnomon.common.layers import unwrap
from gnomon.errors import DataError, GnomonWarning, MethodError, ModelError

__all__ = ["lora_norm_bound", "run_options"]


@torch.no_grad()
def lora_norm_bound(
    model: nn.Module,
    batches: Any,
    *,
    eps: float = 1e-2,
    max_degree: int = 8,
    crossover: float = 1.0,
    max_features: int = 10_000,
    per_sequence: bool = False,
    batch_size: int = 8,
    seed: int = 0,
) -> pd.DataFrame:
    """Measure norms, thresholds and the error of the polynomial for every attention head of a model.

    Parameters
    ----------
    model : nn.Module
        A transformers model, with or without adapters (any of PEFT). It is left as it was.
    batches : LongTensor (n, tokens), mapping, or iterable of these
        Token ids; dicts with ``input_ids`` and perhaps ``attention_mask``. Other columns are ignored.
    eps : float, default 1e-2
        The relative error (Frobenius, of outputs and gradients) that a head may have.
    max_degree : int, default 8
        Even; degrees 2, 4, ... up to it are measured.
    crossover : float, default 1.0
        c in L_cross = c k1 width, the number of tokens from which on the polynomial is faster. `scaling_report` fits
        it to a machine. 0 leaves speed out of the verdict.
    max_features : int, default 10,000
        Most features a head may have.
    per_sequence : bool, default False
        One row per layer, head and sequence (column ``sequence``), instead of the worst sequence of each head.
    batch_size : int, default 8
        Changes speed and memory only.
    seed : int, default 0
        Of the upstream gradient with which errors of gradients are measured.

    Returns
    -------
    DataFrame
        Columns: ``layer, head, L`` (tokens of the longest sequence), ``width``; ``Gamma_Q, Gamma_K, Gamma_V`` (largest
        entry; the scale of the scores is divided evenly over Q and K), ``Gamma_QK`` = sqrt(max|q.k| / width),
        ``threshold`` = sqrt(log L), ``tau`` = Gamma_QK / threshold, ``z_star`` = max|q.k| with centred keys;
        ``g_bound`` (smallest even degree by the error bound), ``g`` (smallest by the measured errors; missing where
        none up to `max_degree` does), ``error_output``, ``error_gradient`` (at g, else at `max_degree`), ``k1`` and
        ``L_cross`` (at g, else at `max_degree`); ``share_Q, share_K, share_V`` (largest entry of what adapters add over
        the largest entry, 0 without adapters) and their largest, ``adapter_share``; ``verdict`` (``"approximate"``: the
        error at g is at most eps and L exceeds L_cross; ``"exact"``; ``"not applicable"``) and its ``reason``.

    Raises
    ------
    DataError
        When there is no sequence of two tokens.
    MethodError
        When an option is out of its range.
    ModelError
        When no attention is found, q, k or v are not finite (with the layer's name), or the model is an
        encoder-decoder or has a prompt-learning adapter.

    Examples
    --------
    >>> from gnomon.common.models import tiny
    >>> table = lora_norm_bound(tiny("llama"), torch.arange(32)[None])
    >>> len(table), table["verdict"].unique().tolist(), float(table["adapter_share"].max())
    (16, ['exact'], 0.0)
    """
    _check_options(eps, max_degree, crossover, max_features)
    inner: Any = unwrap(model)
    _check_model(model, inner)
    prepared = as_batches(batches, batch_size, inner.get_input_embeddings().weight.device)
    kept = [_places(batch) for batch in prepared]
    _check_tokens(inner, prepared, kept)
    degrees = list(range(2, max_degree + 1, 2))
    rows: list[dict[str, Any]] = []
    with evaluating(model):
        first = 0
        for batch, places in zip(prepared, kept, strict=True):

            def see(call: AttentionCall, places: list[Tensor] = places, first: int = first) -> None:
                rows.extend(layer_rows(call, places, first, degrees, seed))

            with watching(inner, see):
                model(**batch, **run_options(inner))
            first += len(places)
    rows.extend(unseen_rows(inner, {row["name"] for row in rows}, max(len(p) for ps in kept for p in ps)))
    return judged(
        pd.DataFrame(rows), degrees, eps, crossover=crossover, max_features=max_features, per_sequence=per_sequence
    )


def _places(batch: dict[str, Tensor]) -> list[Tensor]:
    """Return, for every sequence, where its tokens stand that are no padding."""
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    return [row.nonzero().flatten() for row in mask]


def run_options(inner: Any) -> dict[str, Any]:
    """Return what spares a model work that nobody looks at: a cache, and logits of all tokens."""
    taken = inspect.signature(inner.forward).parameters
    wanted: dict[str, Any] = {"use_cache": False, "logits_to_keep": 1}
    return {name: value for name, value in wanted.items() if name in taken}


def _check_options(eps: float, max_degree: int, crossover: float, max_features: int) -> None:
    if not (math.isfinite(eps) and eps > 0):
        raise MethodError(f"eps = {eps}: the error allowed is a positive number, such as 0.01.")
    if max_degree < 2 or max_degree % 2:
        raise MethodError(f"max_degree = {max_degree}: give an even number of at least 2, such as 8.")
    if not (math.isfinite(crossover) and crossover >= 0):
        raise MethodError(f"crossover = {crossover}: give a number of at least 0; scaling_report measures it.")
    if max_features < 1:
        raise MethodError(f"max_features = {max_features}: give a number of at least 1.")


def _check_model(model: nn.Module, inner: Any) -> None:
    if not hasattr(inner, "get_input_embeddings"):
        raise ModelError(f"a {type(inner).__name__} is no transformers model, whose attention layers can be watched.")
    if getattr(inner.config, "is_encoder_decoder", False) and getattr(inner, "decoder", None) is not None:
        raise ModelError(f"{type(inner).__name__} is an encoder-decoder. Give one half of it: model.get_encoder().")
    if hasattr(inner, "get_encoder") and getattr(inner.config, "is_encoder_decoder", False):
        raise ModelError(f"{type(inner).__name__} is an encoder-decoder. Give one half of it: model.get_encoder().")
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise ModelError("the model has a prompt-learning adapter, whose virtual tokens stand outside of its layers.")
    merged = [name for name, m in inner.named_modules() if isinstance(m, BaseTunerLayer) and m.merged]
    if merged:
        warnings.warn(
            f"adapters are merged into {merged[0]} and {len(merged) - 1} further layers; what they add there counts as "
            "the base model's. Call unmerge_adapter() to see their share.",
            GnomonWarning,
            stacklevel=3,
        )


def _check_tokens(inner: Any, batches: list[dict[str, Tensor]], kept: list[list[Tensor]]) -> None:
    if max(len(places) for rows in kept for places in rows) < 2:
        raise DataError("every sequence has 1 token, and log 1 is 0. Give sequences of at least 2 tokens.")
    size = int(inner.get_input_embeddings().weight.shape[0])
    for batch in batches:
        for extreme in (int(batch["input_ids"].min()), int(batch["input_ids"].max())):
            if not 0 <= extreme < size:
                raise DataError(
                    f"token id {extreme} is not in the model's vocabulary (0 to {size - 1}). Was the text tokenised "
                    "with another model's tokenizer?"
                )
