"""NOLA as a PEFT tuner: its layer and its model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import linear

from gnomon.adapters._peft import LinearAdapter, LinearTuner
from gnomon.adapters.nola.codes import check_bits, pack, straight_through, unpack
from gnomon.adapters.nola.config import NOLAConfig, compare_headers, read_header, write_header
from gnomon.adapters.nola.mixing import SharedBases
from gnomon.errors import GnomonWarning, MethodError, ModelError

__all__ = ["NOLALinear", "NOLAModel", "accumulated", "quantize_nola"]

_HEADER = "nola_header"
_SEEN_IN_TRAINING = (2, 3)  # bits


class NOLALinear(LinearAdapter):
    """A linear layer with W + lora_alpha / r B A, where A and B are mixed from random bases."""

    adapter_layer_names = ("nola_alpha", "nola_beta")
    other_param_names = ("scaling", "bits", "shared")

    def make_containers(self) -> None:
        """Make the containers of the coefficients."""
        self.nola_alpha, self.nola_beta = nn.ParameterDict(), nn.ParameterDict()
        self.scaling: dict[str, float] = {}
        self.bits: dict[str, int | None] = {}
        self.shared: dict[str, dict[str, SharedBases]] = {}

    def add(self, adapter_name: str, config: NOLAConfig) -> None:
        """Make the coefficients of one adapter."""
        k, of_b = config.num_basis_a, config.num_basis_b
        assert of_b is not None
        assert config.lora_alpha is not None
        full = config.r * (self.in_features + self.out_features)
        if k + of_b >= full:
            warnings.warn(
                f"{self.key}: {k} + {of_b} coefficients are no fewer than the {full} numbers of a LoRA of rank "
                f"{config.r}. Take fewer bases, or LoRA.",
                GnomonWarning,
                stacklevel=2,
            )
        start = (0.0, 0.0) if config.variant == "lm" else (1 / k, 1 / of_b)
        self.nola_alpha[adapter_name] = nn.Parameter(torch.full((k,), start[0]))
        self.nola_beta[adapter_name] = nn.Parameter(torch.full((of_b,), start[1]))
        self.scaling[adapter_name] = config.lora_alpha / config.r
        self.bits[adapter_name] = config.coeff_bits

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move the coefficients, but keep them in float32: they train badly in 16 bits."""
        base_device, _ = self._get_base_layer_device_and_dtype(self.get_base_layer())
        for container in (self.nola_alpha, self.nola_beta):
            if adapter_name in container and container[adapter_name].device.type != "meta":
                container[adapter_name] = container[adapter_name].to(device or base_device)

    def parameter(self, side: str, adapter: str) -> Tensor:
        """Return alpha (side "a") or beta (side "b") as it is stored."""
        return (self.nola_alpha if side == "a" else self.nola_beta)[adapter]

    def coefficients(self, side: str, adapter: str) -> Tensor:
        """Return alpha or beta as the forward pass takes it: in float32 or float64, rounded where it is to be."""
        stored = self.parameter(side, adapter)
        given = stored if stored.dtype == torch.float64 else stored.float()
        bits = self.bits[adapter]
        if bits is None or isinstance(given, DTensor) or (self.training and bits not in _SEEN_IN_TRAINING):
            return given
        return straight_through(given, bits)

    @torch.compiler.disable
    def factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """Return A (r, in) and B (out, r) of one adapter, with gradients where they are wanted."""
        shared = self.shared[adapter_name]
        return shared["a"].factor(self), shared["b"].factor(self)

    def delta(self, adapter_name: str) -> Tensor:
        """Return lora_alpha / r B A, (out, in)."""
        A, B = self.factors(adapter_name)
        return self.scaling[adapter_name] * (B @ A)

    def branch(self, adapter_name: str, x: Tensor) -> Tensor:
        """Return lora_alpha / r x A^T B^T."""
        A, B = self.factors(adapter_name)
        return linear(linear(self._cast_input_dtype(x, A.dtype), A), B) * self.scaling[adapter_name]

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Choose the active adapters; the factors of the others are dropped."""
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        for name, sides in self.shared.items():
            if name not in self.active_adapters:
                for shared in sides.values():
                    shared.forget()


class NOLAModel(LinearTuner):
    """Puts `NOLALinear` layers into a model; made by `peft.get_peft_model` from a `NOLAConfig`."""

    prefix = "nola_"
    tuner_layer_cls = NOLALinear

    def _create_and_replace(
        self,
        peft_config: NOLAConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        super()._create_and_replace(peft_config, adapter_name, target, target_name, parent, current_key, **kwargs)
        layer = getattr(parent, target_name)
        known: dict[Any, SharedBases] = self.__dict__.setdefault("_shared_bases", {})
        shapes = {"a": (peft_config.r, layer.in_features), "b": (layer.out_features, peft_config.r)}
        layer.shared[adapter_name] = {}
        for side, shape in shapes.items():
            bases, start = peft_config.bases(side, layer.key, *shape)
            shared = known.get((adapter_name, side, bases))
            if shared is None:
                shared = known[adapter_name, side, bases] = SharedBases(bases, start, adapter_name, side)
            shared.members.append(layer)
            layer.shared[adapter_name][side] = shared

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter with its bases."""
        super().delete_adapter(adapter_name)
        for key in [key for key in self.__dict__.get("_shared_bases", {}) if key[0] == adapter_name]:
            del self._shared_bases[key]

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: NOLAConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        *args: Any,
        **kw: Any,
    ) -> dict[str, Tensor]:
        found = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, *args, **kw)
        layers = {name: m for name, m in model.named_modules() if isinstance(m, NOLALinear) and m.has(adapter_name)}
        if not layers:
            return found
        first = next(iter(layers.values()))
        bits = None if first.training else config.coeff_bits
        if bits is not None:
            for name in [name for name in found if _is_coefficient(name)]:
                stored = found[name]
                found[name] = pack(stored.full_tensor() if isinstance(stored, DTensor) else stored, bits)
        header = {**config.header(first.key, first.in_features), "coeff_bits": bits}
        found[f"base_model.{_HEADER}"] = write_header(header)
        return found

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: NOLAConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        header = next((key for key in state_dict if key.rpartition(".")[2] == _HEADER), None)
        bits = config.coeff_bits
        if header is not None:
            saved = read_header(state_dict.pop(header))
            compare_headers(saved, config)
            bits = saved["coeff_bits"]
        state_dict = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        own = {name: p for name, p in model.named_parameters() if _is_coefficient(name)}
        for name, stored in state_dict.items():
            if name in own and not stored.is_floating_point():
                if bits is None:
                    raise MethodError(
                        f"{name} is coded, but its width is not known. Load the whole file, with its header."
                    )
                state_dict[name] = unpack(stored, own[name].numel(), bits)
        return state_dict


def _is_coefficient(name: str) -> bool:
    return ".nola_alpha." in name or ".nola_beta." in name


def _layers(model: nn.Module) -> list[NOLALinear]:
    found = [module for module in model.modules() if isinstance(module, NOLALinear)]
    if not found:
        raise ModelError(
            f"this {type(model).__name__} has no NOLA layers. "
            "Make them with peft.get_peft_model(model, NOLAConfig(...))."
        )
    return found


def quantize_nola(model: nn.Module, bits: int | None, adapter_name: str = "default") -> nn.Module:
    """Set how many bits a coefficient of a trained adapter has in evaluation mode and in its file.

    The coefficients as trained stay, so several widths can be tried.

    Parameters
    ----------
    model : PeftModel
        Changed in place.
    bits : int or None
        2 to 8, 16, or None for float32. Below 4 the loss grows much unless the training saw the codes
        (``NOLAConfig(coeff_bits=2)``).
    adapter_name : str, default "default"

    Returns
    -------
    PeftModel
        The same model.

    Raises
    ------
    MethodError
        When the width is not offered, or there is no such adapter.
    ModelError
        When the model has no NOLA layers.
    """
    if bits is not None:
        check_bits(bits)
    layers = [layer for layer in _layers(model) if layer.has(adapter_name)]
    configs: dict[str, Any] = getattr(model, "peft_config", {})
    if not layers or adapter_name not in configs:
        raise MethodError(f"there is no NOLA adapter {adapter_name!r}. Adapters: {', '.join(configs)}.")
    for layer in layers:
        layer.bits[adapter_name] = bits
    configs[adapter_name].coeff_bits = bits
    return model


@contextmanager
def accumulated(model: nn.Module) -> Iterator[None]:
    """Let one pass over the bases serve all backward passes in the block: gradient accumulation in a loop of one's own.

    Inside, the gradients of A and B are summed; at the end of the block they become those of the coefficients. So
    clip and step after the block.

    Parameters
    ----------
    model : PeftModel
        On one rank: across ranks gradients are averaged inside the backward pass, before the block ends.

    Raises
    ------
    ModelError
        When the model has no NOLA layers, or is wrapped for several ranks.

    Examples
    --------
    ::

        with accumulated(model):
            for batch in micro_batches:
                (model(**batch).loss / len(micro_batches)).backward()
        optimizer.step()
    """
    layers = _layers(model)
    shards = any(isinstance(p, DTensor) for layer in layers for p in layer.parameters())
    if shards or isinstance(model, nn.parallel.DistributedDataParallel):
        raise ModelError(
            "accumulated() works on one rank: across ranks gradients are averaged inside the backward pass, before "
            "the block ends. Accumulate with the wrapper's own means (no_sync, set_requires_gradient_sync)."
        )
    every = {id(s): s for layer in layers for sides in layer.shared.values() for s in sides.values()}
    for shared in every.values():
        shared.summing = True
    try:
        yield
    finally:
        for shared in every.values():
            shared.summing = False
    for shared in every.values():
        shared.flush()
