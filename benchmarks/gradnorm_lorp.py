"""GradNormLoRP on the matrices of Llama-130M (768 / 2048, rank 192): step, state, peak memory, LLaMA-7B by count.

    python benchmarks/gradnorm_lorp.py [--layers 2] [--rounds 7]

Beside it in the same process: galore_torch's GaLoreAdamW (the same two products, without row norms and tangents),
torch AdamW and the state of bitsandbytes' Adam8bit.
"""

from __future__ import annotations

import argparse
import math
import warnings

import torch
from galore_torch import GaLoreAdamW as PeerGaLore
from timing import check, compare, finish
from torch import nn

from gnomon.common.memory import PeakMemory, tensor_bytes
from gnomon.optim import GradNormLoRP, training_memory

HIDDEN, MLP, RANK, ALPHA = 768, 2048, 192, 0.25
SHAPES = [(HIDDEN, HIDDEN)] * 4 + [(MLP, HIDDEN)] * 2 + [(HIDDEN, MLP)]
NEVER = 1_000_000_000


def matrices(layers: int, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for m, n in SHAPES * layers:
        weight = nn.Parameter((torch.randn(m, n, generator=generator) * 0.02).to(dtype))
        weight.grad = torch.randn(m, n, generator=generator).to(dtype)
        found.append(weight)
    return found


def group(weights: list[nn.Parameter], **more: object) -> list[dict[str, object]]:
    return [{"params": weights, "rank": RANK, "update_proj_gap": NEVER, "scale": ALPHA, "proj_type": "std", **more}]


def ours(weights: list[nn.Parameter], **options: object) -> GradNormLoRP:
    return GradNormLoRP(group(weights, refresh="randomized"), lr=1e-4, **options)  # type: ignore[arg-type]


def peer(weights: list[nn.Parameter]) -> torch.optim.Optimizer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeerGaLore(group(weights), lr=1e-4, no_deprecation_warning=True)


def steps(layers: int, rounds: int) -> None:
    """Time one step without a refresh; the first call, which finds the projectors, warms up."""
    candidates = {
        "GradNormLoRP.step": ours(matrices(layers)).step,
        "GradNormLoRP.step, 8 bits": ours(matrices(layers), bits=8).step,
        "GradNormLoRP.step, authors": ours(matrices(layers), mode="authors").step,
        "galore_torch GaLoreAdamW": peer(matrices(layers)).step,
        "torch AdamW": torch.optim.AdamW(matrices(layers), lr=1e-4).step,
    }
    title = f"one step, {layers} layers of Llama-130M, rank {RANK}"
    pair = {"ours": "GradNormLoRP.step", "peer": "galore_torch GaLoreAdamW"}
    compare(title, candidates, **pair, at_most=1.3, rounds=rounds, warmup=2)


def state(layers: int) -> None:
    """Measure what each optimizer keeps after a step, and the peak that making it adds to the process."""
    measured: dict[str, tuple[int, int]] = {}
    makers = {
        "torch AdamW, float32": lambda: torch.optim.AdamW(matrices(layers), lr=1e-4),
        "galore_torch, float32": lambda: peer(matrices(layers)),
        "GradNormLoRP, float32": lambda: ours(matrices(layers)),
        "GradNormLoRP, 8 bits": lambda: ours(matrices(layers), bits=8),
        "GradNormLoRP, 8 bits, bfloat16 weights": lambda: ours(matrices(layers, torch.bfloat16), bits=8),
    }
    print("\nstate after one step, and what the step added to the process at its peak")
    for name, make in makers.items():
        optimizer = make()
        with PeakMemory() as memory:
            optimizer.step()
        kept = [
            {k: (v.ortho_matrix if k == "projector" else v) for k, v in entry.items()}
            for entry in optimizer.state.values()
        ]
        measured[name] = tensor_bytes(kept), memory.added
        print(f"  {name:<42} {measured[name][0] / 1e6:9.2f} MB {memory.added / 1e6:9.2f} MB")
    adam = measured["torch AdamW, float32"][0]
    eight = sum(2 * (m * n + 4 * math.ceil(m * n / 256)) for m, n in SHAPES * layers)
    print(f"  {'bitsandbytes Adam8bit, by count':<42} {eight / 1e6:9.2f} MB")
    count = sum(min(s) * RANK + 2 * max(s) * RANK + 2 * s[0] for s in SHAPES * layers) * 4
    check("float32 state over a r + 2 b r + 2 m numbers", measured["GradNormLoRP, float32"][0] / count, at_most=1.0)
    check("float32 state over galore_torch's", count / measured["galore_torch, float32"][0], at_most=1.02)
    smallest = measured["GradNormLoRP, 8 bits, bfloat16 weights"][0]
    check("8-bit state over AdamW's, rank a quarter of the hidden size", smallest / adam, at_most=0.125)
    check("8-bit state over Adam8bit's", smallest / eight, at_most=0.5)


def seven_billion() -> None:
    """Count LLaMA-7B in pre-training as the paper has it on one card of 24 GB: layer-wise steps, 8-bit state."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(), dtype=torch.bfloat16)
    print("\nLLaMA-7B by count, GB (weights, state, gradient, workspace; AdamW's float32 state; the part saved)")
    for rank, bits in ((256, 8), (512, 8), (1024, 8), (1024, 32)):
        memory = training_memory(model, rank, bits=bits, step_in_backward=True)
        parts = " + ".join(f"{part / 1e9:.2f}" for part in memory[:4])
        saved = 100 * (1 - memory.state / memory.adam_state)
        print(
            f"  rank {rank:<5} {bits:>2} bits {parts} = {memory.total / 1e9:.2f}; "
            f"{memory.adam_state / 1e9:.1f}; {saved:.1f} %"
        )
        if (rank, bits) == (1024, 8):
            check("rank 1024, 8 bits: GiB without activations", memory.total / 2**30, at_most=24.0)
            check("rank 1024, 8 bits: part of AdamW's state that is saved", saved / 100, at_least=0.89)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    steps(options.layers, options.rounds)
    state(options.layers)
    seven_billion()
    finish()


if __name__ == "__main__":
    main()
