"""EoRA of one layer: Cholesky and a randomised range finder against an eigendecomposition and a full SVD."""

from __future__ import annotations

import argparse

import torch
from timing import check, compare, finish

from gnomon.compress.eora import eora_layer, output_error


def problem(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a white weight error, the hardest for a range finder, and the Gram matrix of correlated inputs."""
    g = torch.Generator().manual_seed(0)
    gram = torch.zeros(size, size)
    scale = torch.logspace(0, -2, size)
    mix = torch.randn(size, size, generator=g) / size**0.5
    for _ in range(8):
        x = (torch.randn(size // 2, size, generator=g) * scale) @ mix
        gram.addmm_(x.T, x)
    return torch.randn(size, size, generator=g), gram


def naive(delta: torch.Tensor, gram: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (A, B) by the steps as they are written down."""
    values, Q = torch.linalg.eigh(gram.double())
    root = values.clamp(min=float(values[-1]) * 1e-12).sqrt()
    U, S, Vh = torch.linalg.svd(delta @ (Q * root).float(), full_matrices=False)
    scale = S[:rank].sqrt()
    return scale[:, None] * Vh[:rank] @ (Q / root).T.float(), U[:, :rank] * scale


def run(size: int, rank: int, at_least: float, rounds: int) -> None:
    delta, gram = problem(size)
    kept: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    title = f"EoRA, {size} x {size}, rank {rank}"
    compare(
        title,
        {
            "eora_layer": lambda: kept.update(ours=eora_layer(delta, gram, rank)),
            "eigendecomposition + full SVD": lambda: kept.update(naive=naive(delta, gram, rank)),
        },
        ours="eora_layer",
        peer="eigendecomposition + full SVD",
        at_least=at_least,
        rounds=rounds,
        warmup=1 if rounds > 1 else 0,
    )
    ours, best = (output_error(delta - B @ A, gram) for A, B in (kept["ours"], kept["naive"]))
    check(f"{title}: objective over the optimum", ours / best, at_most=1.01)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="leave the 4096 x 4096 layer out (some minutes)")
    if parser.parse_args().quick:
        run(1024, 64, at_least=2, rounds=5)
    else:
        run(1024, 64, at_least=2, rounds=5)
        run(4096, 64, at_least=10, rounds=1)
    finish()
