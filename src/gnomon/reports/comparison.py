"""Several runs side by side: where each ended, and in what their recipes differ."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gnomon.common.files import write_text
from gnomon.errors import DataError
from gnomon.reports.page import environment
from gnomon.reports.pictures import size_picture
from gnomon.reports.reading import Run, read_run
from gnomon.reports.tables import Row, arm_names, rows_of, runs_of, split_metrics

__all__ = ["write_comparison"]


@dataclass(frozen=True)
class _Line:
    name: str
    run: Run
    last: Row | None
    metrics: Mapping[str, Any]
    peak: float | None


def _line(run: Run, name: str) -> _Line:
    rows = rows_of(run, arm_names(run)[0]) if run.arms else []
    metrics = {key: value for row in rows for key, value in row.metrics.items()}  # the last stage's value stays
    peak = max((row.peak_memory for row in rows if row.peak_memory is not None), default=None)
    return _Line(name, run, rows[-1] if rows else None, metrics, peak)


def write_comparison(run_folders: Sequence[str | Path], out: str | Path) -> Path:
    """Write one page that sets several runs side by side.

    Parameters
    ----------
    run_folders : sequence of str or Path
        At least two run folders.
    out : str or Path
        The HTML file to write.

    Returns
    -------
    Path
        The page.

    Raises
    ------
    DataError
        With fewer than two folders, or when a folder has no usable run.json.

    Examples
    --------
    >>> write_comparison(["runs/a-1a2b3c", "runs/b-4d5e6f"], "comparison.html")  # doctest: +SKIP
    PosixPath('comparison.html')
    """
    if len(run_folders) < 2:
        raise DataError(
            f"{len(run_folders)} run folder{'' if len(run_folders) == 1 else 's'} to compare; at least 2 are needed. "
            "Name the folders that `gnomon run` wrote."
        )
    runs = [read_run(folder) for folder in run_folders]
    titles = _titles(runs)
    joined = _joined(runs, titles)
    page = environment().get_template("comparison.html").render(
        lines=[_line(run, title) for run, title in zip(runs, titles, strict=True)],
        metrics=split_metrics(joined)[0],
        picture=size_picture(joined),
        titles=titles,
        differences=_differences([run.recipe for run in runs]),
        same_data=len({run.data.sha256 for run in runs}) == 1,
    )  # fmt: skip
    write_text(Path(out), page)
    return Path(out)


def _titles(runs: Sequence[Run]) -> list[str]:
    names = [run.name for run in runs]
    if len(set(names)) == len(names):
        return names
    folders = [run.folder.resolve().name for run in runs]
    if len(set(folders)) == len(folders):
        return folders
    return [f"{name} ({i})" for i, name in enumerate(names, 1)]


def _joined(runs: Sequence[Run], titles: Sequence[str]) -> Run:
    """Return one run whose arms are the main arms of several, for the picture."""
    arms = tuple(
        replace(arm, name=title)
        for run, title in zip(runs, titles, strict=True)
        if run.arms
        for arm in runs_of(run, arm_names(run)[0])
    )
    return replace(runs[0], arms=arms)


def _flat(value: Any, path: str = "") -> dict[str, str]:
    if isinstance(value, Mapping) and value:
        return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{path}.{key}" if path else key).items()}
    if isinstance(value, list) and value:
        return {k: v for i, inner in enumerate(value) for k, v in _flat(inner, f"{path}[{i + 1}]").items()}
    return {path: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}


def _differences(recipes: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Return the recipe fields that are not the same in all runs, with each run's value."""
    flat = [_flat(recipe) if recipe else {} for recipe in recipes]
    keys = dict.fromkeys(key for one in flat for key in one)
    rows = [(key, [one.get(key, "–") for one in flat]) for key in keys if key != "name"]
    return [(key, values) for key, values in rows if len(set(values)) > 1]
