"""SLTrain on whole models: what is replaced, refused, saved, folded, trained and counted."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from gnomon.common import surgery
from gnomon.common.layers import linear_layers
from gnomon.common.models import export_model, load_model, save_model, tiny
from gnomon.errors import GnomonWarning, MethodError, ModelError, NoEffectWarning
from gnomon.nn import (
    SparseLowRankLinear,
    apply_layernorm_scaling,
    apply_norm_placement,
    apply_sltrain,
    check_gradients,
    converted_layers,
    fold_sltrain,
    memory_report,
    unfold_sltrain,
)

PAPER = {  # hidden, intermediate, layers, heads, rank, sparsity
    "60M": (512, 1376, 8, 8, 128, 0.03),
    "130M": (768, 2048, 12, 12, 256, 0.03),
    "350M": (1024, 2736, 24, 16, 256, 0.03),
    "1B": (2048, 5461, 24, 32, 512, 0.03),
    "7B": (4096, 11008, 32, 32, 1024, 0.05),
}
COUNTED = {  # GB of Adam on the dense model, GB of SLTrain; million parameters, million sparse entries
    "60M": (0.35, 0.27, 43.5, 0.76),
    "130M": (0.80, 0.60, 96.5, 2.55),
    "350M": (2.21, 1.24, 194.3, 9.07),
    "1B": (8.03, 4.16, 645.5, 36.2),
    "7B": (40.4, 21.5, 3144.7, 323.8),
}


def ids(rows: int = 2, tokens: int = 12, seed: int = 9) -> Tensor:
    return torch.randint(1, 256, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids()).logits


def shaken(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def llama_of(size: str) -> LlamaForCausalLM:
    hidden, intermediate, layers, heads, rank, sparsity = PAPER[size]
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
    )
    with torch.device("meta"):
        return apply_sltrain(LlamaForCausalLM(config), rank, sparsity)


# ---- what is replaced --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen", "qwen3", "mistral", "gpt2", "gpt_neox", "olmo2", "gemma2", "bert"])
def test_attention_and_mlp_are_replaced_and_head_and_embeddings_are_not(family: str, tmp_path: Path) -> None:
    model = tiny(family, num_layers=2)
    stock = linear_layers(model)
    head = model.get_output_embeddings()
    apply_sltrain(model, rank=4)
    found = converted_layers(model)
    assert set(linear_layers(model)) == {n for n in stock if not ("attn" in n or "attention" in n or "mlp" in n)}
    assert found or family == "bert"
    assert model.get_output_embeddings() is head
    for name, layer in found.items():
        assert (layer.bias is not None) == (stock[name].bias is not None), name
    expected = logits(shaken(model))
    save_model(model, tmp_path / "native")
    torch.testing.assert_close(logits(load_model(tmp_path / "native")), expected, rtol=0, atol=1e-6)
    export_model(model, tmp_path / "dense")
    plain = type(model).from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(logits(plain), expected, rtol=1e-4, atol=1e-4)
    assert list(plain.state_dict()) == list(tiny(family, num_layers=2).state_dict())


def test_grouped_queries_and_odd_sizes_take_their_shapes_from_the_layers() -> None:
    model = apply_sltrain(tiny("llama", num_layers=1, num_kv_heads=2, intermediate_size=91), rank=4)
    layers = converted_layers(model)
    assert layers["model.layers.0.self_attn.k_proj"].B.shape == (32, 4)
    assert layers["model.layers.0.mlp.down_proj"].A.shape == (4, 91)
    assert torch.isfinite(logits(model)).all()


def test_names_match_by_any_part_and_the_converted_ones_are_told() -> None:
    model = apply_sltrain(tiny("llama", num_layers=2), 4, target_modules=["layers.1.mlp", "q_proj"])
    assert list(converted_layers(model)) == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.gate_proj",
        "model.layers.1.mlp.up_proj",
        "model.layers.1.mlp.down_proj",
    ]


def test_head_is_never_replaced_whatever_its_name() -> None:
    for tie in (True, False):
        with pytest.warns(GnomonWarning, match="lm_head: it is the head of the model"):
            model = apply_sltrain(tiny("llama", num_layers=1, tie=tie), 4, target_modules=["lm_head", "mlp"])
        assert type(model.lm_head) is nn.Linear
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tie


def test_shared_modules_stay_shared_and_shared_weights_stay_dense(tmp_path: Path) -> None:
    model = tiny("llama", num_layers=2)
    first, second = model.model.layers
    second.mlp = first.mlp
    second.self_attn.q_proj.weight = first.self_attn.q_proj.weight
    with pytest.warns(GnomonWarning, match=r"2 modules .* stay dense.*shared with another module"):
        apply_sltrain(model, 4)
    assert second.mlp.up_proj is first.mlp.up_proj
    assert isinstance(first.mlp.up_proj, SparseLowRankLinear)
    assert second.self_attn.q_proj.weight is first.self_attn.q_proj.weight
    shared = copy.deepcopy(fold_sltrain(model))
    assert shared.model.layers[1].mlp.up_proj is shared.model.layers[0].mlp.up_proj


def test_experts_in_one_tensor_are_told_to_stay_dense() -> None:
    with pytest.warns(GnomonWarning, match=r"stay dense.*experts stand in one tensor"):
        model = apply_sltrain(tiny("mixtral", num_layers=1), 4)
    assert all("self_attn" in name for name in converted_layers(model))


def test_layers_depend_on_seed_and_name_alone() -> None:
    whole = apply_sltrain(tiny("llama", num_layers=2), 4, seed=5).state_dict()
    some = apply_sltrain(tiny("llama", num_layers=2, seed=8), 4, target_modules=["down_proj"], seed=5).state_dict()
    other = apply_sltrain(tiny("llama", num_layers=2), 4, seed=6).state_dict()
    for part in ("A", "values", "indices"):
        name = f"model.layers.1.mlp.down_proj.{part}"
        assert torch.equal(whole[name], some[name])
        assert not torch.equal(whole[name], other[name])
        assert not torch.equal(whole[name], whole[name.replace("layers.1", "layers.0")])


def test_frozen_layers_stay_frozen() -> None:
    model = tiny("llama", num_layers=2)
    model.model.layers[0].requires_grad_(False)
    apply_sltrain(model, 4)
    assert {p.requires_grad for p in model.model.layers[0].parameters()} == {False}
    assert {p.requires_grad for p in model.model.layers[1].parameters()} == {True}


# ---- what is refused or told -------------------------------------------------------------------------------------


class Quantised(nn.Linear):
    """Stands for a linear layer whose weight is no plain matrix."""


def quantised() -> nn.Module:
    model = tiny("llama", num_layers=1)
    model.model.layers[0].mlp.up_proj = Quantised(64, 176)
    return model


def trained() -> nn.Module:
    model = tiny("llama", num_layers=1)
    with torch.no_grad():
        model.model.norm.weight[0] = 2.0
    return model


def loaded() -> nn.Module:
    model = tiny("llama", num_layers=1)
    model.name_or_path = "somewhere"
    return model


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (quantised, {}, ModelError, r"up_proj' of this 'llama' model is a Quantised, a subclass of nn.Linear"),
        (trained, {}, ModelError, r"trained \(the gains of 'model.norm' are no longer constant\).*init='svd'"),
        (loaded, {}, ModelError, r"trained \(it was loaded from 'somewhere'\).*from_scratch=True"),
        (tiny, {"from_scratch": False}, ModelError, r"from_scratch = False says so"),
        (
            tiny,
            {"target_modules": ["qkv"]},
            ModelError,
            r"no linear layer .*\['qkv'\].*model.layers.0.self_attn.q_proj",
        ),
        (tiny, {"target_modules": "attn"}, MethodError, r"target_modules = 'attn'; it must be a list"),
        (tiny, {"target_modules": []}, MethodError, r"target_modules = \[\]"),
        (tiny, {"sparsity": 1e-5}, ModelError, r"too few for sparsity = 1e-05"),
        (tiny, {"init": "pca"}, MethodError, r"init = 'pca' is unknown"),
        (tiny, {"rank": 0}, MethodError, r"rank = 0"),
        (tiny, {"sparsity": 1.5}, MethodError, r"sparsity = 1.5"),
        (tiny, {"trainable_scale": True, "alpha": 2.0}, MethodError, r"learns the factor that alpha = 2.0 would fix"),
    ],
)
def test_refusals_say_why_and_change_nothing(make: Any, options: dict[str, Any], error: Any, message: str) -> None:
    model = make()
    before = list(model.state_dict())
    with pytest.raises(error, match=message):
        apply_sltrain(model, **{"rank": 4, **options})
    assert list(model.state_dict()) == before
    assert surgery.recorded(model) == []


def test_trained_weights_are_taken_when_random_after_all_or_approximated() -> None:
    apply_sltrain(loaded(), 4, from_scratch=True)
    model = loaded()
    expected = logits(model)
    with pytest.warns(GnomonWarning, match="no fewer parameters"):
        unfold_sltrain(model, rank=64, sparsity=0.5)
    assert float((logits(model) - expected).abs().max()) < 1e-3
    errors = []
    for rank in (4, 12, 24):
        near = unfold_sltrain(loaded(), rank=rank)
        errors.append(float((logits(near) - expected).norm()))
    assert errors == sorted(errors, reverse=True)


def test_warnings_of_ranks_too_high_layers_too_small_and_idle_targets() -> None:
    with pytest.warns(GnomonWarning, match=r"With rank = 60 .* 7 layers have no fewer parameters.*\(64 x 64\)"):
        apply_sltrain(tiny("llama", num_layers=1), 60)
    with pytest.warns(GnomonWarning, match=r"4 modules .* stay dense. .*: 64 x 64 entries are too few"):
        model = apply_sltrain(tiny("llama", num_layers=1), 4, sparsity=1e-4)
    assert all("mlp" in name for name in converted_layers(model))
    with pytest.warns(NoEffectWarning, match=r"target_modules: 'qkv' is part of no linear layer's name"):
        apply_sltrain(tiny("llama", num_layers=1), 4, target_modules=["mlp", "qkv"])


def test_nothing_to_fold_or_report_or_check_is_said() -> None:
    for call in (fold_sltrain, memory_report, check_gradients):
        with pytest.raises(ModelError, match="no sparse plus low-rank layers"):
            call(tiny("llama", num_layers=1))


def test_a_record_without_layers_is_not_applied_over() -> None:
    model = tiny("llama", num_layers=1)
    model.config.gnomon = surgery.recorded(apply_sltrain(tiny("llama", num_layers=1), 4))
    with pytest.raises(ModelError, match="loaded without them"):
        apply_sltrain(model, 4)


# ---- saving ------------------------------------------------------------------------------------------------------


def test_saving_keeps_support_and_options(tmp_path: Path) -> None:
    model = shaken(apply_sltrain(tiny("llama", num_layers=1), 4, 0.1, trainable_scale=True, seed=3))
    save_model(model, tmp_path / "model")
    again = load_model(tmp_path / "model")
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
        assert again.state_dict()[name].dtype == tensor.dtype
    options = surgery.recorded(again)[0]["options"]
    assert options["trainable_scale"] is True
    assert "alpha" not in options
    half = load_model(tmp_path / "model", dtype=torch.bfloat16)
    layer = half.model.layers[0].mlp.up_proj
    assert layer.A.dtype == torch.bfloat16
    assert torch.equal(layer.indices, model.model.layers[0].mlp.up_proj.indices)


def test_the_trainer_saves_what_load_model_reads_and_trains_every_part(tmp_path: Path) -> None:
    model = apply_sltrain(tiny("llama", num_layers=2), 4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rows = [{"input_ids": row, "labels": row} for row in ids(rows=8)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"), max_steps=3, learning_rate=1e-2, report_to=[], use_cpu=True, disable_tqdm=True
    )
    with torch.random.fork_rng():
        trainer = Trainer(model=model, args=arguments, train_dataset=rows)
        trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert torch.equal(logits(load_model(tmp_path / "saved")), logits(model))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == name.endswith("indices"), name


def test_deviations_combine_with_norm_placements_and_scales(tmp_path: Path) -> None:
    orders = {
        "scales last": (lambda m: apply_sltrain(m, 4), apply_layernorm_scaling),
        "scales first": (apply_layernorm_scaling, lambda m: apply_sltrain(m, 4)),
        "placement last": (lambda m: apply_sltrain(m, 4), apply_norm_placement),
        "placement first": (apply_norm_placement, lambda m: apply_sltrain(m, 4)),
    }
    for name, steps in orders.items():
        model = tiny("llama", num_layers=4)
        for step in steps:
            step(model)
        expected = logits(shaken(model))
        save_model(model, tmp_path / name)
        torch.testing.assert_close(logits(load_model(tmp_path / name)), expected, rtol=0, atol=1e-6, msg=name)
        if "scales" in name:
            export_model(model, tmp_path / "stock")
            stock = AutoModelForCausalLM.from_pretrained(tmp_path / "stock")
            torch.testing.assert_close(logits(stock), expected, rtol=1e-4, atol=1e-4, msg=name)


# ---- gradients and memory ----------------------------------------------------------------------------------------


def test_parts_without_gradient_are_found() -> None:
    model = apply_sltrain(tiny("llama", num_layers=2), 4)
    with pytest.raises(ModelError, match=r"42 parts .* got no gradient"):
        check_gradients(model)
    model(input_ids=ids(), labels=ids()).loss.backward()
    check_gradients(model)  # A has zeros, B being zero
    layer = model.model.layers[1].mlp.up_proj
    assert not layer.A.grad.any()
    layer.values.grad.zero_()
    with pytest.raises(ModelError, match=r"1 parts .*: model.layers.1.mlp.up_proj.values. They would stay"):
        check_gradients(model)
    layer.values.requires_grad_(False)
    check_gradients(model)
    with torch.no_grad():
        layer.B.fill_(0.1)
    with pytest.raises(ModelError, match=r"up_proj.A"):
        check_gradients(model)


@pytest.mark.parametrize("size", PAPER)
def test_memory_report_prints_the_papers_figures(size: str) -> None:
    report = memory_report(llama_of(size), optim_bits=16, per_layer=True)
    full, ours, parameters, nonzeros = COUNTED[size]
    assert report.full.total / 1e9 == pytest.approx(full, abs=0.06 if size == "7B" else 0.006)
    assert report.sltrain.total / 1e9 == pytest.approx(ours, abs=0.06 if size == "7B" else 0.006)
    assert report.sltrain.parameters / 1e6 == pytest.approx(parameters, abs=0.06)
    assert report.nonzeros / 1e6 == pytest.approx(nonzeros, abs=0.06 if nonzeros > 10 else 0.006)


def test_memory_of_the_papers_figure_for_1b() -> None:
    report = memory_report(llama_of("1B"), per_layer=True)
    assert report.low_rank.parameters / 1e6 == pytest.approx(609, abs=0.5)
    assert report.full.parameters / 1e6 == pytest.approx(1339, abs=0.5)
    assert report.low_rank.total / 1e9 == pytest.approx(3.7, abs=0.05)
    assert report.galore.total / 1e9 == pytest.approx(4.8, abs=0.05)


def test_memory_report_counts_real_tensors() -> None:
    model = apply_sltrain(tiny("gpt2", num_layers=2), 4).bfloat16()
    size = sum(p.numel() for p in model.parameters())
    entries = sum(layer.values.numel() for layer in converted_layers(model).values())
    report = memory_report(model, optim_bits=32)
    assert report.sltrain.weights == sum(p.numel() * p.element_size() for p in model.parameters()) == 2 * size
    assert report.sltrain.moments == 8 * size
    assert report.sltrain.gradients == 2 * size
    assert (report.sltrain.indices, report.stored_indices) == (8 * entries, 4 * entries)
    assert report.full.parameters == sum(p.numel() for p in tiny("gpt2", num_layers=2).parameters())
    assert memory_report(model, 8, per_layer=True).sltrain.total == 4 * size + 8 * entries
    assert 0 < report.summary()["saved"] < 1
    printed = str(report).splitlines()
    assert [line.split("  ")[0] for line in printed[1:5]] == ["full", "galore", "low rank", "sltrain"]
    with pytest.raises(MethodError, match="optim_bits = 4; a moment takes 8, 16 or 32 bits"):
        memory_report(model, 4)  # type: ignore[arg-type]
