"""DSnoT and its bases on one layer of 4096 x 4096 at 50 %.

Targets: the mask is exactly that of a loop over rows in float64, at 20 times its speed or more, in bounded memory;
Wanda within 1.5 times torch's fastest partial sort and within twice numpy's, which it uses; SparseGPT within 2 times
its Cholesky factorisations and products.

    python benchmarks/dsnot.py [--width 4096] [--rounds 5]

Runs on one core: the loop over rows has but one, and a busy machine then does not decide. The loop is timed on some
rows and extrapolated, as every row costs it the same.
"""

from __future__ import annotations

import argparse
import runpy
import time
from pathlib import Path

import numpy as np
import torch
from timing import check, compare, finish, measure

from gnomon.common.calibration import LayerInputs
from gnomon.common.memory import PeakMemory
from gnomon.compress.dsnot import dsnot_layer, sparsegpt_layer, wanda_mask

DEFINITION = Path(__file__).parents[1] / "tests" / "compress" / "test_dsnot.py"
ROWS_OF_THE_LOOP = 32


def layer(width: int) -> tuple[torch.Tensor, LayerInputs]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(width, width, generator=generator)
    spread, mean = torch.rand(width, generator=generator), 0.3 * torch.randn(width, generator=generator)
    x = torch.randn(4, 512, width, generator=generator) * spread + mean
    return weight, LayerInputs.from_tensor(x)


def refinement(weight: torch.Tensor, inputs: LayerInputs, keep: torch.Tensor, rounds: int) -> None:
    with PeakMemory(every=0.002) as memory:  # the first call: later ones find freed memory at hand
        refined = dsnot_layer(weight, inputs, keep)
    size = weight.numel() * weight.element_size()
    check("memory added, in weights of this size in float32", memory.added / size, at_most=2)
    dsnot_row = runpy.run_path(str(DEFINITION))["dsnot_row"]
    rows = torch.randperm(len(weight), generator=torch.Generator().manual_seed(1))[:ROWS_OF_THE_LOOP]
    arrays = [v.numpy() for v in (inputs.mean_sum, inputs.mean_square, inputs.variance)]
    dense, start = weight[rows].double().numpy(), keep[rows].numpy()

    def loop() -> np.ndarray:
        return np.stack([dsnot_row(w, *arrays, k)[0] for w, k in zip(dense, start, strict=True)])

    different = int((refined[rows].numpy() != loop()).any(1).sum())
    print(f"  swaps per row: {float((refined & ~keep).sum(1).float().mean()):.1f}")
    check(f"rows of {len(rows)} whose mask differs from the definition's", different, at_most=0.5)
    check("rows whose number of zeros changed", int((refined.sum(1) != keep.sum(1)).sum()), at_most=0.5)

    medians = measure({"ours": lambda: dsnot_layer(weight, inputs, keep), "loop": loop}, rounds=rounds)
    whole = medians["loop"] * len(weight) / len(rows)
    print(f"  dsnot_layer {medians['ours'] * 1e3:.0f} ms; loop over rows {whole:.2f} s, from {len(rows)} rows")
    check("loop over rows (extrapolated) over dsnot_layer", whole / medians["ours"], at_least=20)

    blocks = wanda_mask(weight, inputs, pattern="2:4")
    patterned = {
        "wanda_mask 2:4": lambda: wanda_mask(weight, inputs, pattern="2:4"),
        "dsnot_layer 2:4": lambda: dsnot_layer(weight, inputs, blocks, pattern="2:4"),
    }
    for name, seconds in measure(patterned, rounds=rounds).items():
        print(f"  {name} {seconds * 1e3:.0f} ms")


def wanda(weight: torch.Tensor, inputs: LayerInputs, rounds: int) -> None:
    scores, k = weight.abs() * inputs.mean_square.sqrt().float(), weight.shape[1] // 2
    candidates = {
        "wanda_mask": lambda: wanda_mask(weight, inputs, 0.5),
        "numpy.partition (what wanda_mask uses)": lambda: np.partition(scores.numpy(), k - 1, axis=1),
        "torch.topk": lambda: scores.topk(k, dim=1, sorted=False),
        "torch.kthvalue": lambda: scores.kthvalue(k, dim=1),
        "torch.sort": lambda: scores.sort(dim=1, stable=True),
    }
    title = "Wanda (scores, selection, ties, check of the weights) beside selections alone"
    compare(title, candidates, ours="wanda_mask", peer="torch.topk", at_most=1.5, rounds=rounds)
    fast = dict(list(candidates.items())[:2])
    compare(title, fast, ours="wanda_mask", peer=list(fast)[1], at_most=1.5, rounds=4 * rounds)


def sparsegpt(weight: torch.Tensor, inputs: LayerInputs, rounds: int) -> None:
    assert inputs.gram is not None
    gram = inputs.gram
    width = len(gram)

    def floor() -> None:
        hessian = gram + 0.01 * gram.diagonal().mean() * torch.eye(width)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
        upper = torch.linalg.cholesky(inverse, upper=True)
        updated = weight.clone()
        for start in range(0, width, 128):
            end = min(start + 128, width)
            updated[:, end:].addmm_(updated[:, start:end], upper[start:end, end:], alpha=-1)

    compare(
        "SparseGPT beside its three factorisations and its products",
        {
            "sparsegpt_layer": lambda: sparsegpt_layer(weight, inputs, 0.5),
            "sparsegpt_layer 2:4": lambda: sparsegpt_layer(weight, inputs, pattern="2:4"),
            "Cholesky, inverse, Cholesky, products": floor,
        },
        ours="sparsegpt_layer",
        peer="Cholesky, inverse, Cholesky, products",
        at_most=2,
        rounds=rounds,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    weight, inputs = layer(options.width)
    print(f"DSnoT, {options.width} x {options.width}, 50 %")
    keep = wanda_mask(weight, inputs, 0.5)
    refinement(weight, inputs, keep, options.rounds)
    wanda(weight, inputs, options.rounds)
    sparsegpt(weight, inputs, min(options.rounds, 3))
    print(f"\n{time.perf_counter() - started:.0f} s in all")
    finish()


if __name__ == "__main__":
    main()
