"""LoRA-SB and LoRA-XS as PEFT tuners: their layer, their models, what is saved."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import linear

from gnomon.adapters._peft import LinearAdapter, LinearTuner
from gnomon.adapters.lora_sb.config import LoRASBConfig
from gnomon.adapters.lora_sb.factors import Factors, Sketch, derive_seed, update_factors, weight_factors
from gnomon.common.tensors import full_tensor
from gnomon.errors import MethodError, ModelError

__all__ = ["LatentLinear", "LoRASBLinear", "LoRASBModel", "LoRAXSLinear", "LoRAXSModel"]

_START = 1e-5  # standard deviation of R in LoRA-XS
_AGREES = 0.02  # how far `_number` may be off: about the angle, in radians, by which one vector may turn


class LatentLinear(LinearAdapter):
    """A linear layer with W + s B R A, of which R is trained and A and B are fixed."""

    stem: ClassVar[str]
    adapter_layer_names: tuple[str, ...]
    other_param_names = ("configs", "filled")

    def make_containers(self) -> None:
        """Make the containers of R, A and B; A and B are parameters, so that FSDP shards them, but stay frozen."""
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        self.frozen_peft_weight_names: dict[str, tuple[str, ...]] = {}
        self.configs: dict[str, LoRASBConfig] = {}
        self.filled: dict[str, bool] = {}

    def add(self, adapter_name: str, config: LoRASBConfig) -> None:
        """Make the tensors of one adapter; with ``init="xs"`` also compute its factors."""
        limit = min(self.in_features, self.out_features)
        if config.r > limit:
            raise MethodError(
                f"{self.key} has {self.out_features} x {self.in_features} entries, so r is at most {limit}, not "
                f"{config.r}. Lower r, or leave the layer out (k_proj and v_proj are small under grouped queries)."
            )
        shapes = {"R": (config.r, config.r), "A": (config.r, self.in_features), "B": (self.out_features, config.r)}
        for letter, shape in shapes.items():
            getattr(self, f"{self.stem}_{letter}")[adapter_name] = nn.Parameter(torch.zeros(shape))
        self.frozen_peft_weight_names[adapter_name] = (f"{self.stem}_A", f"{self.stem}_B")
        self.configs[adapter_name] = config
        self.filled[adapter_name] = False
        weight = self.get_base_layer().weight
        if config.init == "xs" and "meta" not in (weight.device.type, self.tensors(adapter_name).R.device.type):
            generator = torch.Generator().manual_seed(derive_seed(config.seed, self.key))
            A, B = self.own_factors(config)
            self.fill(adapter_name, Factors(A, B, _START * torch.randn(shapes["R"], generator=generator)))

    def own_factors(self, config: LoRASBConfig, *, orthonormal: bool = False) -> tuple[Tensor, Tensor]:
        """Return A = V_r^T and B = U_r S_r of the base weight, or B = U_r."""
        if self.merged:
            raise ModelError(
                f"{self.key} has the adapters {', '.join(self.merged_adapters)} merged into its weight, which would "
                "change the factors. Call unmerge_adapter() first."
            )
        weight, method = self.get_base_weight(), config.svd
        weight = weight.T if self.fan_in_fan_out else weight
        if orthonormal:
            return update_factors(weight, config.r, method=method)[:2]  # type: ignore[arg-type]
        return weight_factors(weight, config.r, method=method)  # type: ignore[arg-type]

    def sketches(self, adapter_name: str, device: torch.device) -> tuple[Sketch, Sketch]:
        """Return the sketches of the rows (out) and the columns (in) of the weight."""
        config = self.configs[adapter_name]
        rows = config.sketch("b", self.key, self.out_features)
        return rows.to(device), config.sketch("a", self.key, self.in_features).to(device)

    def unsaved(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """Return A and B where the file has none: those in place, or, where nothing is yet, the weight's own."""
        A, B, _ = self.tensors(adapter_name)
        if A.device.type != "meta":
            return A.detach(), B.detach()
        config = self.configs[adapter_name]
        if config.init == "xs":
            return self.own_factors(config)
        return torch.zeros(A.shape), torch.zeros(B.shape)

    def tensors(self, adapter_name: str) -> Factors:
        """Return A, B and R of one adapter as they are stored."""
        return Factors(*(getattr(self, f"{self.stem}_{letter}")[adapter_name] for letter in "ABR"))

    @torch.no_grad()
    def fill(self, adapter_name: str, factors: Factors, *, keep_latent: bool = False) -> None:
        """Write A, B and, unless it is to be kept, R."""
        bf16 = self.configs[adapter_name].save_factors == "bf16"
        for letter, own, given in zip("ABR", self.tensors(adapter_name), factors, strict=True):
            if letter == "R" and keep_latent:
                continue
            if isinstance(own, DTensor):
                raise ModelError(f"{self.key} is sharded. Set its factors before fully_shard, or load a saved adapter.")
            if given.shape != own.shape or not bool(torch.isfinite(given).all()):
                raise MethodError(
                    f"{self.key}: {letter} is to be finite and {tuple(own.shape)}, but has the shape "
                    f"{tuple(given.shape)}{'' if given.shape != own.shape else ' and holds NaN or infinite entries'}."
                )
            own.copy_(given.bfloat16() if bf16 and letter != "R" else given)
        self.filled[adapter_name] = True

    def is_ready(self, adapter_name: str) -> bool:
        """Return whether the factors are there: set, or loaded by whatever means."""
        if not self.filled[adapter_name]:
            A = self.tensors(adapter_name).A
            self.filled[adapter_name] = A.device.type != "meta" and bool(A.any())
        return self.filled[adapter_name]

    def factors(self, adapter_name: str) -> Factors:
        """Return A, B and R, and refuse factors that were never set.

        Raises
        ------
        ModelError
            When the adapter is not initialised.
        """
        if not self.filled[adapter_name] and not self.is_ready(adapter_name):
            given = self.configs[adapter_name].init == "given"
            remedy = (
                "set_lora_sb_factors(model, {layer: (A, B, R)})"
                if given
                else "initialize_lora_sb(model, dataloader, lr=...)"
            )
            raise ModelError(
                f"the adapter {adapter_name!r} has no factors yet at {self.key}, so it can neither train nor be "
                f"evaluated. Call {remedy} from gnomon.adapters first, or load a saved adapter. An adapter saved with "
                "save_factors=False needs its factors set again (keep_latent=True keeps what was trained)."
            )
        return self.tensors(adapter_name)

    def delta(self, adapter_name: str) -> Tensor:
        """Return s B R A, (out, in)."""
        A, B, R = self.factors(adapter_name)
        return self.configs[adapter_name].scaling * (B @ (R @ A))

    def branch(self, adapter_name: str, x: Tensor) -> Tensor:
        """Return s x A^T R^T B^T; what is kept for the backward pass is x A^T, not x."""
        A, B, R = self.factors(adapter_name)
        scaling = self.configs[adapter_name].scaling
        h = linear(self._cast_input_dtype(x, A.dtype), A)
        return linear(linear(h, R if scaling == 1 else scaling * R), B)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move the tensors, but keep their dtype: in bfloat16 the factors would not be orthonormal."""
        base_device, _ = self._get_base_layer_device_and_dtype(self.get_base_layer())
        target = device or base_device
        for name in self.adapter_layer_names:
            container = getattr(self, name)
            if adapter_name in container and "meta" not in (container[adapter_name].device.type, target.type):
                container[adapter_name] = container[adapter_name].to(target)


class LoRASBLinear(LatentLinear):
    """A linear layer with LoRA-SB adapters."""

    stem = "lorasb"
    adapter_layer_names = ("lorasb_R", "lorasb_A", "lorasb_B")


class LoRAXSLinear(LatentLinear):
    """A linear layer with LoRA-XS adapters."""

    stem = "loraxs"
    adapter_layer_names = ("loraxs_R", "loraxs_A", "loraxs_B")


class _LatentModel(LinearTuner):
    """What the two models share: which layers they refuse, and what stands in the file."""

    def _check_layer(self, target: nn.Module, parent: nn.Module, key: str) -> None:
        super()._check_layer(target, parent, key)
        weight = getattr(target, "weight", None)
        for name, module in self.model.named_modules():
            if module is not target and name != key and module._parameters.get("weight") is weight is not None:
                raise ModelError(
                    f"the weight of {key} is also that of {name}, so its gradient is no gradient of the layer, and a "
                    "merge would change both. Leave it out of target_modules."
                )

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: LoRASBConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        *args: Any,
        **kw: Any,
    ) -> dict[str, Tensor]:
        found: dict[str, Tensor] = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, *args, **kw)
        if config.save_factors is True:
            return found
        stem: str = cls.tuner_layer_cls.stem
        numbers: dict[str, Tensor] = {}
        for name, layer in _layers(model, adapter_name).items():
            path = f"{name}.{stem}"
            if f"{path}_A.{adapter_name}" not in found:
                continue
            A, B = (full_tensor(found.pop(f"{path}_{letter}.{adapter_name}")) for letter in "AB")
            if config.save_factors == "bf16":
                found[f"{path}_A.{adapter_name}"], found[f"{path}_B.{adapter_name}"] = A.bfloat16(), B.bfloat16()
            elif config.save_factors == "seeded-sketch":
                rows, columns = layer.sketches(adapter_name, A.device)
                found[f"{path}_A_values.{adapter_name}"] = columns.pick(A.T)
                found[f"{path}_B_values.{adapter_name}"] = rows.pick(B)
            else:
                numbers[layer.key] = _number(A, B)
        if config.init == "xs" and numbers:
            found[f"base_model.{stem}_check"] = torch.stack([numbers[key] for key in sorted(numbers)])
        return found

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: LoRASBConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Put A and B into what was read of a file that holds them in another form, or not at all."""
        stem: str = cls.tuner_layer_cls.stem
        check = next((key for key in state_dict if key.rpartition(".")[2] == f"{stem}_check"), None)
        saved = None if check is None else state_dict.pop(check)
        numbers: dict[str, Tensor] = {}
        for layer in _layers(model, adapter_name).values():
            path = f"base_model.model.{layer.key}.{stem}"
            if f"{path}_R" not in state_dict:
                continue
            if f"{path}_A_values" in state_dict:
                A_values, B_values = (state_dict.pop(f"{path}_{letter}_values") for letter in "AB")
                rows, columns = layer.sketches(adapter_name, A_values.device)
                state_dict[f"{path}_A"] = columns.expand(A_values).T.contiguous()
                state_dict[f"{path}_B"] = rows.expand(B_values)
            elif f"{path}_A" not in state_dict:
                A, B = layer.unsaved(adapter_name)
                state_dict[f"{path}_A"], state_dict[f"{path}_B"] = A, B
                if saved is not None:
                    numbers[layer.key] = _number(full_tensor(A), full_tensor(B))
            for letter in "AB":
                wide = torch.promote_types(state_dict[f"{path}_{letter}"].dtype, torch.float32)
                state_dict[f"{path}_{letter}"] = state_dict[f"{path}_{letter}"].to(wide)
        if saved is not None:
            _compare(saved, numbers)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


class LoRASBModel(_LatentModel):
    """Puts `LoRASBLinear` layers into a model; made by `peft.get_peft_model` from a `LoRASBConfig`."""

    prefix = "lorasb_"
    tuner_layer_cls = LoRASBLinear


class LoRAXSModel(_LatentModel):
    """Puts `LoRAXSLinear` layers into a model; made by `peft.get_peft_model` from a `LoRAXSConfig`."""

    prefix = "loraxs_"
    tuner_layer_cls = LoRAXSLinear


def _layers(model: nn.Module, adapter_name: str) -> dict[str, LatentLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, LatentLinear) and m.has(adapter_name)}


def _number(A: Tensor, B: Tensor) -> Tensor:
    """One number that changes when a vector of A or B turns, changes its sign or its place."""
    weights = torch.linspace(1.0, 2.0, len(A), dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    for vectors in (A, B.T):
        wide = vectors.detach().double().cpu()
        unit = wide / wide.norm(dim=1, keepdim=True).clamp(min=1e-30)
        total += weights @ (unit @ torch.arange(wide.shape[1], dtype=torch.float64).cos())
    return total.float()


def _compare(saved: Tensor, numbers: dict[str, Tensor]) -> None:
    """Refuse factors that differ from those the adapter was trained with."""
    keys = sorted(numbers)
    if len(keys) != saved.numel():
        raise MethodError(
            f"the saved LoRA-XS adapter has {saved.numel()} layers, the model {len(keys)}. Load it on the model it was "
            "trained on, with its own configuration."
        )
    for key, before in zip(keys, saved.tolist(), strict=True):
        if not abs(float(numbers[key]) - before) <= _AGREES:
            raise MethodError(
                f"the factors of {key} are computed from its weight, and come out otherwise here ({numbers[key]:.4f}) "
                f"than where the adapter was saved ({before:.4f}): the base model is another one, or in another dtype, "
                "or the library decomposes otherwise. Load the base model as it was, or save the adapter there with "
                "model.peft_config[name].save_factors = True."
            )
