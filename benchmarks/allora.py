"""ALLoRA against PEFT's LoRA of the same rank: time of a training step, of a layer, what a layer keeps for backward.

    python benchmarks/allora.py [--layers 2] [--hidden 512] [--rounds 15]

LoRA is the floor: ALLoRA does all that it does, and the norms of the rows of B A. Beside it stand what the rule costs
when B A is made for the norms, and when the gradient of the output is scaled as a tensor of its own.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from typing import Any

import peft
import torch
from timing import check, compare, finish, measure
from torch import Tensor, nn
from torch.nn.functional import linear

from gnomon.adapters import ALLoRAConfig, allora_linear, scale_allora_updates
from gnomon.common.models import tiny

RANK = 8
EVERYWHERE: dict[str, Any] = {"target_modules": "all-linear"}


class _Plainly(torch.autograd.Function):
    """The rule as it is written: the dense product for the norms, the scaled gradient as a tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, eta: float) -> Tensor:
        ctx.save_for_backward(x, a, b)
        ctx.eta = eta
        return linear(linear(x, a), b)

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b = ctx.saved_tensors
        flat, given = delta.reshape(-1, delta.shape[-1]), x.reshape(-1, x.shape[-1])
        scales = ((b @ a).norm(dim=1) + ctx.eta**-2).rsqrt()
        scaled = flat * scales
        da = (scaled @ b).T @ given
        db = scaled.T @ (given @ a.T)
        return (delta @ b) @ a, da, db, None


def adapted(config: peft.PeftConfig, options: argparse.Namespace) -> Any:
    model = tiny(
        "llama", vocab_size=512, hidden_size=options.hidden, num_layers=options.layers, num_heads=8, max_positions=256
    )
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        return peft.get_peft_model(model, config)


def step(config: peft.PeftConfig, options: argparse.Namespace) -> Callable[[], None]:
    model = adapted(config, options).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    if getattr(config, "apply", "") == "update":
        scale_allora_updates(optimizer, model)
    rows = torch.randint(1, 512, (8, 128), generator=torch.Generator().manual_seed(0))

    def run() -> None:
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def steps(options: argparse.Namespace) -> None:
    configs: dict[str, peft.PeftConfig] = {
        "ALLoRA, at the gradient": ALLoRAConfig(r=RANK, **EVERYWHERE),
        "PEFT LoRA": peft.LoraConfig(r=RANK, lora_alpha=RANK, **EVERYWHERE),
        "ALLoRA, at the update": ALLoRAConfig(r=RANK, apply="update", **EVERYWHERE),
        "PEFT LoRA, once more": peft.LoraConfig(r=RANK, lora_alpha=RANK, **EVERYWHERE),
    }
    medians = measure({n: step(c, options) for n, c in configs.items()}, rounds=options.rounds, warmup=2)
    print(f"\none step, {options.layers} layers of {options.hidden}, 8 x 128 tokens, r {RANK}, AdamW")
    for name, seconds in medians.items():
        print(f"  {name:<48} {seconds * 1e3:10.3f} ms")
    lora = (medians["PEFT LoRA"] + medians["PEFT LoRA, once more"]) / 2
    print(f"  noise: LoRA once more over LoRA {medians['PEFT LoRA, once more'] / medians['PEFT LoRA']:.3f}")
    check("step: ALLoRA at the gradient over LoRA", medians["ALLoRA, at the gradient"] / lora, at_most=1.03)
    check("step: ALLoRA at the update over LoRA", medians["ALLoRA, at the update"] / lora, at_most=1.03)


def layer(options: argparse.Namespace) -> None:
    """Forward and backward of one layer: the branch with its base, and the branch alone."""
    size, tokens = 2 * options.hidden, 1024
    generator = torch.Generator().manual_seed(0)
    a, b, x, delta = (
        torch.randn(*shape, generator=generator)
        for shape in ((RANK, size), (size, RANK), (tokens, size), (tokens, size))
    )
    weight = torch.randn(size, size, generator=generator)
    for factor in (a, b, x):
        factor.requires_grad_()

    def both(branch: Callable[[], Tensor], base: bool) -> Callable[[], None]:
        def run() -> None:
            out = branch()
            (linear(x, weight) + out if base else out).backward(delta)
            a.grad = b.grad = x.grad = None

        return run

    def candidates(base: bool) -> dict[str, Callable[[], None]]:
        return {
            "ALLoRA": both(lambda: allora_linear(x, a, b, 2.0), base),
            "PEFT LoRA's operations": both(lambda: linear(linear(x, a), b) * 1.0, base),
            "the rule as it is written": both(lambda: _Plainly.apply(x, a, b, 2.0), base),
        }

    compare(f"a layer of {size}, {tokens} tokens, forward and backward", candidates(True), ours="ALLoRA",
            peer="PEFT LoRA's operations", at_most=1.03, rounds=options.rounds)  # fmt: skip
    compare("its branch alone", candidates(False), ours="ALLoRA", peer="the rule as it is written", at_least=1.1,
            rounds=4 * options.rounds)  # fmt: skip


def kept(options: argparse.Namespace) -> None:
    """Bytes that one adapted layer keeps for the backward pass, beside its parameters."""
    found = {}
    for name, config in {
        "ALLoRA": ALLoRAConfig(r=RANK, target_modules=["0"]),
        "PEFT LoRA": peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"]),
    }.items():
        model = peft.get_peft_model(nn.Sequential(nn.Linear(options.hidden, options.hidden)), config)
        own = {p.data_ptr() for p in model.parameters()}
        held: dict[int, int] = {}

        def note(tensor: Tensor, own: set[int] = own, held: dict[int, int] = held) -> Tensor:
            if tensor.data_ptr() not in own:
                held[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            model(torch.ones(1024, options.hidden, requires_grad=True)).sum()
        found[name] = sum(held.values())
    print("\nkept for the backward pass of a layer, bytes")
    for name, number in found.items():
        print(f"  {name:<48} {number:>10}")
    check("kept: ALLoRA over LoRA", found["ALLoRA"] / found["PEFT LoRA"], at_most=1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    steps(options)
    layer(options)
    kept(options)
    finish()


if __name__ == "__main__":
    main()
