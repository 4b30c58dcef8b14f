"""Text to train and test on: the English every CPython carries, local files, or a hub dataset.

Rows that cannot be used are set aside with their number and the reason, never dropped in silence.
"""

from __future__ import annotations

import ast
import gzip
import hashlib
import json
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import torch

from gnomon.common.files import cache_dir, write_text
from gnomon.errors import ConfigError, DataError

__all__ = ["Corpus", "Quarantined", "load", "windows", "write_quarantine"]

_SKIPPED_FOLDERS = {
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "turtledemo",
}


@dataclass(frozen=True)
class Quarantined:
    """A row that was set aside: its number (from 1), why, and the beginning of what stood there."""

    row: int
    reason: str
    excerpt: str = ""


@dataclass(frozen=True)
class Corpus:
    """Documents for training and for validation.

    Attributes
    ----------
    name : str
        What was loaded.
    train, valid : list of str
        The documents. None stands in both.
    sha256 : str
        Hash over all documents, in order.
    quarantined : list of Quarantined
        Rows set aside.
    file : str
        The file they come from, empty for `python-docs` and hub datasets.
    """

    name: str
    train: list[str]
    valid: list[str]
    sha256: str
    quarantined: list[Quarantined] = field(default_factory=list)
    file: str = ""

    @property
    def rows(self) -> int:
        """Number of documents that are used."""
        return len(self.train) + len(self.valid)

    def tokens(self, tokenizer: Any, split: str = "train", limit: int | None = None) -> torch.Tensor:
        """Return one split as a 1-D int64 tensor of token ids, documents joined by the end-of-text token.

        Parameters
        ----------
        tokenizer : transformers tokenizer
        split : {"train", "valid"}
        limit : int, optional
            Stop after at least this many tokens.
        """
        separator = tokenizer.eos_token_id
        pieces: list[int] = []
        documents = self.train if split == "train" else self.valid
        for start in range(0, len(documents), 256):
            batch = tokenizer(documents[start : start + 256], add_special_tokens=False, verbose=False)
            for ids in batch["input_ids"]:
                pieces.extend(ids)
                if separator is not None:
                    pieces.append(separator)
            if limit is not None and len(pieces) >= limit:
                break
        return torch.tensor(pieces, dtype=torch.int64)

    def write_quarantine(self, path: Path) -> Path | None:
        """Write the rows set aside to a JSON-lines file; return its path, or None when there are none."""
        return write_quarantine(self.quarantined, path) if self.quarantined else None


def write_quarantine(rows: Sequence[Quarantined], path: Path) -> Path:
    """Write rows that were set aside to a JSON-lines file; return its path."""
    lines = [json.dumps({"row": q.row, "reason": q.reason, "excerpt": q.excerpt}, ensure_ascii=False) for q in rows]
    write_text(path, "\n".join(lines) + "\n")
    return path


def windows(tokens: torch.Tensor, context: int) -> torch.Tensor:
    """Cut a 1-D tensor of token ids into rows of `context` tokens; the rest is left out.

    Raises
    ------
    DataError
        When there are fewer tokens than one row needs.

    Examples
    --------
    >>> windows(torch.arange(7), 3).tolist()
    [[0, 1, 2], [3, 4, 5]]
    """
    if context < 1:
        raise ConfigError(f"context = {context}: a window holds at least 1 token.")
    count = tokens.numel() // context
    if count == 0:
        raise DataError(
            f"the text has {tokens.numel()} tokens, one window needs {context}. Give more text or a smaller context."
        )
    return tokens[: count * context].reshape(count, context)


def load(
    source: str,
    *,
    text_field: str | None = None,
    split: str = "train",
    validation: float = 0.1,
    strict: bool = False,
) -> Corpus:
    """Load a corpus.

    Parameters
    ----------
    source : str
        ``"python-docs"``; a file ending in ``.txt``, ``.md``, ``.jsonl``, ``.parquet``, ``.txt.gz`` or
        ``.jsonl.gz``; or the id of a hub dataset, read through `datasets`.
    text_field : str, optional
        The column that holds the text; default ``"text"``, or the only text column.
    split : str, default "train"
        Split of a hub dataset.
    validation : float, default 0.1
        Share kept apart for validation; every k-th document, or the end of a single long one.
    strict : bool, default False
        Refuse the file at the first row that cannot be used, where False sets the row aside.

    Returns
    -------
    Corpus

    Raises
    ------
    DataError
        When the file is missing, of another format, empty, or (strict) holds a row that cannot be used.
    ConfigError
        When `validation` is not in (0, 1).
    """
    if not 0 < validation < 1:
        raise ConfigError(f"validation = {validation}: allowed is a share above 0 and below 1, such as 0.1.")
    if source == "python-docs":
        return _python_docs()
    path = Path(source).expanduser()
    if path.is_file():
        texts, bad = _read_file(path, text_field)
    elif path.exists() or path.suffix or source.startswith((".", "/", "~")):
        raise DataError(
            "there is no such file. Allowed: 'python-docs', a .txt, .jsonl or .parquet file, or a hub dataset id.",
            file=source,
        )
    else:
        texts, bad = _read_hub(source, split, text_field)
    where = str(path) if path.is_file() else source
    if strict and bad:
        raise DataError(
            f"{bad[0].reason} ({len(bad)} such row{'s' if len(bad) > 1 else ''}). "
            "Mend the rows, or set strict: false to set them aside.",
            file=where,
            row=bad[0].row,
        )
    if not texts:
        raise DataError(f"no usable text ({len(bad)} rows were set aside). Give a file with text.", file=where)
    train, valid = _divide(texts, validation)
    corpus = _corpus(path.name if path.is_file() else source, train, valid)
    return replace(corpus, quarantined=bad, file=where if path.is_file() else "")


def _corpus(name: str, train: list[str], valid: list[str]) -> Corpus:
    digest = hashlib.sha256()
    for part in (train, valid):
        for text in part:
            digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
        digest.update(b"\1")
    return Corpus(name, train, valid, digest.hexdigest())


def _divide(texts: list[str], validation: float) -> tuple[list[str], list[str]]:
    every = max(2, round(1 / validation))
    if len(texts) >= every:
        return (
            [t for i, t in enumerate(texts) if i % every != every - 1],
            [t for i, t in enumerate(texts) if i % every == every - 1],
        )
    whole = "\n\n".join(texts)
    cut = int(len(whole) * (1 - validation))
    space = whole.find(" ", cut)
    cut = space if 0 <= space < len(whole) - 1 else cut
    return [whole[:cut]], [whole[cut:]]


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _read_file(path: Path, text_field: str | None) -> tuple[list[str], list[Quarantined]]:
    kind = "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix
    readers = {".txt": _txt, ".md": _txt, ".txt.gz": _txt, ".jsonl": _jsonl, ".jsonl.gz": _jsonl}
    try:
        if kind == ".parquet":
            return _parquet(path, text_field)
        if kind not in readers:
            raise DataError(
                f"files ending in {kind or 'nothing'!r} are not read. "
                "Allowed: .txt, .md, .jsonl, .parquet, .txt.gz, .jsonl.gz.",
                file=path,
            )
        with _open(path) as file:
            rows, bad = readers[kind](path, file, text_field)
    except (gzip.BadGzipFile, EOFError) as error:
        raise DataError(f"the file is no complete gzip file ({error}). Pack it again.", file=path) from error
    return rows, bad


def _txt(path: Path, file: IO[bytes], text_field: str | None) -> tuple[list[str], list[Quarantined]]:
    """Blank lines part paragraphs; a line that is no UTF-8 is set aside."""
    lines: list[str] = []
    bad: list[Quarantined] = []
    for number, raw in enumerate(file, 1):
        try:
            lines.append(raw.decode("utf-8"))
        except UnicodeDecodeError as error:
            bad.append(Quarantined(number, f"not UTF-8 at byte {error.start}", raw[:80].decode("utf-8", "replace")))
    text = "".join(lines)
    return ([text] if text.strip() else []), bad


def _jsonl(path: Path, file: IO[bytes], text_field: str | None) -> tuple[list[str], list[Quarantined]]:
    texts: list[str] = []
    bad: list[Quarantined] = []
    for number, raw in enumerate(file, 1):
        if not raw.strip():
            continue
        try:
            row = json.loads(raw.decode("utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            bad.append(Quarantined(number, f"not JSON: {error}", raw[:80].decode("utf-8", "replace")))
            continue
        if not isinstance(row, dict):
            bad.append(Quarantined(number, f"a JSON {type(row).__name__}, not an object", raw[:80].decode()))
            continue
        if text_field is None:
            text_field = _choose_field([k for k, v in row.items() if isinstance(v, str)], path)
        reason = _text_fault(row, text_field)
        if reason:
            bad.append(Quarantined(number, reason, raw[:80].decode("utf-8", "replace")))
        else:
            texts.append(row[text_field])
    if bad and not texts and text_field is not None and any("no field" in q.reason for q in bad):
        raise DataError(f"{bad[0].reason}. Name the text column with 'text_field'.", file=path, row=bad[0].row)
    return texts, bad


def _choose_field(candidates: Sequence[str], where: object) -> str:
    if "text" in candidates:
        return "text"
    if len(candidates) == 1:
        return candidates[0]
    raise DataError(
        f"the text column is not clear; text columns: {', '.join(candidates) or 'none'}. Name one with 'text_field'.",
        file=str(where),
    )


def _text_fault(row: dict[str, Any], text_field: str) -> str:
    if text_field not in row:
        return f"no field {text_field!r} (it has {', '.join(map(str, row)) or 'none'})"
    if not isinstance(row[text_field], str):
        return f"field {text_field!r} is {type(row[text_field]).__name__}, not text"
    return "" if row[text_field].strip() else f"field {text_field!r} is empty"


def _parquet(path: Path, text_field: str | None) -> tuple[list[str], list[Quarantined]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"not a readable parquet file ({error}).", file=path) from error
    names = [f.name for f in table.schema if pa.types.is_string(f.type) or pa.types.is_large_string(f.type)]
    chosen = text_field or _choose_field(names, path)
    if chosen not in table.column_names:
        raise DataError(f"no column {chosen!r}. Columns: {', '.join(table.column_names)}.", file=path)
    return _from_rows(({chosen: v} for v in table.column(chosen).to_pylist()), chosen)


def _from_rows(rows: Iterator[dict[str, Any]], text_field: str) -> tuple[list[str], list[Quarantined]]:
    texts: list[str] = []
    bad: list[Quarantined] = []
    for number, row in enumerate(rows, 1):
        reason = _text_fault(row, text_field)
        if reason:
            bad.append(Quarantined(number, reason, str(row.get(text_field))[:80]))
        else:
            texts.append(row[text_field])
    return texts, bad


def _read_hub(source: str, split: str, text_field: str | None) -> tuple[list[str], list[Quarantined]]:
    import datasets

    try:
        rows = datasets.load_dataset(source, split=split)
    except Exception as error:  # the library raises a family of unrelated types for a missing or offline dataset
        raise DataError(
            f"the dataset {source!r} (split {split!r}) could not be loaded: {error}. "
            "Allowed: 'python-docs', a .txt, .jsonl or .parquet file, or a hub dataset id."
        ) from error
    names = [n for n, f in rows.features.items() if getattr(f, "dtype", "") in ("string", "large_string")]
    chosen = text_field or _choose_field(names, source)
    if chosen not in rows.column_names:
        raise DataError(f"no column {chosen!r}. Columns: {', '.join(rows.column_names)}.", file=source)
    return _from_rows(iter(rows), chosen)


def _python_docs() -> Corpus:
    """The language reference's topics and the standard library's docstrings, one document a topic or module."""
    version = "{}.{}.{}".format(*sys.version_info[:3])
    cached = cache_dir() / f"python-docs-{version}.json"
    if cached.is_file():
        documents = json.loads(cached.read_text(encoding="utf-8"))
    else:
        documents = [*_topics(), *_docstrings(Path(sysconfig.get_paths()["stdlib"]))]
        write_text(cached, json.dumps(documents))
    # A document's own hash decides where it goes, so a changed neighbour moves nothing between the splits.
    share = [int(hashlib.sha256(d.encode()).hexdigest()[:8], 16) % 10 for d in documents]
    train = [d for d, s in zip(documents, share, strict=True) if s != 0]
    valid = [d for d, s in zip(documents, share, strict=True) if s == 0]
    return _corpus("python-docs", train, valid)


def _topics() -> list[str]:
    from pydoc_data import topics

    return [text.strip() for _, text in sorted(topics.topics.items()) if len(text.strip()) > 200]


def _docstrings(root: Path) -> Iterator[str]:
    for path in sorted(root.rglob("*.py")):
        if _SKIPPED_FOLDERS & set(path.relative_to(root).parts[:-1]):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
        text = "\n\n".join(d for d in found if d and len(d) > 40)
        if len(text) > 200:
            yield text
