"""run.json to plain objects: what is missing is said, what is odd is left out, what is unusable is refused."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gnomon.errors import DataError
from gnomon.reports.page import render_report, write_report
from gnomon.reports.reading import quarantined_rows, read_run
from gnomon.reports.words import headline

from .sample import arm, run_json, write_run


def small_run() -> dict[str, Any]:
    """A run of two arms, each kind of detail once."""
    raw = run_json((0,))
    raw["arms"] = [arm(), arm("without eora", "eora")]
    for entry in raw["arms"]:
        details = [stage["details"] for stage in entry["stages"]]
        details[0]["loss_curve"] = details[0]["loss_curve"][:3]
        details[0]["eval_curve"] = details[0]["eval_curve"][:1]
        details[0]["depth"] = details[0]["depth"][:2]
        details[1]["layers"] = details[1]["layers"][:2]
    raw["ablation"] = raw["ablation"][:1]
    return raw


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        yield from paths(inner, (*path, key))


def put(raw: Any, path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """A copy of `raw` with another value at `path`; `...` deletes it."""
    changed = copy.deepcopy(raw)
    spot = changed
    for key in path[:-1]:
        spot = spot[key]
    if value is ...:
        del spot[path[-1]]
    else:
        spot[path[-1]] = value
    return changed


def test_a_finished_run_is_read_whole(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run"))
    assert (run.name, run.status, run.seeds) == ("quickstart", "finished", (0, 1, 2))
    assert len(run.arms) == 15
    assert run.arms[3].without == "layernorm-scaling"
    assert run.missing == run.odd == ()
    train, compress, _ = run.arms[0].stages
    assert len(train.loss) == 600
    assert len(train.depth) == 6
    assert [m.uses for m in compress.methods] == ["dsnot", "eora"]
    assert compress.methods[0].options == {"sparsity": 0.5}
    assert compress.layers[0].facts.keys() == {"sparsity", "error"}
    low, value, high = (getattr(compress.metrics["perplexity"], end) for end in ("low", "value", "high"))
    assert low < value < high
    assert run.data.quarantined == 3


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"format": 1,\n "name": }', ["run.json, row 2", "not valid JSON", "gnomon run"]),
        (b"", ["row 1", "not valid JSON"]),
        (b"\xff\xfe", ["not UTF-8", "byte 0", "gnomon run"]),
        (b"[1, 2]", ["expected one JSON object, found a list"]),
        (b"null", ["found null"]),
        (b"{}", ["no 'format'", "reads format 1"]),
        (b'{"format": 2}', ["format 2", "newer gnomon: upgrade gnomon"]),
        (b'{"format": true}', ["format True", "reads format 1"]),
        (b'{"format": "one"}', ["format 'one'"]),
        (b"[" * 100_000 + b"]" * 100_000, ["cannot be read as JSON"]),
        (b'{"format": ' + b"9" * 5000 + b"}", ["cannot be read as JSON"]),
    ],
)
def test_an_unusable_file_is_refused(tmp_path: Path, content: bytes, words: list[str]) -> None:
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(DataError) as error:
        read_run(tmp_path)
    for word in words:
        assert word in str(error.value)
    assert len(str(error.value)) < 500


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere.run\.json: there is no such file.*`gnomon run`: give a folder"):
        write_report(tmp_path / "nowhere")


def test_missing_sections_are_named(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "early", {"format": 1, "arms": [{"name": "all", "stages": []}]}))
    assert run.name == "early"  # the folder's
    assert "the environment" in run.missing
    assert "the data" in run.missing
    assert "the stages: none is finished yet" in run.missing


def test_values_of_the_wrong_type_are_noted_and_left_out(tmp_path: Path) -> None:
    raw = put(small_run(), ("arms", 0, "stages", 0, "seconds"), "long")
    raw = put(raw, ("arms", 0, "stages", 0, "details", "loss_curve", 1), [1])
    raw = put(raw, ("warnings",), ["fine", 3])
    run = read_run(write_run(tmp_path, raw))
    assert set(run.odd) == {
        "arms[0].stages[0].details.loss_curve[1]: expected a pair [x, y], found a list",
        "arms[0].stages[0].seconds: expected a number, found a text",
        "warnings[1]: expected a text, found a number",
    }
    assert run.arms[0].stages[0].seconds is None
    assert len(run.arms[0].stages[0].loss) == 2
    assert run.warnings == ("fine",)
    page = render_report(run)
    assert "Left out, because run.json holds something unexpected there" in page
    assert "arms[0].stages[0].seconds: expected a number, found a text" in page


ABSENT: Any = ...
VALUES = {
    "absent": ABSENT, "null": None, "text": "x", "list": [[]], "object": {"a": []}, "nan": math.nan, "huge": 10**400,
}  # fmt: skip


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_no_value_anywhere_stops_the_reading(tmp_path: Path, value: Any) -> None:
    raw = small_run()
    for path in paths(raw):
        if path == ("format",):
            continue
        run = read_run(write_run(tmp_path, put(raw, path, value)))
        assert headline(run)[0]


@pytest.mark.parametrize("name", ["absent", "text", "huge"])
def test_no_value_of_any_field_stops_the_page(tmp_path: Path, name: str) -> None:
    raw = small_run()
    named = {path[-1]: path for path in paths(raw) if isinstance(path[-1], str) and path[0] != "recipe"}
    # numbers of the pictures and the tables, where a bad one could stop the drawing
    heavy = ("loss_curve", "variance", "block", "error", "sparsity", "size_bytes", "value", "low")
    tables = ("stages", "metrics", "environment", "difference")
    for field in (*heavy, *tables):
        changed = put(raw, named[field], VALUES[name])
        assert "</html>" in render_report(read_run(write_run(tmp_path, changed))), field


def test_a_difference_written_the_other_way_round_is_turned(tmp_path: Path) -> None:
    row = {
        "method": "m",
        "metric": "perplexity",
        "with": 10.0,
        "without": 12.0,
        "difference": 2.0,
        "low": 1.5,
        "high": 3,
    }
    effect = read_run(write_run(tmp_path, {"format": 1, "ablation": [row]})).ablation[0]
    assert (effect.difference, effect.low, effect.high) == (-2.0, -3.0, -1.5)
    del row["difference"]
    row["low"] = row["high"] = None
    effect = read_run(write_run(tmp_path, {"format": 1, "ablation": [row]})).ablation[0]
    assert (effect.difference, effect.low, effect.high) == (-2.0, None, None)


def test_characters_that_cannot_be_shown_are_replaced(tmp_path: Path) -> None:
    folder = write_run(tmp_path, {"format": 1, "name": "a\u202eb\x00c\ud800d\ne"})
    assert read_run(folder).name == "a\ufffdb\ufffdc\ufffdd\ne"
    assert write_report(folder).read_text(encoding="utf-8").count("a\ufffdb\ufffdc\ufffdd") == 2


def test_only_quarantine_files_inside_the_run_folder_are_opened(tmp_path: Path) -> None:
    secret = tmp_path / "secret.jsonl"
    secret.write_text('{"secret": "plainly-hidden"}\n')
    raw = run_json((0,))
    for name in ("../secret.jsonl", str(secret), "nowhere", "a\0b"):
        raw["data"]["quarantine_file"] = name
        folder = write_run(tmp_path / "run", raw)
        assert quarantined_rows(read_run(folder)) == []
        assert "plainly-hidden" not in write_report(folder).read_text(encoding="utf-8")
    (folder / "link.jsonl").symlink_to(secret)
    raw["data"]["quarantine_file"] = "link.jsonl"
    assert quarantined_rows(read_run(write_run(folder, raw))) == []


def test_quarantined_rows(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    rows = quarantined_rows(read_run(folder))
    assert rows[0] == {"row": "18", "reason": "the text is empty", "text": ""}
    assert rows[2]["text"] == '["a", "b"]'
    (folder / "quarantine.jsonl").write_text("not json\n\n" + json.dumps({"x": "y" * 5000}) + "\n" * 9)
    assert quarantined_rows(read_run(folder)) == [{"row": "not json"}, {"x": "y" * 300}]
    (folder / "quarantine.jsonl").write_text("1\n" * 50)
    assert len(quarantined_rows(read_run(folder), limit=4)) == 4
