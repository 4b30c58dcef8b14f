"""Rows of a data file: CSV, TSV, JSON lines, JSON or Parquet, gzipped or not, every cell as it stands in the file."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gnomon.errors import DataError, nearest

__all__ = ["FORMATS", "Row", "column_key", "file_sha256", "read_rows", "read_text"]

FORMATS = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
"""Endings that `read_rows` knows; all but Parquet also with ``.gz``."""


class Row(dict[str, Any]):
    """One row of a table, with its number in the file (from 1, the heading not counted)."""

    number: int = 0


def column_key(name: str) -> str:
    """Return a column's name in one spelling, so that ``Text ID``, ``text-id`` and ``text_id`` are the same.

    Examples
    --------
    >>> column_key("Error Sentence ID")
    'error_sentence_id'
    """
    return re.sub(r"[^a-z0-9]+", "_", str(name).strip().lower()).strip("_")


def file_sha256(*paths: str | Path) -> str:
    """Return the SHA-256 of the bytes of one file, or of several in the order given."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def read_text(path: str | Path, *, expected: str = "") -> str:
    """Read a UTF-8 text file, gzipped or not, without its byte-order mark; line ends stay as they are.

    Parameters
    ----------
    path : str or Path
    expected : str, optional
        A sentence on what the file should hold, added to the message when it cannot be read.

    Raises
    ------
    DataError
        When there is no such file, or it is no UTF-8 text, or it is empty.
    """
    path = _existing(path, expected)
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"this is no UTF-8 text (byte {error.start}). {expected}".rstrip(), file=path) from error
    except (OSError, EOFError) as error:
        raise DataError(f"this cannot be read ({error}). {expected}".rstrip(), file=path) from error
    if not text.strip():
        raise DataError(f"the file is empty. {expected}".rstrip(), file=path)
    return text


def read_rows(path: str | Path, *, columns: Sequence[str] = (), expected: str = "") -> list[Row]:
    """Read a table, one dict per row, keyed by `column_key` of the column's name.

    Cells of CSV and TSV files are strings exactly as written: ``NA`` stays ``"NA"`` and an empty cell ``""``. Rows
    in which every cell is empty are left out.

    Parameters
    ----------
    path : str or Path
        A file whose name ends as `FORMATS` lists.
    columns : sequence of str
        Columns that must be there, by key.
    expected : str, optional
        A sentence on what the file should hold, added to the message when it cannot be read.

    Returns
    -------
    list of Row
        Dicts that also know their `number`.

    Raises
    ------
    DataError
        When the file is missing, empty, of another format, or lacks a column; with the row where that is known.
    """
    path = _existing(path, expected)
    kind = Path(path.stem).suffix.lower() if path.suffix == ".gz" else path.suffix.lower()
    if kind not in FORMATS or (kind == ".parquet" and path.suffix == ".gz"):
        raise DataError(
            f"a file ending in {kind or 'nothing'!r} cannot be read as a table. Allowed: {', '.join(FORMATS)} "
            f"(all but Parquet also gzipped). {expected}".rstrip(),
            file=path,
        )
    if kind == ".parquet":
        rows = _parquet(path)
    elif kind in (".csv", ".tsv"):
        rows = _separated(path, "," if kind == ".csv" else "\t", expected)
    else:
        rows = _json_lines(path, expected) if kind == ".jsonl" else _json(path, expected)
    full: list[Row] = []
    for number, cells in rows:
        row = Row({column_key(name): value for name, value in cells.items()})
        row.number = number
        if any(value not in ("", None) for value in row.values()):
            full.append(row)
    if not full:
        raise DataError(f"there is no row in this file. {expected}".rstrip(), file=path)
    _check_columns(path, columns, {key: None for row in full for key in row}, expected)
    return full


def _existing(path: str | Path, expected: str) -> Path:
    path = Path(path).expanduser()
    if path.is_dir():
        raise DataError(f"this is a folder; a file is needed. {expected}".rstrip(), file=path)
    if not path.is_file():
        raise DataError(f"there is no such file. {expected}".rstrip(), file=path)
    return path


def _check_columns(path: Path, needed: Sequence[str], found: Iterable[str], expected: str) -> None:
    known = list(found)
    for column in needed:
        if column not in known:
            raise DataError(
                f"the column {column!r} is missing. Found: {', '.join(known)}. {nearest(column, known, noun='column')} "
                f"{expected}".rstrip(),
                file=path,
            )


def _separated(path: Path, delimiter: str, expected: str) -> list[tuple[int, dict[str, Any]]]:
    reader = csv.reader(io.StringIO(read_text(path, expected=expected), newline=""), delimiter=delimiter)
    rows: list[tuple[int, dict[str, Any]]] = []
    number = 0
    try:
        head = next(reader)
        for number, cells in enumerate(reader, 1):
            if not cells:
                continue
            if len(cells) != len(head):
                raise DataError(
                    f"{len(cells)} cells where the heading has {len(head)}. Quote cells that hold a separator or a "
                    "line break.",
                    file=path,
                    row=number,
                )
            rows.append((number, dict(zip(head, cells, strict=True))))
    except csv.Error as error:
        raise DataError(f"this is no valid table ({error}).", file=path, row=number + 1) from error
    return rows


def _json_lines(path: Path, expected: str) -> list[tuple[int, dict[str, Any]]]:
    rows = []
    for number, line in enumerate(read_text(path, expected=expected).split("\n"), 1):
        if line.strip():
            rows.append((number, _object(path, number, line)))
    return rows


def _object(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"this line is no JSON ({error.msg}). Write one object per line.", file=path, row=number) from (
            error
        )
    if not isinstance(value, dict):
        raise DataError(f"a JSON object is needed, not a {type(value).__name__}.", file=path, row=number)
    return value


def _json(path: Path, expected: str) -> list[tuple[int, dict[str, Any]]]:
    try:
        value = json.loads(read_text(path, expected=expected))
    except json.JSONDecodeError as error:
        raise DataError(f"this is no JSON ({error.msg}, line {error.lineno}).", file=path) from error
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        raise DataError("a JSON list of objects is needed.", file=path)
    return list(enumerate(value, 1))


def _parquet(path: Path) -> list[tuple[int, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows: list[dict[str, Any]] = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"this is no Parquet file ({error}).", file=path) from error
    return list(enumerate(rows, 1))
