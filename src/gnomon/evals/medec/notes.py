"""Clinical notes of the benchmark: reading its CSV files, and rows of one's own in the same columns."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gnomon.common.rows import read_rows
from gnomon.errors import DataError, GnomonWarning

__all__ = ["EXPECTED", "NA", "Note", "data_files", "note_from_row", "read_notes", "split_sentences"]

NA = "NA"
"""What stands for 'no correction'."""

EXPECTED = (
    "Expected: a table (.csv, .jsonl or .parquet, also .gz) with the columns Text ID, Sentences, Error Flag, Error "
    "Sentence ID, Corrected Sentence, as in the files MEDEC-MS/*.csv of github.com/abachaa/MEDEC."
)

UW_TERMS = (
    "the UW notes come only under a data-use agreement with the University of Washington, which the MEDEC repository "
    "describes"
)

_COLUMNS = ("text_id", "sentences", "error_flag", "error_sentence_id", "corrected_sentence")
_NUMBERED = re.compile(r"(\d+) ")


@dataclass(frozen=True)
class Note:
    """One note with its gold answer.

    Attributes
    ----------
    text_id : str
    sentences : tuple of (int, str)
        Official number and text of each sentence.
    flag : int
        1 when the note contains an error, else 0.
    sentence_id : int
        Number of the sentence with the error; -1 when there is none.
    correction : str
        The corrected sentence exactly as in the file, or ``"NA"``. White space after its last full stop is a token to
        the benchmark's ROUGE (11 of 189 pairs of the published baseline have one).
    error_type : str
        Such as ``"diagnosis"``; ``"none"`` for a correct note.
    cluster : str
        Beginning of the corrected note. About two thirds of the notes come in pairs, one with and one without the
        error, which are not independent of each other.
    """

    text_id: str
    sentences: tuple[tuple[int, str], ...]
    flag: int
    sentence_id: int
    correction: str = NA
    error_type: str = "none"
    cluster: str = ""

    @property
    def text(self) -> str:
        """The numbered sentences, one a line."""
        return "\n".join(f"{number} {' '.join(sentence.split())}" for number, sentence in self.sentences)


def split_sentences(text: str) -> tuple[tuple[int, str], ...]:
    """Split the column ``Sentences`` into numbered sentences.

    A line starts a sentence only if it begins with the next expected number (from 0) and a space; any other line
    goes on with the sentence before, even if it begins with a number, such as a laboratory value.

    Parameters
    ----------
    text : str

    Returns
    -------
    tuple of (int, str)
        Empty when the first line does not begin with ``"0 "``.

    Examples
    --------
    >>> split_sentences("0 Sodium was\\r\\n135 mmol/L.\\r\\n1 She is well.")
    ((0, 'Sodium was\\n135 mmol/L.'), (1, 'She is well.'))
    """
    sentences: list[str] = []
    for line in re.split(r"\r?\n", text.strip()):
        start = _NUMBERED.match(line)
        if start and int(start[1]) == len(sentences):
            sentences.append(line[start.end() :])
        elif sentences:
            sentences[-1] += "\n" + line
        else:
            return ()
    return tuple(enumerate(sentences))


def _whole(value: Any) -> int | None:
    """Read 1, "1", 1.0 and "1.0"; None for anything else."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return int(number) if number.is_integer() else None


def _beginning(note: dict[str, Any], sentences: tuple[tuple[int, str], ...], sentence_id: int, correction: str) -> str:
    whole = note.get("corrected_text") if sentence_id >= 0 else note.get("text")
    if not isinstance(whole, str) or not whole.strip() or whole.strip() == NA:
        whole = " ".join(correction if number == sentence_id else sentence for number, sentence in sentences)
    return " ".join(whole.split())[:80]


def note_from_row(row: dict[str, Any], *, file: str | Path | None = None, number: int | None = None) -> Note:
    """Make a note of one row, its columns keyed as `gnomon.common.rows.column_key` writes them.

    Raises
    ------
    DataError
        When the flag is not 0 or 1, sentences are not numbered from 0, or flag and sentence number disagree.
    """

    def wrong(message: str) -> DataError:
        return DataError(message, file=file, row=number)

    flag, sentence_id = _whole(row["error_flag"]), _whole(row["error_sentence_id"])
    if flag not in (0, 1):
        raise wrong(f"Error Flag is {row['error_flag']!r}. Allowed: 1 (the note has an error) or 0.")
    sentences = split_sentences(str(row["sentences"]))
    if not sentences:
        raise wrong(
            f"Sentences begins with {str(row['sentences'])[:40]!r}. Write one sentence a line, each with its number "
            "and a space before it, from '0 ' on."
        )
    if sentence_id is None or (sentence_id >= 0) != (flag == 1) or sentence_id >= len(sentences):
        raise wrong(
            f"Error Sentence ID is {row['error_sentence_id']!r} with Error Flag {flag}. Allowed: -1 with flag 0; the "
            f"number of a sentence of this note, 0 to {len(sentences) - 1}, with flag 1."
        )
    said = str(row["corrected_sentence"] if row["corrected_sentence"] is not None else "")
    correction = said if flag and said.strip() not in ("", NA) else NA
    kind = str(row.get("error_type") or "").strip()
    return Note(
        text_id=str(row["text_id"]).strip(),
        sentences=sentences,
        flag=flag,
        sentence_id=sentence_id,
        correction=correction,
        error_type=kind if flag and kind not in ("", NA) else ("unknown" if flag else "none"),
        cluster=_beginning(row, sentences, sentence_id, correction),
    )


def data_files(data: str | Path | Sequence[str | Path], split: str = "") -> list[Path]:
    """Return the files that `data` names; in a folder, the tables whose name contains `split`.

    Raises
    ------
    DataError
        When `data` is empty, or a folder without exactly one such file per collection (MS, UW).
    """
    names = [data] if isinstance(data, str | Path) else list(data)
    if not [name for name in names if str(name)]:
        raise DataError(f"MEDEC needs the file of notes: --data FILE, or -T data=FILE with inspect. {EXPECTED}")
    files: list[Path] = []
    for name in names:
        path = Path(name).expanduser()
        if not path.is_dir():
            files.append(path)
            continue
        tables = sorted(p for p in path.rglob("*") if re.search(r"\.(csv|jsonl|parquet)(\.gz)?$", p.name.lower()))
        chosen = [p for p in tables if split and split.lower() in p.name.lower()]
        if len(chosen) != 1:
            listed = ", ".join(str(p.relative_to(path)) for p in tables) or "none"
            what = f"{len(chosen)} tables whose name contains split = {split!r}" if split else "no split was given"
            raise DataError(
                f"this is a folder, and of its tables one must be chosen: {what}. Tables: {listed}. Name the file, "
                "or a split that stands in one name only.",
                file=path,
            )
        files += chosen
    return files


def read_notes(data: str | Path | Sequence[str | Path], *, split: str = "") -> list[Note]:
    """Read notes from one or more files.

    Rows without a Text ID are left out (the public test file ends with 328 empty ones). When a Text ID occurs
    again, the last row counts, as in the official script.

    Parameters
    ----------
    data : str, Path or sequence of them
        Files, or a folder together with `split`.
    split : str, optional
        Part of a file's name in a folder, such as ``"test"``.

    Returns
    -------
    list of Note

    Raises
    ------
    DataError
        When a file is missing or empty, lacks a column, or holds a row that cannot be used.

    Warns
    -----
    GnomonWarning
        When a Text ID occurs twice, or a note has an error but no correction.
    """
    notes: dict[str, Note] = {}
    twice: list[str] = []
    for file in data_files(data, split):
        rows = read_rows(file, columns=_COLUMNS, expected=EXPECTED)
        for row in rows:
            if str(row["text_id"] or "").strip():
                note = note_from_row(row, file=file, number=row.number)
                if notes.pop(note.text_id, None) is not None:
                    twice.append(note.text_id)
                notes[note.text_id] = note
        if not notes:
            raise DataError(f"no row has a Text ID. {EXPECTED}", file=file)
    if twice:
        warnings.warn(f"Text ID {twice[0]!r} occurs again ({len(twice)} such); its last row counts.", GnomonWarning, 2)
    bare = [note.text_id for note in notes.values() if note.flag and note.correction == NA]
    if bare:
        warnings.warn(
            f"{len(bare)} notes have an error but no Corrected Sentence, such as {bare[0]!r}; their corrections "
            "cannot be scored.",
            GnomonWarning,
            2,
        )
    return list(notes.values())
