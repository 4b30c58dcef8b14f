"""LayerNorm scaling must cost nothing: a training step at 12 layers of width 768 against the stock model.

The machine's noise is larger than what is measured, so three figures are printed: whole steps, interleaved, with and
without the scales (informative); the two multiplications alone, forward and backward, times the number of norms, over
the stock step (the target); and finding the norms when the method is applied.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from timing import check, compare, finish, measure

from gnomon.common.models import tiny
from gnomon.nn import apply_layernorm_scaling, fold_layernorm_scaling, unfold_layernorm_scaling

LAYERS, WIDTH, VOCABULARY = 12, 768, 4096


def build() -> torch.nn.Module:
    return tiny("llama", hidden_size=WIDTH, num_layers=LAYERS, num_heads=12, vocab_size=VOCABULARY)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=256, help="tokens of one step (default: 256)")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    ids = torch.randint(0, VOCABULARY, (2, options.tokens // 2), generator=torch.Generator().manual_seed(0))
    stock, scaled = build(), apply_layernorm_scaling(build())

    def step(model: torch.nn.Module) -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        for parameter in model.parameters():
            parameter.grad = None

    medians = measure({"stock step": lambda: step(stock), "scaled step": lambda: step(scaled)}, rounds=options.rounds)
    print(f"\nTraining step, {LAYERS} layers of width {WIDTH}, {ids.numel()} tokens")
    for name, seconds in medians.items():
        print(f"  {name:<48} {seconds * 1e3:10.3f} ms")
    print(f"  scaled over stock, whole steps: {medians['scaled step'] / medians['stock step']:.4f} (informative)")

    hidden = torch.randn(2, options.tokens // 2, WIDTH, requires_grad=True)
    gradient = torch.randn_like(hidden)
    norm = stock.model.layers[0].input_layernorm
    twin = scaled.model.layers[1].input_layernorm

    def pass_through(module: torch.nn.Module) -> None:
        for _ in range(20):
            module(hidden).backward(gradient)

    with_scale = [
        _difference(lambda: pass_through(twin), lambda: pass_through(norm)) / 20 for _ in range(options.rounds * 3)
    ]
    overhead = 2 * LAYERS * max(0.0, statistics.median(with_scale)) / medians["stock step"]
    check("time added by the scales over a stock step", overhead, at_most=0.01)

    folded = fold_layernorm_scaling(apply_layernorm_scaling(build()))
    compare(
        "Inference after folding is stock",
        {"folded": lambda: _forward(folded, ids), "stock": lambda: _forward(stock, ids)},
        ours="folded",
        peer="stock",
        rounds=options.rounds,
    )
    compare(
        "Applying the method, against building the model",
        {"build": build, "apply": lambda: fold_layernorm_scaling(unfold_layernorm_scaling(stock))},
        ours="apply",
        peer="build",
        at_least=1.0,
        rounds=3,
    )
    finish()


def _difference(ours: object, peer: object) -> float:
    """Seconds by which one call takes longer than the other, run back to back."""
    times = []
    for run in (peer, ours):
        started = time.perf_counter()
        run()  # type: ignore[operator]
        times.append(time.perf_counter() - started)
    return times[1] - times[0]


@torch.no_grad()
def _forward(model: torch.nn.Module, ids: torch.Tensor) -> object:
    return model(ids, use_cache=False).logits


if __name__ == "__main__":
    main()
