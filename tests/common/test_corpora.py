"""Corpora: what is read, what is set aside, what is refused."""

from __future__ import annotations

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gnomon.common import corpora
from gnomon.common.text import byte_tokenizer, train_tokenizer
from gnomon.errors import ConfigError, DataError

LINES = [f"This is sentence number {i} of the test corpus." for i in range(40)]


def test_python_docs_is_english_text_with_two_disjoint_parts():
    corpus = corpora.load("python-docs")
    assert sum(map(len, corpus.train)) > 1_000_000
    assert 0 < len(corpus.valid) < len(corpus.train)
    assert not set(corpus.train) & set(corpus.valid)
    assert any("dictionary" in d for d in corpus.train + corpus.valid)
    assert corpora.load("python-docs").sha256 == corpus.sha256


def test_txt_is_one_document_cut_at_a_space(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\n".join(LINES))
    corpus = corpora.load(str(path))
    assert corpus.train[0] + corpus.valid[0] == "\n".join(LINES)
    assert 0.05 < len(corpus.valid[0]) / len("\n".join(LINES)) < 0.15
    assert corpus.file == str(path)


def test_bytes_that_are_no_utf8_are_set_aside_by_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"good line\n" * 5 + b"bad \xff line\n" + b"good again\n" * 5)
    corpus = corpora.load(str(path))
    assert [q.row for q in corpus.quarantined] == [6]
    assert "UTF-8 at byte 4" in corpus.quarantined[0].reason
    assert "bad" not in corpus.train[0] + corpus.valid[0]


def _jsonl(path, rows):
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    return str(path)


def test_jsonl_sets_bad_rows_aside_with_number_and_reason(tmp_path):
    rows = [{"text": t} for t in LINES]
    rows[3] = "{not json"
    rows[7] = {"other": "x"}
    rows[9] = {"text": 5}
    rows[11] = {"text": "  "}
    rows[13] = "[1, 2]"
    corpus = corpora.load(_jsonl(tmp_path / "a.jsonl", rows))
    assert [q.row for q in corpus.quarantined] == [4, 8, 10, 12, 14]
    reasons = " | ".join(q.reason for q in corpus.quarantined)
    for part in ("not JSON", "no field 'text' (it has other)", "is int, not text", "is empty", "a JSON list"):
        assert part in reasons
    assert corpus.rows == len(LINES) - 5

    side = corpus.write_quarantine(tmp_path / "q.jsonl")
    written = [json.loads(line) for line in side.read_text().splitlines()]
    assert [w["row"] for w in written] == [4, 8, 10, 12, 14]
    assert all(w["reason"] and w["excerpt"] for w in written)


def test_strict_refuses_the_first_bad_row_by_file_and_number(tmp_path):
    path = _jsonl(tmp_path / "a.jsonl", [{"text": "fine"}] * 20 + ["{"])
    with pytest.raises(DataError, match=r"a\.jsonl, row 21: not JSON.*strict: false") as caught:
        corpora.load(path, strict=True)
    assert caught.value.row == 21


def test_the_text_field_is_chosen_or_asked_for(tmp_path):
    only = _jsonl(tmp_path / "only.jsonl", [{"body": t, "n": 1} for t in LINES])
    assert corpora.load(only).rows == len(LINES)
    two = _jsonl(tmp_path / "two.jsonl", [{"a": t, "b": t} for t in LINES])
    with pytest.raises(DataError, match=r"text columns: a, b\. Name one with 'text_field'"):
        corpora.load(two)
    assert corpora.load(two, text_field="b").rows == len(LINES)
    with pytest.raises(DataError, match=r"no field 'c' \(it has a, b\)"):
        corpora.load(two, text_field="c")


def test_parquet_and_gzip(tmp_path):
    table = pa.table({"text": [*LINES, None, ""], "n": range(len(LINES) + 2)})
    pq.write_table(table, tmp_path / "a.parquet")
    corpus = corpora.load(str(tmp_path / "a.parquet"))
    assert corpus.rows == len(LINES)
    assert [q.row for q in corpus.quarantined] == [41, 42]
    with pytest.raises(DataError, match=r"no column 'x'\. Columns: text, n"):
        corpora.load(str(tmp_path / "a.parquet"), text_field="x")
    with gzip.open(tmp_path / "a.txt.gz", "wt") as file:
        file.write("\n".join(LINES))
    assert corpora.load(str(tmp_path / "a.txt.gz")).train[0].startswith("This is sentence number 0")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"x", "ending in '.csv' are not read"),
        ("a.txt", b"", "no usable text"),
        ("a.txt", b" \n \n", "no usable text"),
        ("a.parquet", b"not parquet", "not a readable parquet"),
        ("a.txt.gz", b"not gzip", "no complete gzip"),
    ],
)
def test_unusable_files_are_refused(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        corpora.load(str(path))


def test_a_missing_file_and_an_unreachable_dataset_are_refused(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="there is no such file"):
        corpora.load(str(tmp_path / "missing.txt"))
    import datasets

    def offline(*args, **kwargs):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DataError, match=r"'someone/something'.*could not be loaded: offline"):
        corpora.load("someone/something")


def test_a_hub_dataset_comes_through_datasets(monkeypatch):
    import datasets

    rows = datasets.Dataset.from_dict({"text": [*LINES, ""], "label": list(range(len(LINES) + 1))})
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: rows if split == "test" else None)
    corpus = corpora.load("someone/something", split="test")
    assert (corpus.rows, len(corpus.quarantined)) == (len(LINES), 1)


@pytest.mark.parametrize("share", [0, 1, -0.1, 2])
def test_the_validation_share_is_checked(share):
    with pytest.raises(ConfigError, match="above 0 and below 1"):
        corpora.load("python-docs", validation=share)


@given(n=st.integers(1, 200), context=st.integers(1, 50))
def test_windows_keep_order_and_drop_only_the_rest(n, context):
    tokens = torch.arange(n)
    if n < context:
        with pytest.raises(DataError, match=f"{n} tokens, one window needs {context}"):
            corpora.windows(tokens, context)
        return
    rows = corpora.windows(tokens, context)
    assert rows.shape == (n // context, context)
    assert torch.equal(rows.flatten(), tokens[: rows.numel()])


def test_tokens_join_documents_by_the_end_token_and_respect_the_limit(tmp_path):
    path = _jsonl(tmp_path / "a.jsonl", [{"text": t} for t in LINES])
    corpus = corpora.load(path)
    tokenizer = byte_tokenizer()
    tokens = corpus.tokens(tokenizer)
    assert int((tokens == tokenizer.eos_token_id).sum()) == len(corpus.train)
    assert tokenizer.decode(tokens[: len(LINES[0])].tolist()) == LINES[0]
    assert corpus.tokens(tokenizer, "valid").numel() < tokens.numel()


def test_tokenizers_give_back_the_text(tmp_path, monkeypatch):
    monkeypatch.setenv("GNOMON_CACHE", str(tmp_path))
    text = "def naïve(x):\n    return '≠' * x  # 日本"
    for tokenizer in (byte_tokenizer(), train_tokenizer([text, *LINES], 300), train_tokenizer([text, *LINES], 300)):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    with pytest.raises(ConfigError, match="at least 257"):
        train_tokenizer([text], 100)
