"""The report of a run: everything in it, nothing from outside, nothing from the data at work in it."""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml

from gnomon.reports import write_report
from gnomon.reports.page import bar, environment, machine_rows, reach, yaml_text
from gnomon.reports.reading import read_run

from .helpers import Page
from .sample import HOSTILE, METHODS, RECIPE, hostile_run_json, run_json, write_run


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_report(write_run(tmp_path_factory.mktemp("run"))).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(source: str) -> Page:
    return Page(source)


def test_the_page_is_written_into_the_run_folder(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    assert write_report(folder) == folder / "report.html"
    assert write_report(str(folder)) == folder / "report.html"
    assert sorted(path.name for path in folder.iterdir()) == ["quarantine.jsonl", "report.html", "run.json"]


def test_an_interrupted_writing_leaves_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_run(tmp_path / "run", {"format": 1, "name": "old"})
    old = write_report(folder).read_bytes()
    write_run(folder, {"format": 1, "name": "new"})

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_report(folder)
    monkeypatch.undo()
    assert (folder / "report.html").read_bytes() == old
    assert sorted(path.name for path in folder.iterdir()) == ["quarantine.jsonl", "report.html", "run.json"]


@pytest.mark.skipif(os.name == "nt", reason="file modes are POSIX")
def test_the_page_has_the_modes_of_any_new_file(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.touch()
    assert write_report(write_run(tmp_path, {"format": 1})).stat().st_mode == plain.stat().st_mode


def test_the_same_run_gives_the_same_bytes(tmp_path: Path, source: str) -> None:
    folder = write_run(tmp_path / "again")
    assert write_report(folder).read_text(encoding="utf-8") == source


def test_the_page_is_modest_in_size(source: str) -> None:
    assert len(source.encode()) < 600_000


def test_nothing_comes_from_outside_and_nothing_runs(page: Page, source: str) -> None:
    for tag, attributes in page.tags:
        assert tag not in ("script", "iframe", "object", "embed", "base", "form")
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "srcset", "action", "xlink:href"):
            target = attributes.get(name)
            assert target is None or target.startswith(("data:", "#")) or target == "run.json"
    assert "@import" not in source
    assert "url(" not in source
    policy = page.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"]
    assert policy.startswith("default-src 'none'")
    assert "script-src" not in policy


def test_the_page_is_accessible(page: Page) -> None:
    assert page.all("html")[0]["lang"] == "en"
    assert page.all("meta", name="viewport")
    assert len(page.all("h1")) == 1
    assert all(head.get("scope") in ("col", "row") for head in page.all("th"))
    assert all(len(image["alt"]) > 20 and image["width"] and image["height"] for image in page.all("img"))
    for region in page.all("div", class_="scroll"):
        assert region["role"] == "region"
        assert region["tabindex"] == "0"
        assert region["aria-label"]
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.tags:
        for target in (attributes.get("aria-labelledby"), attributes.get("href", "")[1:]):
            if target and attributes.get("href", "#").startswith("#"):
                assert target in ids


def test_every_piece_is_on_the_page(page: Page) -> None:
    assert "This run took a llama model" in page.text
    assert "It ends at perplexity" in page.text
    # the mean table and three seeds of five arms, three stages each
    assert len(page.all("tr", class_="stage")) == 5 * 4 * 3
    assert len(page.all("tr", class_="effect")) == 5
    assert len(page.all("img")) == 6
    for slug in METHODS:
        assert f"without {slug}" in page.text
    assert "layernorm-scaling lowered perplexity by 0.420 (0.210 to 0.620)." in page.text
    assert "eora: a difference of −0.030 in perplexity is within the spread (−0.140 to +0.090)." in page.text
    assert "no spread measured" in page.text
    assert "No method changed matrix nuclear norm: hidden_size." in page.text
    assert len(page.all("tr", class_="metric")) == 4
    assert "begun 2025-03-14 09:26 UTC" in page.text
    assert "4,127 read, 3 set aside" in " ".join(page.text.replace(" ,", ",").split())
    assert "not UTF-8: byte 0xff at 12" in page.text
    assert "eora: the calibration text has 64 windows" in page.text
    assert "The learning rate follows a cosine" in page.text
    assert "accelerators none" in page.text
    assert "16.8 GB" in page.text.replace("\u00a0", " ")


def test_the_other_arms_are_folded(page: Page) -> None:
    details = page.all("details")
    assert len(details) == 8  # the other metrics (twice), seed by seed, four arms, the layers
    assert not any("open" in attributes for attributes in details)


def test_the_recipe_reads_back(page: Page) -> None:
    assert yaml.safe_load(page.pre[0]) == RECIPE


def test_one_seed_shows_the_interval_of_its_windows(tmp_path: Path) -> None:
    raw = run_json((0,))
    raw["arms"] = raw["arms"][:1]
    raw["arms"][0]["stages"][0]["metrics"]["perplexity"] = {"value": 12.4, "low": 12.1, "high": 12.7}
    raw["arms"][0]["stages"][0]["skipped"] = True
    raw["ablation"] = []
    page = Page(write_report(write_run(tmp_path, raw)).read_text(encoding="utf-8"))
    assert "12.40 12.10 to 12.70" in page.text
    assert "Means over" not in page.text
    assert "seed by seed" not in page.text
    assert "train reused" in page.text
    assert "Not measured in this run. gnomon run … --ablate runs the recipe" in page.text
    assert not page.all("section", id="ablation")
    assert not page.all("a", href="#ablation")
    assert len(page.all("tr", class_="stage")) == 3


@pytest.mark.parametrize("status", ["running", "failed", "interrupted", "", "odd"])
def test_an_unfinished_run_says_what_is_missing(tmp_path: Path, status: str) -> None:
    page = Page(write_report(write_run(tmp_path, {"format": 1, "name": "x", "status": status})).read_text())
    assert "Not (yet) in run.json: the recipe, when it began, the environment, the data, the model and the stages." in (
        page.text
    )
    assert "No stage is finished yet." in page.text
    assert "Not recorded." in page.text
    assert not page.all("img")
    assert not page.all("table")
    assert (status or "status unknown") in page.text


def test_a_run_stopped_between_stages(tmp_path: Path) -> None:
    raw = run_json((0,))
    raw["status"], raw["finished"], raw["ablation"] = "failed", None, []
    raw["arms"] = [raw["arms"][0] | {"stages": raw["arms"][0]["stages"][:1]}, {"name": "without fira", "stages": []}]
    page = Page(write_report(write_run(tmp_path, raw)).read_text(encoding="utf-8"))
    assert "It failed before its end." in page.text
    assert len(page.all("tr", class_="stage")) == 1
    assert "No stage of this arm is finished yet." in page.text


def test_a_value_that_is_not_finite_is_said(tmp_path: Path) -> None:
    raw = run_json((0,))
    raw["arms"][0]["stages"][2]["metrics"]["perplexity"]["value"] = float("nan")
    page = Page(write_report(write_run(tmp_path, raw)).read_text(encoding="utf-8"))
    assert "It ends at perplexity not finite" in page.text


def test_hostile_texts_stay_text(tmp_path: Path) -> None:
    raw = hostile_run_json()
    source = write_report(write_run(tmp_path, raw)).read_text(encoding="utf-8")
    page = Page(source)
    test_nothing_comes_from_outside_and_nothing_runs(page, source)
    assert len(page.all("img")) == 6
    assert "<img src=x" not in source
    assert "49" not in page.all("title")[0]
    assert "{{ 7*7 }}" in page.text
    assert "\u202e" not in source
    assert "\x00" not in source
    shown = HOSTILE.replace("\u202e", "\ufffd").replace("\x00", "\ufffd").replace("\x07", "\ufffd")
    assert source.count("&lt;/script&gt;") > 100
    for text in (f"quickstart {shown}", f"without eora {shown}", f"self_attn.q_proj {shown}"):
        assert text in page.text
    # the recipe is still YAML, with every text as it was
    assert yaml.safe_load(page.pre[0]) == read_run(tmp_path).recipe


def test_bars_stand_around_zero() -> None:
    place = bar(-1.0, 0.0, 2.0, 2.0, 1.0)
    assert place is not None
    assert (place.low, place.value, place.high, place.margin) == (33.0, 60.0, 114.0, 87.0)
    for broken in ((None, 0.0, 1.0, 1.0), (0.0, float("nan"), 1.0, 1.0), (0.0, 0.0, 0.0, 0.0)):
        assert bar(*broken) is None
    assert bar(-9.0, 0.0, 9.0, 1.0).low == 6.0  # type: ignore[union-attr]
    assert reach([None, -3.0, float("inf"), 2.0]) == 3.0
    assert reach([]) == 0.0


def test_the_machine_is_told_known_names_first() -> None:
    rows = machine_rows({"extra": {"a": 1}, "gpus": ["H100", "H100"], "cores": 2, "memory_bytes": 10**400, "cpu": None})
    assert rows == [
        ("processor", "null"), ("cores", "2"), ("memory", "not finite"), ("accelerators", "H100, H100"),
        ("extra", '{"a": 1}'),
    ]  # fmt: skip


def test_recipes_as_yaml() -> None:
    assert yaml_text({}) == ""
    assert yaml_text({"b": 1, "a": "é"}) == "b: 1\na: é"
    nested: dict[str, Any] = {}
    for _ in range(3000):
        nested = {"a": nested}
    assert yaml_text(nested).startswith("# nested too deeply")


def test_templates_ship_with_the_package_and_escape() -> None:
    found = {entry.name for entry in resources.files("gnomon.reports").joinpath("templates").iterdir()}
    assert {"base.html", "macros.html", "report.html", "ledger.html", "comparison.html", "style.css"} <= found
    assert environment().autoescape is True
    for name in found:
        text = resources.files("gnomon.reports").joinpath("templates", name).read_text(encoding="utf-8")
        assert "safe" not in text.replace("unsafe-inline", "")
        assert "autoescape" not in text
