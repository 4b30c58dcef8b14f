"""Times candidates side by side in one process: interleaved rounds, medians, ratios, the machine they ran on."""

from __future__ import annotations

import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping

import torch

_missed: list[str] = []


def machine() -> str:
    """Return the processor, its cores and the versions that matter, as one line."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    threads = torch.get_num_threads()
    return f"{name}, {threads} threads, torch {torch.__version__}, Python {platform.python_version()}"


def measure(candidates: Mapping[str, Callable[[], object]], *, rounds: int = 7, warmup: int = 1) -> dict[str, float]:
    """Return the median seconds of each candidate; every round runs all of them in turn."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(warmup + rounds):
        for name, run in candidates.items():
            started = time.perf_counter()
            run()
            if turn >= warmup:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def compare(
    title: str,
    candidates: Mapping[str, Callable[[], object]],
    *,
    ours: str,
    peer: str,
    at_least: float | None = None,
    at_most: float | None = None,
    rounds: int = 7,
    warmup: int = 1,
) -> float:
    """Time all candidates and print them; return and check the ratio of `peer` to `ours`.

    `at_least`: ours must be at least this many times faster than the peer (peer / ours).
    `at_most`: ours may take at most this many times the peer (ours / peer), for floors and limits.
    """
    medians = measure(candidates, rounds=rounds, warmup=warmup)
    print(f"\n{title}")
    for name, seconds in medians.items():
        print(f"  {name:<48} {seconds * 1e3:10.3f} ms")
    ratio = medians[peer] / medians[ours]
    if at_most is not None:
        check(f"{title}: {ours} over {peer}", 1 / ratio, at_most=at_most)
    else:
        check(f"{title}: {peer} over {ours}", ratio, at_least=at_least)
    return ratio


def check(what: str, value: float, *, at_least: float | None = None, at_most: float | None = None) -> None:
    """Print a figure beside its target and remember a miss for `finish`."""
    met = (at_least is None or value >= at_least) and (at_most is None or value <= at_most)
    target = ""
    if at_least is not None or at_most is not None:
        target = f" (target >= {at_least:g})" if at_least is not None else f" (target <= {at_most:g})"
    print(f"  {what}: {value:.3g}{target}{'' if met else '  MISSED'}")
    if not met:
        _missed.append(what)


def finish() -> None:
    """Print the machine; exit with 1 when a target was missed."""
    print(f"\n{machine()}")
    if _missed:
        sys.exit("targets missed: " + "; ".join(_missed))
