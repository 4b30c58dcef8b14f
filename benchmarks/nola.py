"""NOLA against PEFT's LoRA and VeRA: time of a training step, of an evaluation, size of the file, memory.

    python benchmarks/nola.py [--layers 2] [--hidden 512] [--rounds 7]

All adapt the linear layers of the same Llama, beside each other in one process. LoRA is the floor: NOLA does all that
LoRA of its rank does, and draws its bases. The draws alone, without anything done to them, are timed as NOLA's own
floor.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from timing import check, compare, finish, measure
from torch import Tensor

from gnomon.adapters import NOLAConfig, NOLALinear, accumulated, quantize_nola
from gnomon.common.memory import PeakMemory
from gnomon.common.models import tiny

RANK, BASES = 8, 64


def adapted(config: peft.PeftConfig, options: argparse.Namespace) -> Any:
    model = tiny(
        "llama", vocab_size=512, hidden_size=options.hidden, num_layers=options.layers, num_heads=8, max_positions=256
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, config)


def step(model: Any, rows: Tensor, parts: int = 1, together: bool = False) -> Callable[[], None]:
    """One optimizer step on `parts` micro-batches."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    model.train()

    def passes() -> None:
        for part in rows.chunk(parts):
            (model(input_ids=part, labels=part).loss / parts).backward()

    def run() -> None:
        if together:
            with accumulated(model):
                passes()
        else:
            passes()
        optimizer.step()
        optimizer.zero_grad()

    return run


def configs() -> dict[str, peft.PeftConfig]:
    everywhere: dict[str, Any] = {"target_modules": "all-linear"}
    nola: dict[str, Any] = {"r": RANK, "num_basis_a": BASES, **everywhere}
    return {
        "NOLA": NOLAConfig(**nola),
        "NOLA, bases shared by shape": NOLAConfig(**nola, share_basis="shape"),
        "NOLA, philox": NOLAConfig(**nola, generator="philox"),
        "PEFT LoRA": peft.LoraConfig(r=RANK, lora_alpha=RANK, **everywhere),
        "PEFT VeRA": peft.VeraConfig(r=256, save_projection=True, **everywhere),
    }


def draws(model: Any) -> Callable[[], None]:
    """The random numbers of one step, forward and backward, and nothing else."""
    seen = {id(s): s for m in model.modules() if isinstance(m, NOLALinear) for s in m.shared["default"].values()}

    def run() -> None:
        for _ in range(2):
            for shared in seen.values():
                for _chunk in shared.bases.chunks(torch.device("cpu")):
                    pass

    return run


def steps(options: argparse.Namespace) -> None:
    rows = torch.randint(1, 512, (8, 128), generator=torch.Generator().manual_seed(0))
    models = {name: adapted(config, options) for name, config in configs().items()}
    candidates = {name: step(model, rows) for name, model in models.items()}
    candidates["NOLA's draws alone"] = draws(models["NOLA"])
    title = f"one step, {options.layers} layers of {options.hidden}, 8 x 128 tokens, r {RANK}, k = l = {BASES}"
    medians = measure(candidates, rounds=options.rounds, warmup=2)
    print(f"\n{title}")
    for name, seconds in medians.items():
        print(f"  {name:<48} {seconds * 1e3:10.3f} ms")
    lora, drawn = medians["PEFT LoRA"], medians["NOLA's draws alone"]
    check("step: NOLA over LoRA plus the draws", medians["NOLA"] / (lora + drawn), at_most=1.25)
    check("step: bases shared by shape over LoRA", medians["NOLA, bases shared by shape"] / lora, at_most=1.5)
    check("step: NOLA over VeRA", medians["NOLA"] / medians["PEFT VeRA"], at_most=1.25)

    fresh = [adapted(configs()["NOLA"], options) for _ in range(2)]
    pair = {
        "accumulated()": step(fresh[0], rows, parts=8, together=True),
        "plain accumulation": step(fresh[1], rows, parts=8),
        "PEFT LoRA": step(models["PEFT LoRA"], rows, parts=8),
    }
    compare("one step of 8 micro-batches", pair, ours="accumulated()", peer="plain accumulation", at_least=1.2,
            rounds=options.rounds)  # fmt: skip


def evaluation(options: argparse.Namespace) -> None:
    rows = torch.randint(1, 512, (8, 128), generator=torch.Generator().manual_seed(0))

    def forward(name: str) -> Callable[[], object]:
        model = adapted(configs()[name], options).eval()
        return lambda: model(input_ids=rows).logits

    with torch.no_grad():
        candidates = {name: forward(name) for name in ("NOLA", "PEFT LoRA")}
        compare("evaluation", candidates, ours="NOLA", peer="PEFT LoRA", at_most=1.15, rounds=options.rounds)


def files(options: argparse.Namespace) -> None:
    """The size of the saved adapters."""
    print("\nadapter_model.safetensors")
    sizes = {}
    chosen = {**configs(), "PEFT LoRA, r 1": peft.LoraConfig(r=1, target_modules="all-linear")}
    for name, config in chosen.items():
        model = adapted(config, options).eval()
        for bits in (None, 16, 4) if name == "NOLA" else (None,):
            if name == "NOLA":
                quantize_nola(model, bits)
            with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model.save_pretrained(folder)
                label = f"{name}, {bits} bits" if bits else name
                sizes[label] = (Path(folder) / "adapter_model.safetensors").stat().st_size
                print(f"  {label:<48} {sizes[label]:>10} bytes")
    check("file: LoRA of rank 8 over NOLA", sizes["PEFT LoRA"] / sizes["NOLA"], at_least=5)
    check("file: LoRA of rank 1 over NOLA in 4 bits", sizes["PEFT LoRA, r 1"] / sizes["NOLA, 4 bits"], at_least=3)
    check("file: VeRA with its projections over NOLA", sizes["PEFT VeRA"] / sizes["NOLA"], at_least=10)


def memory() -> None:
    """Mix 512 bases of a 4096-wide layer: they would fill 128 MB."""
    from gnomon.adapters import Bases, mix

    mix(torch.ones(1, 2), Bases(0, 2, 16, 64))
    bases = Bases(0, 512, 16, 4096, 22.6)
    with PeakMemory(every=0.001) as peak:
        mix(torch.ones(1, 512), bases)
    print("\nmemory of one pass over 512 bases of 16 x 4096 (134 MB if held)")
    check("added, MB", peak.added / 1e6, at_most=16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    steps(options)
    evaluation(options)
    files(options)
    memory()
    finish()


if __name__ == "__main__":
    main()
