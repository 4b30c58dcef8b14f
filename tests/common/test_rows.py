"""Tables are read as they stand, and a file that cannot be read says where and why."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gnomon.common.rows import column_key, file_sha256, read_rows, read_text
from gnomon.errors import DataError

CELL = st.text(alphabet=st.characters(blacklist_categories=["Cs"], blacklist_characters="\x00\r"), max_size=8)


@given(st.lists(st.tuples(CELL, CELL), min_size=1, max_size=5))
def test_cells_of_a_csv_come_back_as_written(tmp_path_factory, cells):
    file = tmp_path_factory.mktemp("rows") / "t.csv"
    text = io.StringIO(newline="")
    csv.writer(text).writerows([("A b", "C"), *cells])
    file.write_text(text.getvalue(), newline="")
    kept = [c for c in cells if any(c)]
    if not kept:
        with pytest.raises(DataError, match="no row"):
            read_rows(file)
        return
    rows = read_rows(file)
    assert [(row["a_b"], row["c"]) for row in rows] == kept
    assert [row.number for row in rows] == [i for i, c in enumerate(cells, 1) if any(c)]


def test_na_stays_text_and_every_format_agrees(tmp_path):
    table = pd.DataFrame({"Text ID": ["a", "b"], "Value": ["NA", ""]})
    table.to_csv(tmp_path / "t.csv", index=False)
    table.to_csv(tmp_path / "t.tsv", index=False, sep="\t")
    table.to_json(tmp_path / "t.jsonl", orient="records", lines=True)
    table.to_json(tmp_path / "t.json", orient="records")
    table.to_parquet(tmp_path / "t.parquet")
    for name in ("t.csv", "t.tsv", "t.jsonl", "t.json"):
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + (tmp_path / name).read_bytes()))
    for file in sorted(tmp_path.iterdir()):
        assert read_rows(file, columns=["text_id"]) == [
            {"text_id": "a", "value": "NA"}, {"text_id": "b", "value": ""}
        ], file.name  # fmt: skip


def test_keys_and_hashes(tmp_path):
    assert column_key(" Error Sentence-ID ") == "error_sentence_id"
    (tmp_path / "a").write_bytes(b"one")
    (tmp_path / "b").write_bytes(b"two")
    assert file_sha256(tmp_path / "a", tmp_path / "b") == hashlib.sha256(b"onetwo").hexdigest()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", b"", "the file is empty. It holds x."),
        ("t.csv", b"a,b\n", "there is no row in this file"),
        ("t.csv", b"a,b\n1,2\n1,2,3\n", "t.csv, row 2: 3 cells where the heading has 2"),
        ("t.csv", b"b\n1\n", "the column 'a' is missing. Found: b"),
        ("t.csv", b"a\n\xff\xfe\n", r"this is no UTF-8 text \(byte 2\)"),
        ("t.csv", b'a\n"' + b"x" * 140_000 + b'"\n', "t.csv, row 1: this is no valid table .field larger"),
        ("t.jsonl", b'{"a": 1}\nwhat\n', "t.jsonl, row 2: this line is no JSON"),
        ("t.jsonl", b"[1]\n", "a JSON object is needed, not a list"),
        ("t.json", b'{"a": 1}', "a JSON list of objects is needed"),
        ("t.json", b"[", "this is no JSON"),
        ("t.parquet", b"nothing", "this is no Parquet file"),
        ("t.csv.gz", b"nothing", "this cannot be read"),
        ("t.xlsx", b"x", "a file ending in '.xlsx' cannot be read as a table. Allowed: .csv, .tsv, .jsonl"),
        ("t", b"x", "a file ending in 'nothing'"),
        ("t.parquet.gz", b"x", "cannot be read as a table"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_rows(tmp_path / name, columns=["a"], expected="It holds x.")


def test_places_that_are_no_file(tmp_path):
    with pytest.raises(DataError, match=r"there is no such file\. It holds x"):
        read_rows(tmp_path / "no.csv", expected="It holds x.")
    with pytest.raises(DataError, match="this is a folder; a file is needed"):
        read_text(tmp_path)


def test_values_of_json_keep_their_types(tmp_path):
    (tmp_path / "t.jsonl").write_text(json.dumps({"a": 1, "b": [1, None]}) + "\n\n" + json.dumps({"a": None}) + "\n")
    rows = read_rows(tmp_path / "t.jsonl")
    assert rows == [{"a": 1, "b": [1, None]}]
    assert rows[0].number == 1
