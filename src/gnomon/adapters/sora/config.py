"""The configuration of a SoRA adapter."""

from __future__ import annotations

from dataclasses import dataclass, field

from gnomon.adapters._peft import LinearConfig
from gnomon.errors import MethodError

__all__ = ["SoRAConfig"]


@dataclass
class SoRAConfig(LinearConfig):
    """Configuration of a SoRA adapter: LoRA with one trained gate per rank.

    Parameters
    ----------
    r : int, default 8
        r_max, the rank that every module starts with (authors' scripts: 8). Choose it generously: the gates reduce it.
    lora_alpha : float, default 16
        The change is lora_alpha / r times B diag(g) A (authors' scripts: 16).
    lora_dropout : float, default 0.0
        Probability of dropping an input of A in training (authors' scripts: 0).
    gate_init : {"normal", "ones"}, default "normal"
        Gates start from N(0, 1), as the authors' do, or at 1, where the adapter is a LoRA.
    seed : int, default 0
        A and the gates of every module are drawn from it; no global generator is touched.
    target_modules, exclude_modules, layers_to_transform, layers_pattern, modules_to_save, bias
        As in PEFT's `LoraConfig`; only linear layers can be adapted. The authors adapt all linear layers of attention
        and feed-forward (``"all-linear"``) and train the classification head (``modules_to_save``).

    Raises
    ------
    MethodError
        When a value is not allowed.

    Examples
    --------
    >>> SoRAConfig(r=4).lora_alpha
    16
    """

    lora_alpha: float = field(default=16, metadata={"help": "The change is lora_alpha / r times B diag(g) A."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the input of A."})
    gate_init: str = field(default="normal", metadata={"help": "normal or ones."})
    seed: int = field(default=0, metadata={"help": "A and the gates are drawn from it."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gate_init not in ("normal", "ones"):
            raise MethodError(f"gate_init = {self.gate_init!r}. Allowed: 'normal', 'ones'.")
        if not self.lora_alpha > 0:
            raise MethodError(f"lora_alpha = {self.lora_alpha!r}: a number above 0, such as 16.")
        if not 0 <= self.lora_dropout < 1:
            raise MethodError(f"lora_dropout = {self.lora_dropout!r}: a probability from 0 to below 1, such as 0.1.")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or self.seed < 0:
            raise MethodError(f"seed = {self.seed!r}: a whole number of at least 0.")
