"""The errors gnomon raises on purpose: each tells what was wrong, the value seen, what is allowed, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

__all__ = [
    "ConfigError",
    "DataError",
    "GnomonError",
    "GnomonWarning",
    "MethodError",
    "ModelError",
    "NoEffectWarning",
    "nearest",
]


class GnomonError(ValueError):
    """A mistake the user can mend; the command line prints its text alone and exits with code 2."""


class ConfigError(GnomonError):
    """A recipe, an option or a command that cannot be carried out as written."""


class DataError(GnomonError):
    """Data that cannot be used.

    Parameters
    ----------
    message : str
        What was wrong, what is allowed, what to do.
    file : str or Path, optional
        The file in which it stands.
    row : int, optional
        The row in that file, counted from 1.
    """

    def __init__(self, message: str, *, file: str | Path | None = None, row: int | None = None) -> None:
        place = "" if file is None else f"{file}: " if row is None else f"{file}, row {row}: "
        super().__init__(place + message)
        self.file = None if file is None else str(file)
        self.row = row


class ModelError(GnomonError):
    """A model a method cannot work on: wrong family, no model at all, surgery applied twice."""


class MethodError(GnomonError):
    """An argument a method cannot work with: a rank, a sparsity, a shape, a tensor that is not finite."""


class GnomonWarning(UserWarning):
    """Something allowed that the user should know of; a run puts it into its report."""


class NoEffectWarning(GnomonWarning):
    """A call that was allowed but changed nothing."""


def nearest(name: str, known: Iterable[str], *, noun: str = "name") -> str:
    """Return a sentence naming the known names closest to `name`.

    Parameters
    ----------
    name : str
        The name that was not found.
    known : iterable of str
        All names that would have been accepted.
    noun : str, default "name"
        What such a name is called, for the sentence.

    Returns
    -------
    str
        "Did you mean 'fira'?" or, with nothing close, the list of all known names.

    Examples
    --------
    >>> nearest("fria", ["fira", "eora"])
    "Did you mean 'fira'?"
    """
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return "Did you mean " + " or ".join(repr(c) for c in close) + "?"
    return f"Known {noun}s: {', '.join(known)}." if known else f"There are no {noun}s here."
