"""The processes of a distributed run (torchrun, accelerate launch); a single process is one rank."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

__all__ = ["agree", "ranks"]


def ranks() -> PartialState:
    """Return accelerate's view of the ranks, joined over gloo where there is no accelerator.

    Without `cpu` accelerate would not join CPU ranks at all, and every rank would believe to be the first.
    """
    return PartialState(cpu=not torch.cuda.is_available())


def agree(value: Any) -> Any:
    """Return the first rank's value on every rank, so that all take the same way; waits for them."""
    if ranks().num_processes == 1:
        return value
    return broadcast_object_list([value])[0]
