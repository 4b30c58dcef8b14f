"""Tiny models, saving and loading, with and without surgery and adapters."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

import gnomon
from gnomon.common import surgery
from gnomon.common.layers import attention_and_mlp, decoder_blocks, family, linear_layers, set_weight, weight_of
from gnomon.common.models import ARCHITECTURES, export_model, load_model, save_model, tiny
from gnomon.errors import ConfigError, ModelError

DECODERS = sorted(set(ARCHITECTURES) - {"bert", "marian"})
IDS = torch.arange(2, 18).reshape(2, 8)


def _logits(model, ids=IDS):
    extra = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model.eval()(input_ids=ids, **extra).logits


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_save_and_load_give_the_same_logits(architecture, tmp_path):
    model = tiny(architecture, num_layers=2)
    save_model(model, tmp_path / "m")
    loaded = load_model(tmp_path / "m")
    assert type(loaded) is type(model)
    torch.testing.assert_close(_logits(loaded), _logits(model), rtol=0, atol=0)
    assert len(decoder_blocks(model)) == 2


def test_tiny_is_seeded_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    a, b, c = tiny(seed=1), tiny(seed=1), tiny(seed=2)
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(_logits(a), _logits(b), rtol=0, atol=0)
    assert not torch.equal(_logits(a), _logits(c))


def test_families_have_what_makes_them_different():
    qwen = tiny("qwen")
    assert qwen.config.num_key_value_heads < qwen.config.num_attention_heads
    assert qwen.get_output_embeddings().weight is qwen.get_input_embeddings().weight
    assert type(tiny("gpt2").transformer.h[0].attn.c_attn).__name__ == "Conv1D"
    assert tiny("llama").get_output_embeddings().weight is not tiny("llama").get_input_embeddings().weight


def test_unknown_sizes_and_names_are_refused():
    with pytest.raises(ConfigError, match="Did you mean 'llama'"):
        tiny("lama")
    with pytest.raises(ConfigError, match="not divisible by num_heads = 5"):
        tiny(hidden_size=64, num_heads=5)


@pytest.mark.parametrize("architecture", DECODERS)
def test_layers_are_found_in_every_family(architecture):
    model = tiny(architecture, num_layers=2)
    block = decoder_blocks(model)[0]
    attention, mlp = attention_and_mlp(block)
    assert attention is not mlp
    found = linear_layers(block)
    assert found
    assert family(model) == model.config.model_type
    layer = next(iter(found.values()))
    new = torch.randn_like(weight_of(layer))
    set_weight(layer, new)
    torch.testing.assert_close(weight_of(layer), new)


def test_conv1d_weights_are_out_by_in():
    block = decoder_blocks(tiny("gpt2", hidden_size=32, num_layers=1))[0]
    assert weight_of(block.attn.c_attn).shape == (96, 32)


@pytest.mark.parametrize("architecture", ["llama", "qwen", "gpt2", "gpt_neox"])
def test_a_peft_model_is_saved_as_base_and_adapter(architecture, tmp_path):
    base = tiny(architecture, num_layers=2)
    model = peft.get_peft_model(
        base, peft.LoraConfig(r=4, target_modules="all-linear", fan_in_fan_out=architecture == "gpt2")
    )
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    want = _logits(model)
    save_model(model, tmp_path / "m")
    loaded = load_model(tmp_path / "m")
    assert isinstance(loaded, peft.PeftModel)
    torch.testing.assert_close(_logits(loaded), want, rtol=0, atol=1e-6)
    # Each part also loads with the plain library.
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    with model.disable_adapter():
        torch.testing.assert_close(_logits(plain), _logits(model), rtol=0, atol=1e-6)
    plain = peft.PeftModel.from_pretrained(plain, str(tmp_path / "m" / "adapter"))
    torch.testing.assert_close(_logits(plain), want, rtol=0, atol=1e-6)


def test_export_merges_and_leaves_the_model_as_it_was(tmp_path):
    model = peft.get_peft_model(tiny(num_layers=2), peft.LoraConfig(r=2, target_modules="all-linear"))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    want = _logits(model)
    export_model(model, tmp_path / "stock")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "stock")
    torch.testing.assert_close(_logits(stock), want, rtol=0, atol=1e-5)
    assert isinstance(model, peft.PeftModel)
    torch.testing.assert_close(_logits(model), want, rtol=0, atol=0)


def test_saving_replaces_a_folder_whole_and_a_failure_leaves_the_old_one(tmp_path, monkeypatch):
    model = tiny(num_layers=1)
    save_model(model, tmp_path / "m")
    (tmp_path / "m" / "stale").write_text("x")
    save_model(model, tmp_path / "m")
    assert not (tmp_path / "m" / "stale").exists()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(model), "save_pretrained", full)
    with pytest.raises(OSError, match="No space"):
        save_model(model, tmp_path / "m")
    assert (tmp_path / "m" / "model.safetensors").is_file()
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("content", [None, "{}", '{"model_type": "no-such-family"}'])
def test_a_folder_that_is_no_model_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match="is no model"):
        load_model(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path):
    save_model(tiny(num_layers=1), tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no readable weights"):
        load_model(tmp_path / "m")


def test_surgery_is_recorded_forgotten_and_replayed(tmp_path):
    model = tiny(num_layers=1)
    assert surgery.recorded(model) == []
    surgery.record(model, "x", {"a": 1})
    surgery.record(model, "y")
    assert surgery.is_recorded(model, "x")
    with surgery.replaying():
        surgery.record(model, "z")
    assert [e["slug"] for e in surgery.recorded(model)] == ["x", "y"]
    surgery.forget(model, "x")
    surgery.forget(model, "y")
    assert not hasattr(model.config, "gnomon")


def test_a_model_changed_by_an_unknown_method_is_refused(tmp_path):
    model = tiny(num_layers=1)
    surgery.record(model, "from-the-future")
    save_model(model, tmp_path / "m")
    assert json.loads((tmp_path / "m" / "config.json").read_text())["gnomon"][0]["slug"] == "from-the-future"
    with pytest.raises(ModelError, match=r"'from-the-future'.*does not have.*Install the version"):
        load_model(tmp_path / "m")


def test_require_family_names_family_and_what_is_supported():
    with pytest.raises(ModelError, match=r"x does not support 'gpt2' models.*Supported families: llama, qwen2"):
        surgery.require_family(tiny("gpt2", num_layers=1), ["qwen2", "llama"], "x")


def test_models_without_blocks_or_configuration_are_refused():
    with pytest.raises(ModelError, match="No list of transformer blocks found"):
        decoder_blocks(torch.nn.Linear(2, 2))
    with pytest.raises(ModelError, match="no transformers configuration"):
        surgery.record(torch.nn.Linear(2, 2), "x")
    with pytest.raises(ModelError, match="no transformers model"):
        save_model(torch.nn.Linear(2, 2), "/nowhere")
    half = torch.nn.ModuleDict({"attn": torch.nn.Linear(1, 1)})
    with pytest.raises(ModelError, match="No feed-forward module found in a ModuleDict; it has attn"):
        attention_and_mlp(half)


def test_the_public_names_are_these():
    assert gnomon.load_model is load_model
    assert gnomon.save_model is save_model


@pytest.mark.parametrize("kind", ["lora", "nola"])
def test_linear_layers_are_the_models_own_whatever_adapter_wraps_them(kind):
    """The adapter's matrices are left out, also those of modules trained beside it."""
    import peft

    from gnomon.adapters import NOLAConfig
    from gnomon.common.layers import linear_layers

    model = tiny("llama", num_layers=1)
    before = [id(layer) for layer in linear_layers(model).values()]
    config = peft.LoraConfig(r=2) if kind == "lora" else NOLAConfig(r=2, num_basis_a=4)
    config.target_modules = {"q_proj", "down_proj"}
    wrapped = peft.get_peft_model(model, config)
    assert [id(layer) for layer in linear_layers(wrapped).values()] == before
