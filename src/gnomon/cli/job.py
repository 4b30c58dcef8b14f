"""`gnomon.run`: the recipe runner and the report, as one call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from gnomon.common.engine import Engine
from gnomon.progress import Progress
from gnomon.recipes.runner import RunResult, run_recipe
from gnomon.recipes.schema import Recipe, load_recipe

__all__ = ["RunResult", "run"]


def run(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    *,
    out: str | Path | None = None,
    ablate: bool = False,
    seeds: int | None = None,
    overrides: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    on_change: Callable[[dict[str, Any]], None] | None = None,
    engine: Engine = "local",
) -> RunResult:
    """Run a recipe and write its report; the same as ``gnomon run``.

    Parameters
    ----------
    recipe : str, Path, mapping or Recipe
        Name of a built-in recipe (``"quickstart"``), a YAML file, or its content.
    out : str or Path, optional
        The run folder, exactly; default ``runs/<name>-<hash>``.
    ablate : bool, default False
        Also run each method's arm without it.
    seeds : int, optional
        Repeat with this many seeds.
    overrides : mapping, optional
        As for ``--set``: dotted key -> value.
    progress, on_change : optional
        Where to show progress; what to call when ``run.json`` changes.
    engine : {"local", "ray"}, default "local"
        Where text is scored: here, or spread over a Ray cluster (``RAY_ADDRESS``, else one on this machine).

    Returns
    -------
    RunResult
        With the folder, the content of ``run.json`` and the path of ``report.html``.

    Raises
    ------
    gnomon.errors.GnomonError
        For every mistake in recipe, data or model.

    Examples
    --------
    >>> import gnomon
    >>> result = gnomon.run("quickstart", overrides={"train.tokens": 20_000})  # doctest: +SKIP
    """
    from gnomon.common.ranks import ranks
    from gnomon.reports import write_report

    changes = dict(overrides or {})
    if ablate:
        changes["ablate"] = True
    if seeds is not None:
        changes["seeds"] = seeds
    result = run_recipe(load_recipe(recipe, changes), out=out, progress=progress, on_change=on_change, engine=engine)
    if ranks().is_main_process:
        result = replace(result, report=write_report(result.folder))
    return result
