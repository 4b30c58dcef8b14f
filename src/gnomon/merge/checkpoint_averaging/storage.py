"""Weights on disk, read and written a piece at a time: no file is ever held in memory as a whole."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gnomon.errors import ModelError

__all__ = ["DTYPES", "Entry", "Reader", "ShardWriter", "entries_of"]

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
}  # fmt: skip
_CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor in a file: where it stands, its dtype and shape; `loaded` when the format has to be unpickled."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int = 0
    loaded: Tensor | None = field(default=None, compare=False, repr=False)

    @property
    def numel(self) -> int:
        """Number of elements."""
        return torch.Size(self.shape).numel()

    def read(self) -> Tensor:
        """Return the whole tensor."""
        with Reader(self, self.numel) as reader:
            return reader.read(0, self.numel).clone().reshape(self.shape)


def entries_of(file: Path) -> dict[str, Entry]:
    """Return what a ``.safetensors`` or a torch ``.bin`` file holds, without reading the tensors.

    Raises
    ------
    ModelError
        When the file is damaged, cut short, or of a dtype this library does not read.
    """
    if file.suffix == ".safetensors":
        return _safetensors_entries(file)
    try:
        state = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # torch raises a family of unrelated types for a damaged or foreign file
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{file} is no readable file of weights ({first}). Give the checkpoint's folder.") from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ModelError(f"{file} holds no state dict of tensors, so it is no file of weights. Give the model's own.")
    return {name: Entry(file, t.dtype, tuple(t.shape), loaded=t) for name, t in state.items()}


def _safetensors_entries(file: Path) -> dict[str, Entry]:
    try:
        with safe_open(file, framework="pt"):  # checks the header against the length of the file
            pass
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{file} is damaged or cut short ({error}). Copy or save the checkpoint again, or leave it out."
        ) from error
    with open(file, "rb") as handle:
        (length,) = struct.unpack("<Q", handle.read(8))
        header: dict[str, Any] = json.loads(handle.read(length))
    header.pop("__metadata__", None)
    found = {}
    for name, about in header.items():
        if about["dtype"] not in DTYPES:
            raise ModelError(
                f"{file}: {name!r} has the dtype {about['dtype']}, which cannot be averaged. Allowed: "
                "float64, float32, float16, bfloat16 (and integers, which are taken from the last checkpoint)."
            )
        start = 8 + length + about["data_offsets"][0]
        found[name] = Entry(file, DTYPES[about["dtype"]], tuple(about["shape"]), start)
    return found


class Reader:
    """Reads consecutive pieces of one tensor into a buffer of its own."""

    def __init__(self, entry: Entry, piece: int) -> None:
        self.entry = entry
        self._size = entry.dtype.itemsize
        self._flat = None if entry.loaded is None else entry.loaded.reshape(-1)
        self._bytes = bytearray(0 if self._flat is not None else max(1, min(piece, entry.numel)) * self._size)
        self._file: IO[bytes] | None = None

    def __enter__(self) -> Reader:
        if self._flat is None:
            self._file = open(self.entry.file, "rb", buffering=0)
            self._file.seek(self.entry.offset)
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()

    def read(self, begin: int, end: int) -> Tensor:
        """Return elements `begin` to `end` (one after the other call); valid until the next call."""
        if self._flat is not None:
            return self._flat[begin:end]
        assert self._file is not None
        if end == begin:
            return torch.empty(0, dtype=self.entry.dtype)
        view = memoryview(self._bytes)[: (end - begin) * self._size]
        done = 0
        while done < len(view):
            got = self._file.readinto(view[done:])  # type: ignore[attr-defined]
            if not got:
                raise ModelError(f"{self.entry.file} ends before its tensors do. It was changed while being read.")
            done += got
        return torch.frombuffer(self._bytes, dtype=self.entry.dtype, count=end - begin)


class ShardWriter:
    """Writes one ``.safetensors`` file in the order of its plan, piece by piece.

    Parameters
    ----------
    path : Path
    plan : sequence of (name, dtype, shape)
        Sorted here by dtype size and name, as the format wants for alignment; `order` gives the result.
    """

    def __init__(self, path: Path, plan: Sequence[tuple[str, torch.dtype, tuple[int, ...]]]) -> None:
        plan = sorted(plan, key=lambda item: (-item[1].itemsize, item[0]))
        self.order = [name for name, _, _ in plan]
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name, dtype, shape in plan:
            end = at + torch.Size(shape).numel() * dtype.itemsize
            header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [at, end]}
            at = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.bytes = at
        self._file = open(path, "wb")  # noqa: SIM115 (closed in __exit__)
        self._file.write(struct.pack("<Q", len(text)) + text)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def write(self, piece: Tensor) -> None:
        """Append the next elements, already in the dtype of the plan."""
        if piece.numel():
            self._file.write(piece.contiguous().reshape(-1).view(torch.uint8).numpy().data)
