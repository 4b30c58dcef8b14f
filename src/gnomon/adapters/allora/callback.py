"""ALLoRA's updates in `transformers.Trainer`."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback

from gnomon.adapters.allora.updates import (
    ScaledUpdates,
    is_followed,
    plain_optimizer,
    scale_allora_updates,
    update_layers,
)

__all__ = ["ALLoRACallback", "allora_callback"]


class ALLoRACallback(TrainerCallback):
    """Call `scale_allora_updates` on the Trainer's optimizer when training begins, and end it with the training.

    It needs no state, so a resumed run goes on as an uninterrupted one does.

    Examples
    --------
    >>> trainer = Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[ALLoRACallback()])
    """

    def __init__(self) -> None:
        self._followed: ScaledUpdates | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Follow the optimizer, unless it is followed already."""
        if not is_followed(plain_optimizer(kwargs["optimizer"])):
            self._followed = scale_allora_updates(kwargs["optimizer"], kwargs["model"])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let the optimizer go."""
        if self._followed is not None:
            self._followed.remove()
            self._followed = None


def allora_callback(model: nn.Module) -> ALLoRACallback | None:
    """Return what the Trainer needs for the adapters of a model: `ALLoRACallback`, or None in gradient mode.

    Parameters
    ----------
    model : nn.Module

    Returns
    -------
    ALLoRACallback or None
    """
    return ALLoRACallback() if update_layers(model) else None
