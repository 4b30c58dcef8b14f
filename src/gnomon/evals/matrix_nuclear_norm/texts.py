"""The texts of the authors' evaluation, from rows as the data sets publish them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from gnomon.errors import DataError, MethodError, nearest

__all__ = ["SOURCES", "evaluation_texts"]


def _openbookqa(row: Mapping[str, Any]) -> str:
    choices = row["choices"]
    listed = " ".join(f"{label}: {text}" for label, text in zip(choices["label"], choices["text"], strict=True))
    return f" question: {row['question_stem']} {listed}  answerKey {row['answerKey']}"


def _piqa(row: Mapping[str, Any]) -> str:
    return f"goal: {row['goal']} solution1: {row['sol1']} solution2: {row['sol2']} label: {row['label']}"


def _winogrande(row: Mapping[str, Any]) -> str:
    # "sentece" is how the authors' evaluation spells it
    options = f"option1: {row['option1']} option2: {row['option2']}"
    return f"sentece: {row['sentence']} {options} answer: {row['answer']}"


def _field(name: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda row: row[name]


SOURCES: dict[str, tuple[Callable[[Mapping[str, Any]], str], int | None]] = {
    "wikipedia": (_field("text"), 10_000),
    "openwebtext2": (_field("text"), 10_000),
    "dolly-15k": (_field("context"), None),
    "hh-rlhf": (_field("chosen"), None),
    "openbookqa": (_openbookqa, 1_000),
    "piqa": (_piqa, 1_000),
    "winogrande": (_winogrande, 1_000),
}
"""Data set -> how a row becomes a text, and how many texts the authors drew (None: all)."""


def evaluation_texts(
    rows: Iterable[Mapping[str, Any]], source: str, *, samples: int | None = None, seed: int = 123
) -> list[str]:
    """Turn rows of a data set into the texts that the authors score.

    Parameters
    ----------
    rows : iterable of mapping
        Rows with the columns of the published set. For hh-rlhf, chain the rows of its four test sets.
    source : str
        One of `SOURCES`: wikipedia, openwebtext2 (column ``text``), dolly-15k (non-empty ``context``),
        hh-rlhf (``chosen``), openbookqa, piqa, winogrande (the question, its options and the answer in one
        line).
    samples : int, optional
        How many texts to draw without replacement; default the authors' number, all where there are fewer.
    seed : int, default 123
        Seeds the draw (authors' value); the global random state is not used.

    Returns
    -------
    list of str

    Raises
    ------
    MethodError
        When the source is unknown or `samples` is under 1.
    DataError
        When a row lacks a column, or no text is left.

    Examples
    --------
    >>> evaluation_texts([{"goal": "open a jar", "sol1": "turn", "sol2": "sing", "label": 0}], "piqa")
    ['goal: open a jar solution1: turn solution2: sing label: 0']
    """
    if source not in SOURCES:
        raise MethodError(f"There is no source {source!r}. {nearest(source, SOURCES, noun='source')}")
    if samples is not None and samples < 1:
        raise MethodError(f"samples is {samples}; it must be 1 or more.")
    to_text, default = SOURCES[source]
    texts = []
    for number, row in enumerate(rows, 1):
        try:
            text = to_text(row)
        except (KeyError, TypeError) as error:
            message = f"this row is no row of {source}: {error!r} is missing."
            raise DataError(message, file=source, row=number) from error
        if isinstance(text, str) and text.strip():
            texts.append(text)
    if not texts:
        raise DataError(f"No text is left of the rows of {source}: all are empty.")
    count = default if samples is None else samples
    return texts if count is None or count >= len(texts) else random.Random(seed).sample(texts, count)
