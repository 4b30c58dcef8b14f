"""The configurations of LoRA-SB and LoRA-XS adapters."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from gnomon.adapters._peft import LinearConfig
from gnomon.adapters.lora_sb.factors import SVDS, Sketch, derive_seed
from gnomon.errors import MethodError

__all__ = ["LoRASBConfig", "LoRAXSConfig"]

_SAVES: tuple[Any, ...] = (True, "bf16", "seeded-sketch", False)


@dataclass
class LoRASBConfig(LinearConfig):
    """Configuration of a LoRA-SB adapter: W + s B R A with fixed A and B, of which only R (r x r) is trained.

    Parameters
    ----------
    r : int, default 96
        Rank (the paper's language models; RoBERTa: 24). At most the smaller side of every adapted layer.
    lora_alpha : float, optional
        s = lora_alpha / r. Default r, so s = 1. With ``init="sb"`` the start and, at a learning rate of lr / s^2, SGD
        do not depend on it.
    init : {"sb", "xs", "given"}, default "sb"
        "sb": factors from the first step of full fine-tuning, set by `initialize_lora_sb`. "xs": LoRA-XS, factors of
        the weight itself, at once. "given": your own, by `set_lora_sb_factors`.
    parity : bool, default False
        Decompose as the authors' code does, with their seed and their rounding to bfloat16 (``init="sb"``).
    svd : {"auto", "exact", "randomized"}, default "auto"
        Exact up to a smaller side of 512, randomised above (rank + 8 vectors, 4 iterations).
    save_factors : {True, "bf16", "seeded-sketch", False}, default True
        What is saved beside R. True: A and B. "bf16": A and B, rounded to bfloat16 from the start. "seeded-sketch":
        A and B are chosen in a space of `sketch_size` dimensions that follows from the seed, and stored by their
        coordinates there (``init="sb"``). False: nothing; "xs" computes them again from the weight, any other needs
        them set again.
    sketch_size : int, optional
        Default 4 r.
    seed : int, default 0
        Of R's start in "xs" and of the sketches.
    target_modules, exclude_modules, layers_to_transform, layers_pattern, modules_to_save, bias
        As in PEFT's `LoraConfig`; only linear layers can be adapted.

    Raises
    ------
    MethodError
        When a value is not allowed, or two do not go together.

    Examples
    --------
    >>> LoRASBConfig(r=4).lora_alpha
    4
    """

    r: int = field(default=96, metadata={"help": "Rank."})
    lora_alpha: float | None = field(default=None, metadata={"help": "s = lora_alpha / r; default r."})
    init: str = field(default="sb", metadata={"help": "sb, xs or given."})
    parity: bool = field(default=False, metadata={"help": "Decompose as the authors' code does."})
    svd: str = field(default="auto", metadata={"help": "auto, exact or randomized."})
    save_factors: bool | str = field(default=True, metadata={"help": "True, bf16, seeded-sketch or False."})
    sketch_size: int | None = field(default=None, metadata={"help": "Dimensions of the sketch; default 4 r."})
    seed: int = field(default=0, metadata={"help": "Of R's start in xs, and of the sketches."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in (("init", ("sb", "xs", "given")), ("svd", SVDS), ("save_factors", _SAVES)):
            if not any(getattr(self, name) is value or getattr(self, name) == value for value in allowed):
                raise MethodError(f"{name} = {getattr(self, name)!r}. Allowed: {', '.join(map(repr, allowed))}.")
        if self.lora_alpha is None:
            self.lora_alpha = self.r
        if not self.lora_alpha > 0:
            raise MethodError(f"lora_alpha = {self.lora_alpha!r}: a number above 0; r itself gives a scale of 1.")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or self.seed < 0:
            raise MethodError(f"seed = {self.seed!r}: a whole number of at least 0.")
        sketched = self.save_factors == "seeded-sketch"
        for name, value in (("parity", self.parity), ('save_factors="seeded-sketch"', sketched)):
            if value and self.init != "sb":
                raise MethodError(f"{name} has a meaning only with init = 'sb', not with {self.init!r}. Leave it out.")
        if sketched and self.parity:
            raise MethodError("parity takes the authors' factors, which lie in no sketch. Leave one of the two out.")
        if self.sketch_size is not None and (not sketched or self.sketch_size < self.r):
            raise MethodError(
                f"sketch_size = {self.sketch_size!r} with r = {self.r} and save_factors = {self.save_factors!r}: it is "
                'at least r, such as 4 r, and goes with save_factors="seeded-sketch".'
            )

    @property
    def scaling(self) -> float:
        """s."""
        assert self.lora_alpha is not None
        return self.lora_alpha / self.r

    def sketch(self, side: str, key: str, size: int) -> Sketch:
        """Return the sketch of A (side "a", size n) or B (side "b", size m) of one module."""
        return Sketch.make(size, self.sketch_size or 4 * self.r, derive_seed(self.seed, key, side))


@dataclass
class LoRAXSConfig(LoRASBConfig):
    """Configuration of a LoRA-XS adapter: W + s B R A with A = V_r^T and B = U_r S_r of the weight's own SVD.

    R starts at N(0, 1e-5^2) from the seed.

    Parameters
    ----------
    r, lora_alpha, svd, seed
        As in `LoRASBConfig`.
    save_factors : {False, True, "bf16"}, default False
        False: they are computed again from the weight when the adapter is loaded, and compared with a number that
        was saved for each module.
    target_modules, exclude_modules, layers_to_transform, layers_pattern, modules_to_save, bias
        As in PEFT's `LoraConfig`.

    Raises
    ------
    MethodError
        When a value is not allowed.

    Examples
    --------
    >>> LoRAXSConfig(r=4).save_factors
    False
    """

    init: str = field(default="xs", metadata={"help": "xs."})
    save_factors: bool | str = field(default=False, metadata={"help": "False, True or bf16."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init != "xs":
            raise MethodError(f"init = {self.init!r}: LoRA-XS has 'xs' only. Take LoRASBConfig for the others.")
