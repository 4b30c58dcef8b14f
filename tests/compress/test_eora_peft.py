"""EoRA's adapters as PEFT files, as a start for training, on quantised layers, and over several processes."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import distributed, multiprocessing, nn

from gnomon import catalog
from gnomon.common.layers import decoder_blocks, linear_layers, set_weight, weight_of
from gnomon.common.models import load_model, save_model, tiny
from gnomon.compress.eora import eora, initialize_eora, requantise_after_merge
from gnomon.errors import ModelError

FAMILIES = ["llama", "qwen", "mistral", "gpt2", "gpt_neox"]


def rounded(weight, bits=3):
    scale = (weight.amax(1, keepdim=True) - weight.amin(1, keepdim=True)) / (2**bits - 1)
    return (weight / scale).round() * scale


def pair(architecture="llama", **sizes):
    dense = tiny(architecture, **{"num_layers": 2, **sizes}).eval()
    compressed = copy.deepcopy(dense)
    for block in decoder_blocks(compressed):
        for layer in linear_layers(block).values():
            set_weight(layer, rounded(weight_of(layer)))
    return dense, compressed


def tokens(n=8, length=40, seed=0):
    return torch.randint(1, 256, (n, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids).logits


@pytest.mark.parametrize("architecture", FAMILIES)
def test_round_trip_through_plain_peft(architecture, tmp_path):
    dense, compressed = pair(architecture)
    if architecture == "gpt2":
        for block in compressed.transformer.h:  # biases must survive untouched
            nn.init.normal_(block.attn.c_attn.bias)
        dense.load_state_dict({k: v for k, v in compressed.state_dict().items() if "bias" in k}, strict=False)
    compressed.save_pretrained(tmp_path / "base")
    by_hand = copy.deepcopy(compressed)
    model = eora(compressed, dense, tokens(), rank=8)
    model.save_pretrained(tmp_path / "adapter")

    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["r"] == config["lora_alpha"] == 8
    assert config["lora_dropout"] == 0.0
    assert config["bias"] == "none"
    assert config["use_rslora"] is False
    assert config["use_dora"] is False
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["fan_in_fan_out"] is (architecture == "gpt2")
    assert config["task_type"] == "CAUSAL_LM"
    assert all("." not in name for name in config["target_modules"])

    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    linears = {
        name: layer
        for name, layer in linear_layers(by_hand).items()
        if any(layer is other for block in decoder_blocks(by_hand) for other in linear_layers(block).values())
    }
    assert set(stored) == {f"base_model.model.{n}.lora_{ab}.weight" for n in linears for ab in "AB"}
    for name, layer in linears.items():
        A, B = (stored[f"base_model.model.{name}.lora_{ab}.weight"] for ab in "AB")
        set_weight(layer, weight_of(layer) + B @ A)

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again = PeftModel.from_pretrained(type(dense).from_pretrained(tmp_path / "base"), tmp_path / "adapter").eval()
    ids = tokens(seed=1)
    torch.testing.assert_close(logits(again, ids), logits(by_hand, ids), rtol=1e-5, atol=1e-5)
    assert torch.equal(logits(again, ids), logits(model, ids))
    assert (logits(again, ids) - logits(dense, ids)).norm() < 0.8 * (
        logits(again.unload(), ids) - logits(dense, ids)
    ).norm()


def test_loads_by_our_own_loader(tmp_path):
    dense, compressed = pair("qwen")
    model = eora(compressed, dense, tokens(), rank=4)
    save_model(model, tmp_path / "saved")
    assert torch.equal(logits(load_model(tmp_path / "saved").eval(), tokens()), logits(model, tokens()))


def test_tied_embeddings_stay_tied_and_untouched():
    dense, compressed = pair("qwen")
    assert compressed.get_output_embeddings().weight is compressed.get_input_embeddings().weight
    model = eora(compressed, dense, tokens(), rank=4)
    base = model.get_base_model()
    assert base.get_output_embeddings().weight is base.get_input_embeddings().weight
    assert torch.equal(base.get_input_embeddings().weight, dense.get_input_embeddings().weight)
    assert not any("lm_head" in name or "embed" in name for name, _ in model.named_parameters() if "lora_" in name)


def test_ranks_by_layer(tmp_path):
    dense, compressed = pair("qwen", num_layers=12)
    plain = copy.deepcopy(compressed)
    pattern = {
        "k_proj": 3,
        "model.layers.1.mlp.up_proj": 5,
        r"layers\.11\..*down_proj": 0,
        "layers.2.mlp.gate_proj": 40,
    }
    model = eora(compressed, dense, tokens(), rank=8, rank_pattern=pattern, targets=r".*(k|o|up|down|gate)_proj")
    config = model.peft_config["default"]
    assert config.rank_pattern == config.alpha_pattern
    assert config.rank_pattern == {"k_proj": 3, "model.layers.1.mlp.up_proj": 5, "model.layers.2.mlp.gate_proj": 40}
    base = model.get_base_model()
    assert type(base.model.layers[11].mlp.down_proj) is nn.Linear
    assert type(base.model.layers[0].self_attn.q_proj) is nn.Linear
    assert base.model.layers[1].mlp.up_proj.r["default"] == 5
    assert base.model.layers[11].mlp.up_proj.r["default"] == 8
    assert {layer.self_attn.k_proj.scaling["default"] for layer in base.model.layers} == {1.0}
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(plain, tmp_path).eval()
    assert torch.equal(logits(again, tokens()), logits(model, tokens()))


def test_clamped_ranks_are_written_into_the_patterns(tmp_path):
    dense, compressed = pair("qwen")  # keys and values have 32 outputs, everything else at least 64
    plain = copy.deepcopy(compressed)
    with pytest.warns(
        UserWarning, match="rank 48 exceeds .* of 4 layers .* to 32 for 'model.layers.0.self_attn.k_proj'"
    ):
        model = eora(compressed, dense, tokens(), rank=48)
    assert model.peft_config["default"].rank_pattern == {"k_proj": 32, "v_proj": 32}
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(plain, tmp_path).eval(), tokens()), logits(model, tokens()))


def test_targets_by_name_leave_the_rest_alone(tmp_path):
    dense, compressed = pair("gpt2")
    plain = copy.deepcopy(compressed)
    model = eora(compressed, dense, tokens(), rank=4, targets=["mlp.c_proj", "transformer.h.1.attn.c_attn"])
    assert model.peft_config["default"].target_modules == {
        "transformer.h.0.mlp.c_proj",
        "transformer.h.1.mlp.c_proj",
        "transformer.h.1.attn.c_attn",
    }
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(plain, tmp_path).eval(), tokens()), logits(model, tokens()))


def test_the_adapter_can_be_trained_and_generates():
    dense, compressed = pair("qwen")
    model = eora(compressed, dense, tokens(), rank=4)
    assert {name.rpartition("lora_")[2][:1] for name, p in model.named_parameters() if p.requires_grad} == {"A", "B"}
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    assert model.generate(input_ids=tokens(1, 5), max_new_tokens=3, do_sample=False).shape == (1, 8)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("options", [{"lora_alpha": 8}, {"lora_alpha": 32}, {"lora_alpha": 16, "use_rslora": True}])
@pytest.mark.parametrize("source", ["model", "state dict"])
def test_initialize_fills_an_adapter_of_any_scaling(architecture, options, source):
    dense, compressed = pair(architecture)
    wanted = eora(copy.deepcopy(compressed), dense, tokens(), rank=8)
    config = LoraConfig(
        r=8, target_modules="all-linear", lora_dropout=0.3, fan_in_fan_out=architecture == "gpt2", **options
    )
    model = get_peft_model(compressed, config)
    assert model.training
    random = torch.get_rng_state()
    found = initialize_eora(model, dense if source == "model" else dense.state_dict(), tokens())
    assert found is model
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training
    assert model.get_base_model().get_submodule(next(iter(_lora_names(model)))).training
    assert model.peft_config["default"].lora_dropout == 0.3
    torch.testing.assert_close(logits(model.eval(), tokens()), logits(wanted, tokens()), rtol=1e-3, atol=1e-4)


def _lora_names(model):
    return [
        name for name, m in model.get_base_model().named_modules() if hasattr(m, "lora_A") and hasattr(m, "scaling")
    ]


def test_initialize_takes_the_weights_of_the_target_layers_alone():
    """Then layers without adapter, here all but one, stand in for the dense ones."""
    dense, compressed = pair()
    name = "model.layers.0.mlp.up_proj"
    model = get_peft_model(compressed, LoraConfig(r=64, lora_alpha=64, target_modules=[name]))
    initialize_eora(model, {f"{name}.weight": dense.get_submodule(name).weight}, tokens(20))
    layer = model.get_base_model().get_submodule(name)
    repaired = layer.get_base_layer().weight + layer.get_delta_weight("default")
    torch.testing.assert_close(repaired, dense.get_submodule(name).weight, rtol=1e-3, atol=1e-4)


def test_initialize_beats_a_zero_start_after_training():
    """The same few steps from the compensated start end nearer to the dense model than from LoRA's zero start."""
    ids = tokens(16)
    ends = {}
    for start in ("zero", "eora"):
        dense, compressed = pair()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = get_peft_model(compressed, LoraConfig(r=4, lora_alpha=4, target_modules="all-linear"))
        if start == "eora":
            initialize_eora(model, dense, ids)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        target = logits(dense, ids)
        for _ in range(10):
            optimizer.zero_grad()
            (model(input_ids=ids).logits - target).square().mean().backward()
            optimizer.step()
        ends[start] = float((logits(model, ids) - target).square().mean())
    assert ends["eora"] < ends["zero"]


def _peft(case):
    dense, compressed = pair(num_layers=1)
    weights = dense.state_dict()
    model = get_peft_model(compressed, LoraConfig(r=2, target_modules=["up_proj"], use_dora=case == "dora"))
    if case == "plain":
        model = dense
    elif case == "missing":
        del weights["model.layers.0.mlp.up_proj.weight"]
    elif case == "shape":
        weights["model.layers.0.mlp.up_proj.weight"] = torch.zeros(5, 64)
    elif case == "head":
        model = get_peft_model(pair(num_layers=1)[1], LoraConfig(r=2, target_modules=["lm_head"]))
    elif case == "merged":
        model.merge_adapter()
    elif case == "two":
        model.add_adapter("other", LoraConfig(r=2, target_modules=["up_proj"]))
        model.set_adapter("other")
    return model, weights


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("plain", "LlamaForCausalLM is no PeftModel"),
        ("missing", "no weight for 1 of the adapter's layers, for example 'model.layers.0.mlp.up_proj'"),
        ("shape", r"the adapter's layer is \(176, 64\) \(out, in\), the dense weight \(5, 64\)"),
        ("head", "'lm_head'.*may only target linear layers of the blocks"),
        ("merged", "merged into 'model.layers.0.mlp.up_proj'; .*unmerge_adapter"),
        ("dora", "uses DoRA"),
        ("two", r"must be the only active one; active: \['other'\]"),
    ],
)
def test_initialize_refuses(case, message):
    model, weights = _peft(case)
    with pytest.raises(ModelError, match=message):
        initialize_eora(model, weights, tokens())


def test_layers_with_packed_weights():
    """Four-bit layers of bitsandbytes: W_compressed is what the packed layer computes."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    dense = tiny(num_layers=1, hidden_size=64, intermediate_size=128).eval()
    packed = copy.deepcopy(dense)
    for block in packed.model.layers:
        for name, layer in linear_layers(block).items():
            four = bitsandbytes.nn.Linear4bit(
                layer.in_features, layer.out_features, bias=False, compute_dtype=torch.float32, quant_type="fp4"
            )
            four.load_state_dict({"weight": layer.weight.detach().clone()}, strict=False)
            block.set_submodule(name, four.to("cpu"))
    before = logits(packed, tokens(seed=1))
    told = {}
    model = eora(packed, dense, tokens(), rank=16, on_layer=lambda name, facts: told.setdefault(name, facts))
    assert len(told) == 7
    assert all(facts["error_after"] < 0.7 * facts["error_before"] for facts in told.values())
    wanted = logits(dense, tokens(seed=1))
    assert (logits(model, tokens(seed=1)) - wanted).norm() < 0.8 * (before - wanted).norm()
    with pytest.raises(ModelError, match=r"packed weights .*Linear4bit"):
        requantise_after_merge(model, lambda name, w: w)


def _part(rank, world, folder):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    try:
        dense, compressed = pair("qwen")
        told = {}
        part = tokens(8)[rank * 3 : rank * 3 + (3 if rank == 0 else 5)]  # unequal shares
        model = eora(compressed, dense, part, rank=4, on_layer=lambda name, facts: told.setdefault(name, facts))
        state = {key: value for key, value in model.state_dict().items() if "lora_" in key}
        torch.save((state, told), f"{folder}/{rank}.pt")
        for options in ({"accumulation": "decay"}, {"method": "gradient"}):
            with pytest.raises(ValueError, match="runs in one process"):
                eora(compressed, dense, part, rank=4, **options)
    finally:
        distributed.destroy_process_group()


def test_statistics_are_summed_over_processes(tmp_path):
    multiprocessing.spawn(_part, args=(2, str(tmp_path)), nprocs=2)
    (first, told), (second, _) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    dense, compressed = pair("qwen")
    alone = {}
    model = eora(compressed, dense, tokens(8), rank=4, on_layer=lambda name, facts: alone.setdefault(name, facts))
    wanted = model.state_dict()
    assert {facts["tokens"] for facts in told.values()} == {320.0}
    assert set(first) == {key for key in wanted if "lora_" in key}
    for key, value in first.items():
        assert torch.equal(value, second[key])
        torch.testing.assert_close(value, wanted[key], rtol=5e-3, atol=1e-4)
    for name, facts in told.items():
        assert facts["error_after"] == pytest.approx(alone[name]["error_after"], rel=1e-3)


def test_card():
    card = catalog.get("eora")
    assert catalog.load("eora") is eora
    assert card.plugs == "compressor"
    assert card.recipe["stages"] == ["compress"]
