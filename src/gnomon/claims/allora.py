"""ALLoRA's claims re-measured: the step grows with eta while the forward scale stays 1; what is left of it under Adam.

The paper fine-tunes models up to Llama 3 on commonsense and perception tasks, and reports accuracies that cannot be
re-measured at this size. What it says of the mechanism can: LoRA's scale is taken out of the forward pass, and eta
gives the steps that it gave, more to the rows that have moved little. Here a two-layer Llama of 64 channels, trained on
the Python documentation, is adapted with rank 8 on all linear layers in 120 steps to the names of the Unicode
characters, or to school arithmetic (GSM8K). LoRA has the scale 1 where nothing else is said.

Under AdamW a factor of the gradient that changes slowly cancels, and at the start all rows have the same, so the rule
at the gradient is expected to gain nothing there; at the update it does not cancel. At this size LoRA with the forward
scale 4 (arm ``lora-scale-4``) is better than both, so nothing here says that ALLoRA beats a scale that was tuned.

Learning rates are 0.05 for SGD with momentum 0.9 and 0.005 for AdamW. Other rates of SGD were looked at on the first
seed: the order in eta holds at 0.01 and 0.02, and not at 0.2, which is too much (eta 4 and 8 end above LoRA). The
margins of the ladder of eta, 0.04, were chosen after the first seed, which had 0.07 and 0.06 on the names and 0.06 and
0.05 on arithmetic; so was the factor 0.998, within which the rule at the gradient gains nothing under AdamW.
"""

from __future__ import annotations

from functools import lru_cache

import peft
import torch

from gnomon.adapters.allora import ALLoRAConfig, scale_allora_updates
from gnomon.claims import adaptation
from gnomon.claims.experiment import experiment

__all__ = ["adam_gradient", "adam_update", "faster_at_scale_one", "faster_on_maths", "loss"]

_RANK = 8
_STEPS = {"small": 120, "medium": 400, "large": 1000}
_LR = {"sgd": 0.05, "adamw": 0.005}
_SCALES = ("small", "medium", "large")


@lru_cache(maxsize=256)
def loss(method: str, size: float, optimizer: str, text: str, seed: int, scale: str) -> float:
    """Return the held-out loss after adaptation, in nats per byte.

    Parameters
    ----------
    method : {"lora", "gradient", "update"}
        LoRA, or ALLoRA at the gradient, or at the update.
    size : float
        Forward scale of LoRA, eta of ALLoRA.
    optimizer : {"sgd", "adamw"}
    text : {"names", "maths"}
    seed : int
    scale : {"small", "medium", "large"}
    """
    config: peft.LoraConfig
    if method == "lora":
        config = peft.LoraConfig(r=_RANK, lora_alpha=round(_RANK * size), target_modules="all-linear")
    else:
        config = ALLoRAConfig(r=_RANK, eta=size, apply=method, target_modules="all-linear")
    model = adaptation.adapted(config, seed, scale)
    parameters = [p for p in model.parameters() if p.requires_grad]
    lr = _LR[optimizer]
    made: torch.optim.Optimizer
    if optimizer == "sgd":
        made = torch.optim.SGD(parameters, lr=lr, momentum=0.9)
    else:
        made = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    if method == "update":
        scale_allora_updates(made, model)
    adaptation.fit(model, adaptation.rows(text, "train"), _STEPS[scale], lr, seed + 1, optimizer=made)
    return adaptation.held_out_loss(model, text)


def _size(arm: str) -> float:
    return float(arm.rpartition("-")[2])


def _with_sgd(arm: str, text: str, seed: int, scale: str) -> float:
    if arm == "lora":
        return loss("lora", 1.0, "sgd", text, seed, scale)
    return loss("gradient", _size(arm), "sgd", text, seed, scale)


@experiment(
    arms=("lora", "eta-2", "eta-4", "eta-8"),
    relation=("eta-2 < lora by 0.04", "eta-4 < eta-2 by 0.04", "eta-8 < eta-4"),
    unit="validation loss, nats per byte",
    scales=_SCALES,
)
def faster_at_scale_one(arm: str, seed: int, scale: str) -> float:
    """With SGD and the forward scale 1, each doubling of eta brings the model further in the same steps."""
    return _with_sgd(arm, "names", seed, scale)


@experiment(
    arms=("lora", "eta-2", "eta-4"),
    relation=("eta-2 < lora by 0.04", "eta-4 < eta-2 by 0.04"),
    unit="validation loss, nats per byte",
    scales=_SCALES,
)
def faster_on_maths(arm: str, seed: int, scale: str) -> float:
    """The same on real rows: questions of GSM8K with their worked answers."""
    return _with_sgd(arm, "maths", seed, scale)


@experiment(
    arms=("lora", "update-2", "update-4", "lora-scale-4"),
    relation=("update-2 < lora by 0.03", "update-4 < lora by 0.03", "update-4 < update-2"),
    unit="validation loss, nats per byte",
    scales=_SCALES,
)
def adam_update(arm: str, seed: int, scale: str) -> float:
    """At the update of AdamW, eta gives larger steps at the forward scale 1."""
    if arm in ("lora", "lora-scale-4"):
        return loss("lora", 1.0 if arm == "lora" else 4.0, "adamw", "names", seed, scale)
    return loss("update", _size(arm), "adamw", "names", seed, scale)


@experiment(
    arms=("lora", "gradient-1", "gradient-2", "gradient-4"),
    relation=("gradient-1 > 0.998 * lora", "gradient-2 > 0.998 * lora", "gradient-4 > 0.998 * lora"),
    unit="validation loss, nats per byte",
    scales=_SCALES,
)
def adam_gradient(arm: str, seed: int, scale: str) -> float:
    """At the gradient under AdamW, eta gains nothing: a constant factor cancels in Adam's quotient."""
    if arm == "lora":
        return loss("lora", 1.0, "adamw", "names", seed, scale)
    return loss("gradient", _size(arm), "adamw", "names", seed, scale)
