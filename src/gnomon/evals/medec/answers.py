"""What a system says of a note: parsing a model's answer, reading and writing submission files."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from gnomon.common.files import write_text
from gnomon.common.rows import FORMATS, read_rows, read_text
from gnomon.errors import DataError, GnomonWarning, MethodError
from gnomon.evals.medec.notes import NA

__all__ = ["PARSERS", "Prediction", "Submission", "parse_answer", "read_run", "write_run"]

Parser = Literal["lenient", "strict"]
PARSERS = ("lenient", "strict")

RUN_EXPECTED = (
    "Expected: one line per note, '<text id> <flag> <sentence id> <corrected sentence or NA>', such as "
    "'ms-test-0 1 4 The patient has gout.'; or a table with the columns text_id and answer (a model's own words), or "
    "text_id, flag, sentence_id, correction; or an Inspect log (.eval)."
)

_LINE = re.compile(r"[a-z0-9\-]+\s[0-9]+\s-?[0-9]+\s.+")
_DECORATION = " \t\r\n*_`\"'“”‘’.!:;,#>()[]{}"
_CORRECT_FIRST = re.compile(r"[\s*_`\"'“”#>(\[]*CORRECT[*_`\"'“”)\]]*\s*(?:[.:;,!\n–—-]|$)")
_NUMBER = r"(?P<id>-?\d+)(?!\d|[.,:/]\d|\s?%)"
_FIRST = re.compile(rf"(?<![\w.,/-])(?:[Ss](?:ent(?:ence)?)?[ #.:_-]*)?(?:(?:id|ID)[ :#=]*)?{_NUMBER}(?![A-Za-z])")
_LEADING = re.compile(
    rf"[\s*_`\"'“”#>(\[<|-]*?(?:[Ss](?:ent(?:ence)?)?[ #.:_-]*)?(?:(?:id|ID)[ :#=]*)?{_NUMBER}(?![A-Za-z])"
)
_SEPARATOR = re.compile(r"^,?[\s.:;|)\]}>*_`=–—-]+")  # a comma only right after the number: "7 , and" is a fragment


class Prediction(NamedTuple):
    """A system's answer on one note: flag, number of the sentence (-1: none), corrected sentence (``"NA"``: none)."""

    flag: int
    sentence_id: int
    correction: str


CORRECT = Prediction(0, -1, NA)


def parse_answer(text: str, parser: Parser = "lenient") -> Prediction | None:
    """Read a model's answer.

    ``CORRECT`` as the whole answer (any case, with punctuation or markdown around it), or in capitals at its
    beginning, means that the note is correct. Else the first whole number is the sentence and what follows it the
    correction, with white space collapsed and quotes removed. A number that is no sentence of the note stays: the
    flag counts, the sentence does not. Anything else is no answer.

    Parameters
    ----------
    text : str
    parser : {"lenient", "strict"}, default "lenient"
        ``"strict"`` takes a number only at the beginning of the answer (``3``, ``S3``, ``Sentence 3``, with markdown)
        and ``CORRECT`` only as the whole answer.

    Returns
    -------
    Prediction or None
        None when there is nothing to read, which is kept apart from a wrong answer.

    Raises
    ------
    MethodError
        When there is no such parser.

    Examples
    --------
    >>> parse_answer("**2** The patient is diagnosed with gout.")
    Prediction(flag=1, sentence_id=2, correction='The patient is diagnosed with gout.')
    >>> parse_answer("I cannot tell.") is None
    True
    """
    if parser not in PARSERS:
        raise MethodError(f"parser = {parser!r}. Allowed: {', '.join(PARSERS)}.")
    bare = text.strip(_DECORATION)
    if bare.upper() == "CORRECT":
        return CORRECT
    if parser == "lenient" and _CORRECT_FIRST.match(text):
        return CORRECT
    found = _FIRST.search(text) if parser == "lenient" else _LEADING.match(text)
    if found is None:
        return None
    correction = _tidy(text[found.end() :])
    sentence_id = int(found["id"])
    if sentence_id == -1 and correction in ("", NA):
        return CORRECT  # the data's own way to write that no sentence is wrong
    return Prediction(1, sentence_id, correction or NA)


def _tidy(text: str) -> str:
    rest = " ".join(_SEPARATOR.sub("", text).split())
    rest = re.sub(r"[*_`]+$", "", rest).strip()
    for opening, closing in (('"', '"'), ("“", "”"), ("'", "'"), ("<", ">")):
        if len(rest) > 1 and rest.startswith(opening) and rest.endswith(closing):
            rest = rest[1:-1].strip()
    return rest


@dataclass(frozen=True)
class Submission:
    """Predictions read from a file.

    Attributes
    ----------
    predictions : dict of str to Prediction
        By text id; of an id that occurs again the last line counts.
    ignored : list of (int, str)
        Lines that have not the official form, by number (from 1).
    unparsed : list of str
        Ids of notes whose answer could not be read (tables and logs); they count as missing.
    repeated : list of str
        Ids that occurred again.
    odd : list of str
        Ids with flag 0 but a sentence number, or flag 1 without a correction; they count as they stand.
    """

    predictions: dict[str, Prediction]
    ignored: list[tuple[int, str]] = field(default_factory=list)
    unparsed: list[str] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)
    odd: list[str] = field(default_factory=list)

    @property
    def notices(self) -> list[str]:
        """What a reader of the result should know, as sentences."""
        said = []
        if self.ignored:
            number, line = self.ignored[0]
            said.append(
                f"{len(self.ignored)} lines have not the form of a submission and were left out; the first is line "
                f"{number}: {line[:60]!r}."
            )
        for ids, what in (
            (self.unparsed, "answers could not be read and count as missing"),
            (self.repeated, "ids occur again; their last line counts"),
            (self.odd, "answers have flag 0 with a sentence number, or flag 1 without a correction; they count as is"),
        ):
            if ids:
                said.append(f"{len(ids)} {what}; the first is {ids[0]!r}.")
        return said


def _collect(items: Iterable[tuple[str, Prediction | None]], ignored: list[tuple[int, str]]) -> Submission:
    found: dict[str, Prediction] = {}
    unparsed: list[str] = []
    repeated: list[str] = []
    seen: set[str] = set()
    for text_id, prediction in items:
        if text_id in seen:
            repeated.append(text_id)
            found.pop(text_id, None)
        seen.add(text_id)
        if prediction is None:
            unparsed.append(text_id)
        else:
            found[text_id] = prediction
    odd = [i for i, p in found.items() if (p.flag == 0 and p.sentence_id != -1) or (p.flag == 1 and p.correction == NA)]
    return Submission(found, ignored, [i for i in unparsed if i not in found], repeated, odd)


def _normal(flag: int, sentence_id: int, correction: str) -> Prediction:
    """Apply the official rules: quotes and runs of white space go, flag 0 has no correction."""
    said = " ".join(correction.split()).strip('"').strip()
    return Prediction(flag, sentence_id, said or NA) if flag else Prediction(flag, sentence_id, NA)


def read_run(path: str | Path, *, parser: Parser = "lenient") -> Submission:
    """Read predictions: a submission file, a table, or the log of an evaluation.

    Parameters
    ----------
    path : str or Path
        A text file in the official form ``<text id> <flag> <sentence id> <correction>``; lines of another form are
        left out with a notice. Or a ``.csv``, ``.jsonl`` or ``.parquet`` with ``text_id`` and either ``answer`` (a
        model's own words) or ``flag``, ``sentence_id``, ``correction``. Or an Inspect log (``.eval``).
    parser : {"lenient", "strict"}, default "lenient"
        For answers in a model's own words.

    Returns
    -------
    Submission

    Raises
    ------
    DataError
        When the file is missing or empty, or no line of it can be used.

    Warns
    -----
    GnomonWarning
        With every notice.
    """
    path = Path(path).expanduser()
    kind = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if kind == ".eval":
        submission = _from_log(path, parser)
    elif kind in FORMATS:
        submission = _from_table(path, parser)
    else:
        submission = _from_lines(path)
    if not submission.predictions and not submission.unparsed:
        raise DataError(f"no line of this file is a prediction. {RUN_EXPECTED}", file=path, row=1)
    for notice in submission.notices:
        warnings.warn(notice, GnomonWarning, 2)
    return submission


def _from_lines(path: Path) -> Submission:
    items: list[tuple[str, Prediction | None]] = []
    ignored: list[tuple[int, str]] = []
    for number, line in enumerate(read_text(path, expected=RUN_EXPECTED).split("\n"), 1):
        line = line.strip()
        if not line:
            continue
        if not _LINE.fullmatch(line):
            ignored.append((number, line))
            continue
        text_id, flag, sentence_id, correction = line.split(None, 3)
        items.append((text_id, _normal(int(flag), int(sentence_id), correction)))
    return _collect(items, ignored)


def _from_table(path: Path, parser: Parser) -> Submission:
    rows = read_rows(path, columns=("text_id",), expected=RUN_EXPECTED)
    items: list[tuple[str, Prediction | None]] = []
    for row in rows:
        text_id = str(row["text_id"]).strip()
        if "answer" in row:
            items.append((text_id, parse_answer(str(row["answer"] or ""), parser)))
            continue
        try:
            flag, sentence_id = int(float(row["flag"])), int(float(row["sentence_id"]))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"flag and sentence_id must be whole numbers. {RUN_EXPECTED}", file=path, row=row.number
            ) from (error)
        items.append((text_id, _normal(flag, sentence_id, str(row.get("correction") or NA))))
    return _collect(items, [])


def _from_log(path: Path, parser: Parser) -> Submission:
    from gnomon.common.tasks import read_log

    samples = [sample for sample in read_log(path).samples or [] if sample.epoch == 1]
    return _collect([(str(s.id), parse_answer(s.output.completion, parser)) for s in samples], [])


def write_run(predictions: Mapping[str, Prediction | tuple[int, int, str]], path: str | Path) -> None:
    """Write predictions in the form that the shared task takes: one line each, whole or not at all.

    Raises
    ------
    MethodError
        When an id does not fit the form (lower-case letters, digits and dashes).
    """
    lines = []
    for text_id, prediction in predictions.items():
        said = _normal(*prediction)
        line = f"{text_id} {said.flag} {said.sentence_id} {said.correction}"
        if not _LINE.fullmatch(line):
            raise MethodError(
                f"the prediction {line[:60]!r} does not fit the form of a submission; ids hold a-z, 0-9 and '-'."
            )
        lines.append(line)
    write_text(Path(path), "\n".join(lines) + "\n")


def prediction_from(value: Any) -> Prediction | None:
    """Read a prediction back from a log's metadata."""
    return None if value is None else Prediction(int(value[0]), int(value[1]), str(value[2]))
