"""The ledger of claims as Markdown and as a page."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from gnomon.errors import DataError
from gnomon.reports import write_ledger
from gnomon.reports.ledger import escaped, read_ledger, summary

from .helpers import Page
from .sample import HOSTILE, ledger_json


def written(folder: Path, raw: Any) -> tuple[str, Page]:
    (folder / "ledger.json").write_text(json.dumps(raw), encoding="utf-8")
    markdown, page = write_ledger(folder / "ledger.json", folder / "out")
    assert (markdown, page) == (folder / "out" / "ledger.md", folder / "out" / "ledger.html")
    return markdown.read_text(encoding="utf-8"), Page(page.read_text(encoding="utf-8"))


def cells(line: str) -> list[str]:
    """The cells of a row of a Markdown table: split at bars that are not escaped."""
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def rows(markdown: str) -> list[list[str]]:
    return [cells(line) for line in markdown.splitlines() if line.startswith("|")][2:]


def test_the_markdown_table(tmp_path: Path) -> None:
    markdown, _ = written(tmp_path, ledger_json())
    found = rows(markdown)
    assert [row[0] for row in found] == ["eora", "fira", "layernorm-scaling", "matrix-nuclear-norm"]
    assert all(len(row) == 7 for row in found)
    fira = found[1]
    assert fira[1] == "lower loss than GaLore at the same optimizer memory"
    assert fira[2] == "LLaMA-60M on C4: perplexity 31.06 against 34.88"
    assert fira[3] == "small"
    assert fira[4] == (
        "fira 2.825 (2.812 to 2.834)<br>galore 3.008 (2.987 to 3.026)<br>validation loss, nats per token"
    )
    assert fira[5] == "fira &lt; galore by 0.12: +0.183 (+0.153 to +0.199)"
    assert fira[6] == "**reproduced**"
    assert found[3][4] == "small 0.558<br>large 0.923<br>mnn"  # one seed has no range
    assert (
        "4 claims of 4 methods measured again: 1 reproduced, 1 same direction, 1 not visible at this scale and "
        "1 contradicted." in markdown
    )
    assert "Measured with: gnomon 0.1.0, Python 3.11.9" in markdown


def test_the_page(tmp_path: Path) -> None:
    _, page = written(tmp_path, ledger_json())
    assert len(page.all("tr", class_="claim")) == 4
    assert len(page.all("svg", class_="bar")) == 4
    assert len(page.all("details")) == 4
    for verdict in ("reproduced", "same direction", "not visible at this scale", "contradicted"):
        assert page.text.count(verdict) >= 3  # the sentence, the tile, the row
    assert "fira 2.825 (2.812 to 2.834)" in page.text
    assert "+0.183 (+0.153 to +0.199); margin 0.120" in page.text
    assert "Seed 2" in page.text
    assert "31.06" in page.text
    assert "Took 2\u00a0min\u00a021\u00a0s" in page.text or "Took 2 min 21 s" in page.text
    assert not page.all("script")
    assert all(head["scope"] in ("col", "row") for head in page.all("th"))


def test_several_relations_stand_in_one_row(tmp_path: Path) -> None:
    raw = ledger_json()
    raw["entries"] = raw["entries"][:1]
    raw["entries"][0]["relations"].append(
        {"text": "fira < adam", "gap": -0.1, "low": None, "high": None, "margin": 0.0, "verdict": "contradicted"}
    )
    markdown, page = written(tmp_path, raw)
    assert rows(markdown)[0][5].endswith("<br>fira &lt; adam: −0.100")
    assert "1 claim of 1 method measured again" in markdown
    assert len(page.all("svg", class_="bar")) == 1  # no interval, no drawing


def test_claims_measured_on_two_machines(tmp_path: Path) -> None:
    raw = ledger_json()
    raw["entries"][0]["environment"] = {"gnomon": "0.2.0", "gpus": ["H100"]}
    markdown, page = written(tmp_path, raw)
    assert "Measured with: gnomon 0.2.0, accelerators H100 (1 claim)." in markdown
    assert "accelerators none (3 claims)." in markdown
    assert "1 claim gnomon 0.2.0 accelerators H100" in page.text
    assert "3 claims gnomon 0.1.0" in page.text
    assert "gnomon 0.2.0. Run 2025-03-14 10:02 UTC." in page.text  # beside its seeds


def test_an_empty_and_a_thin_ledger(tmp_path: Path) -> None:
    markdown, page = written(tmp_path, {"format": 1})
    assert "No claim was run yet." in markdown
    assert "The machine was not recorded." in markdown
    assert "gnomon claims run --all" in page.text
    markdown, page = written(tmp_path, {"format": 1, "entries": [{"slug": "x", "verdict": "new word"}, 3]})
    assert "1 new word" in markdown
    assert "entries\\[1\\]: expected an object, found a number" in markdown
    assert rows(markdown)[0] == ["x", "", "", "", "not measured", "–", "**new word**"]
    assert "new word" in page.text


def test_hostile_texts_stay_text(tmp_path: Path) -> None:
    raw = ledger_json()
    nasty = f"{HOSTILE} | [x](javascript:alert(1)) `code` *b* _i_ ~~s~~\n\n| new | row |\n# head"
    entry = raw["entries"][0]
    for key in ("slug", "id", "says", "paper_figure", "unit", "scale", "verdict", "gnomon", "run_at"):
        entry[key] = nasty
    entry["arms"] = {nasty: {nasty: 1.0}}
    entry["relations"][0]["text"] = nasty
    raw["environment"] = {nasty: nasty}
    markdown, page = written(tmp_path, raw)
    assert all(len(row) == 7 for row in rows(markdown))
    assert len(rows(markdown)) == 4
    assert "<img" not in markdown
    assert "<script" not in markdown
    assert "](" not in markdown.replace("\\](", "")
    assert set(re.findall(r"<[^>]*>", markdown)) == {"<br>"}
    assert sum(line.startswith("#") for line in markdown.splitlines()) == 1
    assert not page.all("script")
    assert not page.all("img")
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)


def test_escaping_for_markdown() -> None:
    assert escaped("a|b <c> & *d*\n\\e") == r"a\|b &lt;c&gt; &amp; \*d\* \\e"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "there is no such file. It is written by `gnomon claims run --all`"),
        ("{", "row 1: the file is not valid JSON"),
        ('{"format": 3}', "upgrade gnomon"),
    ],
)
def test_an_unusable_ledger_is_refused(tmp_path: Path, content: str | None, words: str) -> None:
    path = tmp_path / "ledger.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=words):
        write_ledger(path, tmp_path)
    assert not (tmp_path / "ledger.md").exists()


def test_counts_are_in_the_order_of_the_verdicts(tmp_path: Path) -> None:
    (tmp_path / "ledger.json").write_text(json.dumps(ledger_json()))
    ledger = read_ledger(tmp_path / "ledger.json")
    assert [verdict for verdict, _ in ledger.counts][:2] == ["reproduced", "same direction"]
    assert summary(ledger).startswith("4 claims")
