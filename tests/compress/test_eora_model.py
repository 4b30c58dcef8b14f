"""EoRA on whole models: the order of work, the statistics it uses, and pairs of models that do not fit."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from torch import nn

from gnomon.common.calibration import LayerInputs
from gnomon.common.layers import decoder_blocks, linear_layers, set_weight, weight_of
from gnomon.common.models import tiny
from gnomon.compress.eora import eora, eora_layer, output_error, requantise_after_merge
from gnomon.errors import DataError, MethodError, ModelError, NoEffectWarning

pytestmark = pytest.mark.filterwarnings("ignore:.*calibrated with fewer tokens:UserWarning")


def rounded(weight, bits=3):
    scale = (weight.amax(1, keepdim=True) - weight.amin(1, keepdim=True)) / (2**bits - 1)
    return (weight / scale).round() * scale


def pair(architecture="llama", compress=rounded, **sizes):
    """Return a dense model, in evaluation mode, and its compressed copy."""
    dense = tiny(architecture, **{"num_layers": 2, **sizes}).eval()
    compressed = copy.deepcopy(dense)
    for block in decoder_blocks(compressed):
        for layer in linear_layers(block).values():
            set_weight(layer, compress(weight_of(layer)))
    return dense, compressed


def tokens(n=6, length=40, seed=0):
    return torch.randint(1, 256, (n, length), generator=torch.Generator().manual_seed(seed))


def run(*arguments, **options):
    """Run eora and collect what it tells of each layer."""
    facts = {}
    model = eora(*arguments, on_layer=lambda name, told: facts.setdefault(name, told), **options)
    return model, facts


def adapter(model, name):
    layer = model.get_base_model().get_submodule(name)
    return layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()


@torch.no_grad()
def inputs_of(model, names, ids, mask=None):
    """Return what some layers of a model get, by hooks on a plain forward pass."""
    seen = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0]))
        for name in names
    ]
    model(input_ids=ids, attention_mask=mask)
    for handle in handles:
        handle.remove()
    return {name: torch.cat([x.reshape(-1, x.shape[-1]) for x in parts]) for name, parts in seen.items()}


def test_order_of_work():
    """Inputs come from dense blocks fed by compensated ones, as the loop below says in so many words."""
    dense, compressed = pair(num_layers=3)
    hybrid = copy.deepcopy(dense)  # blocks before the present one compensated, the present one dense
    ids = tokens()
    wanted = {}
    for index, block in enumerate(hybrid.model.layers):
        prefix = f"model.layers.{index}."
        layers = {prefix + name: layer for name, layer in linear_layers(block).items()}
        seen = inputs_of(hybrid, layers, ids)
        for name, layer in layers.items():
            weight, small = layer.weight.detach(), compressed.get_submodule(name).weight.detach()
            A, B = eora_layer(weight - small, seen[name].T @ seen[name], 8)
            wanted[name] = B @ A
            set_weight(layer, small + B @ A)
    model, facts = run(compressed, dense, ids, rank=8)
    assert list(facts) == list(wanted)
    for name, product in wanted.items():
        A, B = adapter(model, name)
        torch.testing.assert_close(B @ A, product, rtol=1e-3, atol=2e-6)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, hybrid(ids).logits, rtol=1e-4, atol=1e-5)


def test_facts_are_the_errors_of_the_stored_adapter():
    dense, compressed = pair(num_layers=1)
    ids = tokens()
    name = "model.layers.0.mlp.up_proj"
    x = inputs_of(dense, [name], ids)[name]
    delta = dense.get_submodule(name).weight.detach() - compressed.get_submodule(name).weight.detach()
    model, facts = run(compressed, dense, ids, rank=8)
    A, B = adapter(model, name)
    told = facts[name]
    assert told["error_before"] == pytest.approx(output_error(delta, x.T @ x) / len(x), rel=1e-4)
    assert told["error_after"] == pytest.approx(output_error(delta - B @ A, x.T @ x) / len(x), rel=1e-3)
    assert told["rank"] == 8
    assert told["tokens"] == len(x) == 240
    assert told["effective_rank"] == 64


@pytest.mark.parametrize("architecture", ["llama", "qwen", "gpt2"])
def test_lowers_every_layer_error_further_than_the_baselines(architecture):
    ids = tokens()
    errors = {}
    for method in ("eora", "svd", "act_s"):
        dense, compressed = pair(architecture, num_layers=1)
        errors[method] = run(compressed, dense, ids, rank=4, method=method)[1]
    for name, told in errors["eora"].items():
        assert told["error_after"] < told["error_before"]
        assert told["error_after"] < errors["svd"][name]["error_after"]
        assert told["error_after"] < errors["act_s"][name]["error_after"]


def test_query_key_and_value_share_one_factorisation(monkeypatch):
    from gnomon.compress.eora import compensate

    calls = []
    real = compensate.input_space
    monkeypatch.setattr(compensate, "input_space", lambda gram, **k: calls.append(len(gram)) or real(gram, **k))
    dense, compressed = pair(num_layers=1, architecture="qwen")
    eora(compressed, dense, tokens(), rank=4)
    assert len(calls) == 4


def test_the_dense_model_and_the_modes_are_left_as_they_were():
    dense, compressed = pair()
    dense.train()
    compressed.model.layers[1].train()
    state = {key: value.clone() for key, value in dense.state_dict().items()}
    small = {key: value.clone() for key, value in compressed.state_dict().items()}
    modules = [type(m) for m in dense.modules()]
    random = torch.get_rng_state()
    model = eora(compressed, dense, tokens(), rank=4)
    assert torch.equal(torch.get_rng_state(), random)
    assert dense.training
    assert [type(m) for m in dense.modules()] == modules
    assert all(torch.equal(value, dense.state_dict()[key]) for key, value in state.items())
    base = model.get_base_model()
    assert not model.training
    assert not base.training
    assert base.model.layers[1].training
    found = {key.replace(".base_layer", ""): value for key, value in base.state_dict().items()}
    assert all(torch.equal(value, found[key]) for key, value in small.items())
    with torch.no_grad(), model.disable_adapter():
        plain = model(input_ids=tokens()).logits
    torch.testing.assert_close(plain, model.unload()(tokens()).logits)


def test_padding_is_masked_out():
    ids = tokens(4, 24)
    padded, mask = torch.zeros(4, 40, dtype=torch.long), torch.zeros(4, 40, dtype=torch.long)
    padded[:, :24], mask[:, :24] = ids, 1
    dense, compressed = pair()
    plain, facts = run(compressed, dense, ids, rank=4)
    dense, compressed = pair()
    masked, told = run(compressed, dense, {"input_ids": padded, "attention_mask": mask}, rank=4)
    for name in facts:
        assert told[name]["tokens"] == facts[name]["tokens"] == 96
        for a, b in zip(adapter(plain, name), adapter(masked, name), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-4)


def test_order_of_the_samples_matters_only_with_decay():
    ids = tokens()
    products = {}
    for accumulation in ("sum", "decay"):
        for order in (ids, ids.flip(0)):
            dense, compressed = pair(num_layers=1)
            A, B = adapter(
                eora(compressed, dense, order, rank=4, accumulation=accumulation, batch_size=1),
                "model.layers.0.mlp.up_proj",
            )
            products.setdefault(accumulation, []).append(B @ A)
    torch.testing.assert_close(*products["sum"], rtol=1e-3, atol=1e-6)
    assert (products["decay"][0] - products["decay"][1]).abs().max() > 1e-5


def test_decay_is_the_published_average():
    ids, name = tokens(), "model.layers.0.mlp.up_proj"
    dense, compressed = pair(num_layers=1)
    x = inputs_of(dense, [name], ids)[name].view(6, 40, -1).split([4, 2])
    gram = torch.zeros(64, 64)
    for part in x:
        flat = part.reshape(-1, 64)
        gram = gram * (6 / (6 + len(part))) + flat.T @ flat / 6
    delta = dense.get_submodule(name).weight.detach() - compressed.get_submodule(name).weight.detach()
    A, B = eora_layer(delta, gram, 4)
    model = eora(compressed, dense, ids, rank=4, accumulation="decay", batch_size=4)
    C, D = adapter(model, name)
    torch.testing.assert_close(D @ C, B @ A, rtol=1e-3, atol=1e-6)


def test_gradient_baseline_lies_between_nothing_and_the_closed_form():
    ids = {"input_ids": tokens(), "attention_mask": torch.ones(6, 40, dtype=torch.long)}
    ids["attention_mask"][3:, 30:] = 0
    dense, compressed = pair(num_layers=1, hidden_size=32, num_heads=2)
    options = {"rank": 4, "targets": ["q_proj", "up_proj"]}
    _, best = run(copy.deepcopy(compressed), dense, ids, **options)
    _, fitted = run(compressed, dense, ids, **options, method="gradient", gradient_steps=200, batch_size=4)
    for name, told in fitted.items():
        assert 0.999 * best[name]["error_after"] <= told["error_after"] < told["error_before"]


def test_quantised_adapters():
    dense, compressed = pair(num_layers=1)
    _, full = run(copy.deepcopy(compressed), dense, tokens(), rank=8)
    model, told = run(compressed, dense, tokens(), rank=8, adapter_bits=4, adapter_group_size=-1)
    A, B = adapter(model, "model.layers.0.mlp.down_proj")
    assert max(len(row.unique()) for row in (*A, *B)) <= 16
    for name in told:
        assert (
            full[name]["error_after"]
            < told[name]["error_after"]
            < 0.5 * (full[name]["error_after"] + told[name]["error_before"])
        )


def test_full_rank_restores_the_dense_model():
    dense, compressed = pair()
    ids = tokens(12, 60)
    with pytest.warns(
        UserWarning, match=r"rank 500 exceeds min\(out, in\) of 14 layers and is lowered there, .* to 64"
    ):
        model = eora(compressed, dense, ids, rank=500)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, dense(ids).logits, rtol=1e-3, atol=1e-4)


def test_nothing_lost_gives_a_zero_adapter_and_says_so():
    dense, compressed = pair(compress=lambda weight: weight)
    with pytest.warns(NoEffectWarning, match="layers equal the original's"):
        model = eora(compressed, dense, tokens(), rank=4)
    assert not any(p.any() for name, p in model.named_parameters() if "lora_" in name)


def test_fewer_tokens_than_inputs_are_told():
    dense, compressed = pair(num_layers=1)
    with pytest.warns(UserWarning, match=r"7 layers were calibrated with fewer tokens .* saw 20 of 64 directions"):
        model, facts = run(compressed, dense, tokens(1, 20), rank=8)
    assert {told["effective_rank"] for told in facts.values()} == {20}
    assert all(torch.isfinite(p).all() for p in model.parameters())


class Experts(nn.Module):
    """A feed-forward part of two experts as linear layers; the second is never asked."""

    def __init__(self, mlp):
        super().__init__()
        self.experts = nn.ModuleList([mlp, copy.deepcopy(mlp)])

    def forward(self, x):
        return self.experts[0](x.reshape(-1, x.shape[-1])).view_as(x)


def test_experts_without_tokens_are_skipped_and_reported(tmp_path):
    from peft import PeftModel

    dense = tiny(num_layers=2).eval()
    for block in dense.model.layers:
        block.mlp = Experts(block.mlp)
    compressed = copy.deepcopy(dense)
    for block in compressed.model.layers:
        for layer in linear_layers(block).values():
            set_weight(layer, rounded(layer.weight))
    plain = copy.deepcopy(compressed)
    with pytest.warns(UserWarning, match=r"6 layers saw no token .* 'model.layers.0.mlp.experts.1.gate_proj'"):
        model, facts = run(compressed, dense, tokens(), rank=4)
    assert facts["model.layers.1.mlp.experts.1.up_proj"] == {"rank": 0.0, "tokens": 0.0, "effective_rank": 0.0}
    assert facts["model.layers.1.mlp.experts.0.up_proj"]["tokens"] == 240
    assert type(model.get_base_model().model.layers[0].mlp.experts[1].up_proj) is nn.Linear
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again = PeftModel.from_pretrained(plain, str(tmp_path)).eval()
    with torch.no_grad():
        assert torch.equal(again(input_ids=tokens()).logits, model(input_ids=tokens()).logits)


def test_fused_experts_are_told():
    dense, compressed = pair("mixtral", num_layers=1)
    with pytest.warns(UserWarning, match="'0.mlp.experts.gate_up_proj' holds the weights of several experts"):
        _, facts = run(compressed, dense, tokens(), rank=4)
    assert {name.rpartition(".")[2] for name in facts} == {"q_proj", "k_proj", "v_proj", "o_proj"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank = 0: a whole number >= 1"),
        ({"rank_pattern": {"q_proj": -1}}, r"rank_pattern\['q_proj'\] = -1"),
        ({"rank_pattern": {"qq": 3}}, "'qq' matches none of the targets"),
        ({"rank_pattern": {"proj": 0, ".*_proj": 0}}, "matches none|every target rank 0"),
        ({"rank_pattern": {".*_proj": 0}}, "every target rank 0"),
        ({"targets": ["q_prj"]}, "Did you mean 'q_proj'.*output head are never"),
        ({"targets": ["lm_head"]}, "no linear layer of the blocks matches 'lm_head'"),
        ({"targets": ".*nothing"}, "matches '.*nothing'"),
        ({"targets": []}, "targets is empty"),
        ({"method": "eigen"}, "method = 'eigen'"),
        ({"accumulation": "mean"}, "accumulation = 'mean'. Known accumulations: decay, sum"),
        ({"adapter_bits": 16}, "adapter_bits = 16"),
        ({"dtype": "int8"}, "dtype = 'int8': a floating dtype"),
    ],
)
def test_bad_options_leave_the_model_alone(options, message):
    dense, compressed = pair(num_layers=1)
    with pytest.raises(MethodError, match=message):
        eora(compressed, dense, tokens(), **{"rank": 4, **options})
    assert type(compressed.model.layers[0].mlp.up_proj) is nn.Linear
    assert all(p.requires_grad for p in compressed.parameters())


def broken(case):
    dense, compressed = pair()
    if case == "same":
        compressed = dense
    elif case == "blocks":
        del compressed.model.layers[1]
    elif case == "shape":
        compressed = pair(intermediate_size=96)[1]
    elif case == "family":
        compressed = pair("gpt2")[1]
    elif case == "norm":
        compressed.model.layers[1].input_layernorm.weight.data *= 3
    elif case == "embedding":
        compressed = pair(vocab_size=300)[1]
    elif case in ("attached", "merged"):
        compressed = eora(compressed, dense, tokens(), rank=2)
        if case == "merged":
            compressed.merge_adapter()
    return dense, compressed


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("same", "the same object.*deepcopy"),
        ("blocks", r"\('llama'\) has 1 blocks, the original \('llama'\) 2"),
        ("shape", r"'model.layers.0.mlp.gate_proj': the compressed weight is \(96, 64\) .* the dense one \(176, 64\)"),
        ("family", r"\('gpt2'\) has no layer 'model.layers.0.self_attn.q_proj', the original \('llama'\)"),
        ("norm", "'layers.1.input_layernorm.weight' is no linear layer and differs"),
        ("embedding", r"'embed_tokens.weight' is \(300, 64\) in the compressed model and \(256, 64\)"),
        ("attached", "PEFT adapters attached to its weights .*initialize_eora"),
        ("merged", "PEFT adapters merged into its weights"),
    ],
)
def test_pairs_that_do_not_fit(case, message):
    dense, compressed = broken(case)
    with pytest.raises(ModelError, match=message):
        eora(compressed, dense, tokens(), rank=2)


def test_reordered_columns_are_refused_and_the_model_is_given_back():
    dense, compressed = pair()
    layer = compressed.model.layers[1].mlp.down_proj
    layer.weight.data = layer.weight.data[:, torch.randperm(176, generator=torch.Generator().manual_seed(0))]
    before = {key: value.clone() for key, value in compressed.state_dict().items()}
    with pytest.raises(MethodError, match=r"'model.layers.1.mlp.down_proj': .*nothing in common.*act-order"):
        eora(compressed, dense, tokens(), rank=2)
    assert compressed.state_dict().keys() == before.keys()
    assert all(torch.equal(before[key], value) for key, value in compressed.state_dict().items())
    assert all(p.requires_grad for p in compressed.parameters())
    layer.weight.data = before["model.layers.1.mlp.down_proj.weight"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns where an adapter is left behind
        with pytest.raises(MethodError):
            eora(compressed, dense, tokens(), rank=2)


def test_values_that_are_not_finite_name_the_layer():
    dense, compressed = pair()
    compressed.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(MethodError, match=r"'model.layers.1.mlp.up_proj': the compressed weight holds NaN"):
        eora(compressed, dense, tokens(), rank=2)
    dense, compressed = pair()
    for model in (dense, compressed):
        model.model.layers[1].input_layernorm.weight.data[5] = float("inf")
    with pytest.raises(MethodError, match=r"'model.layers.1.self_attn.q_proj'.*NaN or infinite"):
        eora(compressed, dense, tokens(), rank=2, targets=["q_proj"])


def test_calibration_that_does_not_fit():
    dense, compressed = pair()
    with pytest.raises(DataError, match="empty"):
        eora(compressed, dense, [], rank=2)
    with pytest.raises(DataError, match="token id 256"):
        eora(compressed, dense, torch.full((1, 8), 256), rank=2)


def test_statistics_in_half_precision_do_not_overflow():
    dense, compressed = pair(num_layers=1)
    wide, small = dense.to(torch.bfloat16), compressed.to(torch.bfloat16)
    model, facts = run(small, wide, tokens(), rank=8)
    A, B = adapter(model, "model.layers.0.mlp.up_proj")
    assert A.dtype == B.dtype == torch.bfloat16
    assert all(told["error_after"] < 0.9 * told["error_before"] for told in facts.values())
    x = torch.full((4, 8, 16), 300.0, dtype=torch.float16)  # 32 squares of it exceed float16
    gram = LayerInputs.from_tensor(x).gram
    assert torch.isfinite(gram).all()


def test_adapter_dtype_can_be_chosen():
    dense, compressed = pair(num_layers=1)
    model = eora(compressed, dense, tokens(), rank=8, dtype="bfloat16")
    assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {torch.bfloat16}
    json.dumps(model.peft_config["default"].to_dict(), default=list)


def test_merging_asks_for_a_new_compression():
    dense, compressed = pair(num_layers=1)
    model = eora(compressed, dense, tokens(), rank=8)
    told = {}
    before = {name: weight_of(layer.get_base_layer()).clone() for name, layer in _lora_layers(model)}
    sums = {name: before[name] + torch.mm(*reversed(adapter(model, name))) for name in before}
    merged = requantise_after_merge(
        model, lambda name, weight: rounded(weight, 3), on_layer=lambda name, facts: told.setdefault(name, facts)
    )
    for name, layer in merged.named_modules():
        if name in before:
            torch.testing.assert_close(layer.weight, rounded(sums[name], 3))
            lost = (layer.weight - sums[name]).square().sum() / (sums[name] - before[name]).square().sum()
            assert told[name]["kept"] == pytest.approx(1 - float(lost), rel=1e-3, abs=1e-3)
    assert not hasattr(merged, "peft_config")
    dense, compressed = pair(num_layers=1)
    model = eora(compressed, dense, tokens(), rank=8)
    told.clear()
    requantise_after_merge(model, lambda name, w: w, on_layer=lambda name, facts: told.setdefault(name, facts))
    assert {facts["kept"] for facts in told.values()} == {1.0}


def _lora_layers(model):
    return [(n, m) for n, m in model.get_base_model().named_modules() if hasattr(m, "lora_A") and hasattr(m, "r")]


def test_merging_refuses_what_it_cannot_do():
    dense, compressed = pair(num_layers=1)
    with pytest.raises(ModelError, match="LlamaForCausalLM has no LoRA layers"):
        requantise_after_merge(compressed, lambda name, w: w)
    model = eora(compressed, dense, tokens(), rank=4)
    with pytest.raises(MethodError, match=r"'model.layers.0.self_attn.q_proj': requantise returned .* \(64, 63\)"):
        requantise_after_merge(model, lambda name, w: w[:, 1:])
    model.merge_adapter()
    with pytest.raises(ModelError, match=r"merged already.*unmerge_adapter"):
        requantise_after_merge(model, lambda name, w: w)
