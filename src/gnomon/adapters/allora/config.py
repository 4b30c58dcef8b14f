"""The configuration of an ALLoRA adapter: PEFT's LoraConfig without what the method removes."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from peft import LoraConfig
from torch import nn

from gnomon.adapters.allora.rule import check_eta
from gnomon.errors import ConfigError, MethodError

__all__ = ["MODES", "ALLoRAConfig", "check_mode"]

MODES = ("gradient", "update")


def check_mode(apply: str) -> str:
    """Return the mode.

    Raises
    ------
    MethodError
        When there is no such mode.
    """
    if apply not in MODES:
        raise MethodError(f"apply = {apply!r}. Allowed: {', '.join(map(repr, MODES))}.")
    return apply


# What LoRA may have and the method has not: option -> why not.
_REMOVED: dict[str, str] = {
    "lora_dropout": "ALLoRA trains without dropout",
    "use_rslora": "ALLoRA has no forward scale, and eta takes its place",
    "use_dora": "ALLoRA is a rule for plain LoRA factors",
    "lora_bias": "ALLoRA is defined for the two factors, without a bias",
    "target_parameters": "ALLoRA is defined for linear layers, not for single parameters",
}


@dataclass
class ALLoRAConfig(LoraConfig):
    """Configuration of an ALLoRA adapter.

    Parameters
    ----------
    r : int, default 8
        Rank.
    eta : float, default 2.0
        Scale of a row of B A that is zero, and the largest. The paper's value is not known to us; 2.0 is
        lora_alpha / r of the common LoRA with lora_alpha = 2 r, so the first step equals its first step.
    apply : {"gradient", "update"}, default "gradient"
        "gradient": the paper's rule, at the gradients of A and B. "update": at the optimizer's update of B, for
        AdamW and its kin, in which a factor of the gradient cancels; `scale_allora_updates` or `ALLoRACallback` does
        it.
    target_modules, modules_to_save, init_lora_weights, rank_pattern, ...
        As in PEFT's `LoraConfig`, but for what the method removes: `lora_alpha` is r (also in `alpha_pattern`),
        `lora_dropout` 0, `use_rslora`, `use_dora` and `lora_bias` are off, and there are no other LoRA variants.

    Raises
    ------
    MethodError
        When a value is not allowed.

    Notes
    -----
    `to_dict`, and with it the saved file, leaves `eta` and `apply` out: what is saved is a plain LoRA.

    Examples
    --------
    >>> config = ALLoRAConfig(r=4, eta=2.0)
    >>> config.lora_alpha, config.peft_type.value
    (4, 'LORA')
    """

    lora_alpha: int | None = field(default=None, metadata={"help": "Always r: there is no forward scale."})
    eta: float = field(default=2.0, metadata={"help": "Scale of a row that is zero.", "is_lora_variant": True})
    apply: str = field(default="gradient", metadata={"help": "gradient or update."})

    def __post_init__(self) -> None:
        self.eta = check_eta(self.eta)
        check_mode(self.apply)
        if not isinstance(self.r, int) or isinstance(self.r, bool) or self.r < 1:
            raise MethodError(f"r = {self.r!r}: the rank is a whole number of at least 1, such as 8.")
        for name, reason in _REMOVED.items():
            if getattr(self, name):
                raise MethodError(f"{name} = {getattr(self, name)!r}: {reason}. Leave {name} out.")
        self._check_scale()
        self._check_variants()
        super().__post_init__()
        from gnomon.adapters.allora.layer import build_layer  # it needs this class

        self._register_custom_module({nn.Module: build_layer})

    def _check_scale(self) -> None:
        if self.lora_alpha is None:
            self.lora_alpha = self.r
        if self.lora_alpha != self.r:
            raise MethodError(
                f"lora_alpha = {self.lora_alpha!r} with r = {self.r}: ALLoRA has no forward scale. Leave lora_alpha "
                f"out, and set eta = {self.lora_alpha / self.r:g} to start with the step of that LoRA."
            )
        alphas: Any = getattr(self, "alpha_pattern", None)
        if alphas not in ({}, None, self.rank_pattern):
            raise MethodError(
                f"alpha_pattern = {alphas!r}: ALLoRA has no forward scale. Leave alpha_pattern out; it "
                "follows rank_pattern."
            )
        self.alpha_pattern = dict(self.rank_pattern or {})

    def _check_variants(self) -> None:
        on = [
            f.name
            for f in fields(self)
            if f.metadata.get("is_lora_variant") and f.name != "eta" and getattr(self, f.name)
        ]
        initialisation = next(f for f in fields(self) if f.name == "init_lora_weights")
        if self.init_lora_weights in initialisation.metadata.get("lora_variants", ()):
            on.append(f"init_lora_weights={self.init_lora_weights!r}")
        if on:
            raise MethodError(
                f"{on[0]}: this is a LoRA variant of its own, and ALLoRA is a rule for plain LoRA. Leave it out."
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as a dictionary, that of a plain `LoraConfig`."""
        plain: dict[str, Any] = super().to_dict()
        del plain["eta"], plain["apply"]
        return plain

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str,
        subfolder: str | None = None,
        *,
        eta: float = 2.0,
        apply: str = "gradient",
        **kwargs: Any,
    ) -> ALLoRAConfig:
        """Read the configuration of a saved LoRA, to go on training it with ALLoRA's rule.

        Parameters
        ----------
        pretrained_model_name_or_path : str
            A folder or the name of a repository.
        subfolder : str, optional
        eta : float, default 2.0
        apply : {"gradient", "update"}, default "gradient"
            The file holds neither: give those of the earlier run.
        **kwargs
            For the download.

        Returns
        -------
        ALLoRAConfig

        Raises
        ------
        ConfigError
            When it is no LoRA.
        MethodError
            When it has a forward scale, dropout, or another thing that the method removes.
        """
        saved = LoraConfig.from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        if not isinstance(saved, LoraConfig):
            raise ConfigError(
                f"{pretrained_model_name_or_path} holds an adapter of the type {saved.peft_type.value}. ALLoRA can go "
                "on training a LoRA. Name the folder of one."
            )
        given = {f.name: getattr(saved, f.name) for f in fields(saved) if f.init}
        return cls(**given, eta=eta, apply=apply)
