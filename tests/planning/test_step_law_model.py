"""Counting parameters as the law does, planning from a model, and the Trainer's arguments."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings

import peft
import pytest
import torch
import transformers
from transformers import LlamaConfig, MixtralConfig, Qwen2MoeConfig

from gnomon.common.models import tiny
from gnomon.errors import GnomonWarning, MethodError, ModelError
from gnomon.planning import (
    count_parameters,
    dense_parameters,
    flops_per_token,
    from_model,
    step_law,
    training_arguments,
)

SHAPES = [(960, 9368, 7, 15, 214_663_680), (1024, 9552, 8, 16, 268_304_384), (1280, 9472, 10, 10, 429_260_800)]


def llama(hidden=960, intermediate=9368, layers=7, heads=15, **more):
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=more.pop("kv_heads", heads),
        **more,
    )


def mixture(experts: int, chosen: int, shared: int):
    """The authors' mixtures: 16 blocks of 1408, the first of them dense."""
    return Qwen2MoeConfig(
        hidden_size=1408,
        intermediate_size=3904,
        num_hidden_layers=16,
        num_attention_heads=11,
        num_key_value_heads=11,
        moe_intermediate_size=352,
        shared_expert_intermediate_size=shared,
        num_experts=experts,
        num_experts_per_tok=chosen,
        mlp_only_layers=[0],
    )


@pytest.mark.parametrize(("hidden", "ffn", "layers", "heads", "expected"), SHAPES)
def test_published_dense_counts(hidden, ffn, layers, heads, expected):
    assert dense_parameters(hidden, ffn, layers) == layers * (4 * hidden**2 + 3 * hidden * ffn) == expected
    found = count_parameters(llama(hidden, ffn, layers, heads))
    assert found.non_embedding == found.active == expected
    assert found.flops_per_token(2048) == flops_per_token(hidden, ffn, layers, 2048)
    assert not found.moe


@pytest.mark.parametrize(("experts", "chosen", "shared", "active"), [(89, 1, 352, 187973632), (88, 2, 704, 232579072)])
def test_published_mixture_counts(experts, chosen, shared, active):
    found = count_parameters(mixture(experts, chosen, shared))
    assert (found.non_embedding, found.active, found.moe) == (2_150_612_992, active, True)
    if chosen == 1:
        assert found.flops_per_token(2048) == 1681489920


def test_a_mixture_is_planned_with_all_its_experts():
    plan = from_model(mixture(89, 1, 352), 8e9)
    assert plan.n_params == 2_150_612_992
    assert plan.lr == step_law(2_150_612_992, 8e9, moe=True).lr
    found = count_parameters(tiny("mixtral"))
    assert found.active < found.non_embedding
    assert count_parameters(MixtralConfig(num_hidden_layers=2)).active == 2 * (
        4096 * 128 * (2 * 32 + 2 * 8) + 2 * 3 * 4096 * 14336
    )


def test_grouped_query_heads():
    config = llama(1024, 2816, 3, 16, kv_heads=4)
    expected = 3 * (1024 * (16 + 2 * 4 + 16) * 64 + 3 * 1024 * 2816)
    assert count_parameters(config).non_embedding == expected
    assert dense_parameters(1024, 2816, 3, heads=16, kv_heads=4) == expected
    assert dense_parameters(1024, 2816, 3, heads=8, kv_heads=2, head_dim=128) == expected
    assert dense_parameters(1024, 2816, 3, heads=16) == dense_parameters(1024, 2816, 3)
    assert dense_parameters(1024, 2816, 3, gated=False) == 3 * (4 * 1024**2 + 2 * 1024 * 2816)


@pytest.mark.parametrize(
    "family", ["llama", "qwen", "qwen3", "mistral", "gpt2", "gpt_neox", "olmo2", "gemma2", "mixtral"]
)
def test_every_family_counts_the_matrices_of_its_blocks(family):
    model = tiny(family, num_layers=2)
    before = copy.deepcopy(model.state_dict())
    found = count_parameters(model)
    outside = ("embed_tokens", "wte", "wpe", "embed_in", "embed_out", "lm_head")
    named = {n: p for n, p in model.named_parameters() if p.ndim >= 2 and not n.endswith("gate.weight")}
    inside = {n: p for n, p in named.items() if not any(part in n.split(".") for part in outside)}
    assert found.non_embedding == sum(p.numel() for p in inside.values())
    assert found.embedding == sum(p.numel() for n, p in named.items() if n not in inside), "tied ones once"
    assert found.layers == 2
    state = torch.get_rng_state()
    assert count_parameters(model.config) == found, "the configuration alone says the same"
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())


def test_tied_embeddings_are_counted_once():
    tied, free = (count_parameters(tiny("llama", tie=t)) for t in (True, False))
    assert free.embedding == 2 * tied.embedding == 2 * 256 * 64
    assert free.non_embedding == tied.non_embedding


@pytest.mark.parametrize("config", [peft.LoraConfig(target_modules="all-linear"), peft.VeraConfig(), peft.LoHaConfig()])
def test_adapters_are_not_counted(config):
    config.target_modules = config.target_modules or ["q_proj", "v_proj"]
    plain = count_parameters(tiny("llama"))
    assert count_parameters(peft.get_peft_model(tiny("llama"), config)).non_embedding == plain.non_embedding


def test_a_plan_from_a_model_its_configuration_and_its_folder_is_one(tmp_path):
    config = llama(512, 2048, 15, 8, vocab_size=512)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    config.save_pretrained(tmp_path)
    plans = [from_model(given, 2e10, micro_batch=4, devices=8) for given in (model, config, tmp_path, str(tmp_path))]
    assert all(plan == plans[0] for plan in plans)
    assert plans[0] == step_law(dense_parameters(512, 2048, 15), 2e10, micro_batch=4, devices=8)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (tiny("marian").config, "encoder-decoder"),
        (tiny("marian"), "encoder-decoder"),
        (torch.nn.Linear(2, 2), "no configuration"),
        (object(), "neither a model nor a configuration"),
        ("/no/such/folder", "is no model.*config\\.json"),
        (transformers.ViTConfig(), "no decoder that transformers"),
    ],
)
def test_what_is_no_decoder_is_refused(given, words):
    with pytest.raises(ModelError, match=words):
        from_model(given, 2e10)


def test_packed_weights_are_refused():
    model = tiny("llama", num_layers=1)
    packed = torch.nn.Parameter(torch.zeros(8, 8, dtype=torch.uint8), requires_grad=False)
    model.model.layers[0].mlp.up_proj.weight = packed
    with pytest.raises(ModelError, match=r"up_proj.weight is stored as torch.uint8.*configuration"):
        count_parameters(model)


def test_a_number_that_includes_the_embeddings_is_noticed():
    config = llama(vocab_size=65536)  # 63M in one table, 23 % of what is left
    right = count_parameters(config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step_law(right.non_embedding, 1e10, config=config)
        step_law(1e9, 1e11, config=llama(vocab_size=1000))  # a table too small to matter
    with pytest.warns(GnomonWarning, match="has 2.147e.08 parameters without embeddings and head") as caught:
        plan = step_law(right.non_embedding + right.embedding, 1e10, config=config)
    assert caught[0].filename == __file__
    assert str(caught[0].message) in plan.notes


@pytest.mark.parametrize("sizes", [{"hidden": 0}, {"layers": -1}, {"kv_heads": 2}])
def test_sizes_that_cannot_be_are_refused(sizes):
    with pytest.raises(MethodError, match=r"1 or more|heads, which is missing"):
        dense_parameters(**{"hidden": 8, "intermediate": 8, "layers": 1, **sizes})


def test_training_arguments_are_the_setting_of_the_paper(tmp_path):
    plan = step_law(1e9, 1e11, micro_batch=8, devices=16)
    found = training_arguments(plan, tmp_path, use_cpu=True, report_to=[])
    assert found.learning_rate == plan.lr
    assert found.per_device_train_batch_size * found.gradient_accumulation_steps * 16 * 2048 == plan.batch_tokens
    assert (found.max_steps, found.warmup_steps) == (plan.steps, 2000)
    assert (found.adam_beta1, found.adam_beta2, found.adam_epsilon) == (0.9, 0.95, 1e-8)
    assert (found.weight_decay, found.max_grad_norm) == (0.1, 1.0)
    other = training_arguments(plan, tmp_path, micro_batch=4, use_cpu=True, weight_decay=0.0)
    assert (other.gradient_accumulation_steps, other.weight_decay) == (8, 0.0)
    short = training_arguments(step_law(1e9, 1e9 * 10, micro_batch=32, devices=64), tmp_path, use_cpu=True)
    assert short.warmup_steps == short.max_steps // 10 < 2000
    with pytest.raises(MethodError, match=r"no multiple of 2048 .*micro_batch=1, devices=1"):
        training_arguments(step_law(1e9, 1e11), tmp_path)
    with pytest.raises(MethodError, match="micro_batch=3"):
        training_arguments(plan, tmp_path, micro_batch=3)


def test_the_trainer_decays_to_the_fixed_final_rate(tmp_path):
    plan = step_law(1e9, 1e11, micro_batch=8, devices=16)
    arguments = training_arguments(plan, tmp_path, use_cpu=True, report_to=[], max_steps=40, warmup_steps=4)
    trainer = transformers.Trainer(model=tiny("llama", num_layers=1), args=arguments)
    trainer.create_optimizer_and_scheduler(40)
    rates = []
    for _ in range(40):
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        rates.append(trainer.optimizer.param_groups[0]["lr"])
    assert max(rates) == pytest.approx(plan.lr)
    assert rates[-1] == pytest.approx(1e-5)


def test_a_number_needs_no_torch():
    code = "import sys; from gnomon.planning import step_law; step_law(1e9, 1e11); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
