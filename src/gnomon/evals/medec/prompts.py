"""What a model is asked: two wordings, each with or without one example."""

from __future__ import annotations

from typing import Literal

from gnomon.errors import ConfigError, nearest
from gnomon.evals.medec.notes import Note

__all__ = ["EXAMPLE", "PROMPTS", "SYSTEM", "prompt_text"]

PromptName = Literal["p1", "p2"]

SYSTEM = "You are an experienced medical doctor who reviews clinical notes for errors."

_OPENING = {
    "p1": "The clinical note below is either correct or contains exactly one error.",
    "p2": (
        "The clinical note below is either correct or contains exactly one error. The error, if there is one, concerns "
        "a treatment, the management, the cause, or the diagnosis."
    ),
}

_TASK = (
    "There is one sentence per line, and each line begins with the number of its sentence. Check every sentence.\n"
    "If the note is correct, answer with the one word CORRECT.\n"
    "If a sentence is wrong, answer with its number, a space, and the corrected sentence, and nothing else."
)

PROMPTS = tuple(_OPENING)

EXAMPLE = (
    Note(
        text_id="example",
        sentences=(
            (0, "A 30-year-old man has a painful red knee."),
            (1, "Fluid shows needle-shaped negatively birefringent crystals."),
            (2, "The patient is diagnosed with pseudogout."),
        ),
        flag=1,
        sentence_id=2,
        correction="The patient is diagnosed with gout.",
        error_type="diagnosis",
    ),
    "2 The patient is diagnosed with gout.",
)
"""An invented note and its answer, shown where an example is asked for."""


def prompt_text(note: Note, prompt: str = "p1", examples: int = 0) -> str:
    """Return what the model is asked about one note.

    Parameters
    ----------
    note : Note
    prompt : {"p1", "p2"}, default "p1"
        ``"p2"`` also says what kinds of error there are.
    examples : {0, 1}, default 0

    Raises
    ------
    ConfigError
        When there is no such wording, or another number of examples is asked for.

    Examples
    --------
    >>> "CORRECT" in prompt_text(EXAMPLE[0])
    True
    """
    if prompt not in _OPENING:
        raise ConfigError(f"prompt = {prompt!r}. {nearest(str(prompt), PROMPTS, noun='prompt')}")
    if examples not in (0, 1) or isinstance(examples, bool):
        raise ConfigError(f"examples = {examples!r}. Allowed: 0 or 1.")
    parts = [_OPENING[prompt], _TASK]
    if examples:
        parts.append(f"Example\n\nNote:\n{EXAMPLE[0].text}\n\nAnswer: {EXAMPLE[1]}")
    parts.append(f"Note:\n{note.text}\n\nAnswer:")
    return "\n\n".join(parts)
