"""ALLoRA's claims at a size that takes seconds: what each arm trains, and that no arm changes another."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch

from gnomon.adapters import ALLoRAConfig
from gnomon.claims import adaptation, allora

DATA = {
    text: torch.randint(1, 200, (40, adaptation.CONTEXT), generator=torch.Generator().manual_seed(i))
    for i, text in enumerate(("docs", "names", "maths"))
}
TINY = {"hidden_size": 16, "num_layers": 1, "pretrain": 2}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch):
    """The configurations and optimizers of the arms that were trained, in order."""
    found: list[tuple[Any, torch.optim.Optimizer]] = []
    configs: list[Any] = []
    adapted, fit = adaptation.adapted, adaptation.fit

    def note_config(config: Any, seed: int, scale: str) -> Any:
        configs.append(config)
        return adapted(config, seed, scale)

    def note_optimizer(*args: Any, **kwargs: Any) -> Any:
        if "optimizer" in kwargs:
            found.append((configs[-1], kwargs["optimizer"]))
        return fit(*args, **kwargs)

    monkeypatch.setitem(adaptation.SIZES, "tiny", dict(TINY))
    monkeypatch.setitem(allora._STEPS, "tiny", 3)
    monkeypatch.setattr(adaptation, "rows", lambda text, split: DATA[text][: 40 if split == "train" else 16])
    monkeypatch.setattr(adaptation, "adapted", note_config)
    monkeypatch.setattr(adaptation, "fit", note_optimizer)
    allora.loss.cache_clear()
    adaptation.pretrained.cache_clear()
    yield found
    allora.loss.cache_clear()
    adaptation.pretrained.cache_clear()


def test_the_arms_are_what_they_are_called(seen: list[Any]) -> None:
    values = {arm: allora.faster_at_scale_one.measure(arm, 0, "tiny") for arm in ("lora", "eta-2", "eta-8")}
    assert len(set(values.values())) == 3
    assert [type(c) for c, _ in seen] == [peft.LoraConfig, ALLoRAConfig, ALLoRAConfig]
    assert [getattr(c, "eta", None) for c, _ in seen] == [None, 2.0, 8.0]
    assert all(c.lora_alpha == c.r == 8 for c, _ in seen)
    assert all(isinstance(o, torch.optim.SGD) and not o._optimizer_step_post_hooks for _, o in seen)
    seen.clear()
    for arm in ("lora", "lora-scale-4", "update-2"):
        allora.adam_update.measure(arm, 0, "tiny")
    assert [c.lora_alpha for c, _ in seen] == [8, 32, 8]
    assert [bool(o._optimizer_step_post_hooks) for _, o in seen] == [False, False, True]
    assert all(isinstance(o, torch.optim.AdamW) for _, o in seen)
    assert seen[-1][0].apply == "update"
    seen.clear()
    allora.adam_gradient.measure("gradient-4", 0, "tiny")
    assert (seen[0][0].apply, seen[0][0].eta, type(seen[0][1])) == ("gradient", 4.0, torch.optim.AdamW)
    allora.adam_gradient.measure("lora", 0, "tiny")
    assert len(seen) == 1  # the value of the other claim


def test_an_arm_changes_no_other(seen: list[Any]) -> None:
    first = allora.adam_update.measure("lora", 0, "tiny")
    second = allora.adam_update.measure("update-4", 0, "tiny")
    allora.loss.cache_clear()
    assert allora.adam_update.measure("update-4", 0, "tiny") == second != first
    assert allora.adam_update.measure("lora", 0, "tiny") == first
