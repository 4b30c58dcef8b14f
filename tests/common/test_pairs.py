"""Prompts with completions: reading, splitting, token ids and batches."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from gnomon.common.pairs import UNICODE_CATEGORIES, Pair, encode, load_pairs, pad
from gnomon.common.text import byte_tokenizer
from gnomon.errors import DataError
from gnomon.recipes.schema import BUILTIN_PAIRS


def write(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rows(count: int = 60) -> list[object]:
    return [{"prompt": f"{i} and {i}: ", "completion": str(2 * i)} for i in range(count)]


def test_no_prompt_stands_on_both_sides_and_neighbours_move_nothing(tmp_path: Path) -> None:
    found = load_pairs(write(tmp_path / "a.jsonl", rows()), validation=0.3)
    assert len(found.train) + len(found.valid) == 60
    assert not {p.prompt for p in found.train} & {p.prompt for p in found.valid}
    fewer = load_pairs(write(tmp_path / "b.jsonl", rows()[:30]), validation=0.3)
    assert {p.prompt for p in fewer.valid} <= {p.prompt for p in found.valid}
    assert found.sha256 != fewer.sha256
    assert found.train[0].row == 1 + [r["prompt"] for r in rows()].index(found.train[0].prompt)  # type: ignore[index]


def test_other_columns_and_packed_files(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"q": f"q{i}", "a": f"a{i}"}) + "\n" for i in range(40))
    found = load_pairs(path, prompt_field="q", completion_field="a", validation=0.2)
    assert found.file == str(path)
    assert all(pair.completion == "a" + pair.prompt[1:] for pair in found.train)


def test_rows_that_cannot_be_used_are_set_aside_or_refused(tmp_path: Path) -> None:
    odd: list[object] = [{"prompt": " ", "completion": "x"}, {"prompt": "p", "completion": 3}]
    path = write(tmp_path / "a.jsonl", [*odd, *rows()])
    found = load_pairs(path)
    assert [(q.row, q.reason) for q in found.quarantined] == [
        (1, "field 'prompt' is empty"),
        (2, "field 'completion' is int, not text"),
    ]
    with pytest.raises(DataError, match=r"row 1: field 'prompt' is empty\. Mend the row"):
        load_pairs(path, strict=True)


def test_messages(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="completion"):
        load_pairs(write(tmp_path / "a.jsonl", [{"prompt": "a", "answer": "b"}]))
    with pytest.raises(DataError, match="Both need at least one"):
        load_pairs(write(tmp_path / "b.jsonl", rows(1)))
    with pytest.raises(DataError, match=r"missing.jsonl: there is no such file\. Allowed: 'unicode-categories'"):
        load_pairs("missing.jsonl")
    with pytest.raises(DataError, match=r"data\.prompt_field and data\.completion_field"):
        load_pairs(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match=r"no-such-set.*could not be loaded.*'unicode-categories'"):
        load_pairs("no-such-set")


def test_the_built_in_rows() -> None:
    found = load_pairs(UNICODE_CATEGORIES)
    assert BUILTIN_PAIRS == (UNICODE_CATEGORIES,)
    assert len(found.train) > 5000
    known = {pair.prompt: pair.completion for pair in [*found.train, *found.valid]}
    assert known["latin small letter a\nis a "] == "small letter"
    assert known["digit seven\nis a "] == "number"
    assert len(set(known.values())) == 7
    assert found.sha256 == load_pairs(UNICODE_CATEGORIES).sha256


def test_only_the_completion_and_the_end_are_learned() -> None:
    tokenizer = byte_tokenizer()
    example = encode(Pair("ab", "cde"), tokenizer)
    letters, end = tokenizer("abcde")["input_ids"], tokenizer.eos_token_id
    assert example.ids.tolist() == [*letters, end]
    assert example.labels.tolist() == [-100, -100, *letters[2:], end]
    assert example.ids[0] == letters[0], "the labels are a copy"


def test_batches_are_padded_on_the_right() -> None:
    tokenizer = byte_tokenizer()
    short, long = encode(Pair("a", "b"), tokenizer), encode(Pair("aaa", "bb"), tokenizer)
    batch = pad([short, long], pad_id=7)
    assert batch["input_ids"].shape == (2, 6)
    assert batch["input_ids"][0, 3:].tolist() == [7, 7, 7]
    assert batch["attention_mask"].sum(dim=1).tolist() == [3, 6]
    assert batch["labels"][0, 3:].tolist() == [-100] * 3
    assert torch.equal(batch["labels"][1], long.labels)
