"""``gnomon run``: the live table, the closing table, the dry run."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

from gnomon.errors import ConfigError

__all__ = ["quiet_libraries", "run_command", "stage_rows"]


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit in ("B", "KiB") else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def _count(number: float) -> str:
    return f"{number / 1e6:.2f} M" if number < 1e9 else f"{number / 1e9:.2f} B"


def _figure(figure: dict[str, Any] | None) -> str:
    if not figure or figure.get("value") is None:
        return "-"
    text = f"{figure['value']:.4g}"
    if figure.get("low") is not None and figure.get("high") is not None:
        text += f" ({figure['low']:.4g} to {figure['high']:.4g})"
    return text


def stage_rows(run: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows of the run's table: one row per arm, seed and stage."""
    from gnomon.progress import duration

    known = ("perplexity", "accuracy", "matrix-nuclear-norm.mnn")
    metrics = [m for m in _metric_names(run) if m in known] or _metric_names(run)[:2]
    several = len(run.get("seeds", [])) > 1
    costs = ["size", "trained", "weights + optimizer"] if run["recipe"].get("arms") else ["size", "non-zero"]
    heads = ["arm", "after", *costs, "peak memory", "time", *(m.rpartition(".")[2] for m in metrics)]
    rows = []
    for arm in run["arms"]:
        name = arm["name"] + (f", seed {arm['seed']}" if several else "")
        for stage in arm["stages"]:
            took = "kept" if stage.get("skipped") else duration(stage["seconds"])
            rows.append(
                [
                    name,
                    stage["label"],
                    *[_cost(stage, name) for name in costs],
                    _bytes(stage["peak_memory_bytes"]) if stage["peak_memory_bytes"] else "-",
                    took,
                    *[_figure(stage["metrics"].get(m)) for m in metrics],
                ]
            )
    return heads, rows


def _cost(stage: dict[str, Any], name: str) -> str:
    details = stage["details"]
    if name == "size":
        return _bytes(stage["size_bytes"])
    if name == "non-zero":
        return _count(stage["nonzero_parameters"])
    if "trainable_parameters" not in details:
        return "-"
    if name == "trained":
        return f"{details['trainable_parameters']:,}"
    return _bytes(details["weight_bytes"] + details["optimizer_bytes"])


def _metric_names(run: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(m for arm in run["arms"] for stage in arm["stages"] for m in stage["metrics"]))


def _ablation_rows(run: dict[str, Any]) -> list[list[str]]:
    rows = []
    for row in run["ablation"]:
        if row["metric"] not in ("perplexity",) and len(_metric_names(run)) > 1:
            continue
        spread = "-" if row["low"] is None else f"{row['low']:+.4g} to {row['high']:+.4g}"
        rows.append(
            [
                row["method"],
                row["metric"],
                f"{row['with']:.4g}",
                f"{row['without']:.4g}",
                f"{row['difference']:+.4g}",
                spread,
            ]
        )
    return rows


def _table(title: str, heads: list[str], rows: list[list[str]]) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for i, head in enumerate(heads):
        table.add_column(Text(head), justify="left" if i < 2 else "right", overflow="fold")
    for row in rows:
        table.add_row(*[Text(cell) for cell in row])
    return table


def _print_tables(run: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console() if sys.stdout.isatty() else Console(width=140, no_color=True)
    console.print(_table(run["name"], *stage_rows(run)))
    rows = _ablation_rows(run)
    if rows:
        spread = "range over seeds" if run["ablation"][0]["spread"] == "seeds" else "95 % interval"
        heads = ["method", "metric", "with", "without", "difference", spread]
        console.print(_table("what each method bought (at the end; lower perplexity is better)", heads, rows))
    for text in run["warnings"]:
        console.print(f"note: {text}", markup=False, highlight=False)


def quiet_libraries() -> None:
    """Keep other libraries' chatter out of the progress; their errors still come through."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)


def run_command(
    recipe: str,
    *,
    out: Path | None,
    assignments: list[str],
    ablate: bool,
    seeds: int | None,
    dry_run: bool,
    schema: bool,
    quiet: bool,
    engine: str,
    as_json: bool,
) -> None:
    """Carry out ``gnomon run``."""
    from gnomon.recipes.overrides import parse_assignments
    from gnomon.recipes.schema import builtin_recipes, json_schema, load_recipe

    if schema:
        print(json.dumps(json_schema(), indent=1))
        return
    if not recipe:
        raise ConfigError(f"Which recipe? Built in: {', '.join(builtin_recipes())}. Or give a YAML file.")
    overrides = parse_assignments(assignments)
    if ablate:
        overrides["ablate"] = True
    if seeds is not None:
        overrides["seeds"] = seeds
    checked = load_recipe(recipe, overrides)
    quiet_libraries()
    if dry_run:
        _dry_run(checked, as_json)
        return
    from gnomon.cli.job import run
    from gnomon.common.engine import check_engine
    from gnomon.progress import Progress

    progress = Progress(enabled=not quiet)
    shown = {"stages": 0}

    def on_change(state: dict[str, Any]) -> None:
        heads, rows = stage_rows(state)
        for row in rows[shown["stages"] :]:
            progress.say("  ".join(f"{h}: {c}" for h, c in zip(heads, row, strict=True) if c != "-"))
        shown["stages"] = max(shown["stages"], len(rows))

    result = run(checked, out=out, progress=progress, on_change=on_change, engine=check_engine(engine))
    if result.report is None:  # another rank than the first
        return
    if as_json:
        print(json.dumps({"folder": str(result.folder), "report": str(result.report), **result.run}))
        return
    _print_tables(result.run)
    print(f"report  {result.report}")
    if (result.folder / "model").is_dir():
        print(f"model   {result.folder / 'model'}   gnomon.load_model(...)")
    if (result.folder / "export").is_dir():
        print(f"export  {result.folder / 'export'}   AutoModelForCausalLM.from_pretrained(...)")


def _dry_run(recipe: Any, as_json: bool) -> None:
    from gnomon.recipes.dry import plan

    found = plan(recipe)
    if as_json:
        print(json.dumps(found))
        return
    print(f"{found['name']}: {_count(found['parameters'])} parameters, weights {_bytes(found['weight_bytes'])}")
    data = found["data"]
    print(f"data: {data['source']}, {data['train_tokens']:,} training and {data['valid_tokens']:,} validation tokens")
    for stage in found["stages"]:
        steps = f", {stage['steps']} steps, {stage['tokens']:,} tokens" if "steps" in stage else ""
        print(f"{stage['index'] + 1}. {stage['kind']}{steps}, about {_bytes(stage['memory_bytes'])}")
        for use in stage["methods"]:
            options = ", ".join(f"{k}={v}" for k, v in use["with"].items())
            print(f"     {use['uses']}" + (f" ({options})" if options else ""))
    print(f"arms: {', '.join(found['arms'])}; seeds: {found['seeds']}")
