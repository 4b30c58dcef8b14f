"""What saving and loading needs to know of PEFT: which tensors are the model's own, and who knows an adapter."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from gnomon import catalog
from gnomon.common.files import read_json

__all__ = ["base_state", "register_adapter"]


def base_state(base: nn.Module) -> dict[str, torch.Tensor]:
    """Return the state of a model inside a PEFT wrapper under the names it had before adapters were attached."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    state = dict(base.state_dict())
    for name, module in base.named_modules():
        if isinstance(module, BaseTunerLayer):
            own = f"{name}.base_layer."
        elif isinstance(module, AuxiliaryTrainingWrapper):
            own = f"{name}.original_module."
        else:
            continue
        for key in [k for k in state if k.startswith(f"{name}.")]:
            tensor = state.pop(key)
            if key.startswith(own):
                state[f"{name}.{key.removeprefix(own)}"] = tensor
    return state


def register_adapter(folder: Path) -> None:
    """Import gnomon's own adapters when PEFT does not know the one saved in `folder`."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    known = {str(t.value) for t in PEFT_TYPE_TO_CONFIG_MAPPING}
    if read_json(folder / "adapter_config.json").get("peft_type") not in known:
        for card in catalog.methods(plugs="adapter"):
            catalog.load(card.slug)
