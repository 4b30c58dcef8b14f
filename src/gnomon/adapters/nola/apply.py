"""The plain function by which recipes attach a NOLA adapter."""

from __future__ import annotations

from typing import Literal

from peft import PeftModel
from transformers import PreTrainedModel

from gnomon.adapters._peft import attach
from gnomon.adapters.nola.config import NOLAConfig

__all__ = ["apply_nola"]


def apply_nola(
    model: PreTrainedModel,
    r: int = 8,
    num_basis_a: int = 512,
    num_basis_b: int | None = None,
    *,
    lora_alpha: float | None = None,
    seed: int = 0,
    variant: Literal["lm", "vision"] = "lm",
    coeff_bits: int | None = None,
    share_basis: Literal["module", "shape"] = "module",
    generator: Literal["mt19937", "philox"] = "mt19937",
    target_modules: list[str] | str | None = None,
) -> PeftModel:
    """Attach a NOLA adapter to a model: `NOLAConfig` with plain options, then `peft.get_peft_model`.

    Parameters
    ----------
    model : PreTrainedModel
        Changed in place; all its own weights are frozen.
    r, num_basis_a, num_basis_b, lora_alpha, seed, variant, coeff_bits, share_basis, generator, target_modules
        As in `NOLAConfig`.

    Returns
    -------
    PeftModel

    Raises
    ------
    MethodError
        When an option is not allowed.
    ModelError
        When the model has adapters, a target is no linear layer, or the family's targets are not known.

    Examples
    --------
    >>> from gnomon.common.models import tiny
    >>> model = apply_nola(tiny("llama"), r=4, num_basis_a=16)
    >>> sum(p.numel() for p in model.parameters() if p.requires_grad)
    256
    """
    config = NOLAConfig(
        r=r,
        num_basis_a=num_basis_a,
        num_basis_b=num_basis_b,
        lora_alpha=lora_alpha,
        seed=seed,
        variant=variant,
        coeff_bits=coeff_bits,
        share_basis=share_basis,
        generator=generator,
        target_modules=target_modules,
        task_type="CAUSAL_LM",
    )
    return attach(model, config)
