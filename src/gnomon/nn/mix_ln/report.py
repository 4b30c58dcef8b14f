"""What each block of a model does: gradient, variance, turn of the residual stream, and loss without the block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from gnomon.common.calibration import as_batches
from gnomon.common.depth import (
    angular_distances,
    block_removal_drop,
    for_plotting,
    gradient_norms,
    stream_statistics,
)
from gnomon.errors import MethodError

__all__ = ["angular_map", "layer_report"]


def layer_report(
    model: nn.Module,
    batches: Any,
    *,
    max_distance: int | None = None,
    metric: Callable[[nn.Module], float] | None = None,
    batch_size: int = 8,
) -> pd.DataFrame:
    """Return one row a block that says how much the block does.

    Parameters
    ----------
    model : PreTrainedModel
        A decoder of any placement, stock ones too; left as it was.
    batches : LongTensor (n, T), mapping, or iterable (DataLoader)
        Token ids; with padding the attention mask as well.
    max_distance : int, optional
        Greatest n of the angular distances d(l, n); default the number of blocks.
    metric : callable, optional
        ``metric(model) -> float``, such as an accuracy on a benchmark: the column ``metric_drop`` then holds
        metric without the block minus metric with it.
    batch_size : int, default 8

    Returns
    -------
    DataFrame
        ``layer`` from 0; ``grad_norm``, the L2 norm of the loss gradient over all trainable parameters of the block;
        ``variance`` of its output over batch, token and feature; ``angular_distance`` d(l, 1) between its input and
        output at the last token, in [0, 1]; ``loss_drop``, the loss without the block minus the loss with it in
        nats a token: near 0 for a block that could go. ``attrs["angular_distances"]`` and
        ``attrs["angular_distances_for_plotting"]`` hold d(l, n) as lists of rows, the latter clipped to the 1st and
        99th percentile of its row and stretched to [0, 1]. NaN where block l + n does not exist or a vector is zero.

    Raises
    ------
    MethodError
        When `max_distance` is not between 1 and the number of blocks.
    ModelError
        When no parameter of the blocks is trainable, or the model has no head.

    Examples
    --------
    >>> import torch
    >>> from gnomon.common.models import tiny
    >>> report = layer_report(tiny("llama"), torch.arange(64).reshape(4, 16))
    >>> list(report.columns)
    ['layer', 'grad_norm', 'variance', 'angular_distance', 'loss_drop']
    """
    if max_distance is not None and max_distance < 1:
        raise MethodError(f"max_distance = {max_distance}. It must be at least 1: the distance across one block.")
    prepared = as_batches(batches, batch_size)
    variance, distances = stream_statistics(model, prepared, max_distance=max_distance, batch_size=batch_size)
    columns = {
        "layer": np.arange(len(variance)),
        "grad_norm": gradient_norms(model, prepared, batch_size=batch_size).numpy(),
        "variance": variance.numpy(),
        "angular_distance": distances[:, 0].numpy(),
        "loss_drop": block_removal_drop(model, prepared, batch_size=batch_size).numpy(),
    }
    if metric is not None:
        columns["metric_drop"] = block_removal_drop(model, metric=metric).numpy()
    report = pd.DataFrame(columns)
    report.attrs = {  # lists, because pandas compares attrs with == and writes them as JSON
        "angular_distances": distances.tolist(),
        "angular_distances_for_plotting": for_plotting(distances).tolist(),
    }
    return report


def angular_map(
    model: nn.Module,
    batches: Any,
    *,
    max_distance: int | None = None,
    normalised: bool = False,
    batch_size: int = 8,
) -> pd.DataFrame:
    """Return the angular distances d(l, n) as a table for a heat map: row l from 0, column n from 1.

    Parameters
    ----------
    model : PreTrainedModel
    batches : LongTensor (n, T), mapping, or iterable
    max_distance : int, optional
    normalised : bool, default False
        Each row clipped to its 1st and 99th percentile and stretched to [0, 1], for pictures only.
    batch_size : int, default 8

    Returns
    -------
    DataFrame

    Raises
    ------
    MethodError
        When `max_distance` is not between 1 and the number of blocks.

    Examples
    --------
    >>> import torch
    >>> from gnomon.common.models import tiny
    >>> angular_map(tiny("llama"), torch.arange(64).reshape(4, 16), max_distance=2).shape
    (4, 2)
    """
    distances = angular_distances(model, batches, max_distance=max_distance, batch_size=batch_size)
    shown = for_plotting(distances) if normalised else distances
    layers = pd.RangeIndex(shown.shape[0], name="layer")
    return pd.DataFrame(shown.numpy(), index=layers, columns=pd.RangeIndex(1, shown.shape[1] + 1, name="distance"))
