"""Fira on the matrices of Llama-130M (12 layers, 768 / 2048, rank 192): step, refresh, state.

    python benchmarks/fira.py [--layers 2] [--rounds 9]

Floors and peers run beside it in the same process: the step against its own floor (two products of 2mnr, one read
of G, one read-modify-write of W) and against the `fira` package; the refresh against exact SVD, in time and, on a
small language model, in loss.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import statistics
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from timing import check, compare, finish, measure
from torch import Tensor, nn

from gnomon.common.linalg import dominant_basis
from gnomon.common.memory import tensor_bytes
from gnomon.optim import Fira, GaLoreAdamW

HIDDEN, MLP, RANK, GAP, ALPHA = 768, 2048, 192, 200, 0.25
SHAPES = [(HIDDEN, HIDDEN)] * 4 + [(MLP, HIDDEN)] * 2 + [(HIDDEN, MLP)]


def matrices(layers: int, seed: int = 0) -> list[nn.Parameter]:
    """The projected weights of the model with gradients whose spectrum falls, as real ones do."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for m, n in SHAPES * layers:
        weight = nn.Parameter(torch.randn(m, n, generator=generator) * 0.02)
        weight.grad = gradient(m, n, generator)
        found.append(weight)
    return found


def gradient(m: int, n: int, generator: torch.Generator) -> Tensor:
    k = min(m, n)
    left, right = (torch.randn(size, k, generator=generator) for size in (m, n))
    return left * torch.arange(1, k + 1) ** -0.7 @ right.T / k**0.5 + 0.01 * torch.randn(m, n, generator=generator)


def group(weights: list[nn.Parameter], gap: int) -> list[dict[str, object]]:
    return [{"params": weights, "rank": RANK, "update_proj_gap": gap, "alpha": ALPHA, "proj_type": "std"}]


def peer_fira(weights: list[nn.Parameter], gap: int) -> torch.optim.Optimizer:
    # this file carries the package's name and stands first on the path
    paths, here = list(sys.path), Path(__file__).resolve().parent
    sys.path[:] = [path for path in paths if Path(path or ".").resolve() != here]
    try:
        FiraAdamW = importlib.import_module("fira").FiraAdamW
    finally:
        sys.path[:] = paths
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        return FiraAdamW(group(weights, gap), lr=0.01, no_deprecation_warning=True)


def floor(weights: list[nn.Parameter]) -> Callable[[], None]:
    """Two products of 2mnr into buffers that exist, then W += G: nothing that computes the step can do less."""
    work = []
    for weight in weights:
        W, G = weight.data, weight.grad
        m, n = W.shape
        tall = m >= n
        P = torch.randn(RANK, n) if tall else torch.randn(m, RANK)
        work.append((W, G, P, tall, torch.empty(m, RANK) if tall else torch.empty(RANK, n), torch.empty(m, n)))

    def run() -> None:
        for W, G, P, tall, low, full in work:
            if tall:
                torch.mm(G, P.T, out=low)
                torch.mm(low, P, out=full)
            else:
                torch.mm(P.T, G, out=low)
                torch.mm(P, low, out=full)
            W.add_(G, alpha=1e-9)

    return run


def steps(layers: int, rounds: int) -> tuple[float, float]:
    """Time one step without a refresh; return our and the package's seconds."""
    never = 1_000_000_000
    ours, peer = matrices(layers), matrices(layers)
    fira, package = Fira(group(ours, never), lr=1e-4), peer_fira(peer, never)
    galore, adamw = matrices(layers), matrices(layers)
    galore_optimizer = GaLoreAdamW(group(galore, never), lr=1e-4)
    dense = torch.optim.AdamW(adamw, lr=1e-4)
    bare = floor(matrices(layers))
    candidates = {
        "Fira.step": fira.step,
        "its floor": bare,
        "fira package": package.step,
        "GaLoreAdamW.step": galore_optimizer.step,
        "torch AdamW": dense.step,
    }
    title = f"one step, {layers} layers of Llama-130M, rank {RANK}"
    compare(title, candidates, ours="Fira.step", peer="its floor", at_most=1.3, rounds=rounds, warmup=2)
    pair = {"Fira.step": fira.step, "fira package": package.step}
    compare(title, pair, ours="Fira.step", peer="fira package", at_least=1.2, rounds=rounds)
    medians = measure(pair, rounds=rounds)
    state_bytes(ours, fira, galore_optimizer)
    return medians["Fira.step"], medians["fira package"]


def state_bytes(weights: list[nn.Parameter], fira: Fira, galore: GaLoreAdamW) -> None:
    """Measure the state against a r + 2 b r + 1 numbers a matrix."""
    expected = sum(min(w.shape) * RANK + 2 * max(w.shape) * RANK + 1 for w in weights) * 4
    print("\nstate")
    measured = tensor_bytes(dict(fira.state))
    print(f"  Fira {measured} bytes, a r + 2 b r + 1 numbers a matrix: {expected}")
    check("state: measured over formula", measured / expected, at_least=1.0, at_most=1.0)
    scalars = 4 * len(weights)
    check("GaLore: measured over formula", tensor_bytes(dict(galore.state)) / (expected - scalars), at_most=1.0)
    dense = sum(2 * w.numel() * 4 for w in weights)
    print(f"  AdamW would hold {dense} bytes: {dense / measured:.2f} times as much")


def refreshes(rounds: int) -> tuple[float, float]:
    """Time the projectors of one layer; return our and the exact seconds."""
    generator = torch.Generator().manual_seed(1)
    work = []
    for m, n in SHAPES:
        before = gradient(m, n, generator)
        after = before + gradient(m, n, generator)
        a = after if m < n else after.T
        old = torch.linalg.svd(before if m < n else before.T, full_matrices=False).U[:, :RANK].contiguous()
        work.append((after, a, old))

    def exact() -> None:
        for after, _, _ in work:
            torch.linalg.svd(after, full_matrices=False)

    def warm() -> None:
        for _, a, old in work:
            dominant_basis(a, RANK, start=old)

    pair = {"warm-started refresh": warm, "exact SVD": exact}
    compare("refresh of one layer's seven projectors", pair, ours="warm-started refresh", peer="exact SVD",
            at_least=10, rounds=rounds)  # fmt: skip
    kept = []
    for after, a, old in work:
        best = torch.linalg.svdvals(after)[:RANK].norm()
        kept.append(float((dominant_basis(a, RANK, start=old).T @ a).norm() / best))
    check("gradient norm captured, of the best possible (worst matrix)", min(kept), at_least=0.97)
    medians = measure(pair, rounds=max(3, rounds // 3))
    return medians["warm-started refresh"], medians["exact SVD"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    ours, package = steps(options.layers, options.rounds)
    warm, exact = refreshes(options.rounds)
    ours += warm * options.layers / GAP
    package += exact * options.layers / GAP
    print(f"\namortised over a gap of {GAP}\n  Fira {ours * 1e3:.1f} ms, fira package {package * 1e3:.1f} ms a step")
    check("amortised: fira package over Fira", package / ours, at_least=1.5)
    loss_curves()
    finish()


def loss_curves(seeds: int = 3) -> None:
    """Train a small Llama with exact and with randomised refreshes: the losses must differ by seed noise only."""
    from gnomon.claims.fira import train

    exact = [train("fira", seed, refresh="exact").loss for seed in range(seeds)]
    fast = [train("fira", seed, refresh="randomized").loss for seed in range(seeds)]
    noise = statistics.stdev(exact)
    gap = abs(statistics.mean(fast) - statistics.mean(exact))
    print("\nvalidation loss after training with exact and randomised refreshes, per seed")
    print("  exact     ", " ".join(f"{loss:.4f}" for loss in exact))
    print("  randomised", " ".join(f"{loss:.4f}" for loss in fast))
    check("difference of the means over the spread of seeds", gap / noise, at_most=1.0)


if __name__ == "__main__":
    main()
