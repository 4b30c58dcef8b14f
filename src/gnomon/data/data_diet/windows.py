"""Choosing rows of token ids for the training of a language model."""

from __future__ import annotations

import copy
import functools
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn

from gnomon.common.engine import Engine, run_all
from gnomon.data.data_diet.rows import Rows
from gnomon.data.data_diet.scoring import score_models
from gnomon.data.data_diet.selection import select
from gnomon.data.data_diet.training import TrainingPlan, seeds_of, train_model
from gnomon.errors import DataError, MethodError

__all__ = ["select_windows"]

WindowMethod = Literal["el2n", "grand", "el1", "margin", "sum_margin"]


def select_windows(
    model: nn.Module,
    rows: Int[Tensor, "rows context"],
    *,
    seed: int = 0,
    method: WindowMethod = "el2n",
    keep: float = 0.5,
    order: Literal["hard", "easy", "random"] = "hard",
    offset: float = 0.0,
    warm_steps: int = 100,
    batch_size: int = 16,
    lr: float = 1e-3,
    runs: int = 2,
    engine: Engine = "local",
) -> Int[Tensor, " kept"]:
    """Choose rows of token ids by how hard they are after a short training of private copies of a language model.

    The paper is about classification; for language models this is an extension. Hard rows of text are often noise
    rather than knowledge, so compare with ``order="random"``, which keeps as many rows.

    Parameters
    ----------
    model : nn.Module
        A causal language model; it is not changed.
    rows : LongTensor (rows, context)
        Token ids.
    seed : int, default 0
        Of the order of rows in the short training, and of ``order="random"``.
    method : {"el2n", "grand", "el1", "margin", "sum_margin"}, default "el2n"
        The mean over tokens; for ``"grand"`` the norm of the gradient of the row's mean token loss.
    keep : float, default 0.5
        Share of the rows.
    order : {"hard", "easy", "random"}, default "hard"
    offset : float, default 0.0
        Share of the rows skipped at the end that is kept.
    warm_steps : int, default 100
        Steps of AdamW (cosine) on each copy before scoring; 0 scores the model as it is.
    batch_size : int, default 16
        Rows in a batch, for training and scoring.
    lr : float, default 1e-3
        Of these steps.
    runs : int, default 2
        Copies, each with another order of the rows; scores are averaged.
    engine : {"local", "ray"}, default "local"
        Where the copies are trained and scored.

    Returns
    -------
    LongTensor (kept,)
        Numbers of the rows to keep, ascending.

    Raises
    ------
    DataError
        When `rows` are no token ids.
    MethodError
        Shares or options that are not possible.

    Examples
    --------
    >>> from gnomon.common.models import tiny
    >>> rows = torch.randint(1, 256, (8, 16), generator=torch.Generator().manual_seed(0))
    >>> select_windows(tiny("llama"), rows, warm_steps=2, batch_size=4).shape
    torch.Size([4])
    """
    if not isinstance(rows, Tensor) or rows.dim() != 2 or rows.is_floating_point() or rows.dtype == torch.bool:
        shown = f"shape {tuple(rows.shape)}, {rows.dtype}" if isinstance(rows, Tensor) else type(rows).__name__
        raise DataError(f"rows are {shown}. Give token ids: an integer tensor of shape (rows, context).")
    if warm_steps < 0 or runs < 1 or batch_size < 1:
        raise MethodError(
            f"warm_steps = {warm_steps}, runs = {runs}, batch_size = {batch_size}. At least 0, 1 and 1 are allowed."
        )
    if order not in ("hard", "easy", "random"):
        raise MethodError(f"order = {order!r}. Allowed: hard, easy, random.")
    if method not in ("el2n", "grand", "el1", "margin", "sum_margin"):
        raise MethodError(f"method = {method!r}. Allowed for rows of tokens: el2n, grand, el1, margin, sum_margin.")
    scores = np.zeros(len(rows))
    if order != "random":
        select(scores, float(keep), order=order, offset=float(offset))  # refuse wrong shares before the training
        plan = TrainingPlan(steps=max(1, warm_steps), batch_size=batch_size, lr=lr)
        work = functools.partial(_warm_scores, model, rows, plan, method, seed, warm_steps)
        scores = np.mean(run_all(work, list(range(runs if warm_steps else 1)), engine=engine), axis=0)
    return torch.from_numpy(select(scores, float(keep), order=order, offset=float(offset), seed=seed))


def _warm_scores(
    model: nn.Module, rows: Tensor, plan: TrainingPlan, method: WindowMethod, seed: int, warm_steps: int, run: int
) -> np.ndarray:
    copied = copy.deepcopy(model)
    source = Rows(rows)
    if warm_steps:
        train_model(copied, source, plan, seed=seeds_of(seed, run)[1])
    (scored,) = score_models([copied], source, method, batch_size=plan.batch_size)
    return scored.values
