"""Attention gradients by chained low-rank products against `scaled_dot_product_attention`, over the number of tokens.

    python benchmarks/lora_limits.py [--rounds 5] [--longest 8192]

Forward and backward of one head, float32, one thread. The slopes are factors of time per doubling of L: 4 for exact
attention, 2 for the polynomial. Below the crossover exact attention is the one to use.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import torch
from timing import check, compare, finish
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from gnomon.adapters.lora_limits import feature_count, lora_norm_bound, poly_attention, poly_features, scaling_report
from gnomon.common.memory import PeakMemory
from gnomon.common.models import tiny

HEADS = ((4, 4), (8, 2), (16, 2))  # width, degree


def inputs(tokens: int, width: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [0.3 * torch.randn(1, 1, tokens, width, generator=generator) for _ in range(4)]


def step(route: Callable[..., Tensor], tensors: list[Tensor]) -> Callable[[], object]:
    leaves = [x.clone().requires_grad_() for x in tensors[:3]]
    return lambda: torch.autograd.grad(route(*leaves), leaves, tensors[3])


def scaling(options: argparse.Namespace) -> None:
    lengths = [options.longest >> i for i in range(4, -1, -1)]
    for causal in (False, True):
        for width, degree in HEADS:
            report = scaling_report(width, degree, lengths=lengths, rounds=options.rounds, causal=causal)
            name = f"d {width}, degree {degree}, k1 {report.features}{', causal' if causal else ''}"
            print(f"\n{name}: L, exact and polynomial in ms, error of output and gradients")
            for row in report.table.to_dict("records"):
                print(f"  {row['L']:>6} {row['exact_s'] * 1e3:9.2f} {row['approximate_s'] * 1e3:9.2f} "
                      f"{row['error_output']:9.1e} {row['error_gradient']:9.1e}")  # fmt: skip
            print(f"  crossover at L {report.crossover:,.0f}, c = crossover / (k1 d) = {report.constant:.2f}")
            check(f"{name}: exact, time per doubling", 2**report.exact_exponent, at_least=2.8)
            check(f"{name}: polynomial, time per doubling", 2**report.approximate_exponent, at_most=2.5)
            last = report.table.iloc[-1]
            ratio = float(last["exact_s"] / last["approximate_s"])
            # a causal mask halves exact attention, so that its crossover lies near the longest L for wide heads
            check(f"{name}: exact over polynomial at L {lengths[-1]}", ratio, at_least=None if causal else 1.0)


def memory(options: argparse.Namespace) -> None:
    """The score matrix that eager attention keeps, against the sums over features."""
    print("\nmemory added by forward and backward, d 8, degree 2")
    for tokens in (options.longest // 2, options.longest):
        tensors = inputs(tokens, 8)
        routes = {
            "polynomial": lambda q, k, v: poly_attention(q, k, v, 2),
            "exact, sdpa": scaled_dot_product_attention,
            "exact, score matrix": lambda q, k, v: (q @ k.transpose(-1, -2)).softmax(-1) @ v,
        }
        added = {}
        for name, route in routes.items():
            step(route, inputs(64, 8))()  # what the first call loads is no part of it
            with PeakMemory(every=0.001) as peak:
                step(route, tensors)()
            added[name] = peak.added / 1e6
            print(f"  L {tokens:>6}  {name:<24} {added[name]:8.1f} MB")
        score = tokens**2 * 4 / 1e6
        check(
            f"L {tokens}: polynomial over one score matrix ({score:.0f} MB)", added["polynomial"] / score, at_most=0.1
        )


def features(options: argparse.Namespace) -> None:
    """Degree by degree against monomial by monomial."""
    x, degree = 0.3 * torch.randn(4096, 8, generator=torch.Generator().manual_seed(0)), 4
    exponents = [e for e in torch.cartesian_prod(*[torch.arange(degree + 1)] * 8).tolist() if sum(e) <= degree]
    assert len(exponents) == feature_count(8, degree)

    def one_by_one() -> Tensor:
        root = [math.sqrt(math.prod(math.factorial(i) for i in e)) for e in exponents]
        columns = [(x ** torch.tensor(e)).prod(-1) / r for e, r in zip(exponents, root, strict=True)]
        return torch.stack(columns, dim=-1)

    candidates = {"recursion": lambda: poly_features(x, degree), "each monomial": one_by_one}
    compare(f"features, d 8, degree {degree}, 4096 tokens", candidates, ours="recursion", peer="each monomial",
            at_least=10, rounds=3)  # fmt: skip


def diagnostic(options: argparse.Namespace) -> None:
    """What a measurement costs, against the forward pass that it watches."""
    model = tiny("llama", hidden_size=256, num_layers=4, num_heads=4, max_positions=512).eval()
    rows = torch.randint(1, 256, (4, 512), generator=torch.Generator().manual_seed(0))

    def forward() -> object:
        with torch.no_grad():
            return model(input_ids=rows, use_cache=False).logits

    candidates = {
        "one forward pass": forward,
        "lora_norm_bound, degree 2": lambda: lora_norm_bound(model, rows, max_degree=2),
        "lora_norm_bound, degrees up to 8": lambda: lora_norm_bound(model, rows),
    }
    compare("a measurement, 4 layers of 256, 4 x 512 tokens", candidates, ours="lora_norm_bound, degrees up to 8",
            peer="one forward pass", at_most=40, rounds=3)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--longest", type=int, default=8192)
    options = parser.parse_args()
    torch.set_num_threads(1)
    scaling(options)
    memory(options)
    features(options)
    diagnostic(options)
    finish()


if __name__ == "__main__":
    main()
