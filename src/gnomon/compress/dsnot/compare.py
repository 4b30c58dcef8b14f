"""All bases with and without refinement, side by side."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor, nn

from gnomon.compress.dsnot.models import dsnot, prune
from gnomon.compress.dsnot.report import layer_errors
from gnomon.errors import MethodError

__all__ = ["compare_bases"]


@torch.no_grad()
def _loss_and_divergence(
    model: nn.Module, original: nn.Module, tokens: Int[Tensor, "n context"], batch_size: int
) -> tuple[float, float]:
    """Return the mean next-token loss and the mean divergence of the dense from the pruned prediction, in nats."""
    loss = divergence = 0.0
    for part in tokens.split(batch_size):
        found = model(input_ids=part).logits[:, :-1].float().log_softmax(-1)
        wanted = original(input_ids=part).logits[:, :-1].float().log_softmax(-1)
        loss -= float(found.gather(-1, part[:, 1:, None]).sum(dtype=torch.float64))
        divergence += float((wanted.exp() * (wanted - found)).sum(dtype=torch.float64))
    count = tokens.shape[0] * (tokens.shape[1] - 1)
    return loss / count, divergence / count


def compare_bases(
    model: nn.Module,
    calibration: Any,
    *,
    sparsity: float | str | None = None,
    pattern: str | None = None,
    bases: Sequence[str] = ("magnitude", "wanda", "sparsegpt"),
    held_out: Int[Tensor, "n context"] | None = None,
    batch_size: int = 8,
    **options: Any,
) -> pd.DataFrame:
    """Prune copies of a model in every way and put their errors side by side, with and without refinement.

    Parameters
    ----------
    model : nn.Module
        The dense model; not changed.
    calibration : LongTensor (n, T), mapping, or iterable
        Token ids.
    sparsity, pattern
        As in `prune`.
    bases : sequence of str, default ("magnitude", "wanda", "sparsegpt")
    held_out : LongTensor (n, context), optional
        Token ids of other text, for the loss and the divergence.
    batch_size : int, default 8
    **options
        Handed on to `dsnot` (``max_cycles``, ``refine``, ...).

    Returns
    -------
    DataFrame
        One row per base and refinement ("none": `prune`, with SparseGPT's weight updates; "dsnot"): ``sparsity`` and
        the layers' average ``error``, ``mse``, ``mean_term``, ``covariance_term`` and ``expected_error``; with
        `held_out` also ``loss``, ``perplexity`` and ``kl`` (dense to pruned, nats per token).

    Raises
    ------
    MethodError
        When a base is not known.
    """
    if not bases:
        raise MethodError("bases is empty. Name at least one of 'magnitude', 'wanda', 'sparsegpt'.")
    rows = []
    dense = copy.deepcopy(model).eval()
    for base in bases:
        for refinement in ("none", "dsnot"):
            pruned = copy.deepcopy(model)
            if refinement == "none":
                prune(pruned, calibration, base, sparsity, pattern, batch_size=batch_size)  # type: ignore[arg-type]
            else:
                chosen: Any = base
                dsnot(
                    pruned,
                    calibration,
                    base=chosen,
                    sparsity=sparsity,
                    pattern=pattern,
                    batch_size=batch_size,
                    **options,
                )
            errors = layer_errors(pruned, model, calibration, batch_size=batch_size).drop(columns="layer").mean()
            row: dict[str, Any] = {"base": base, "refinement": refinement}
            row |= {str(key): float(value) for key, value in errors.items()}
            if held_out is not None:
                row["loss"], row["kl"] = _loss_and_divergence(pruned.eval(), dense, held_out, batch_size)
                row["perplexity"] = float(torch.tensor(row["loss"]).exp())
            rows.append(row)
    return pd.DataFrame(rows)
