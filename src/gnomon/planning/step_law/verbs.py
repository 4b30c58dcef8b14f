"""What stands behind ``gnomon plan``: sections to print, made of plain values."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from gnomon.errors import DataError, MethodError, nearest
from gnomon.planning.step_law.fitting import fit_step_law
from gnomon.planning.step_law.law import Hyperparameters, step_law
from gnomon.planning.step_law.laws import LAWS, compare_laws, compare_laws_on_runs
from gnomon.planning.step_law.loss_law import fit_loss_law
from gnomon.planning.step_law.runs import convexity, read_runs

if TYPE_CHECKING:
    from gnomon.planning.step_law.counting import ParameterCount

__all__ = ["compare", "fit", "plan"]

Section = dict[str, Any]


def plan(
    model: Any,
    tokens: float,
    seq_len: int = 2048,
    batch_tokens: float | None = None,
    micro_batch: int | None = None,
    devices: int | None = None,
    law: str = "step-law",
    loss: float | None = None,
    runs: str | Path | None = None,
) -> Section:
    """Return the section ``learning rate and batch`` for one model and number of tokens.

    Parameters
    ----------
    model : float, PreTrainedModel or PreTrainedConfig
        Non-embedding parameters, or a model to count them in.
    tokens : float
        Training tokens.
    seq_len, batch_tokens, micro_batch, devices
        As for `step_law`; without the last two the batch is rounded to whole sequences.
    law : str, default "step-law"
        ``"all"`` or the name of another law adds a table of what these choose.
    loss : float, optional
        Expected final loss, for the laws whose batch depends on it; with `runs` the default is what the loss law fitted
        to them says.
    runs : str or Path, optional
        A table of runs to refit the coefficients on first.

    Returns
    -------
    dict
        ``title``; ``rows``, pairs of label and text; ``tables``; ``notes``; ``data``, JSON-plain.
    """
    if law not in ("step-law", "all") and law not in LAWS:
        raise MethodError(f"law = {law!r}. {nearest(law, ['all', *LAWS], noun='law')}")
    counted: ParameterCount | None = None
    n_params = model
    if not isinstance(model, (int, float)):
        from gnomon.planning.step_law.counting import count_parameters

        counted = count_parameters(model)
        n_params = counted.non_embedding
    found = step_law(
        n_params,
        tokens,
        seq_len,
        batch_tokens=batch_tokens,
        micro_batch=1 if micro_batch is None else micro_batch,
        devices=1 if devices is None else devices,
        moe=counted is not None and counted.moe,
        fit=None if runs is None else fit_step_law(runs, seq_len=seq_len),
    )
    notes = list(found.notes)
    if counted is None:
        notes.append("the number is taken as the non-embedding parameters; embeddings and head do not count")
    tables, laws = [], None
    if law != "step-law":
        if loss is None and runs is not None:
            loss = _expected_loss(runs, seq_len, n_params, tokens)
        chosen = None if law == "all" else ["step-law", law]
        per_token = 6.0 * n_params if counted is None else counted.flops_per_token(seq_len)
        laws = compare_laws(n_params, tokens, seq_len, laws=chosen, compute=per_token * tokens, loss=loss)
        tables.append(_laws_table(laws))
        notes += [f"{name}: {note}" for name, note in laws["note"].items() if note]
    data = found.to_dict() | {"laws": None if laws is None else _plain(laws)}
    if counted is not None:
        data |= {"embedding_params": counted.embedding, "active_params": counted.active}
    rows = _plan_rows(found, counted, micro_batch is not None or devices is not None)
    return {"title": "learning rate and batch (step law)", "rows": rows, "tables": tables, "notes": notes, "data": data}


def _expected_loss(runs: str | Path, seq_len: int, n_params: float, tokens: float) -> float | None:
    """What the loss law of a table of runs says, if the table has groups enough for one."""
    try:
        return float(fit_loss_law(read_runs(runs, seq_len), bootstrap=0).predict(n_params, tokens))
    except DataError:
        return None


def _plan_rows(found: Hyperparameters, counted: ParameterCount | None, passes: bool) -> list[list[str]]:
    parameters = f"{found.n_params:,.0f} without embeddings"
    if counted is not None:
        parameters += f" ({counted.embedding:,} in embeddings and head)"
        parameters += f", all experts; {counted.active:,} active" if counted.moe else ""

    def between(name: str, form: str) -> str:
        if name not in found.intervals:
            return ""
        low, high = found.intervals[name]
        return f"  ({found.confidence:.0%} interval {low:{form}} to {high:{form}})".replace("%", " %")

    near = abs(found.batch_tokens / found.optimal_batch_tokens - 1) <= 0.01
    rows = [
        ["parameters", parameters],
        ["tokens", f"{found.n_tokens:,.0f} ({found.n_tokens / found.n_params:.3g} per parameter)"],
        ["peak learning rate", f"{found.lr:.3e}{between('lr', '.2e')}"],
        [
            "batch",
            f"{found.batch_tokens:,} tokens = {found.batch_sequences:,.0f} sequences of {found.seq_len}",
        ],
        ["optimal batch", f"{found.optimal_batch_tokens:,.0f} tokens{between('batch_tokens', ',.0f')}"],
        ["steps", f"{found.steps:,}{between('steps', ',.0f') if near else ''}"],
    ]
    if passes:
        where = f"{found.devices} device" + ("s" if found.devices != 1 else "")
        rows.insert(4, ["", f"{found.accumulate} x {found.micro_batch} sequences on {where}"])
    warmup = min(2000, found.steps // 10)
    rows.append(["setting", f"AdamW (0.9, 0.95), weight decay 0.1, clip 1.0, warm-up {warmup:,} steps, cosine to 1e-5"])
    return rows


def _laws_table(laws: pd.DataFrame) -> dict[str, Any]:
    def cell(value: float, form: str) -> str:
        return "-" if pd.isna(value) else format(value, form)

    return {
        "title": "what other laws choose",
        "columns": [
            "law",
            "source",
            "learning rate",
            "batch, tokens",
            "sequences",
            "steps",
            "excess in the paper, o/oo",
        ],
        "rows": [
            [
                name,
                row["source"],
                cell(row["lr"], ".3e"),
                cell(row["batch_tokens"], ",.0f"),
                cell(row["batch_sequences"], ",.0f"),
                cell(row["steps"], ",.0f"),
                cell(row["paper_excess"], "g"),
            ]
            for name, row in laws.iterrows()
        ],
    }


def _plain(table: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """A frame as JSON-plain dicts by row; missing values become None."""
    return {
        str(name): {str(k): None if pd.isna(v) else v for k, v in row.items()}
        for name, row in table.astype(object).to_dict(orient="index").items()
    }


def fit(runs: str | Path, seq_len: int = 2048) -> Section:
    """Return the section of a refit on a table of runs: coefficients, shape of the loss, loss law.

    Parameters
    ----------
    runs : str or Path
        Columns N, D, lr, bs, smooth loss: see `read_runs`.
    seq_len : int, default 2048

    Returns
    -------
    dict
        As `plan`.
    """
    table = read_runs(runs, seq_len)
    found = fit_step_law(runs, seq_len=seq_len)
    summary, bowls = found.summary(), convexity(table)
    judged = bowls["convex"].notna().sum()
    rows = [
        ["runs", f"{found.rows} in {table['group'].nunique()} (N, D) groups"],
        ["kept", f"{found.kept} within {found.threshold:.2%} of their group's smallest loss".replace("%", " %")],
        ["convex groups", f"{int(bowls['convex'].sum())} of {judged}"],
    ]
    notes = ["all logs are natural; the batch is in tokens"]
    data: dict[str, Any] = {"coefficients": _plain(summary), "kept": found.kept, "rows": found.rows}
    data["convex_groups"], data["judged_groups"] = int(bowls["convex"].sum()), int(judged)
    try:
        losses = fit_loss_law(table, bootstrap=0)
    except DataError as error:
        notes.append(f"no loss law: {error}")
    else:
        E, A, B, alpha, beta = losses.coefficients
        rows.append(["loss law", f"exp({E:.4g}) + exp({A:.4g}) / N^{alpha:.4g} + exp({B:.4g}) / D^{beta:.4g}"])
        assert losses.held_out is not None
        rows.append(["held-out group", f"{losses.held_out['error']:+.2%} of its loss".replace("%", " %")])
        data["loss_law"] = dict(zip(("E", "A", "B", "alpha", "beta"), losses.coefficients.tolist(), strict=True))
        data["held_out"] = losses.held_out
    shown = {
        "title": "coefficients (natural logs)",
        "columns": ["", *map(str, summary.columns)],
        "rows": [
            [str(name), *[f"{v:.5g}" for v in row]] for name, row in zip(summary.index, summary.to_numpy(), strict=True)
        ],
    }
    return {
        "title": f"step law refitted on {Path(runs).name}",
        "rows": rows,
        "tables": [shown],
        "notes": notes,
        "data": data,
    }


def compare(runs: str | Path, seq_len: int = 2048) -> Section:
    """Return the section that says how much loss each law's choice costs on a table of runs.

    Parameters
    ----------
    runs : str or Path
        As for `fit`.
    seq_len : int, default 2048

    Returns
    -------
    dict
        As `plan`.
    """
    table = read_runs(runs, seq_len)
    found = compare_laws_on_runs(table)
    shown = {
        "title": "loss over the best run of the group, by the run nearest to a law's choice (per mille)",
        "columns": ["law", "mean", "worst group"],
        "rows": [[str(name), f"{row['mean']:.2f}", f"{row['max']:.2f}"] for name, row in found.iterrows()],
    }
    rows = [["runs", f"{len(table)} in {table['group'].nunique()} (N, D) groups"]]
    notes = ["openai: with the group's best batch", "constant: 3e-4 and 0.5M tokens"]
    return {
        "title": f"laws compared on {Path(runs).name}",
        "rows": rows,
        "tables": [shown],
        "notes": notes,
        "data": _plain(found),
    }
