"""Peak memory, measured: allocations on the accelerator, resident memory of the process on the CPU.

On Linux the kernel itself keeps the highest resident size and can be told to start anew; elsewhere, and where that is
not allowed, the size is read at short intervals, which can miss a short peak.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from pathlib import Path
from types import TracebackType

import psutil
import torch

__all__ = ["PeakMemory", "tensor_bytes"]


_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_open: list[PeakMemory] = []  # blocks under way: starting the kernel's peak anew must not lose what they have seen


def _return_free_memory() -> None:
    """Give memory that the allocator holds free back to the system, or using it again would not show."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:  # glibc
        trim(0)


def _kernel_peak() -> int | None:
    """Return the highest resident size since the last reset in bytes; None where the kernel keeps none."""
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


def _restart_kernel_peak() -> bool:
    """Let the kernel's peak start at the present size; False where that is not possible."""
    before = _kernel_peak()
    if before is None:
        return False
    try:
        _RESET.write_text("5")
    except OSError:
        return False
    for block in _open:
        block.peak = max(block.peak, before)
    return True


class PeakMemory:
    """Measures the peak while a block runs.

    Parameters
    ----------
    every : float, default 0.02
        Seconds between two readings of the process's resident memory, where the kernel keeps no peak (CPU only).

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
        self._kernel = False

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
        _return_free_memory()
        self._kernel = _restart_kernel_peak()
        self.peak = 0
        self._read()
        self.before = self.peak
        if self._kernel:
            _open.append(self)
            return self
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
        if self._kernel:
            _open.remove(self)
            self.peak = max(self.peak, _kernel_peak() or 0)
        else:
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
