"""Peak memory, measured: allocations on the accelerator, resident memory of the process on the CPU."""

from __future__ import annotations

import threading
from types import TracebackType

import psutil
import torch

__all__ = ["PeakMemory", "tensor_bytes"]


class PeakMemory:
    """Measures the peak while a block runs.

    Parameters
    ----------
    every : float, default 0.02
        Seconds between two readings of the process's resident memory (CPU only).

    Attributes
    ----------
    before, peak : int
        Bytes at entry and the highest reading until exit; on CUDA, allocations of the current device.
    device : str
        ``"cuda"`` or ``"cpu"``: what was measured.

    Examples
    --------
    >>> with PeakMemory() as memory:
    ...     x = torch.ones(1000)
    >>> memory.peak >= memory.before
    True
    """

    def __init__(self, every: float = 0.02) -> None:
        self.every = every
        self.before = 0
        self.peak = 0
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._process = psutil.Process()

    @property
    def added(self) -> int:
        """Bytes by which the peak exceeded the level at entry."""
        return max(0, self.peak - self.before)

    def _read(self) -> None:
        self.peak = max(self.peak, self._process.memory_info().rss)

    def _watch(self) -> None:
        while not self._stop.wait(self.every):
            self._read()

    def __enter__(self) -> PeakMemory:
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            return self
        self._read()
        self.before = self.peak
        self._stop.clear()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.device == "cuda":
            self.peak = torch.cuda.max_memory_allocated()
            return
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self._read()


def tensor_bytes(value: object) -> int:
    """Sum the bytes of all distinct tensors in a module, an optimizer state or any nesting of dicts and lists."""
    seen: dict[int, int] = {}

    def visit(item: object) -> None:
        if isinstance(item, torch.Tensor):
            storage = item.untyped_storage()
            seen[storage.data_ptr() if storage.data_ptr() else id(item)] = item.numel() * item.element_size()
        elif isinstance(item, torch.nn.Module):
            for tensor in (*item.parameters(), *item.buffers()):
                visit(tensor)
        elif isinstance(item, dict):
            for entry in item.values():
                visit(entry)
        elif isinstance(item, (list, tuple)):
            for entry in item:
                visit(entry)

    visit(value)
    return sum(seen.values())
