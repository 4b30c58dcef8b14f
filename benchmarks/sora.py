"""SoRA against PEFT's LoRA and AdaLoRA of the same rank: time of a training step, and of the gates' part in it.

    python benchmarks/sora.py [--layers 2] [--hidden 512] [--rounds 9]

All adapt the linear layers of the same Llama, beside each other in one process. LoRA is the floor: SoRA does all that
LoRA does, multiplies by the gates and thresholds them. Re-packed, it does less.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from typing import Any

import peft
import torch
from timing import check, finish, measure
from torch import Tensor

from gnomon.adapters import SoRAConfig, SoRALinear, SoRAProximal, repack_sora
from gnomon.common.models import tiny

RANK = 8


def adapted(config: peft.PeftConfig, options: argparse.Namespace) -> Any:
    model = tiny(
        "llama", vocab_size=512, hidden_size=options.hidden, num_layers=options.layers, num_heads=8, max_positions=256
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, config)


def adamw(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)


def step(model: Any, optimizer: torch.optim.Optimizer, rows: Tensor, after: Any = None) -> Callable[[], None]:
    model.train()
    count = iter(range(10**9))

    def run() -> None:
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        if after is not None:
            after(next(count))
        optimizer.zero_grad()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    rows = torch.randint(1, 512, (8, 128), generator=torch.Generator().manual_seed(0))
    everywhere: dict[str, Any] = {"target_modules": "all-linear"}
    lora = adapted(peft.LoraConfig(r=RANK, lora_alpha=16, **everywhere), options)
    ada_config = peft.AdaLoraConfig(
        init_r=RANK, target_r=4, total_step=10_000, tinit=1, tfinal=1, deltaT=1, lora_alpha=16, **everywhere
    )
    ada = adapted(ada_config, options)
    sora, packed = (adapted(SoRAConfig(r=RANK, **everywhere), options) for _ in range(2))
    optimizers = [SoRAProximal(adamw(model), model, xi=1e-4) for model in (sora, packed)]
    for layer in packed.modules():
        if isinstance(layer, SoRALinear):
            layer.lora_gate["default"].data[2:] = 0.0
    optimizers[1].xi = 1e-2  # zeros stay zero
    first = step(packed, optimizers[1], rows)
    first()
    repack_sora(packed, optimizers[1], after=1)
    candidates = {
        "PEFT LoRA": step(lora, adamw(lora), rows),
        "SoRA": step(sora, optimizers[0], rows),
        "SoRA, re-packed to rank 2": first,
        "PEFT AdaLoRA": step(ada, adamw(ada), rows, after=ada.base_model.update_and_allocate),
    }
    medians = measure(candidates, rounds=options.rounds, warmup=2)
    print(f"\none step, {options.layers} layers of {options.hidden}, 8 x 128 tokens, rank {RANK}")
    for name, seconds in medians.items():
        print(f"  {name:<48} {seconds * 1e3:10.3f} ms")
    check("step: SoRA over LoRA", medians["SoRA"] / medians["PEFT LoRA"], at_most=1.05)
    check("step: SoRA over AdaLoRA", medians["SoRA"] / medians["PEFT AdaLoRA"], at_most=1.0)
    check("step: re-packed over SoRA", medians["SoRA, re-packed to rank 2"] / medians["SoRA"], at_most=1.0)
    finish()


if __name__ == "__main__":
    main()
