"""The walk through the blocks: inputs from the dense block, adapters, then on with the compensated block."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, distributed, nn

from gnomon.common.calibration import LayerInputs, as_batches, walk_blocks
from gnomon.compress.eora.dense import DenseLinear, Observer
from gnomon.compress.eora.gradient import gradient_fit
from gnomon.compress.eora.layer import (
    EXACT_BELOW,
    InputSpace,
    Unseen,
    diagonal_space,
    factorise,
    input_space,
    output_error,
)
from gnomon.compress.eora.pairing import DenseLayer, compressed_weight
from gnomon.compress.eora.rounding import check_bits, quantise_adapter
from gnomon.errors import GnomonWarning, MethodError, ModelError, NoEffectWarning, nearest

__all__ = ["METHODS", "Compensation", "OnLayer", "Options"]

METHODS = ("eora", "svd", "act_s", "gradient")
OnLayer = Callable[[str, dict[str, float]], None]


def _processes() -> int:
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


@dataclass(frozen=True)
class Options:
    """How adapters are computed; the fields are described at `gnomon.compress.eora.eora`."""

    method: str = "eora"
    accumulation: str = "sum"
    unseen: Unseen = "skip"
    exact: bool | None = None
    cutoff: float | None = None
    adapter_bits: int | None = None
    adapter_group_size: int = 128
    gradient_steps: int = 3000
    batch_size: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        choices = {"method": METHODS, "accumulation": ("sum", "decay"), "unseen": ("skip", "correct")}
        for key, allowed in choices.items():
            value = getattr(self, key)
            if value not in allowed:
                raise MethodError(f"{key} = {value!r}. {nearest(str(value), allowed, noun=key)}")
        if self.adapter_bits is not None:
            check_bits(self.adapter_bits, self.adapter_group_size)
        ordered = self.accumulation == "decay" or self.method == "gradient"
        if ordered and _processes() > 1:
            raise MethodError(
                f"method = {self.method!r} with accumulation = {self.accumulation!r} depends on the order of the "
                "sequences and runs in one process. Use a closed-form method with accumulation = 'sum', which is "
                "summed over all processes."
            )


@dataclass
class _Inputs:
    """What is known of one tensor that layers of a block read, over all processes."""

    gram: Tensor
    abs_mean: Tensor
    tokens: int
    observer: Observer | None


class Compensation:
    """Fills the LoRA layers of a PEFT model block by block.

    Parameters
    ----------
    base : PreTrainedModel
        The compressed model with LoRA layers in it.
    adapter : str
        Name of the adapter to fill.
    dense : mapping of str to DenseLayer
        Layers of the dense model by full name, also those without a LoRA layer: the inputs come from dense blocks.
    options : Options
    on_layer : callable, optional

    Attributes
    ----------
    idle : list of str
        Layers that no token reached; their adapters are left as they were.
    """

    def __init__(
        self,
        base: nn.Module,
        adapter: str,
        dense: Mapping[str, DenseLayer],
        options: Options,
        on_layer: OnLayer | None = None,
    ) -> None:
        self.base = base
        self.adapter = adapter
        self.dense = dense
        self.options = options
        self.on_layer = on_layer
        self.idle: list[str] = []
        self._away: dict[str, nn.Module] = {}
        self._observers: dict[str, Observer] = {}
        self._short: dict[str, tuple[int, int]] = {}
        self._repaired = False

    def run(self, calibration: Any) -> None:
        """Walk the calibration set through the model and fill every adapter.

        Raises
        ------
        MethodError
            When a layer's inputs or weights are not finite, or its two weights have nothing in common.
        """
        batches = as_batches(calibration, self.options.batch_size)
        if self.options.accumulation == "decay" or self.options.method == "gradient":
            total = sum(len(batch["input_ids"]) for batch in batches)
            masks = [batch.get("attention_mask") for batch in batches]
            decay_over = total if self.options.accumulation == "decay" else None
            self._observers = {name: Observer(masks, decay_over) for name in self.dense}
        with self._dense_in_place():
            walk_blocks(self.base, batches, self._visit, batch_size=self.options.batch_size)
        self._warn()

    @contextmanager
    def _dense_in_place(self) -> Iterator[None]:
        modes = [(module, module.training) for module in self.base.modules()]
        try:
            for name, layer in self.dense.items():
                self._away[name] = self.base.get_submodule(name)
                self.base.set_submodule(name, DenseLinear(layer, self._observers.get(name)))
            yield
        finally:
            for name in list(self._away):
                self.base.set_submodule(name, self._away.pop(name))
            for module, training in modes:
                module.training = training

    def _visit(self, index: int, prefix: str, block: nn.Module, found: dict[str, LayerInputs]) -> None:
        names = [name for name in self._away if name.startswith(f"{prefix}.")]
        for name in names:
            # evaluation mode: the compensated block runs without the dropout of an adapter yet to be trained
            self.base.set_submodule(name, self._away.pop(name).eval())
        layers = {name: layer for name in names if (layer := self._lora(name)) is not None}
        leaders, inputs = self._gather(layers, found)
        spaces: dict[str, InputSpace] = {}
        for name, layer in layers.items():
            leader = leaders.get(name)
            if leader is None or inputs[leader].tokens == 0:
                self.idle.append(name)
                self._tell(name, rank=0, tokens=0, effective_rank=0)
                continue
            try:
                if leader not in spaces:
                    spaces[leader] = self._space(inputs[leader])
                self._fill(name, layer, inputs[leader], spaces[leader])
            except MethodError as error:
                raise MethodError(f"Layer {name!r}: {error}") from error
        for name in names:
            self._observers.pop(name, None)

    def _lora(self, name: str) -> LoraLayer | None:
        module = self.base.get_submodule(name)
        return module if isinstance(module, LoraLayer) and self.adapter in module.r else None

    def _tell(self, name: str, **facts: float) -> None:
        if self.on_layer is not None:
            self.on_layer(name, {key: float(value) for key, value in facts.items()})

    def _gather(
        self, layers: Mapping[str, LoraLayer], found: Mapping[str, LayerInputs]
    ) -> tuple[dict[str, str], dict[str, _Inputs]]:
        """Name the first layer that reads each layer's input; sum the statistics over all processes."""
        first: dict[int, str] = {}
        leaders = {name: first.setdefault(id(found[name]), name) for name in layers if name in found}
        shared = _processes() > 1
        if shared:
            everyone: list[dict[str, str]] = [{} for _ in range(_processes())]
            distributed.all_gather_object(everyone, leaders)
            leaders = {name: leader for one in reversed(everyone) for name, leader in one.items()}
        inputs = {}
        for leader in sorted(set(leaders.values())):
            width = self.dense[leader].weight.shape[1]
            weight = layers[leader].lora_A[self.adapter].weight
            wide = torch.float64 if self.dense[leader].weight.dtype == torch.float64 else torch.float32
            local = found.get(leader) or LayerInputs(width)
            gram = weight.new_zeros(width, width, dtype=wide) if local.gram is None else local.gram.to(wide)
            sums = local.abs_sums.to(gram)
            tokens = torch.tensor([local.tokens], device=gram.device)
            if shared:
                for tensor in (gram, sums, tokens):
                    distributed.all_reduce(tensor)
            count = int(tokens)
            inputs[leader] = _Inputs(gram, sums / max(count, 1), count, self._observers.get(leader))
        return leaders, inputs

    def _space(self, inputs: _Inputs) -> InputSpace:
        size = len(inputs.gram)
        if self.options.method in ("svd", "gradient"):
            return InputSpace(None)
        if self.options.method == "act_s":
            return diagonal_space(inputs.abs_mean)
        # a mean over tokens instead of the sum: the same product B A, and factors whose size is that of the weights
        gram = inputs.gram / inputs.tokens
        if inputs.observer is not None and inputs.observer.gram is not None:
            gram = inputs.observer.gram
        exact = size <= EXACT_BELOW if self.options.exact is None else self.options.exact
        return input_space(gram, exact=exact, cutoff=self.options.cutoff)

    def _fill(self, name: str, layer: LoraLayer, inputs: _Inputs, space: InputSpace) -> None:
        gram = inputs.gram
        dense = self.dense[name].weight
        compressed = compressed_weight(layer.get_base_layer())
        wide = torch.float64 if torch.float64 in (compressed.dtype, dense.dtype) else torch.float32
        dense, compressed = dense.to(gram.device, wide), compressed.to(gram.device, wide)
        _check_weights(dense, compressed)
        delta = dense - compressed
        scaling = float(layer.scaling[self.adapter])
        A, B = self._factors(delta, inputs, space, layer.r[self.adapter])
        if self.options.adapter_bits is not None:
            A, B = quantise_adapter(A, B, gram, self.options.adapter_bits, group_size=self.options.adapter_group_size)
        for container, matrix in ((layer.lora_A, A), (layer.lora_B, B)):
            weight = container[self.adapter].weight
            weight.data = (matrix / scaling**0.5).to(weight.device, weight.dtype)
        stored = layer.lora_B[self.adapter].weight.detach().to(delta) @ layer.lora_A[self.adapter].weight.detach().to(
            delta
        )
        before = output_error(delta, gram) / inputs.tokens
        after = output_error(delta - scaling * stored, gram) / inputs.tokens
        self._repaired = self._repaired or before > 0
        seen = space.effective_rank
        known = min(delta.shape[1] if seen is None else seen, inputs.tokens)
        if inputs.tokens < delta.shape[1]:
            self._short[name] = (known, delta.shape[1])
        facts = {"rank": A.shape[0], "tokens": inputs.tokens, "effective_rank": known}
        self._tell(name, **facts, error_before=before, error_after=after)

    def _factors(self, delta: Tensor, inputs: _Inputs, space: InputSpace, rank: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.options.seed)
        if self.options.method == "gradient":
            sequences = inputs.observer.sequences if inputs.observer is not None else []
            return gradient_fit(delta, sequences, rank, steps=self.options.gradient_steps, generator=generator)
        exact = min(delta.shape) <= EXACT_BELOW if self.options.exact is None else self.options.exact
        return factorise(delta, space, rank, exact=exact, unseen=self.options.unseen, generator=generator)

    def _warn(self) -> None:
        if self.idle:
            warnings.warn(
                f"{len(self.idle)} layers saw no token of the calibration set and get no adapter, for example "
                f"{self.idle[0]!r}. Use more or other calibration text to reach every expert.",
                GnomonWarning,
                stacklevel=4,
            )
        if self._short:
            name, (known, size) = next(iter(self._short.items()))
            warnings.warn(
                f"{len(self._short)} layers were calibrated with fewer tokens than they have inputs; {name!r} saw "
                f"{known} of {size} directions (its effective rank). The others "
                f"{'get no correction' if self.options.unseen == 'skip' else 'are corrected unseen'}.",
                GnomonWarning,
                stacklevel=4,
            )
        if not self._repaired:
            warnings.warn(
                "The compressed model's layers equal the original's: the adapter is zero and changes nothing.",
                NoEffectWarning,
                stacklevel=4,
            )


def _check_weights(dense: Tensor, compressed: Tensor) -> None:
    for which, weight in (("dense", dense), ("compressed", compressed)):
        if not bool(torch.isfinite(weight).all()):
            raise MethodError(f"the {which} weight holds NaN or infinite values. Compress or load the model again.")
    if dense.shape != compressed.shape:
        raise ModelError(f"the compressed weight is {tuple(compressed.shape)}, the dense one {tuple(dense.shape)}.")
    a, b = dense.flatten(), compressed.flatten()
    sizes = torch.linalg.vector_norm(a), torch.linalg.vector_norm(b)
    difference = torch.linalg.vector_norm(a - b)
    if difference > 1.2 * sizes[0] and torch.dot(a, b) < 0.1 * sizes[0] * sizes[1]:
        raise MethodError(
            f"the two weights have nothing in common: |W - W_compressed| = {float(difference):.3g} with |W| = "
            f"{float(sizes[0]):.3g}. Were the columns reordered (act-order) or do the models come from different "
            "checkpoints? Dequantise back to the original order and take W from the dense checkpoint."
        )
