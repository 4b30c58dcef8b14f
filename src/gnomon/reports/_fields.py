"""Reading JSON that may be unfinished: what is absent reads as empty, what has the wrong type is noted."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from gnomon.errors import DataError

__all__ = ["Fields", "clean", "read_object"]

_KINDS: dict[type, str] = {
    dict: "an object", list: "a list", str: "a text", bool: "true/false", int: "a number", float: "a number",
}  # fmt: skip


def kind_of(value: object) -> str:
    """Say what a JSON value is: ``"a list"``, ``"an object"``, ``"null"``."""
    return _KINDS.get(type(value), "null")


class Fields:
    """One JSON object, read field by field without ever failing.

    Parameters
    ----------
    raw : object
        The decoded JSON; anything but a dict reads as an empty object and is noted.
    where : str
        Its path in the file, such as ``"arms[0].stages[1]"``, for the notes.
    odd : list of str
        Receives a note for each value that has the wrong type.
    """

    def __init__(self, raw: object, where: str, odd: list[str]) -> None:
        self.where = where
        self.odd = odd
        if raw is not None and not isinstance(raw, dict):
            self._note("", "an object", raw)
        self.raw: dict[str, Any] = raw if isinstance(raw, dict) else {}

    def _path(self, key: str) -> str:
        return ".".join(part for part in (self.where, key) if part)

    def _note(self, key: str, wanted: str, found: object) -> None:
        self.odd.append(f"{self._path(key) or 'the file'}: expected {wanted}, found {kind_of(found)}")

    def has(self, key: str) -> bool:
        """Whether the field is there and not null."""
        return self.raw.get(key) is not None

    def text(self, key: str) -> str:
        """Return a text, or "" when absent."""
        value = self.raw.get(key)
        if value is None or isinstance(value, str):
            return value or ""
        self._note(key, "a text", value)
        return ""

    def number(self, key: str) -> float | None:
        """Return a number, finite or not, or None when absent."""
        return self._number(key, self.raw.get(key))

    def _number(self, key: str, value: object) -> float | None:
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self._note(key, "a number", value)
            return None
        try:
            return float(value)
        except OverflowError:  # JSON has integers beyond every float
            return float("inf") if value > 0 else float("-inf")

    def whole(self, key: str) -> int | None:
        """Return a whole number, or None when absent or not finite."""
        value = self.number(key)
        return int(value) if value is not None and abs(value) < 2**63 else None

    def flag(self, key: str) -> bool:
        """Return whether the field is true."""
        return self.raw.get(key) is True

    def child(self, key: str) -> Fields:
        """Return the object under `key`, empty when absent."""
        return Fields(self.raw.get(key), self._path(key), self.odd)

    def items(self, key: str) -> list[Any]:
        """Return the list under `key`, empty when absent."""
        value = self.raw.get(key)
        if value is None:
            return []
        if isinstance(value, list):
            return value
        self._note(key, "a list", value)
        return []

    def children(self, key: str) -> list[Fields]:
        """Return the objects of the list under `key`; other entries are noted and left out."""
        found: list[Fields] = []
        for i, entry in enumerate(self.items(key)):
            if isinstance(entry, dict):
                found.append(Fields(entry, f"{self._path(key)}[{i}]", self.odd))
            else:
                self._note(f"{key}[{i}]", "an object", entry)
        return found

    def texts(self, key: str) -> list[str]:
        """Return the texts of the list under `key`; other entries are noted and left out."""
        found: list[str] = []
        for i, entry in enumerate(self.items(key)):
            if isinstance(entry, str):
                found.append(entry)
            else:
                self._note(f"{key}[{i}]", "a text", entry)
        return found

    def numbers(self, key: str) -> dict[str, float]:
        """Return the numbers of the object under `key`; other entries are noted and left out."""
        inner = self.child(key)
        found = {name: inner.number(name) for name in inner.raw}
        return {name: value for name, value in found.items() if value is not None}

    def pairs(self, key: str) -> list[tuple[float, float]]:
        """Return the ``[x, y]`` pairs of the list under `key`; other entries are noted and left out."""
        found: list[tuple[float, float]] = []
        for i, entry in enumerate(self.items(key)):
            place = f"{key}[{i}]"
            if not isinstance(entry, list) or len(entry) != 2:
                self._note(place, "a pair [x, y]", entry)
                continue
            x, y = (self._number(place, value) for value in entry)
            if x is not None and y is not None:
                found.append((x, y))
        return found


# control characters (but tab and newline), lone surrogates, and the marks that turn the direction of text round
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def clean(value: Any) -> Any:
    """Replace, in every text of a JSON value, the characters a page cannot show by the replacement character."""
    if isinstance(value, str):
        return _UNPRINTABLE.sub("\ufffd", value)
    if isinstance(value, list):
        return [clean(entry) for entry in value]
    if isinstance(value, dict):
        return {clean(key): clean(entry) for key, entry in value.items()}
    return value


def read_object(path: Path, *, writer: str, again: str) -> dict[str, Any]:
    """Read a JSON file of format 1.

    Parameters
    ----------
    path : Path
        The file.
    writer : str
        Which command writes such a file, for the messages.
    again : str
        What to do when the file is unusable, a full sentence.

    Returns
    -------
    dict

    Raises
    ------
    DataError
        When the file is missing, is no JSON, is no object, or has another format.
    """
    if not path.is_file():
        raise DataError(f"there is no such file. It is written by `{writer}`: give a folder that has one.", file=path)
    try:
        raw = clean(json.loads(path.read_text(encoding="utf-8")))
    except UnicodeDecodeError as error:
        raise DataError(
            f"the file is not UTF-8 text ({error.reason}, byte {error.start}). {again}", file=path
        ) from None
    except json.JSONDecodeError as error:
        raise DataError(f"the file is not valid JSON ({error.msg}). {again}", file=path, row=error.lineno) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"the file cannot be read as JSON ({error}). {again}", file=path) from None
    if not isinstance(raw, dict):
        raise DataError(f"expected one JSON object, found {kind_of(raw)}. {again}", file=path)
    version = raw.get("format")
    if isinstance(version, bool) or version != 1:
        seen = "no 'format'" if "format" not in raw else f"format {version!r}"[:80]
        todo = again
        if isinstance(version, int) and version > 1:
            todo = "It was written by a newer gnomon: upgrade gnomon."
        raise DataError(f"{seen}; this gnomon reads format 1. {todo}", file=path)
    return raw
