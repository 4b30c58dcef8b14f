"""DSnoT and its bases on whole models of several families."""

from __future__ import annotations

import copy
import math
from typing import Any

import pandas as pd
import peft
import pytest
import torch
from torch import Tensor, nn

from gnomon.common.calibration import LayerInputs, walk_blocks
from gnomon.common.layers import attention_and_mlp, decoder_blocks, linear_layers, set_weight, weight_of
from gnomon.common.models import tiny
from gnomon.compress.dsnot import (
    check_options,
    compare_bases,
    dsnot,
    dsnot_layer,
    freeze_masks,
    layer_errors,
    magnitude_mask,
    masks_of,
    prune,
    sparsegpt_layer,
    wanda_mask,
)
from gnomon.errors import DataError, MethodError, ModelError, NoEffectWarning

FAMILIES = ["llama", "qwen", "mistral", "gpt2", "gpt_neox"]


def ids(n: int = 4, tokens: int = 32, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (n, tokens), generator=torch.Generator().manual_seed(seed))


def linears(model: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in linear_layers(model).items() if any(m is x for x in decoder_blocks(model).modules())}


def first_block_inputs(model: nn.Module, data: Tensor) -> dict[str, LayerInputs]:
    found: dict[str, LayerInputs] = {}
    walk_blocks(model, data, lambda i, n, b, inputs: found.update(inputs if i == 0 else {}))
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "magnitude"])
def test_prune_does_to_each_layer_what_the_layer_function_does(family: str, method: Any) -> None:
    model = tiny(family, num_layers=2)
    dense, inputs = copy.deepcopy(model), first_block_inputs(model, ids())
    assert prune(model, ids(), method, 0.6) is model
    for name, seen in inputs.items():
        weight = weight_of(dense.get_submodule(name))
        if method == "sparsegpt":
            wanted = sparsegpt_layer(weight, seen, 0.6)[0]
        else:
            wanted = weight * (wanda_mask(weight, seen, 0.6) if method == "wanda" else magnitude_mask(weight, 0.6))
        assert torch.equal(weight_of(model.get_submodule(name)), wanted), name
    for layer in linears(model).values():
        assert float((weight_of(layer) == 0).float().mean()) == pytest.approx(0.6, abs=0.02)


@pytest.mark.parametrize("base", ["wanda", "magnitude", "sparsegpt"])
@pytest.mark.parametrize("pattern", [None, "2:4", "4:8"])
def test_sparsity_is_exact_and_kept_values_are_dense(base: Any, pattern: str | None) -> None:
    model = tiny("llama", num_layers=2)
    dense = copy.deepcopy(model)
    dsnot(model, ids(), base=base, sparsity=None if pattern else 0.7, pattern=pattern, refine="all", max_cycles=9)
    for name, layer in linears(model).items():
        weight, original = weight_of(layer), weight_of(dense.get_submodule(name))
        zero = weight == 0
        assert torch.equal(weight, original.masked_fill(zero, 0))
        if pattern is None:
            assert (zero.sum(1) == int(weight.shape[1] * 0.7)).all()
        else:
            n, m = map(int, pattern.split(":"))
            assert (zero.view(len(zero), -1, m).sum(-1) == n).all()


def test_attention_is_refined_and_the_rest_is_the_base() -> None:
    data = ids()
    base, attention, everything = (tiny("llama", num_layers=1) for _ in range(3))
    dsnot(base, data, sparsity=0.5, max_cycles=0)
    dsnot(attention, data, sparsity=0.5, max_cycles=5)
    dsnot(everything, data, sparsity=0.5, max_cycles=5, refine="all")
    for name in linears(base):
        one, two, three = (masks_of(m)[name] for m in (base, attention, everything))
        assert torch.equal(one, two) == ("mlp" in name), name
        assert not torch.equal(one, three), name
    wanda = prune(tiny("llama", num_layers=1), data, "wanda", 0.5)
    assert all(torch.equal(a, b) for a, b in zip(masks_of(wanda).values(), masks_of(base).values(), strict=True))


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_layers_equal_the_layer_function_also_where_weights_are_transposed_or_fused(family: str) -> None:
    model = tiny(family, num_layers=1)
    dense, inputs = copy.deepcopy(model), first_block_inputs(model, ids())
    dsnot(model, ids(), sparsity=0.5, max_cycles=7, threshold=0.01, power=0.5, without_same_sign=False, refine="all")
    for name, seen in inputs.items():
        weight = weight_of(dense.get_submodule(name))
        keep = wanda_mask(weight, seen, 0.5)
        keep = dsnot_layer(weight, seen, keep, max_cycles=7, threshold=0.01, power=0.5, without_same_sign=False)
        assert torch.equal(weight_of(model.get_submodule(name)), weight * keep)


def test_later_blocks_see_the_pruned_blocks_before_them() -> None:
    model = tiny("llama", num_layers=2)
    dense = copy.deepcopy(model)
    prune(model, ids(), "wanda", 0.5)
    half = copy.deepcopy(dense)
    for name, layer in linear_layers(decoder_blocks(half)[0]).items():
        set_weight(layer, weight_of(decoder_blocks(model)[0].get_submodule(name)))
    found: dict[str, LayerInputs] = {}
    walk_blocks(half, ids(), lambda i, n, b, inputs: found.update(inputs))
    name = "model.layers.1.mlp.up_proj"
    expected = wanda_mask(weight_of(dense.get_submodule(name)), found[name], 0.5)
    assert torch.equal(masks_of(model)[name], expected)


def test_expected_error_falls_in_every_refined_layer() -> None:
    def errors(cycles: int) -> dict[str, float]:
        found: dict[str, float] = {}
        dsnot(
            tiny("llama", num_layers=1, hidden_size=128),
            ids(8, 64),
            sparsity=0.6,
            refine="all",
            max_cycles=cycles,
            on_layer=lambda name, facts: found.update({name: facts["expected_error"]}),
        )
        return found

    before, after = errors(0), errors(50)
    assert set(before) == set(after)
    for name, value in before.items():
        assert after[name] < 0.3 * value, name


def test_on_layer_tells_what_was_done() -> None:
    facts: dict[str, dict[str, float]] = {}
    model = dsnot(tiny("llama", num_layers=2), ids(), sparsity=0.5, refine="all", on_layer=facts.__setitem__)
    assert list(facts) == list(linears(model))
    for name, told in facts.items():
        weight = weight_of(model.get_submodule(name))
        assert told["sparsity"] == pytest.approx(float((weight == 0).float().mean()))
        assert told["tokens"] == 128
        assert 0 <= told["swaps"] <= math.ceil(0.0125 * weight.shape[1])
        assert told["mse"] == pytest.approx(told["mean_term"] + told["covariance_term"])
        assert 0 < told["error"] < 1
    told_by_magnitude: dict[str, dict[str, float]] = {}
    prune(tiny("llama", num_layers=1), method="magnitude", on_layer=told_by_magnitude.__setitem__)
    assert all(told == {"sparsity": pytest.approx(0.5, abs=1e-3)} for told in told_by_magnitude.values())


def test_current_zeros_of_any_origin_are_a_start() -> None:
    dense = tiny("llama", num_layers=2)
    sparse = prune(copy.deepcopy(dense), ids(), "sparsegpt", 0.6)
    before = masks_of(sparse)
    refined = dsnot(sparse, ids(), base="current", original_model=dense, max_cycles=5)
    assert refined is sparse
    moved = 0
    for name, keep in masks_of(sparse).items():
        original = weight_of(dense.get_submodule(name))
        assert torch.equal(weight_of(sparse.get_submodule(name)), original * keep)  # dense values come back
        assert torch.equal(keep.sum(1), before[name].sum(1))
        moved += int((keep != before[name]).sum())
    assert moved > 0


def test_current_with_a_pattern_keeps_the_pattern_or_says_that_there_is_none() -> None:
    dense = tiny("llama", num_layers=1)
    sparse = prune(copy.deepcopy(dense), method="magnitude", pattern="2:4")
    dsnot(sparse, ids(), base="current", pattern="2:4", original_model=dense, refine="all", max_cycles=8)
    for keep in masks_of(sparse).values():
        assert ((~keep).view(len(keep), -1, 4).sum(-1) == 2).all()
    sparse = prune(copy.deepcopy(dense), ids(), "wanda", 0.5)
    with pytest.raises(
        MethodError, match=r"Layer 'model\.layers\.0\.self_attn\.q_proj': keep breaks the pattern '2:4'"
    ):
        dsnot(sparse, ids(), base="current", pattern="2:4", original_model=dense)


def test_bad_starts() -> None:
    dense = tiny("llama", num_layers=1)
    with pytest.raises(MethodError, match="base = 'current' needs the dense weights: give original_model"):
        dsnot(copy.deepcopy(dense), ids(), base="current")
    with pytest.raises(MethodError, match="the model's own zeros decide how many there are"):
        dsnot(copy.deepcopy(dense), ids(), base="current", sparsity=0.5, original_model=dense)
    with pytest.raises(ModelError, match=r"has no match in original_model \(none\)"):
        dsnot(copy.deepcopy(dense), ids(), base="current", original_model=tiny("gpt2", num_layers=1))
    with pytest.warns(NoEffectWarning, match="no weight of the model is zero"):
        dsnot(copy.deepcopy(dense), ids(), base="current", original_model=dense)


def test_peft_models_are_pruned_in_their_base_and_give_the_masks_of_the_plain_model() -> None:
    plain = prune(tiny("llama", num_layers=2), ids(), "wanda", 0.5)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    wrapped = peft.get_peft_model(tiny("llama", num_layers=2), config)
    adapters = {n: p.clone() for n, p in wrapped.named_parameters() if "lora_" in n}
    prune(wrapped, ids(), "wanda", 0.5)
    masks = masks_of(wrapped)
    assert all(torch.equal(masks[name], mask) for name, mask in masks_of(plain).items())
    assert all(torch.equal(p, adapters[n]) for n, p in wrapped.named_parameters() if "lora_" in n)


def test_a_model_with_idle_experts_reports_them() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(64, 64), nn.Linear(64, 64)])

        def forward(self, x: Tensor) -> Tensor:
            return self.experts[0](x)

    model = tiny("llama", num_layers=1)
    model.model.layers[0].mlp = Experts()
    facts: dict[str, dict[str, float]] = {}
    with pytest.warns(NoEffectWarning, match=r"No token reached 'model\.layers\.0\.mlp\.experts\.1': it stays dense"):
        dsnot(model, ids(), sparsity=0.5, on_layer=facts.__setitem__)
    assert facts["model.layers.0.mlp.experts.1"] == {"sparsity": 0.0, "tokens": 0.0}
    assert facts["model.layers.0.mlp.experts.0"]["sparsity"] == 0.5


def test_fused_experts_stay_dense_with_a_warning() -> None:
    model = tiny("mixtral", num_layers=1)
    before = copy.deepcopy(model.model.layers[0].mlp.state_dict())
    with pytest.warns(NoEffectWarning, match="2 weights hold several experts in one tensor"):
        prune(model, ids(), "wanda", 0.5)
    assert all(torch.equal(v, before[k]) for k, v in model.model.layers[0].mlp.state_dict().items())
    assert all(float((weight_of(m) == 0).float().mean()) == 0.5 for m in linears(model).values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base": "wander"}, r"base = 'wander'\. Did you mean 'wanda'"),
        ({"sparsity": 1.0}, "Allowed is 0 <= sparsity < 1"),
        ({"pattern": "2:5"}, r"Layer 'model\.layers\.0\.self_attn\.q_proj': A row of 64 inputs cannot be cut"),
        ({"sparsity": 0.4, "pattern": "2:4"}, "contradicts pattern"),
        ({"max_cycles": "many"}, "max_cycles = 'many'. Allowed are a number of at least 0 and 'scaled'"),
        ({"threshold": "low"}, "threshold = 'low'. Allowed are a number of at least 0 and 'scaled'"),
        ({"refine": "mlp"}, "refine = 'mlp'. Allowed are 'attention' and 'all'"),
        ({"max_cycles": -2}, "max_cycles = -2"),
    ],
)
def test_bad_options_change_nothing(options: dict[str, Any], message: str) -> None:
    model = tiny("llama", num_layers=1)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(MethodError, match=message):
        dsnot(model, ids(), **options)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_bad_methods_models_and_data() -> None:
    model = tiny("llama", num_layers=1)
    with pytest.raises(MethodError, match=r"method = 'wand'\. Did you mean 'wanda'"):
        prune(model, ids(), "wand")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="There is no calibration set"):
        prune(model)
    with pytest.raises(DataError, match="The calibration set is empty"):
        dsnot(model, ids(0))
    model.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(ModelError, match="This 'llama' model is quantised"):
        dsnot(model, ids())
    model = tiny("llama", num_layers=1)
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight.data.to(torch.int8), requires_grad=False)
    with pytest.raises(MethodError, match=r"Layer 'model\.layers\.0\.mlp\.up_proj': The weight has dtype torch.int8"):
        prune(model, ids())
    model = prune(tiny("llama", num_layers=1), method="magnitude")
    with freeze_masks(model), pytest.raises(ModelError, match=r"has a frozen mask .* Call remove"):
        prune(model, ids())


def test_check_options_is_what_the_recipe_asks_beforehand() -> None:
    model = tiny("llama", num_layers=1)
    check_options(model, sparsity=0.5, power=2.0)
    with pytest.raises(MethodError, match="cannot be cut into blocks of 5"):
        check_options(model, pattern="2:5")


def test_layer_errors_and_the_comparison_of_bases() -> None:
    dense = tiny("llama", num_layers=1, hidden_size=128)
    mode = [m.training for m in dense.modules()]
    before = copy.deepcopy(dense.state_dict())
    pruned = prune(copy.deepcopy(dense), ids(), "wanda", 0.6)
    table = layer_errors(pruned, dense, ids())
    assert list(table["layer"]) == list(linears(dense))
    assert ((table["mse"] - table["mean_term"] - table["covariance_term"]).abs() < 1e-6 * table["mse"]).all()
    assert layer_errors(dense, dense, ids())["error"].eq(0).all()
    with pytest.raises(ModelError, match="has no match in original_model"):
        layer_errors(pruned, tiny("gpt2", num_layers=1), ids())

    found = compare_bases(dense, ids(8, 64), sparsity=0.6, held_out=ids(2, 64, seed=5), refine="all", max_cycles=4)
    assert isinstance(found, pd.DataFrame)
    assert list(found["base"]) == ["magnitude"] * 2 + ["wanda"] * 2 + ["sparsegpt"] * 2
    rows = found.set_index(["base", "refinement"])
    assert rows.loc[("wanda", "dsnot"), "expected_error"] < rows.loc[("wanda", "none"), "expected_error"]
    assert rows.loc[("sparsegpt", "none"), "error"] < rows.loc[("wanda", "none"), "error"]
    assert (rows["kl"] > 0).all()
    assert rows["perplexity"].to_list() == pytest.approx(rows["loss"].map(math.exp).to_list())
    assert [m.training for m in dense.modules()] == mode
    assert all(torch.equal(v, before[k]) for k, v in dense.state_dict().items())
    with pytest.raises(MethodError, match="bases is empty"):
        compare_bases(dense, ids(), bases=())


def test_attention_modules_are_found_in_all_families() -> None:
    for family in FAMILIES:
        block = decoder_blocks(tiny(family, num_layers=1))[0]
        assert 0 < len(linear_layers(attention_and_mlp(block)[0])) < len(linear_layers(block))
