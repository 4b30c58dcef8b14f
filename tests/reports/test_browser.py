"""The pages in a real browser, at the width of a telephone and of a desktop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gnomon.reports import write_comparison, write_ledger, write_report

from .helpers import dump_dom, measured
from .sample import hostile_run_json, ledger_json, run_json, write_run


def lies_well(facts: dict[str, Any], width: int, images: int) -> None:
    assert facts["inner"] == width
    assert facts["scroll"] <= facts["client"] <= width, f"the page scrolls sideways: {facts['wide']}"
    assert facts["wide"] == []
    assert facts["cut"] == []
    assert len(facts["images"]) == images
    for complete, natural, shown in facts["images"]:
        assert complete
        assert natural > 300
        assert 280 < shown <= width
    assert facts["scripts"] == 0
    assert facts["odd"] == 0
    assert not facts["hit"]


def test_a_report_at_both_widths(tmp_path: Path) -> None:
    page = write_report(write_run(tmp_path / "run")).read_text(encoding="utf-8")
    found = measured(page, tmp_path)
    for width, facts in found.items():
        lies_well(facts, width, images=6)
        assert facts["stages"] == 60
        assert facts["effects"] == 5
    # two pictures beside each other on a desktop, one below the other on a telephone
    assert found[1280]["images"][0][2] > 400


def test_a_hostile_report_at_both_widths(tmp_path: Path) -> None:
    raw = hostile_run_json()
    raw["name"] = "</script><script>window.hit=1</script><img src=x onerror='window.hit=1'>" + "w" * 300
    raw["status"] = "finished <svg onload=window.hit=1>" + "v" * 100
    page = write_report(write_run(tmp_path / "run", raw)).read_text(encoding="utf-8")
    # without the policy in its head the page must hold as well
    bare = page.replace("Content-Security-Policy", "X-Nothing")
    assert bare != page
    for width, facts in measured(bare, tmp_path).items():
        lies_well(facts, width, images=6)


def test_the_page_alone_without_any_script(tmp_path: Path) -> None:
    path = write_report(write_run(tmp_path / "run", run_json((0,))))
    dom = dump_dom(path.as_uri(), tmp_path / "profile")
    assert dom.count('<tr class="stage">') == 15
    assert dom.count('<tr class="effect">') == 5
    assert dom.count('<img src="data:image/svg+xml;base64,') == 6


@pytest.mark.parametrize("width", [390, 1280])
def test_the_ledger_and_a_comparison(tmp_path: Path, width: int) -> None:
    (tmp_path / "ledger.json").write_text(json.dumps(ledger_json()))
    _, ledger = write_ledger(tmp_path / "ledger.json", tmp_path)
    facts = measured(ledger.read_text(encoding="utf-8"), tmp_path, (width,))[width]
    lies_well(facts, width, images=0)
    assert facts["claims"] == 4
    folders = [write_run(tmp_path / name, run_json((0,)) | {"name": name}) for name in ("a", "b")]
    page = write_comparison(folders, tmp_path / "comparison.html").read_text(encoding="utf-8")
    lies_well(measured(page, tmp_path, (width,))[width], width, images=1)
