"""The one place that extends PEFT: it enters new methods into PEFT's registry and holds what their layers share.

An adapter method of this library is a PEFT tuner of its own. It needs three classes and one call:

- a dataclass that extends `LinearConfig` (r, target_modules, ... are there),
- a layer that extends `LinearAdapter` and writes only its mathematics: `add` makes the trainable tensors of one
  adapter, `delta` returns the change of the weight, `branch` (optional) a cheaper way to its output,
- a model that extends `LinearTuner` with `prefix` and `layer`,
- ``register("nola", NOLAConfig, NOLAModel)``, at the end of the module behind the card's `entry`.

What a recipe calls (`[recipe] call` of the card) takes the model and plain options and ends with `attach`.

`get_peft_model`, `save_pretrained`, `PeftModel.from_pretrained`, `load_adapter`, `merge_and_unload`, `save_as_lora`
and the rest of PEFT then work. Saving needs no code: what hangs on the layer in a container named by
`adapter_layer_names` is saved; plain Python values are not and must follow from the config.

PEFT keeps its methods in the enumeration `peft.PeftType` and refuses names that are not in it, so `register` adds
the name first. Should a later PEFT bring a method of the same name, PEFT keeps it, and ours is entered under
``GNOMON_<NAME>`` with a warning.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from peft import PeftConfig, PeftModel, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    get_quantization_kwargs,
    register_peft_method,
    resolve_quantization_backend,
)
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from gnomon.adapters._on_import import register_adapters as _register_adapters
from gnomon.errors import GnomonWarning, MethodError, ModelError

__all__ = ["LinearAdapter", "LinearConfig", "LinearTuner", "attach", "register"]

_ADDED: dict[str, Any] = {}  # name in the enumeration -> the member this library added


def register(name: str, config_cls: type[LinearConfig], model_cls: type[BaseTuner]) -> Any:
    """Enter a method into PEFT; entering it again changes nothing.

    Parameters
    ----------
    name : str
        Lower case, without a trailing underscore.
    config_cls : subclass of LinearConfig
    model_cls : subclass of BaseTuner

    Returns
    -------
    PeftType
        The member of PEFT's enumeration that stands for the method.

    Warns
    -----
    GnomonWarning
        When PEFT has a method of that name; this one is then entered as ``gnomon_<name>``.
    """
    own = f"gnomon_{name}" if _is_taken(name) else name
    if own != name and own.upper() not in _ADDED:
        warnings.warn(
            f"this PEFT brings its own {name!r} method, which keeps the name; gnomon's {config_cls.__name__} is known "
            f"to PEFT as {own!r}. Folders saved under the old name are read by PEFT's method.",
            GnomonWarning,
            stacklevel=2,
        )
    member = _member(own.upper())
    if member in PEFT_TYPE_TO_CONFIG_MAPPING:  # the module was imported anew: the newer classes count
        PEFT_TYPE_TO_CONFIG_MAPPING[member] = config_cls
        PEFT_TYPE_TO_TUNER_MAPPING[member] = model_cls
    else:
        register_peft_method(name=own, config_cls=config_cls, model_cls=model_cls, prefix=model_cls.prefix)
    config_cls.registered_as = member
    return member


def _is_taken(name: str) -> bool:
    return name.upper() in PeftType.__members__ and name.upper() not in _ADDED


def _member(name: str) -> Any:
    """Return the member of PEFT's enumeration with this name, added if need be."""
    if name not in PeftType.__members__:
        member = str.__new__(PeftType, name)
        member._name_ = member._value_ = name
        member._sort_order_ = len(PeftType._member_names_)
        PeftType._member_names_.append(name)
        PeftType._member_map_[name] = member
        PeftType._value2member_map_[name] = member
        type.__setattr__(PeftType, name, member)
        _ADDED[name] = member
    return PeftType[name]


def attach(model: nn.Module, config: PeftConfig) -> PeftModel:
    """Attach a first adapter to a model: `peft.get_peft_model`, which would wrap a model with adapters a second time.

    Parameters
    ----------
    model : nn.Module
        Changed in place.
    config : PeftConfig

    Returns
    -------
    PeftModel

    Raises
    ------
    ModelError
        When the model has adapters.
    """
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        kinds = {str(c.peft_type.value) for c in getattr(model, "peft_config", {}).values()}
        raise ModelError(
            f"this {type(model).__name__} has adapters already ({', '.join(sorted(kinds)) or 'of an unknown kind'}). "
            "Merge them first (model = model.merge_and_unload()), or add a further one with model.add_adapter."
        )
    return get_peft_model(model, config)


@dataclass
class LinearConfig(PeftConfig):
    """The fields that PEFT expects of a method for linear layers, and their checks.

    Parameters
    ----------
    r : int, default 8
        Rank.
    target_modules : list of str or str, optional
        Names or one regular expression, or ``"all-linear"``; default what PEFT's LoRA adapts in the family.
    exclude_modules : list of str or str, optional
    layers_to_transform : list of int or int, optional
    layers_pattern : list of str or str, optional
    modules_to_save : list of str, optional
        Modules to train and save beside the adapter.
    bias : {"none", "all", "adapter_only"}, default "none"
        Which biases of the base model are trained.
    """

    registered_as: ClassVar[Any] = None

    r: int = field(default=8, metadata={"help": "Rank."})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "Linear layers to adapt."})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Linear layers to leave alone."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Numbers of the blocks."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the list of blocks."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Trained whole, saved beside."})
    bias: str = field(default="none", metadata={"help": "Biases to train: none, all, adapter_only."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.registered_as is None:
            raise MethodError(f"{type(self).__name__} is not known to PEFT. Call gnomon.adapters._peft.register first.")
        self.peft_type = self.registered_as
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        if not isinstance(self.r, int) or isinstance(self.r, bool) or self.r < 1:
            raise MethodError(f"r = {self.r!r}: the rank is a whole number of at least 1, such as 8.")
        if self.bias not in ("none", "all", "adapter_only"):
            raise MethodError(f"bias = {self.bias!r}. Allowed: 'none', 'all', 'adapter_only'.")
        if self.layers_pattern and not self.layers_to_transform and self.layers_to_transform != 0:
            raise MethodError("layers_pattern has a meaning only with layers_to_transform. Set both or neither.")


class LinearAdapter(nn.Module, BaseTunerLayer):
    """A linear layer W (out x in, also `Conv1D` and quantised layers) with adapters that add to it.

    Parameters
    ----------
    base_layer : nn.Module
    adapter_name : str
    config : LinearConfig
    key : str
        Path of the layer in the base model.
    **kwargs
        For PEFT's quantisation backends.

    Attributes
    ----------
    in_features, out_features : int
    key : str
    """

    if TYPE_CHECKING:  # PEFT carries no types
        active_adapters: list[str]
        get_base_layer: Any
        get_base_weight: Any
        set_base_weight: Any
        set_adapter: Any
        _cast_input_dtype: Any
        _get_available_adapters: Any
        _get_base_layer_device_and_dtype: Any
        _move_adapter_to_device_of_base_layer: Any
        quantization_backend: Any

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: LinearConfig, *, key: str, **kwargs: Any
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        base = self.get_base_layer()
        self.quantization_backend = resolve_quantization_backend(
            base, get_apply_tensor_subclass=kwargs.get("get_apply_tensor_subclass")
        )
        self.in_features, self.out_features = _get_in_out_features(base)
        self.fan_in_fan_out = isinstance(base, Conv1D)
        self.key = key
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self.make_containers()
        self.update_layer(adapter_name, config)

    def make_containers(self) -> None:
        """Make the empty containers (`nn.ParameterDict`, ...) that `adapter_layer_names` lists."""
        raise NotImplementedError

    def add(self, adapter_name: str, config: Any) -> None:
        """Put the tensors of one adapter into the containers."""
        raise NotImplementedError

    def delta(self, adapter_name: str) -> Tensor:
        """Return what one adapter adds to the weight, (out, in)."""
        raise NotImplementedError

    def branch(self, adapter_name: str, x: Tensor) -> Tensor:
        """Return what one adapter adds to the output: (..., in) -> (..., out)."""
        delta = self.delta(adapter_name)
        return linear(self._cast_input_dtype(x, delta.dtype), delta)

    def update_layer(self, adapter_name: str, config: LinearConfig, inference_mode: bool = False) -> None:
        """Add an adapter to the layer."""
        self.add(adapter_name, config)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def has(self, adapter_name: str) -> bool:
        """Return whether this layer carries the adapter."""
        return adapter_name in self._get_available_adapters()

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """Return what one adapter adds to the weight, in the layout of the base layer."""
        delta = self.delta(adapter_name)
        return delta.T if self.fan_in_fan_out else delta

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the base weight.

        Parameters
        ----------
        safe_merge : bool, default False
            Refuse a result that is not finite, and leave the weight as it was.
        adapter_names : list of str, optional
            Default the active ones.

        Raises
        ------
        MethodError
            With `safe_merge`, when the merged weight is not finite.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if not self.has(name):
                continue
            merged = self._shifted(name, 1.0)
            if safe_merge and not torch.isfinite(merged).all():
                raise MethodError(
                    f"merging the adapter {name!r} into {self.key} gives values that are not finite. The adapter is "
                    "broken: train it again with a lower learning rate, or load another one."
                )
            self.set_base_weight(merged)
            self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take all merged adapters out of the base weight again."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            if self.has(name):
                self.set_base_weight(self._shifted(name, -1.0))

    def _shifted(self, adapter_name: str, sign: float) -> Tensor:
        """The base weight plus or minus one adapter, rounded to the weight's own dtype once."""
        weight = self.get_base_weight()
        delta = self.get_delta_weight(adapter_name).to(weight.device)
        return (weight + sign * delta).to(weight.dtype)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the output of the base layer plus that of every active adapter."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        result: Tensor = self.base_layer(x, *args, **kwargs)
        active = [] if self.merged else [name for name in self.active_adapters if self.has(name)]
        if not active:
            return result
        dtype = result.dtype
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        for name in active:
            result = result + self.branch(name, x)
        return result.to(dtype)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Return True: what these adapters do is an addition to the weight."""
        return True

    def __repr__(self) -> str:
        return f"gnomon.{super().__repr__()}"


class LinearTuner(BaseTuner):
    """Puts a `LinearAdapter` in the place of every targeted linear layer.

    Attributes
    ----------
    prefix : str
        Unique to the method; the names of all its containers begin with it.
    tuner_layer_cls : type of LinearAdapter
        The method's layer.
    """

    tuner_layer_cls = LinearAdapter
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _prepare_adapter_config(self, peft_config: LinearConfig, model_config: dict[str, Any]) -> LinearConfig:
        family = model_config.get("model_type")
        if peft_config.target_modules is None and family not in self.target_module_mapping:
            raise ModelError(
                f"which linear layers of a {family or 'custom'!r} model to adapt is not known. Name them with "
                "target_modules (a list of names, a regular expression, or 'all-linear')."
            )
        return super()._prepare_adapter_config(peft_config, model_config)

    def _create_and_replace(
        self,
        peft_config: LinearConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        if isinstance(target, self.tuner_layer_cls):
            target.update_layer(adapter_name, peft_config)
            return
        self._check_layer(target, parent, current_key)
        layer = self.tuner_layer_cls(
            target, adapter_name, peft_config, key=current_key, **get_quantization_kwargs(self.model)
        )
        self._replace_module(parent, target_name, layer, target)

    def _check_layer(self, target: nn.Module, parent: nn.Module, key: str) -> None:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        backend = None if isinstance(base, (nn.Linear, Conv1D)) else resolve_quantization_backend(base)
        if not isinstance(base, (nn.Linear, Conv1D)) and getattr(backend, "layer_type", None) != "linear":
            raise ModelError(
                f"{key} is a {type(base).__name__}. Allowed: nn.Linear, transformers' Conv1D and their quantised "
                "forms. Name other target_modules."
            )
        if isinstance(parent, nn.MultiheadAttention):
            raise ModelError(
                f"{key} belongs to an nn.MultiheadAttention, which reads the weight past the layer, so an adapter "
                "there would do nothing. Name other target_modules."
            )


_register_adapters()  # where this module was imported before PEFT, the methods have been waiting for it
