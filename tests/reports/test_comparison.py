"""Several runs side by side."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

from gnomon.errors import DataError
from gnomon.reports import write_comparison

from .helpers import Page, svg_of
from .sample import RECIPE, hostile_run_json, run_json, write_run


def compared(tmp_path: Path, *folders: Path) -> Page:
    out = write_comparison(folders, tmp_path / "out" / "comparison.html")
    assert out == tmp_path / "out" / "comparison.html"
    return Page(out.read_text(encoding="utf-8"))


def other() -> dict[str, object]:
    raw = run_json((0,))
    raw["recipe"] = copy.deepcopy(RECIPE)
    raw["recipe"]["stages"][1]["compress"]["methods"][0]["with"]["sparsity"] = 0.6
    raw["name"] = "sparser"
    raw["arms"] = raw["arms"][:1]
    return raw


def test_two_runs(tmp_path: Path) -> None:
    page = compared(tmp_path, write_run(tmp_path / "a", run_json((0,))), write_run(tmp_path / "b", other()))
    assert len(page.all("tr", class_="run")) == 2
    assert len(page.all("tr", class_="difference")) == 1
    assert "stages[2].compress.methods[1].with.sparsity 0.5 0.6" in page.text
    assert "quickstart and sparser" in page.text
    svg = svg_of(page.all("img")[0]["src"])
    assert ">quickstart</text>" in svg
    assert ">sparser</text>" in svg
    assert "did not use the same data" not in page.text


def test_runs_on_other_data_and_of_one_name(tmp_path: Path) -> None:
    raw = run_json((0,))
    raw["data"]["sha256"] = "0"
    page = compared(tmp_path, write_run(tmp_path / "a", run_json((0,))), write_run(tmp_path / "b", raw))
    assert "did not use the same data" in page.text
    assert "a and b" in page.text  # the names are equal, so the folders' names stand
    assert "In nothing but their names." in page.text


def test_an_unfinished_and_a_hostile_run(tmp_path: Path) -> None:
    page = compared(
        tmp_path,
        write_run(tmp_path / "a", {"format": 1, "status": "running"}),
        write_run(tmp_path / "b", hostile_run_json()),
    )
    assert len(page.all("tr", class_="run")) == 2
    assert not page.all("script")
    assert len(page.all("img")) == 1


def test_one_run_is_too_few(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"1 run folder to compare; at least 2 are needed"):
        write_comparison([tmp_path], tmp_path / "x.html")
