"""SLTrain: the layer against nn.Linear and against plain autograd, and the memory of training LLaMA-130M.

    python benchmarks/sltrain.py [--rounds 7] [--size 768] [--no-memory]

Time: forward and backward of one layer with rank size / 4, at token counts on both sides of the switch between the
two paths, beside `nn.Linear`, the factored layer alone and the straightforward way (autograd over ``B @ A`` and
``index_add``). Memory: weights, moments, indices and gradients of LLaMA-7B by the paper's accounting, and the peak of
a few training steps of LLaMA-130M, each way of training in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

import torch
from timing import check, finish, measure
from torch import Tensor, nn
from torch.nn.functional import linear as linear_map
from transformers import LlamaConfig, LlamaForCausalLM

from gnomon.common.memory import PeakMemory, tensor_bytes
from gnomon.nn import SparseLowRankLinear, apply_sltrain, draw_support, memory_report, per_layer_optimizer
from gnomon.nn.sltrain.functional import sparse_low_rank_linear
from gnomon.optim import GaLoreAdamW

SIZES_130M = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12}
SIZES_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
WAYS = ("full", "full 8 bit per layer", "sltrain", "sltrain 8 bit per layer")


def naive(layer: SparseLowRankLinear, x: Tensor) -> Tensor:
    W = layer.scale * (layer.B @ layer.A)
    return linear_map(x, W.view(-1).index_add(0, layer.indices, layer.values).view(W.shape))


def passes(run: Any, x: Tensor, gy: Tensor, repeats: int) -> None:
    for _ in range(repeats):
        x.grad = None
        run(x).backward(gy)


def timings(size: int, rounds: int) -> None:
    rank = size // 4
    layer = SparseLowRankLinear(size, size, rank, bias=False)
    linear = nn.Linear(size, size, bias=False)
    with torch.no_grad():
        layer.B.normal_(0, 0.02, generator=torch.Generator().manual_seed(0))
    parts = (layer.A, layer.B, layer.values, layer.indices)
    for tokens in (1, 32, size // 4, size, 4 * size):
        generator = torch.Generator().manual_seed(tokens)
        x = torch.randn(tokens, size, generator=generator).requires_grad_()
        gy = torch.randn(tokens, size, generator=generator)
        runs = {
            "nn.Linear": linear,
            "layer": layer,
            "dense path": lambda x: sparse_low_rank_linear(x, *parts, path="dense"),
            "factored path": lambda x: sparse_low_rank_linear(x, *parts, path="factored"),
            "low rank alone": lambda x: linear_map(linear_map(x, layer.A), layer.B),
            "plain autograd": lambda x: naive(layer, x),
        }
        repeats = max(1, min(20, 2 * size // tokens))  # short passes are timed many at a time
        candidates = {
            name: (lambda run=run, x=x, gy=gy, n=repeats: passes(run, x, gy, n)) for name, run in runs.items()
        }
        medians = {name: seconds / repeats for name, seconds in measure(candidates, rounds=rounds).items()}
        print(f"\nForward and backward, {size} x {size}, rank {rank}, {tokens} tokens")
        for name, seconds in medians.items():
            print(f"  {name:<48} {seconds * 1e3:10.3f} ms")
        best = min(medians["dense path"], medians["factored path"])
        # under a millisecond the spread between rounds is as wide as what would be checked
        switch = 1.25 if tokens > 1 else None
        check(f"{tokens} tokens: layer over the better path", medians["layer"] / best, at_most=switch)
        # building W twice is the price of not keeping it: one product of m n r more
        check(f"{tokens} tokens: layer over plain autograd", medians["layer"] / medians["plain autograd"], at_most=1.2)
        limit = 1 + 4 * rank / (3 * tokens) + 0.25  # four more products of m n r beside three of T m n
        target = limit if tokens >= size else None
        check(f"{tokens} tokens: layer over nn.Linear", medians["layer"] / medians["nn.Linear"], at_most=target)


def support(rounds: int) -> None:
    m, n = 4096, 4096
    generator = torch.Generator().manual_seed(0)
    medians = measure(
        {
            "draw_support": lambda: draw_support(m, n, 0.05, generator),
            "randperm": lambda: torch.randperm(m * n, generator=generator)[: m * n // 20].sort().values,
        },
        rounds=max(3, rounds // 2),
    )
    print(f"\nSupport of a {m} x {n} weight, 5 %")
    for name, seconds in medians.items():
        print(f"  {name:<48} {seconds * 1e3:10.3f} ms")
    check("randperm over draw_support", medians["randperm"] / medians["draw_support"], at_least=2.0)


def counted() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=32000, **SIZES_7B))
    apply_sltrain(model, rank=1024, sparsity=0.05)
    plain, lean = memory_report(model), memory_report(model, optim_bits=8, per_layer=True)
    print(f"\nLLaMA-7B, Adam in 16 bits, counted\n{plain}\n8-bit Adam per layer\n{lean}")
    check("LLaMA-7B: share saved (paper, measured: 0.73)", 1 - lean.sltrain.total / plain.full.total, at_least=0.7)


def train(way: str, steps: int, tokens: int) -> dict[str, int]:
    """Train one way in this process; return the bytes of weights and of state, and what the steps added to them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=32000, **SIZES_130M)).bfloat16()
    if way.startswith("sltrain"):
        apply_sltrain(model, rank=256)
    options: dict[str, Any] = {"lr": 1e-3}
    if way.endswith("per layer"):
        optimizer: Any = per_layer_optimizer(model, GaLoreAdamW, bits=8, **options)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, foreach=False, **options)
    ids = torch.randint(0, 32000, (1, tokens), generator=torch.Generator().manual_seed(0))
    weights = tensor_bytes(model)
    with PeakMemory() as memory:
        for _ in range(steps):
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    state = tensor_bytes(list(optimizer.state.values()))
    return {"weights": weights, "state": state, "added": memory.added}


def measured(steps: int, tokens: int) -> None:
    found: dict[str, dict[str, int]] = {}
    print(f"\nLLaMA-130M in bfloat16, {steps} steps of {tokens} tokens, measured")
    for way in WAYS:
        command = [sys.executable, __file__, "--train", way, "--steps", str(steps), "--tokens", str(tokens)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[way] = json.loads(done.stdout.splitlines()[-1])
        shown = ", ".join(f"{name} {value / 1e6:.0f} MB" for name, value in found[way].items())
        print(f"  {way:<28} {shown}, peak {peak(found[way]) / 1e6:.0f} MB")
    full = peak(found["full"])
    check("sltrain over full", peak(found["sltrain"]) / full, at_most=0.85)
    # the peak holds what quantising the moments of the embedding takes in float32, on top of what is kept
    check("sltrain 8 bit per layer over full, peak", peak(found["sltrain 8 bit per layer"]) / full, at_most=0.75)
    lean, plain = found["sltrain 8 bit per layer"], found["full"]
    kept = (lean["weights"] + lean["state"]) / (2 * plain["weights"] + plain["state"])
    check("sltrain 8 bit per layer over full, weights, state, gradients", kept, at_most=0.4)
    check(
        "sltrain 8 bit per layer over full 8 bit per layer",
        peak(found["sltrain 8 bit per layer"]) / peak(found["full 8 bit per layer"]),
        at_most=0.95,
    )


def peak(use: dict[str, int]) -> int:
    """Weights and what training added: moments, gradients, activations and temporary tensors."""
    return use["weights"] + use["added"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--size", type=int, default=768, help="width of the timed layer (default: 768)")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64, help="of a measured training step (default: 64)")
    parser.add_argument("--no-memory", action="store_true", help="leave out the training steps of LLaMA-130M")
    parser.add_argument("--train", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        print(json.dumps(train(options.train, options.steps, options.tokens)))
        return
    timings(options.size, options.rounds)
    support(options.rounds)
    counted()
    if not options.no_memory:
        measured(options.steps, options.tokens)
    finish()


if __name__ == "__main__":
    main()
