"""Where claims find real data that cannot be part of the package."""

from __future__ import annotations

import os
from pathlib import Path

from gnomon.errors import DataError

__all__ = ["real_file"]


def real_file(where: str, origin: str) -> Path:
    """Return a file below the folder that the environment variable ``GNOMON_SHARED_DATA`` names.

    Parameters
    ----------
    where : str
        Its place there, such as ``"medec/ms_val.csv.gz"``.
    origin : str
        Where it comes from, for the message.

    Returns
    -------
    Path

    Raises
    ------
    DataError
        When the variable is not set or the file is not there; the message says how to get it.
    """
    root = os.environ.get("GNOMON_SHARED_DATA", "")
    path = Path(root) / where
    if not root or not path.is_file():
        raise DataError(
            f"this claim is measured on real data, and there is no {where} below GNOMON_SHARED_DATA = {root!r}. It is "
            f"made of {origin}. Put it into a folder {path.parent.name} and set the environment variable "
            "GNOMON_SHARED_DATA to the folder above that.",
            file=path if root else None,
        )
    return path
