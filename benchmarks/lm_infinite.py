"""LM-Infinite: decoding at 32k tokens, the same at 2k, the cache's bytes, prefill against dense attention.

    python benchmarks/lm_infinite.py [--rounds 9]

A Llama of random weights (4 layers, width 256, window 2048, 10 sinks) decodes beside itself without the method, each
with its cache filled to the length. Prefill is one layer's attention (4 heads of 64, window 512, 10 sinks) beside
PyTorch's causal `scaled_dot_product_attention`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from timing import check, compare, finish
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache

from gnomon.common.models import tiny
from gnomon.context import LambdaCache, Sinks, apply_lm_infinite, lambda_attention
from gnomon.context.lm_infinite.rotation import turn_by, turned

LAYERS, HIDDEN, HEADS, WINDOW, SINKS = 4, 256, 4, 2048, 10
LONG = 32768
PREFILL_WINDOW, HEAD = 512, 64


def model() -> Any:
    return tiny("llama", hidden_size=HIDDEN, num_heads=HEADS, num_layers=LAYERS, max_positions=WINDOW).eval()


def states(tokens: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shape = (1, HEADS, tokens, HIDDEN // HEADS)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def decoding(which: Any, cache: Any) -> Callable[[], None]:
    """Four tokens, one after another, on a cache that is filled already."""
    token = torch.ones(1, 1, dtype=torch.int64)

    @torch.no_grad()
    def run() -> None:
        for _ in range(4):
            which(input_ids=token, cache=cache, use_cache=True)

    return run


def full_cache(tokens: int) -> DynamicCache:
    cache = DynamicCache()
    for layer in range(LAYERS):
        cache.update(*states(tokens), layer)
    return cache


def bounded_cache(tokens: int) -> LambdaCache:
    cache = LambdaCache(SINKS, WINDOW)
    cache.prepare(None)
    for layer in range(LAYERS):
        cache.update(*states(SINKS + WINDOW), layer)
        cache.layers[layer].seen = tokens  # random keys look the same wherever the ring stands
    return cache


def decode(rounds: int) -> None:
    plain, ours = model(), apply_lm_infinite(model(), sinks=SINKS)
    long, short = bounded_cache(LONG), bounded_cache(WINDOW + SINKS)
    compare(
        f"4 tokens after {LONG}, window {WINDOW}",
        {"lm-infinite": decoding(ours, long), "full attention": decoding(plain, full_cache(LONG))},
        ours="lm-infinite",
        peer="full attention",
        at_least=2.72,
        rounds=rounds,
        warmup=2,
    )
    check(
        "a token after 32768 over one after 2058", ratio(decoding(ours, long), decoding(ours, short), 60), at_most=1.1
    )
    formula = 2 * LAYERS * HEADS * (SINKS + WINDOW) * (HIDDEN // HEADS) * 4
    print(f"\ncache: {long.nbytes} bytes; full attention at {LONG}: {2 * LAYERS * HEADS * LONG * HIDDEN // HEADS * 4}")
    check("cache bytes over the formula", long.nbytes / formula, at_most=1.0)


def ratio(first: Callable[[], object], second: Callable[[], object], rounds: int) -> float:
    """Ratio of medians; the one that begins changes from round to round, so that neither always finds a cold cache."""
    times: dict[str, list[float]] = {"first": [], "second": []}
    for turn in range(rounds):
        pair = [("first", first), ("second", second)]
        for name, run in pair if turn % 2 else pair[::-1]:
            started = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - started)
    return statistics.median(times["first"][2:]) / statistics.median(times["second"][2:])


def prefilling(tokens: int) -> dict[str, Callable[[], object]]:
    generator = torch.Generator().manual_seed(tokens)
    q, k, v = (torch.randn(1, HEADS, tokens, HEAD, generator=generator) for _ in range(3))
    inv_freq = 10000.0 ** (-torch.arange(HEAD // 2) / (HEAD // 2))

    def ours() -> Tensor:
        turn = turn_by(PREFILL_WINDOW - torch.arange(tokens), inv_freq, False, q.dtype)
        back = turn_by(-torch.arange(SINKS), inv_freq, False, q.dtype)
        first = k[:, :, :SINKS]
        sinks = Sinks(first, v[:, :, :SINKS], turned(q, turn), turned(first, back), PREFILL_WINDOW)
        return lambda_attention(q, k, v, window=PREFILL_WINDOW, sinks=sinks)

    return {"lm-infinite": ours, "dense": lambda: scaled_dot_product_attention(q, k, v, is_causal=True)}


@torch.no_grad()
def prefill(rounds: int) -> None:
    for factor in (4, 8, 16):
        tokens = factor * PREFILL_WINDOW
        compare(
            f"attention over {tokens} tokens, window {PREFILL_WINDOW}",
            prefilling(tokens),
            ours="lm-infinite",
            peer="dense",
            at_most=0.5 if factor == 16 else None,
            rounds=rounds,
        )
    print("\ndoubling the text")
    for tokens in (8192, 16384):
        pair = [prefilling(n)["lm-infinite"] for n in (tokens, tokens // 2)]
        check(f"{tokens} over {tokens // 2}", ratio(*pair, 3 * rounds), at_most=2.2)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    decode(arguments.rounds)
    prefill(arguments.rounds)
    finish()
