"""What every compressor owes, tested over all members the catalog finds; an exception is a line with its reason."""

from __future__ import annotations

import copy
import inspect
import math
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gnomon import catalog
from gnomon.common.layers import decoder_blocks, linear_layers, unwrap, weight_of
from gnomon.common.models import load_model, save_model, tiny
from gnomon.errors import DataError, GnomonError, MethodError, ModelError

SLUGS = [card.slug for card in catalog.methods(plugs="compressor")]
FAMILIES = ["llama", "qwen", "mistral", "gpt2", "gpt_neox"]

OPTIONS: dict[str, dict[str, Any]] = {  # arguments without a default, or small ones for speed
    "eora": {"rank": 4},
    "evopress": {"generations": 2, "offspring": 4},
}

EXCEPTIONS: dict[tuple[str, str], str] = {
    ("eora", "budget"): "adds an adapter: the compressed weights, and so their zeros, stay as they are",
    ("eora", "quantised"): "repairs quantised models: it takes them on purpose",
}

REPORTS: dict[str, tuple[str, ...]] = {  # of which at least one stands in the facts of each layer
    "dsnot": ("sparsity",),
    "eora": ("rank",),
}


def calibration(n: int = 4, tokens: int = 32, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (n, tokens), generator=torch.Generator().manual_seed(seed))


def halved(model: nn.Module) -> nn.Module:
    """Magnitude-prune half of every linear of the blocks: what repairing compressors start from."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for layer in block_linears(model).values():
            weight = weight_of(layer)
            weight.masked_fill_(weight.abs() < weight.abs().median(), 0)
    return model


def repairs(slug: str) -> bool:
    return "compressed_model" in inspect.signature(catalog.load(slug)).parameters


def start(slug: str, family: str = "llama", **sizes: Any) -> tuple[nn.Module, nn.Module]:
    """The model a compressor is called on, and the dense model."""
    dense = tiny(family, num_layers=2, **sizes).eval()
    return (halved(dense) if repairs(slug) else copy.deepcopy(dense)), dense


def compress(slug: str, model: nn.Module, dense: nn.Module, data: Any = None, **more: Any) -> nn.Module:
    """Call an entry by its parameters' names, as recipes do."""
    entry: Callable[..., nn.Module] = catalog.load(slug)
    offered = {
        "model": model,
        "compressed_model": model,
        "original_model": dense,
        "calibration": calibration() if data is None else data,
        "seed": 0,
        **OPTIONS.get(slug, {}),
        **more,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return entry(**{k: v for k, v in offered.items() if k in inspect.signature(entry).parameters})


def excused(slug: str, test: str) -> None:
    if (slug, test) in EXCEPTIONS:
        pytest.skip(EXCEPTIONS[slug, test])


def block_linears(model: nn.Module) -> dict[str, nn.Module]:
    inside = {id(m) for m in decoder_blocks(model).modules()}
    return {name: layer for name, layer in linear_layers(model).items() if id(layer) in inside}


def stock_name(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".base_layer", "")


def state(model: nn.Module) -> dict[str, Tensor]:
    """All tensors of the model itself by stock names, adapters left out."""
    tensors = {stock_name(k): v for k, v in unwrap(model).state_dict().items()}
    return {k: v.clone() for k, v in tensors.items() if "lora_" not in k}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=calibration(2, 16, seed=9)).logits


@pytest.mark.parametrize("slug", SLUGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_compressors_work_on_every_family_and_touch_nothing_else(slug: str, family: str) -> None:
    model, dense = start(slug, family)
    before, dense_before, dense_logits = state(model), state(dense), logits(model)
    result = compress(slug, model, dense)
    after = state(result)
    linear = {f"{stock_name(name)}.weight" for name in block_linears(dense)}
    assert set(before) <= set(after), "parameters went missing"
    for name, tensor in before.items():
        if name not in linear:
            assert torch.equal(after[name], tensor), f"{name} was changed"
    assert all(torch.equal(v, dense_before[k]) for k, v in state(dense).items()), "original_model was changed"
    found = logits(result)
    assert bool(torch.isfinite(found).all())
    assert not torch.equal(found, dense_logits), "nothing was done"


@pytest.mark.parametrize("slug", SLUGS)
def test_the_budget_is_exact_and_as_reported(slug: str) -> None:
    facts: dict[str, dict[str, float]] = {}
    model, dense = start(slug)
    result = compress(slug, model, dense, on_layer=lambda name, told: facts.__setitem__(stock_name(name), dict(told)))
    excused(slug, "budget")
    told_any = False
    for name, layer in block_linears(result).items():
        weight, told = weight_of(layer), facts[stock_name(name)]
        if "sparsity" in told:
            told_any = True
            assert float((weight == 0).float().mean()) == pytest.approx(told["sparsity"], abs=1e-6)
            assert told["sparsity"] == pytest.approx(0.5, abs=1 / weight.shape[1])
        if "bits" in told:
            told_any = True
            levels = max(len(row.unique()) for row in weight)
            assert levels <= 2 ** told["bits"] or told.get("group_size", 0) > 0
    assert told_any, "facts name neither sparsity nor bits"


@pytest.mark.parametrize("slug", SLUGS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_compressed_model_is_saved_and_loaded(slug: str, family: str, tmp_path: Path) -> None:
    model, dense = start(slug, family)
    result = compress(slug, model, dense)
    save_model(result, tmp_path / "model")
    again = load_model(tmp_path / "model")
    torch.testing.assert_close(logits(again), logits(result), rtol=1e-6, atol=1e-6)
    assert {k: v.dtype for k, v in state(again).items()} == {k: v.dtype for k, v in state(result).items()}


@pytest.mark.parametrize("slug", SLUGS)
def test_on_layer_is_called_once_per_layer_with_finite_numbers(slug: str) -> None:
    calls: list[tuple[str, dict[str, float]]] = []
    model, dense = start(slug)
    compress(slug, model, dense, on_layer=lambda name, told: calls.append((name, dict(told))))
    names = [stock_name(name) for name, _ in calls]
    assert sorted(names) == sorted(stock_name(name) for name in block_linears(dense))
    for name, told in calls:
        assert told, name
        assert all(isinstance(k, str) and math.isfinite(float(v)) for k, v in told.items()), (name, told)
        assert any(key in told for key in REPORTS.get(slug, told)), (name, told)


@pytest.mark.parametrize("slug", SLUGS)
def test_the_same_call_gives_the_same_model_and_leaves_global_randomness_alone(slug: str) -> None:
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    models, dense = [start(slug)[0] for _ in range(2)], start(slug)[1]
    first = logits(compress(slug, models[0], dense))
    torch.rand(7, generator=torch.Generator().manual_seed(3))
    assert torch.equal(first, logits(compress(slug, models[1], dense)))
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002
    assert before[2] == random.getstate()


@pytest.mark.parametrize("slug", SLUGS)
def test_padding_does_not_matter(slug: str) -> None:
    data = calibration()
    rows = [{"input_ids": row[: 32 - 5 * i]} for i, row in enumerate(data)]
    mask = torch.stack([(torch.arange(32) < 32 - 5 * i).long() for i in range(len(data))])
    results = []
    for form in (rows, {"input_ids": torch.where(mask.bool(), data, 7), "attention_mask": mask}):
        model, dense = start(slug)
        results.append(logits(compress(slug, model, dense, form)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("slug", SLUGS)
def test_training_mode_gradients_and_dtype_are_kept(slug: str) -> None:
    model, dense = start(slug)
    model.train()
    requires = {stock_name(k): p.requires_grad for k, p in model.named_parameters()}
    result = compress(slug, model, dense)
    assert all(module.training for module in unwrap(result).modules())
    assert not dense.training
    assert torch.is_grad_enabled()
    if unwrap(result) is result:
        assert {stock_name(k): p.requires_grad for k, p in result.named_parameters()} == requires
    model, dense = start(slug)
    result = compress(slug, model.to(torch.bfloat16), dense.to(torch.bfloat16))
    assert {p.dtype for p in unwrap(result).parameters()} == {torch.bfloat16}
    assert bool(torch.isfinite(logits(result)).all())


@pytest.mark.parametrize("slug", SLUGS)
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch.zeros(0, 8, dtype=torch.long), "calibration set is empty"),
        (torch.full((1, 8), 999), "token id 999"),
        (["some text"], "Tokenize"),
        (torch.zeros(2, 300, dtype=torch.long), "300 tokens"),
    ],
)
def test_bad_calibration_data_is_told_and_changes_nothing(slug: str, data: Any, message: str) -> None:
    model, dense = start(slug)
    before = state(model)
    with pytest.raises(DataError, match=message):
        compress(slug, model, dense, data)
    assert all(torch.equal(v, before[k]) for k, v in state(model).items())


@pytest.mark.parametrize("slug", SLUGS)
def test_values_that_are_not_finite_name_the_layer(slug: str) -> None:
    model, dense = start(slug)
    for one in {id(model): model, id(dense): dense}.values():
        with torch.no_grad():
            decoder_blocks(one)[1].mlp.up_proj.weight[0, 0] = math.nan
    with pytest.raises(MethodError, match=r"layers\.1\.mlp\.(up|down)_proj"):
        compress(slug, model, dense)


@pytest.mark.parametrize("slug", SLUGS)
def test_models_without_blocks_are_refused(slug: str) -> None:
    with pytest.raises(ModelError, match="No list of transformer blocks"):
        compress(slug, nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4)))


@pytest.mark.parametrize("slug", SLUGS)
def test_quantised_models_are_refused(slug: str) -> None:
    excused(slug, "quantised")
    model, dense = start(slug)
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(ModelError, match="quantised"):
        compress(slug, model, dense)


@pytest.mark.parametrize("slug", SLUGS)
def test_the_arm_without_the_method_runs(slug: str) -> None:
    without = catalog.get(slug).recipe.get("without")
    if without is None:
        pytest.skip("the arm without it leaves it out")
    model, dense = start(slug)
    compress(slug, model, dense, **without)


@pytest.mark.parametrize("slug", SLUGS)
def test_every_option_has_a_plain_type_and_a_default_or_a_row_here(slug: str) -> None:
    offered = {"model", "compressed_model", "original_model", "tokenizer", "calibration", "texts", "seed", "on_layer"}
    for name, parameter in inspect.signature(catalog.load(slug)).parameters.items():
        if name in offered:
            continue
        assert parameter.annotation is not inspect.Parameter.empty, name
        assert parameter.default is not inspect.Parameter.empty or name in OPTIONS.get(slug, {}), name


def test_unknown_exceptions_are_removed() -> None:
    known = set(SLUGS) | {"evopress", "int2-1"}
    assert {slug for slug, _ in EXCEPTIONS} | set(OPTIONS) | set(REPORTS) <= known
    assert issubclass(MethodError, GnomonError)
