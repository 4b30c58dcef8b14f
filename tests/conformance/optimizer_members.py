"""Which optimizers the conformance suite covers and how to make one, found through the catalog."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import torch

from gnomon import catalog
from gnomon.common.models import tiny

# further ways to make a member, covered beside the default: member -> {name of the way: options of the constructor}
WAYS: dict[str, dict[str, dict[str, Any]]] = {
    "gradnorm-lorp:GradNormLoRP": {"authors": {"mode": "authors"}},
}


def members() -> list[str]:
    """Every optimizer class of every module behind a card that plugs an optimizer, as "slug:class[:way]"."""
    found = []
    for card in catalog.methods(plugs="optimizer"):
        module = importlib.import_module(card.entry.partition(":")[0])
        for name in module.__all__:
            thing = getattr(module, name)
            if inspect.isclass(thing) and issubclass(thing, torch.optim.Optimizer):
                member = f"{card.slug}:{name}"
                found += [member, *(f"{member}:{way}" for way in WAYS.get(member, {}))]
        assert any(m.endswith(":" + card.entry.partition(":")[2]) for m in found), f"{card.slug}: entry is no optimizer"
    return found


def optimizer_class(member: str) -> type[torch.optim.Optimizer]:
    slug, name = member.split(":")[:2]
    return getattr(importlib.import_module(catalog.get(slug).entry.partition(":")[0]), name)


def tiny_model(dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    return tiny("llama", vocab_size=64, hidden_size=16, num_layers=2, num_heads=2, max_positions=16, seed=seed).to(
        dtype
    )


def groups(member: str, model: torch.nn.Module) -> list[Any]:
    """The parameter groups the method's card asks for, or the plain parameters."""
    recipe = catalog.get(member.split(":")[0]).recipe
    if "groups" not in recipe:
        return [{"params": list(model.parameters())}]
    function = catalog.resolve(recipe["groups"])
    small = {"rank": 4, "update_proj_gap": 2}
    return function(model, **{k: v for k, v in small.items() if k in inspect.signature(function).parameters})


def build(member: str, model: torch.nn.Module, lr: Any = 0.01, **options: Any) -> torch.optim.Optimizer:
    slug, name, *way = member.split(":")
    own = WAYS[f"{slug}:{name}"][way[0]] if way else {}
    return optimizer_class(member)(groups(member, model), lr=lr, **{**own, **options})


def accepts(member: str, option: str) -> bool:
    return option in inspect.signature(optimizer_class(member).__init__).parameters
