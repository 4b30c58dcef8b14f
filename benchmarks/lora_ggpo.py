"""GGPO and MGPO against PEFT's LoRA: time of a training step with each back-end, and memory.

    python benchmarks/lora_ggpo.py [--layers 1] [--hidden 768] [--rows 16] [--rounds 9]

All train a LoRA of the same rank on all linear layers of the same Llama, beside each other in one process. LoRA is the
floor. A naive GGPO, which keeps a copy and a noise matrix of every weight, is timed beside them.
"""

from __future__ import annotations

import argparse
import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import peft
import torch
from timing import check, finish, measure
from torch import Tensor

from gnomon.adapters import GGPO, MGPO, Perturbation
from gnomon.common.lora import lora_pairs
from gnomon.common.memory import PeakMemory
from gnomon.common.models import tiny

RANK = 8


def adapted(options: argparse.Namespace, dtype: torch.dtype = torch.float32) -> Any:
    model = tiny(
        "llama", vocab_size=512, hidden_size=options.hidden, num_layers=options.layers, num_heads=8, max_positions=256
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
        return peft.get_peft_model(model.to(dtype), config).train()


class Naive:
    """GGPO with full matrices: a copy of every weight, and noise for every weight at once."""

    def __init__(self, model: Any) -> None:
        self.pairs = lora_pairs(model)

    def __enter__(self) -> None:
        self.copies = [pair.weight.detach().clone() for pair in self.pairs]
        for pair in self.pairs:
            norms = (pair.weight + pair.delta()).detach().norm(dim=1)
            noise = torch.randn(pair.weight.shape) * (0.03 * norms / pair.weight.shape[1] ** 0.5)[:, None]
            pair.weight.data += noise

    def __exit__(self, *error: object) -> None:
        for pair, copy in zip(self.pairs, self.copies, strict=True):
            pair.weight.data.copy_(copy)


def step(model: Any, rows: Tensor, make: Callable[[Any, Any], Any] | None = None) -> Callable[[], None]:
    """One optimizer step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.0)
    window = contextlib.nullcontext() if make is None else make(model, optimizer)

    def run() -> None:
        with window:
            model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def makers() -> dict[str, Callable[[Any, Any], Any] | None]:
    return {
        "PEFT LoRA": None,
        "GGPO, weight": lambda m, o: Perturbation(m, o, GGPO(), backend="weight"),
        "GGPO, functional": lambda m, o: Perturbation(m, o, GGPO(), backend="functional"),
        "MGPO, weight": lambda m, o: Perturbation(m, o, MGPO(), backend="weight"),
        "MGPO, functional": lambda m, o: Perturbation(m, o, MGPO(), backend="functional"),
        "GGPO, naive": lambda m, o: Naive(m),
    }


def steps(options: argparse.Namespace) -> None:
    rows = torch.randint(1, 512, (options.rows, 128), generator=torch.Generator().manual_seed(0))
    candidates = {name: step(adapted(options), rows, make) for name, make in makers().items()}
    print(f"one step, {options.layers} layers of {options.hidden}, {options.rows} x 128 tokens, rank {RANK}")
    medians = measure(candidates, rounds=options.rounds, warmup=2)
    for name, seconds in medians.items():
        print(f"  {name:<48} {seconds * 1e3:10.3f} ms")
    floor = medians["PEFT LoRA"]
    for rule, target in (("GGPO", 1.15), ("MGPO", 1.05)):
        for backend in ("weight", "functional"):
            check(f"step: {rule}, {backend} over LoRA", medians[f"{rule}, {backend}"] / floor, at_most=target)


def memory(options: argparse.Namespace) -> None:
    """What a step needs beyond the model, in MB."""
    print("\nmemory of a step beyond the model and LoRA's own")
    rows = torch.randint(1, 512, (1, 16), generator=torch.Generator().manual_seed(0))
    added = {}
    for name, make in makers().items():
        model = adapted(options)
        size = sum(pair.weight.nbytes for pair in lora_pairs(model))
        run = step(model, rows, make)
        run()
        run()
        with PeakMemory(every=0.001) as peak:
            run()
        added[name] = peak.added / 1e6
        print(f"  {name:<48} {added[name]:10.1f} MB (adapted weights: {size / 1e6:.1f} MB)")
    check("functional MGPO over LoRA, MB", added["MGPO, functional"] - added["PEFT LoRA"], at_most=0.1 * size / 1e6)
    # One matrix W + eps at a time; the allocator keeps several of them, so the copy of all weights is the measure.
    over = {name: value - added["PEFT LoRA"] for name, value in added.items()}
    check("functional GGPO over the naive way, memory", over["GGPO, functional"] / over["GGPO, naive"], at_most=0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    steps(options)
    memory(options)
    finish()


if __name__ == "__main__":
    main()
