"""Prompts with the completions a model is to learn: from files, a hub dataset, or the table every Python carries.

Rows that cannot be used are set aside with their number and the reason, as in `gnomon.common.corpora`. A prompt stands
in training or in validation, never in both: a hash of it decides.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gnomon.common.corpora import Quarantined
from gnomon.common.rows import FORMATS, read_rows
from gnomon.errors import DataError

__all__ = ["UNICODE_CATEGORIES", "Example", "Pair", "Pairs", "encode", "load_pairs", "pad"]

UNICODE_CATEGORIES = "unicode-categories"
"""Built in: the name of a character, and whether it is a letter, a mark, a number, punctuation or a symbol."""

_CATEGORIES = {"Lu": "capital letter", "Ll": "small letter", "Lo": "other letter", "M": "mark", "N": "number",
               "P": "punctuation", "S": "symbol"}  # fmt: skip


_FORMATS = (
    f"Allowed: {UNICODE_CATEGORIES!r}, a .csv, .tsv, .json, .jsonl or .parquet file (all but Parquet also .gz), or a "
    "hub dataset id."
)
_COLUMNS = "Name the columns with data.prompt_field and data.completion_field."


@dataclass(frozen=True)
class Pair:
    """A prompt and its completion, as text, and the number of their row (from 1)."""

    prompt: str
    completion: str
    row: int = 0


@dataclass(frozen=True)
class Pairs:
    """Rows for training and for validation.

    Attributes
    ----------
    train, valid : list of Pair
    sha256 : str
        Hash over all rows, in order.
    quarantined : list of Quarantined
        Rows set aside.
    file : str
        The file they come from, "" for built-in ones and hub datasets.
    """

    train: list[Pair]
    valid: list[Pair]
    sha256: str
    quarantined: list[Quarantined] = field(default_factory=list)
    file: str = ""


@dataclass(frozen=True)
class Example:
    """Token ids (tokens,) of a prompt and its completion with the end token, and where the completion begins."""

    ids: Tensor
    start: int

    @property
    def labels(self) -> Tensor:
        """The ids, -100 over the prompt."""
        labels = self.ids.clone()
        labels[: self.start] = -100
        return labels


def load_pairs(
    source: str | Path,
    *,
    prompt_field: str = "prompt",
    completion_field: str = "completion",
    split: str = "train",
    validation: float = 0.1,
    strict: bool = False,
) -> Pairs:
    """Load prompts and completions.

    Parameters
    ----------
    source : str or Path
        ``"unicode-categories"``, a CSV, TSV, JSON, JSON-lines or Parquet file (gzipped or not), or a hub dataset id.
    prompt_field, completion_field : str
        The columns.
    split : str, default "train"
        Of a hub dataset.
    validation : float, default 0.1
        Share of the prompts kept apart.
    strict : bool, default False
        Refuse the data at the first row that cannot be used.

    Returns
    -------
    Pairs

    Raises
    ------
    DataError
        When there is no such data, a column is missing, or nothing usable is left on either side of the split.

    Examples
    --------
    >>> load_pairs("unicode-categories").train[0].completion in _CATEGORIES.values()
    True
    """
    file = ""
    if str(source) == UNICODE_CATEGORIES:
        rows: Iterable[Mapping[str, Any]] = _unicode_rows()
        prompt_field, completion_field = "prompt", "completion"
    elif Path(source).is_file():
        file = str(source)
        rows = read_rows(source, columns=(prompt_field, completion_field), expected=_COLUMNS)
    elif _is_file_name(str(source)):
        raise DataError(f"there is no such file. {_FORMATS}", file=source)
    else:
        rows = _hub_rows(str(source), split, (prompt_field, completion_field))
    good: list[Pair] = []
    bad: list[Quarantined] = []
    for number, row in enumerate(rows, 1):
        reason = _fault(row, (prompt_field, completion_field))
        if reason:
            bad.append(Quarantined(number, reason, str(row.get(prompt_field))[:80]))
            if strict:
                raise DataError(
                    f"{reason}. Mend the row, or leave strict out to set such rows aside.", file=source, row=number
                )
        else:
            good.append(Pair(row[prompt_field], row[completion_field], number))
    train = [pair for pair in good if _position(pair.prompt) >= validation]
    valid = [pair for pair in good if _position(pair.prompt) < validation]
    if not train or not valid:
        raise DataError(
            f"{len(good)} usable rows ({len(bad)} set aside) leave {len(train)} for training and {len(valid)} for "
            "validation. Both need at least one: give more rows, or change data.validation.",
            file=source,
        )
    digest = hashlib.sha256()
    for pair in good:
        digest.update(f"{pair.prompt}\0{pair.completion}\0".encode("utf-8", "surrogatepass"))
    return Pairs(train, valid, digest.hexdigest(), bad, file)


def _is_file_name(source: str) -> bool:
    return Path(source.removesuffix(".gz")).suffix.lower() in FORMATS


def _position(prompt: str) -> float:
    """Return where in [0, 1) a prompt's hash lies."""
    return int(hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()[:8], 16) / 2**32


def _fault(row: Mapping[str, Any], columns: Sequence[str]) -> str:
    for column in columns:
        value = row.get(column)
        if not isinstance(value, str):
            return f"field {column!r} is {type(value).__name__}, not text"
        if not value.strip():
            return f"field {column!r} is empty"
    return ""


def _unicode_rows() -> list[dict[str, str]]:
    """Names of the characters below U+3000, each with what it is."""
    rows = []
    for character in map(chr, range(0x3000)):
        name, kind = unicodedata.name(character, ""), unicodedata.category(character)
        category = _CATEGORIES.get(kind) or _CATEGORIES.get(kind[0])
        if name and category:
            rows.append({"prompt": f"{name.lower()}\nis a ", "completion": category})
    return rows


def _hub_rows(source: str, split: str, columns: tuple[str, str]) -> Iterable[Mapping[str, Any]]:
    import datasets

    try:
        rows = datasets.load_dataset(source, split=split)
    except Exception as error:  # the library raises a family of unrelated types for a missing or offline dataset
        raise DataError(f"the dataset {source!r} (split {split!r}) could not be loaded: {error}. {_FORMATS}") from error
    for column in columns:
        if column not in rows.column_names:
            raise DataError(f"no column {column!r}. Columns: {', '.join(rows.column_names)}.", file=source)
    return rows


def encode(pair: Pair, tokenizer: Any) -> Example:
    """Return the token ids of a prompt, its completion and the end token.

    Prompt and completion are tokenized apart, so that the prompt's ids are the ones a model is asked with.
    """
    prompt = tokenizer(pair.prompt, verbose=False)["input_ids"]
    completion = tokenizer(pair.completion, add_special_tokens=False, verbose=False)["input_ids"]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return Example(torch.tensor([*prompt, *completion, *end]), len(prompt))


def pad(examples: Sequence[Example], pad_id: int = 0) -> dict[str, Tensor]:
    """Return a batch: `input_ids`, `attention_mask`, `labels` (rows, longest), padded on the right."""
    return {
        "input_ids": _padded([e.ids for e in examples], pad_id),
        "attention_mask": _padded([torch.ones_like(e.ids) for e in examples], 0),
        "labels": _padded([e.labels for e in examples], -100),
    }


def _padded(rows: list[Tensor], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
