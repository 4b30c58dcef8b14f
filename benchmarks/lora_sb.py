"""LoRA-SB against PEFT: its probe beside LoRA-GA's, a step beside LoRA's, the trained numbers of real models.

python benchmarks/lora_sb.py [--layers 4] [--hidden 512] [--rank 32] [--rounds 7]
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from typing import Any

import peft
import torch
import transformers
from timing import check, compare, finish
from torch import Tensor

from gnomon.adapters import LoRASBConfig, LoRAXSConfig, initialize_lora_sb
from gnomon.adapters.lora_sb.tuner import LatentLinear
from gnomon.common.gradient_probe import probe_gradients
from gnomon.common.memory import PeakMemory
from gnomon.common.models import tiny

EVERYWHERE: dict[str, Any] = {"target_modules": "all-linear"}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def base(options: argparse.Namespace) -> Any:
    return tiny("llama", vocab_size=512, hidden_size=options.hidden, num_layers=options.layers, num_heads=8,
                max_positions=256)  # fmt: skip


def batches(rows: int = 4, count: int = 4) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    found = [torch.randint(1, 512, (rows, 128), generator=generator) for _ in range(count)]
    return [{"input_ids": ids, "labels": ids} for ids in found]


def ours(model: Any, passes: int = 1) -> Callable[[], None]:
    layers = {m.key: m.get_base_layer() for m in model.modules() if isinstance(m, LatentLinear)}

    def run() -> None:
        with model.disable_adapter():
            for _ in probe_gradients(model, layers, batches(), passes=passes):
                pass

    return run


def peers(model: Any, options: argparse.Namespace) -> Callable[[], None]:
    names = [name for name, m in model.named_modules() if name.rpartition(".")[2] in PROJECTIONS]
    config = peft.LoraConfig(
        r=options.rank, init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig(), target_modules=PROJECTIONS
    )

    def step() -> None:
        for batch in batches():
            model(**batch).loss.backward()

    def run() -> None:
        peft.preprocess_loraga(model, config, step)
        for name in names:
            del model.get_submodule(name)._peft_loraga_grad

    return run


def probe(options: argparse.Namespace) -> None:
    wrapped = peft.get_peft_model(base(options), LoRASBConfig(r=options.rank, **EVERYWHERE))
    plain = base(options)
    candidates = {"LoRA-SB": ours(wrapped), "LoRA-SB, 4 passes": ours(wrapped, 4), "LoRA-GA": peers(plain, options)}
    compare("probe, 4 batches of 4 x 128 tokens", candidates, ours="LoRA-SB", peer="LoRA-GA", at_most=1.1,
            rounds=options.rounds)  # fmt: skip
    added = {}
    for name, run in candidates.items():
        with PeakMemory(every=0.002) as peak:
            run()
        added[name] = peak.added / 1e6
        print(f"  {name:<48} {added[name]:10.1f} MB added")
    check("memory: LoRA-SB over LoRA-GA", added["LoRA-SB"] / added["LoRA-GA"], at_most=1.1)
    check("memory: LoRA-SB, 4 passes, over LoRA-GA", added["LoRA-SB, 4 passes"] / added["LoRA-GA"], at_most=0.8)


def step(model: Any) -> Callable[[], None]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    rows = batches()[0]
    model.train()

    def run() -> None:
        model(**rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def steps(options: argparse.Namespace) -> None:
    sb = peft.get_peft_model(base(options), LoRASBConfig(r=options.rank, **EVERYWHERE))
    initialize_lora_sb(sb, batches(count=1), eta=1e-6)
    lora = peft.get_peft_model(base(options), peft.LoraConfig(r=options.rank, lora_alpha=options.rank, **EVERYWHERE))
    candidates = {"LoRA-SB": step(sb), "PEFT LoRA": step(lora)}
    compare("one training step, 4 x 128 tokens", candidates, ours="LoRA-SB", peer="PEFT LoRA", at_most=1.05,
            rounds=options.rounds)  # fmt: skip


def counts() -> None:
    """Trained numbers of the paper's models, LoRA of rank 32 over LoRA-SB."""
    shapes = {
        "Mistral-7B": (transformers.MistralConfig(
            hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
            num_key_value_heads=8, vocab_size=32000), (64, 96)),
        "Gemma-2 9B": (transformers.Gemma2Config(
            hidden_size=3584, intermediate_size=14336, num_hidden_layers=42, num_attention_heads=16,
            num_key_value_heads=8, head_dim=256, vocab_size=256000), (64, 96)),
        "Llama-3.2 3B": (transformers.LlamaConfig(
            hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24,
            num_key_value_heads=8, head_dim=128, vocab_size=128256), (96,)),
    }  # fmt: skip
    print("\ntrained numbers, all seven projections")
    for name, (config, ranks) in shapes.items():

        def trained(adapter: peft.PeftConfig, config: Any = config) -> int:
            with torch.device("meta"):
                model = transformers.AutoModelForCausalLM.from_config(config)
                wrapped = peft.get_peft_model(model, adapter)
            return sum(p.numel() for p in wrapped.parameters() if p.requires_grad)

        lora = trained(peft.LoraConfig(r=32, target_modules=PROJECTIONS))
        for rank in ranks:
            found = trained(LoRAXSConfig(r=rank, target_modules=PROJECTIONS))
            assert found == trained(LoRASBConfig(r=rank, target_modules=PROJECTIONS))
            print(f"  {name}, LoRA r 32: {lora:,}; LoRA-SB r {rank}: {found:,}")
            check(f"{name}: LoRA of rank 32 over LoRA-SB of rank {rank}", lora / found, at_least=26.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    probe(options)
    steps(options)
    counts()
    finish()


if __name__ == "__main__":
    main()
