"""The LoRA layers of a model as perturbations see them: which can be moved, and the noise that one of them gets."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.utils import extract_model_from_parallel
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gnomon.adapters.lora_ggpo import rules
from gnomon.adapters.lora_ggpo.backends import Noise, is_plain
from gnomon.common.lora import LoraPair, lora_pairs
from gnomon.errors import ModelError

__all__ = ["check_unmerged", "checked_pairs", "exactly", "is_trained", "layer_noise", "layer_seed"]


def checked_pairs(model: nn.Module, adapter: str | None = None) -> list[LoraPair]:
    """Return the LoRA factors of a model whose merged weights can be perturbed.

    Raises
    ------
    ModelError
        Where there is no plain LoRA, it is merged, or its parameters are held by FSDP 1 or DeepSpeed.
    MethodError
        When several adapters are active and none is named.
    """
    pairs = lora_pairs(extract_model_from_parallel(model, keep_fp32_wrapper=True), adapter)
    for pair in pairs:
        if pair.adapter in pair.layer.lora_variant:
            variant = type(pair.layer.lora_variant[pair.adapter]).__name__
            raise ModelError(
                f"{pair.name} has a variant of LoRA ({variant}), whose merged weight is not W + s B A. Use a plain "
                "LoraConfig (without use_dora and the like)."
            )
        if type(pair.layer).__name__ in ("MultiheadAttention", "ParamWrapper"):
            raise ModelError(
                f"{pair.name} is LoRA on a {type(pair.layer.get_base_layer()).__name__}, which does not compute "
                "x W^T. Leave it out of target_modules (target_parameters)."
            )
    if any(hasattr(p, "ds_id") for p in model.parameters()):
        raise ModelError("the model is held by DeepSpeed ZeRO-3, which hides gradients and momenta. Train with FSDP2.")
    if any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules()):
        raise ModelError("the model is wrapped by FSDP 1, which flattens the factors. Use FSDP2 (fully_shard).")
    return pairs


def check_unmerged(pairs: list[LoraPair]) -> None:
    """Refuse an adapter that was merged since its layers were found."""
    merged = [pair.name for pair in pairs if pair.adapter in pair.layer.merged_adapters]
    if merged:
        raise ModelError(
            f"the adapter {pairs[0].adapter!r} is merged into {merged[0]}, so there is nothing to train. Call "
            "unmerge_adapter() first."
        )


@contextmanager
def exactly(device: torch.device) -> Iterator[None]:
    """Without a graph, and without the rounding that an autocast around us would bring."""
    with torch.no_grad(), torch.autocast(device_type=device.type, enabled=False):
        yield


def layer_seed(*parts: object) -> int:
    """Return a seed of 63 bits that depends on all the parts."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def is_trained(pair: LoraPair, always: bool = False) -> bool:
    """Return whether the adapter acts at the layer, in training mode unless `always`."""
    layer = pair.layer
    return (always or layer.training) and not layer.disable_adapters and pair.adapter in layer.active_adapters


def _base_weight(pair: LoraPair) -> Tensor:
    """The base weight as (out, in), dequantised where it is quantised."""
    base = pair.layer.get_base_layer()
    if is_plain(base):
        weight = pair.weight
    elif getattr(base, "weight", None) is None:
        raise ModelError(
            f"the base layer of {pair.name} is a {type(base).__name__} without a weight that could be read. GGPO needs "
            "the norms of its rows; use MGPO."
        )
    else:
        weight = dequantize_module_weight(base)
    if weight.is_meta or isinstance(weight, DTensor) or not weight.is_floating_point():
        raise ModelError(
            f"the weight of {pair.name} is {type(weight).__name__} of {weight.dtype} on {weight.device} and cannot be "
            "read here. Load the model without offloading and without tensor parallelism."
        )
    return weight.detach()


def layer_noise(
    pair: LoraPair,
    factors: tuple[Tensor, Tensor],
    gradient_norms: Tensor | None,
    sigma: float,
    beta: float,
    seed: int,
) -> Noise:
    """Return GGPO's perturbation of one layer: the norms of the merged rows now, and a seed."""
    weight = _base_weight(pair)
    with exactly(weight.device):
        b, a = (x.to(weight.device) for x in factors)
        norms = rules.merged_row_norms(weight, b, a, pair.scaling)
        spread = rules.ggpo_deviations(norms, gradient_norms, sigma, beta, a.shape[1])
    return Noise(seed, spread, a.shape[1])
