"""Averaging checkpoints on disk against loading them all, and the online update against a training step.

    python benchmarks/checkpoint_averaging.py [--checkpoints 10] [--width 384] [--rounds 5]

The peer is the plain script: `torch.load` of every state dict, then a loop over names. mergekit is not measured.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from timing import check, compare, finish, measure

from gnomon.common.memory import PeakMemory
from gnomon.common.models import tiny
from gnomon.merge import RunningAverage, average_checkpoints


def write_run(folder: Path, count: int, width: int) -> int:
    """Write snapshots of one run in both formats; return the bytes of one."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"embed": (20 * width, width), "head": (5, width)}
    for i in range(6):
        shapes |= {f"layers.{i}.attention": (4 * width, width), f"layers.{i}.mlp": (8 * width, width)}
        shapes |= {f"layers.{i}.norm": (width,), f"layers.{i}.bias": (4 * width,)}
    start = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for i in range(count):
        state = {name: t + 0.01 * torch.randn(t.shape, generator=generator) for name, t in start.items()}
        path = folder / f"checkpoint-{100 * (i + 1)}"
        path.mkdir(parents=True)
        save_file(state, path / "model.safetensors", {"format": "pt"})
        torch.save(state, path.parent / f"state-{i}.pt")
    return sum(t.nbytes for t in start.values())


def plain(folder: Path, count: int) -> dict[str, torch.Tensor]:
    """What one writes by hand: all state dicts at once, a loop over names."""
    states = [torch.load(folder / f"state-{i}.pt", weights_only=True) for i in range(count)]
    mean = {name: sum(state[name].float() for state in states) / count for name in states[0]}
    torch.save(mean, folder / "plain.pt")
    return mean


def averaged(folder: Path, count: int) -> None:
    average_checkpoints([folder / f"checkpoint-{100 * (i + 1)}" for i in range(count)], folder / "average")


def _added(call: Callable[[Path, int], object], folder: Path, count: int) -> int:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    call(folder / "small", 2)  # imports and first-use allocations, on a run too small to matter
    with PeakMemory(every=0.001) as memory:
        call(folder, count)
    return memory.added


def added(call: Callable[[Path, int], object], folder: Path, count: int, repeats: int = 3) -> float:
    """Return the median number of bytes by which a call raises memory, each time in a fresh process.

    In a process that has run either before, the allocator would serve it from pages it kept.
    """
    values = []
    for _ in range(repeats):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            values.append(pool.submit(_added, call, folder, count).result())
    return float(statistics.median(values))


def offline(folder: Path, count: int, width: int, rounds: int) -> None:
    size = write_run(folder, count, width)
    write_run(folder / "small", 2, 8)
    print(f"{count} checkpoints of {size / 1e6:.0f} MB")

    def ours() -> None:
        averaged(folder, count)

    def peer() -> None:
        plain(folder, count)

    ours()
    mean, found = plain(folder, count), load_file(folder / "average" / "model.safetensors")
    check("largest difference of the two results", max(float((found[k] - v).abs().max()) for k, v in mean.items()),
          at_most=2e-6)  # fmt: skip
    del mean, found
    pair = {"average_checkpoints": ours, "torch.load of all": peer}
    compare("one average, disk to disk", pair, ours="average_checkpoints", peer="torch.load of all", at_least=1.0,
            rounds=rounds)  # fmt: skip
    mine, theirs = added(averaged, folder, count), added(plain, folder, count)
    print("\nmemory added, each in a fresh process")
    print(f"  average_checkpoints {mine / 1e6:.1f} MB, torch.load of all {theirs / 1e6:.1f} MB")
    check("memory added over the size of one checkpoint", mine / size, at_most=0.5)
    check("memory: torch.load of all over average_checkpoints", theirs / mine, at_least=4.0)


def online(rounds: int) -> None:
    """One update against one training step of the same model; an epoch has at least this many steps."""
    steps_of_epoch = 100
    model = tiny("llama", hidden_size=256, num_layers=6, vocab_size=4096)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    batch = torch.randint(0, 4096, (16, 64), generator=torch.Generator().manual_seed(0))
    average = RunningAverage()
    average.update(model.state_dict())

    def step() -> None:
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def update() -> None:
        average.update(model.state_dict())

    medians = measure({"step": step, "update": update}, rounds=rounds)
    print("\nonline")
    print(f"  training step {medians['step'] * 1e3:.1f} ms, one update {medians['update'] * 1e3:.1f} ms")
    share = medians["update"] / medians["step"]
    check(
        f"an update per epoch of {steps_of_epoch} steps, share of the training time",
        share / steps_of_epoch,
        at_most=0.01,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoints", type=int, default=10)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    folder = Path(tempfile.mkdtemp(prefix="averaging-"))
    try:
        offline(folder, options.checkpoints, options.width, options.rounds)
    finally:
        shutil.rmtree(folder)
    online(options.rounds)
    finish()


if __name__ == "__main__":
    main()
