"""Which adapters the conformance suite covers and how to make one, found through the catalog."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import peft
import torch
from torch import Tensor, nn

from gnomon import catalog
from gnomon.common.models import tiny

CONTROL = "peft-lora"  # PEFT's own LoRA: a check that fails on it is a wrong check

OPTIONS: dict[str, dict[str, Any]] = {  # a member is a slug, or "slug:case" for another set of options of that slug
    CONTROL: {"r": 4},
    "allora": {"r": 4, "eta": 2.0},
    "allora:update": {"r": 4, "eta": 4.0, "apply": "update"},
    "lora-sb": {"r": 4, "save_factors": "bf16"},
    "lora-sb:whole": {"r": 4, "parity": True, "lora_alpha": 2.0},
    "lora-sb:sketch": {"r": 4, "save_factors": "seeded-sketch", "sketch_size": 12},
    "lora-sb:xs": {"r": 4},
    "nola": {"r": 4, "num_basis_a": 12, "num_basis_b": 10},
    "nola:shape": {"r": 4, "num_basis_a": 12, "num_basis_b": 10, "share_basis": "shape"},
    "nola:vision": {"r": 4, "num_basis_a": 12, "num_basis_b": 10, "variant": "vision"},
    "nola:2-bits": {"r": 4, "num_basis_a": 12, "num_basis_b": 10, "coeff_bits": 2},
    "nola:16-bits": {"r": 4, "num_basis_a": 12, "num_basis_b": 10, "coeff_bits": 16},
    "nola:philox": {"r": 4, "num_basis_a": 12, "num_basis_b": 10, "generator": "philox"},
    "sora": {"r": 4, "lora_alpha": 8.0},
    "sora:ones": {"r": 4, "gate_init": "ones", "lora_alpha": 4.0},
}

# Trained numbers of one adapted layer, (in, out) -> count, as the documentation says.
TRAINED: dict[str, Callable[[int, int], int]] = {
    CONTROL: lambda n, m: 4 * (n + m),
    "allora": lambda n, m: 4 * (n + m),
    "lora-sb": lambda n, m: 4 * 4,
    "nola": lambda n, m: 12 + 10,
    "sora": lambda n, m: 4 * (n + m) + 4,
}

NO_IDENTITY: dict[str, str] = {
    "lora-sb": "it starts at the first step of full fine-tuning",
    "lora-sb:whole": "it starts at the first step of full fine-tuning",
    "lora-sb:sketch": "it starts at the first step of full fine-tuning",
    "lora-sb:xs": "R starts at N(0, 1e-5^2)",
    "nola:vision": "its coefficients start at 1 / k and 1 / l, as in the authors' code",
}

STUBBORN: dict[str, str] = {"nola:2-bits": "four values per vector follow a small step only now and then"}

CODED: dict[str, str] = dict.fromkeys(
    ("nola:2-bits", "lora-sb:sketch"), "transformers' own load_adapter takes tensors as they stand in the file"
)

SAVED_AS: dict[str, type] = {"allora": peft.LoraConfig}  # it is a rule of training; its file is a plain LoRA

LARGER: dict[str, str] = dict.fromkeys(
    ("lora-sb", "lora-sb:whole", "lora-sb:sketch"),
    "its fixed factors follow from the data, so they are saved beside what is trained",
)

MADE_BY: dict[str, str] = {"lora-sb:xs": "gnomon.adapters.lora_sb:LoRAXSConfig"}  # not the entry of the card

INITIALISED_BY: dict[str, str] = {"lora-sb": "gnomon.adapters.lora_sb:initialize_lora_sb"}  # before anything else

TAKES_EMBEDDINGS = {CONTROL}

FAMILIES = ("llama", "qwen", "mistral", "gpt2", "gpt_neox")


def members() -> list[str]:
    slugs = [card.slug for card in catalog.methods(plugs="adapter")]
    cases = [name for name in OPTIONS if name != CONTROL and name.partition(":")[0] in slugs]
    return [CONTROL, *cases, *(slug for slug in slugs if slug not in cases)]


def with_families() -> list[tuple[str, str]]:
    """Every slug in every family, further cases of a slug in two."""
    return [(m, f) for m in members() for f in (FAMILIES if ":" not in m else ("gpt2",))]


def config(member: str, **changes: Any) -> peft.PeftConfig:
    slug = member.partition(":")[0]
    make = peft.LoraConfig if slug == CONTROL else catalog.load(slug)
    if member in MADE_BY:
        make = catalog.resolve(MADE_BY[member])
    return make(**{**OPTIONS.get(member, {}), **changes})


def base_model(family: str = "llama", dtype: torch.dtype = torch.float32, **sizes: Any) -> Any:
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "max_positions": 32, **sizes}
    return tiny(family, **sizes).to(dtype).eval()


def adapted(member: str, family: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A fresh adapter on a tiny model, in evaluation mode."""
    options = {"target_modules": "all-linear", "task_type": "CAUSAL_LM", **changes}
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(0)  # PEFT's own methods draw from the global generator
        return initialised(member, peft.get_peft_model(base_model(family, dtype), config(member, **options))).eval()


def initialised(member: str, model: Any) -> Any:
    """Give a fresh adapter what its method computes from the data before training."""
    by = INITIALISED_BY.get(member.partition(":")[0])
    if by is not None and member not in MADE_BY:
        catalog.resolve(by)(model, offered()["batches"], lr=0.01, num_training_steps=100)
    return model


def offered() -> dict[str, Any]:
    """What the train stage of a recipe offers to a call beside the model."""
    batches = [{"input_ids": ids(seed=seed), "labels": ids(seed=seed)} for seed in (21, 22)]
    return {"batches": batches, "lr": 0.01, "num_training_steps": 100, "seed": 0}


def shaken(model: nn.Module, seed: int = 1) -> Any:
    """Move every trained number a little, as training does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def ids(rows: int = 3, tokens: int = 12, seed: int = 9) -> Tensor:
    return torch.randint(1, 64, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def logits(model: nn.Module, given: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids() if given is None else given).logits
