"""The bounds of a model on texts, with a summary for recipes and logs."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from torch import nn

from gnomon.adapters.lora_limits.bound import lora_norm_bound
from gnomon.adapters.lora_limits.verdict import VERDICTS
from gnomon.common.layers import unwrap
from gnomon.errors import DataError, GnomonWarning, MethodError

__all__ = ["LimitsReport", "limits_report", "summarised"]

LONGEST_DEFAULT = 2048


@dataclass(frozen=True)
class LimitsReport:
    """The table of `lora_norm_bound` and what it was made with.

    Attributes
    ----------
    table : DataFrame
    eps : float
    """

    table: pd.DataFrame = field(repr=False)
    eps: float

    def to_frame(self) -> pd.DataFrame:
        """Return a copy of the table."""
        return self.table.copy()

    def summary(self) -> dict[str, float]:
        """Return means and largest values over the heads, and how many heads got which verdict."""
        return summarised(self.table)


def summarised(table: pd.DataFrame) -> dict[str, float]:
    """Return means and largest values of a table of `lora_norm_bound`; what no head has is left out.

    Parameters
    ----------
    table : DataFrame

    Returns
    -------
    dict of str to float
        ``heads``, ``approximate``, ``exact``, ``not_applicable``; ``tau_mean``, ``tau_max`` and the same of the other
        norms, ``z_star`` and ``adapter_share``; ``degree_bound_mean``.
    """
    numbers = {"heads": float(len(table))}
    numbers |= {v.replace(" ", "_"): float((table["verdict"] == v).sum()) for v in VERDICTS}
    for name in ("tau", "Gamma_Q", "Gamma_K", "Gamma_V", "Gamma_QK", "z_star", "adapter_share"):
        column = table[name].dropna()
        if len(column):
            numbers |= {f"{name}_mean": float(column.mean()), f"{name}_max": float(column.max())}
    degrees = table["g_bound"].dropna()
    if len(degrees):
        numbers["degree_bound_mean"] = float(degrees.astype(float).mean())
    return numbers


def limits_report(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    eps: float = 1e-2,
    max_degree: int = 8,
    crossover: float = 1.0,
    max_length: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
) -> LimitsReport:
    """`lora_norm_bound` on texts, one sequence each.

    Parameters
    ----------
    model : nn.Module
    tokenizer : PreTrainedTokenizerBase
        Its padding side does not matter, and it needs no pad token.
    texts : sequence of str
    eps, max_degree, crossover, batch_size, seed
        As in `lora_norm_bound`.
    max_length : int, optional
        Tokens after which a text is cut; default 2048 or what the model allows.

    Returns
    -------
    LimitsReport

    Raises
    ------
    DataError
        When there are no texts, one is no string, or none has two tokens.
    MethodError
        When an option is out of its range.
    ModelError
        As in `lora_norm_bound`.

    Examples
    --------
    >>> from gnomon.common.models import tiny
    >>> from gnomon.common.text import byte_tokenizer
    >>> report = limits_report(tiny("llama", vocab_size=257), byte_tokenizer(), ["def area(r): return 3.14 * r * r"])
    >>> report.summary()["heads"]
    16.0
    """
    limit = getattr(getattr(unwrap(model), "config", None), "max_position_embeddings", None)
    longest = min(limit or LONGEST_DEFAULT, LONGEST_DEFAULT) if max_length is None else max_length
    if longest < 2 or (limit is not None and longest > limit):
        raise MethodError(f"max_length = {longest}: give at least 2 and at most the model's {limit} positions.")
    if isinstance(texts, str):
        raise DataError("texts is one string; give a list of strings, each of which is one sequence.")
    texts = list(texts)
    for row, text in enumerate(texts, 1):
        if not isinstance(text, str):
            raise DataError(f"texts must be strings; got {type(text).__name__}.", file="texts", row=row)
    if not texts:
        raise DataError("There are no texts to measure. Give a list of strings.")
    encoded = tokenizer(texts, truncation=True, max_length=longest, padding=False, verbose=False)["input_ids"]
    rows = [torch.tensor(ids, dtype=torch.long) for ids in encoded if len(ids) > 1]
    if not rows:
        raise DataError("no text has 2 tokens, and log 1 is 0. Give longer texts.")
    if len(rows) < len(texts):
        warnings.warn(
            f"{len(texts) - len(rows)} of {len(texts)} texts have fewer than 2 tokens and were left out.",
            GnomonWarning,
            stacklevel=2,
        )
    table = lora_norm_bound(
        model, rows, eps=eps, max_degree=max_degree, crossover=crossover, batch_size=batch_size, seed=seed
    )
    return LimitsReport(table, eps)
