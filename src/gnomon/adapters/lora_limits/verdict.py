"""From the numbers of every head and sequence to one row a head, with its degree, its crossover and its verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from gnomon.adapters.lora_limits.features import feature_count, needed_degree

__all__ = ["VERDICTS", "judged"]

VERDICTS = ("approximate", "exact", "not applicable")
_LARGEST = ("L", "Gamma_Q", "Gamma_K", "Gamma_V", "Gamma_QK", "tau", "z_star", "share_Q", "share_K", "share_V")
_COLUMNS = (
    "layer", "head", "L", "width", "Gamma_Q", "Gamma_K", "Gamma_V", "Gamma_QK", "threshold", "tau", "z_star", "g_bound",
    "g", "error_output", "error_gradient", "k1", "L_cross", "share_Q", "share_K", "share_V", "adapter_share", "verdict",
    "reason",
)  # fmt: skip


def judged(
    rows: pd.DataFrame,
    degrees: Sequence[int],
    eps: float,
    *,
    crossover: float,
    max_features: int,
    per_sequence: bool,
) -> pd.DataFrame:
    """Return the table of `lora_norm_bound` from one row per layer, head and sequence."""
    measured = [*_LARGEST, *(f"{kind}_{g}" for g in degrees for kind in ("output", "gradient"))]
    rows = rows.reindex(columns=list(dict.fromkeys([*rows.columns, *measured])))
    keys = ["name", "layer", "head", *(["sequence"] if per_sequence else [])]
    largest = {name: (name, "max") for name in measured}
    table = rows.groupby(keys, sort=False, as_index=False).agg(width=("width", "first"), reason=("reason", "max"),
                                                               **largest)  # fmt: skip
    stopped = table["reason"] != ""
    # a head that one sequence rules out has no scores, also where others were measured
    table.loc[stopped, ["Gamma_QK", "tau", "z_star", *measured[len(_LARGEST) :]]] = math.nan
    found = [_decide(row, degrees, eps, crossover, max_features) for row in table.to_dict("records")]
    table = pd.concat([table.drop(columns="reason"), pd.DataFrame(found)], axis=1)
    table["threshold"] = table["L"].map(lambda tokens: math.sqrt(math.log(tokens)))
    table["adapter_share"] = table[["share_Q", "share_K", "share_V"]].max(axis=1)
    table = table.astype(dict.fromkeys(("g_bound", "g", "k1"), "Int64"))
    order = ["layer", *(["sequence"] if per_sequence else []), "head"]
    table = table.sort_values(order, kind="stable", ignore_index=True)
    return table[[*order[:-1], *(name for name in _COLUMNS if name != "layer")]]


def _decide(
    row: dict[Any, Any], degrees: Sequence[int], eps: float, crossover: float, max_features: int
) -> dict[str, Any]:
    if row["reason"]:
        nothing = dict.fromkeys(("g_bound", "g", "k1"), pd.NA) | dict.fromkeys(
            ("error_output", "error_gradient", "L_cross"), math.nan
        )
        return {**nothing, "verdict": "not applicable", "reason": row["reason"]}
    worst = {g: max(row[f"output_{g}"], row[f"gradient_{g}"]) for g in degrees}
    degree = next((g for g in degrees if worst[g] <= eps), None)
    at = degree or degrees[-1]
    count = feature_count(row["width"], at)
    length = crossover * count * row["width"]
    if degree is None:
        verdict, reason = "exact", f"no degree up to {at} has an error of at most {eps:g} (it is {worst[at]:.2g})"
    elif count > max_features:
        verdict, reason = "exact", f"{count:,} features at degree {at}, more than {max_features:,}"
    elif row["L"] <= length:
        verdict, reason = "exact", f"{row['L']} tokens, of which more than {length:,.0f} would be needed to be faster"
    else:
        verdict, reason = "approximate", f"an error of {worst[at]:.2g} at degree {at}, {row['L']} tokens above "\
                                         f"{length:,.0f}"  # fmt: skip
    return {
        "g_bound": needed_degree(row["z_star"], eps),
        "g": degree if degree is not None else pd.NA,
        "error_output": row[f"output_{at}"],
        "error_gradient": row[f"gradient_{at}"],
        "k1": count,
        "L_cross": length,
        "verdict": verdict,
        "reason": reason,
    }
