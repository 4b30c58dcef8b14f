"""EoRA's claims re-measured: nearest on every layer, nearest in distribution, and what the calibration text does.

The paper compensates LLaMA models and reports task accuracy. Here a small trained model is rounded to 3 bits or pruned
to 2:4 and the held-out divergence from the dense model is measured, as accuracy on real tasks needs models that have
any.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from gnomon.claims.experiment import experiment
from gnomon.common.calibration import LayerInputs, walk_blocks
from gnomon.common.corpora import windows
from gnomon.common.layers import decoder_blocks, linear_layers, set_weight, weight_of
from gnomon.common.models import Workbench, workbench
from gnomon.compress.eora import eora, eora_layer, output_error

__all__ = ["every_layer", "pruned", "quantised", "task_text"]

_CONTEXT = 128
_SEQUENCES = 32
_HELD_OUT = {"small": 64, "medium": 256, "large": 1024}


@lru_cache(maxsize=1)
def _bench() -> Workbench:
    return workbench()


def _rounded(weight: Tensor, bits: int = 3) -> Tensor:
    """Round each row to the nearest of 2^bits values between its smallest and largest entry (zero among them)."""
    low, high = weight.amin(1, keepdim=True).clamp(max=0), weight.amax(1, keepdim=True).clamp(min=0)
    scale = (high - low) / (2**bits - 1)
    zero = (-low / scale).round()
    return scale * (((weight / scale).round() + zero).clamp(0, 2**bits - 1) - zero)


def _two_of_four(weight: Tensor) -> Tensor:
    groups = weight.abs().unflatten(1, (-1, 4))
    keep = torch.zeros_like(groups).scatter_(-1, groups.topk(2, dim=-1).indices, 1.0)
    return weight * keep.flatten(1)


def _compressed(compress: Callable[[Tensor], Tensor]) -> Any:
    model = copy.deepcopy(_bench().model)
    for block in decoder_blocks(model):
        for layer in linear_layers(block).values():
            set_weight(layer, compress(weight_of(layer)))
    return model


def _draw(rows: Tensor, count: int, seed: int) -> Tensor:
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:count]]


def _calibration(seed: int) -> Tensor:
    return _draw(windows(_bench().train_tokens, _CONTEXT), _SEQUENCES, seed)


def _held_out(scale: str, seed: int) -> Tensor:
    """Return other windows for every seed, so that the spread over seeds holds the choice of the test text too."""
    return _draw(windows(_bench().valid_tokens, _CONTEXT), _HELD_OUT[scale], 1000 + seed)


@torch.no_grad()
def _divergence(model: nn.Module, rows: Tensor) -> float:
    """Return the mean KL divergence per token from the dense model's prediction to this model's."""
    total = 0.0
    for part in rows.split(16):
        wanted = _bench().model(input_ids=part).logits.log_softmax(-1)
        found = model(input_ids=part).logits.log_softmax(-1)
        total += float((wanted.exp() * (wanted - found)).sum(-1).mean(-1).sum())
    return total / len(rows)


def _compensated(compress: Callable[[Tensor], Tensor], method: str, rank: int, calibration: Tensor) -> nn.Module:
    model = _compressed(compress)
    if method == "none":
        return model
    return eora(model, _bench().model, calibration, rank, method=method, seed=0)  # type: ignore[arg-type]


@experiment(
    arms=("eora", "act_s", "svd"),
    relation=("eora < svd", "eora < act_s"),
    unit="largest layer error relative to plain SVD's on that layer, 3 bit, rank 4",
)
def every_layer(arm: str, seed: int, scale: str) -> float:
    """Measure the layer on which a method does worst beside plain SVD; all methods see the dense model's inputs."""
    model, ratios = copy.deepcopy(_bench().model), []

    def visit(index: int, name: str, block: nn.Module, inputs: dict[str, LayerInputs]) -> None:
        for key, seen in inputs.items():
            weight = weight_of(model.get_submodule(key))
            delta, errors = weight - _rounded(weight), []
            for method in (arm, "svd"):
                mean = (seen.abs_sums / seen.tokens).float()
                A, B = eora_layer(delta, seen.gram, 4, method=method, abs_mean=mean)  # type: ignore[arg-type]
                assert seen.gram is not None
                errors.append(output_error(delta - B @ A, seen.gram))
            ratios.append(errors[0] / errors[1])

    walk_blocks(model, _calibration(seed), visit)
    return max(ratios)


@experiment(
    arms=("eora", "act_s", "svd", "none"),
    relation=("eora < 0.75 * svd", "eora < act_s", "svd < none"),
    unit="held-out KL divergence to the dense model, nats per token, 3 bit per row, rank 4",
)
def quantised(arm: str, seed: int, scale: str) -> float:
    """Measure the divergence after rounding every row to 3 bits, with a rank-4 adapter of each kind."""
    return _divergence(_compensated(_rounded, arm, 4, _calibration(seed)), _held_out(scale, seed))


@experiment(
    arms=("eora", "svd", "none"),
    relation=("eora < 0.75 * svd", "svd < none"),
    unit="held-out KL divergence to the dense model, nats per token, 2:4, rank 32",
)
def pruned(arm: str, seed: int, scale: str) -> float:
    """Measure the divergence after 2:4 magnitude pruning, with adapters of rank 32 (a sixth of the width)."""
    return _divergence(_compensated(_two_of_four, arm, 32, _calibration(seed)), _held_out(scale, seed))


@lru_cache(maxsize=4)
def _task_rows(split: str, task: bool) -> Tensor:
    """Return the windows that hold interactive sessions (the task), or those that hold none."""
    bench = _bench()
    rows = windows(bench.train_tokens if split == "train" else bench.valid_tokens, _CONTEXT)
    texts = bench.tokenizer.batch_decode(rows)
    return rows[torch.tensor([(text.count(">>>") >= 2) if task else (">>>" not in text) for text in texts])]


@experiment(
    arms=("task", "general", "none"),
    relation=("task > general", "task > none"),
    unit="next-token accuracy on held-out interactive sessions, percent, 2:4 and 3 bit, rank 16",
)
def task_text(arm: str, seed: int, scale: str) -> float:
    """Measure accuracy on one kind of text after calibrating on it, or on the same amount of other text."""
    model = _compressed(lambda weight: _rounded(_two_of_four(weight)))
    if arm != "none":
        calibration = _draw(_task_rows("train", arm == "task"), _SEQUENCES, seed)
        model = eora(model, _bench().model, calibration, 16)
    rows = _task_rows("valid", True)[seed % 3 :: 3]  # a third of the test text each, so that its spread is seen too
    with torch.no_grad():
        found = torch.cat([model(input_ids=part).logits[:, :-1].argmax(-1) for part in rows.split(16)])
    return 100 * float((found == rows[:, 1:]).float().mean())
