"""The processes of a distributed run (torchrun, accelerate launch); a single process is one rank."""

from __future__ import annotations

import torch
from accelerate import PartialState

__all__ = ["ranks"]


def ranks() -> PartialState:
    """Return accelerate's view of the ranks, joined over gloo where there is no accelerator.

    Without `cpu` accelerate would not join CPU ranks at all, and every rank would believe to be the first.
    """
    return PartialState(cpu=not torch.cuda.is_available())
