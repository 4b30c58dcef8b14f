"""Which models the norm placements accept, what they refuse with which words, and what they warn of."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
import transformers
from torch import nn

from gnomon import catalog
from gnomon.common import surgery
from gnomon.common.models import tiny
from gnomon.errors import ConfigError, GnomonWarning, MethodError, ModelError, NoEffectWarning
from gnomon.nn import apply_layernorm_scaling, apply_norm_placement
from gnomon.nn.mix_ln.apply import check_options
from gnomon.recipes.options import check_recipe
from gnomon.recipes.schema import Recipe

IDS = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(3))
SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def unchanged(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    now = model.state_dict()
    return (
        surgery.recorded(model) == [] and list(now) == list(before) and all(torch.equal(now[n], before[n]) for n in now)
    )


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        ("Phi3ForCausalLM", {"num_key_value_heads": 2, "resid_pdrop": 0.1}),
        ("GemmaForCausalLM", {"head_dim": 8, "num_key_value_heads": 4}),
        ("OlmoForCausalLM", {}),
        ("MixtralForCausalLM", {"num_local_experts": 2, "num_key_value_heads": 4}),
        ("Starcoder2ForCausalLM", {"num_key_value_heads": 2}),
    ],
)
@pytest.mark.parametrize("placement", ["mix", "sandwich"])
def test_look_alikes_are_accepted_by_what_they_compute(cls: str, options: dict, placement: str) -> None:
    kind = getattr(transformers, cls)
    model = kind(kind.config_class(**SIZES, **options, pad_token_id=0, bos_token_id=0, eos_token_id=0)).eval()
    stock = model(IDS).logits
    logits = apply_norm_placement(model, placement, 0.5)(IDS).logits
    assert logits.shape == stock.shape
    assert not torch.allclose(logits, stock)
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    norms = [p for n, p in model.named_parameters() if "layernorm" in n]
    assert all(p.grad is not None and bool(p.grad.any()) for p in norms)


def test_dropouts_stay_behind_their_sub_layers() -> None:
    config = transformers.Phi3Config(**SIZES, resid_pdrop=1.0, pad_token_id=0)
    model = apply_norm_placement(transformers.Phi3ForCausalLM(config), "post").train()
    embedded = model.model.embed_tokens(IDS)
    block = model.model.layers[0]
    rotary = model.model.rotary_emb(embedded, torch.arange(9)[None])
    alone = block.post_feedforward_layernorm(block.post_attention_layernorm(embedded))
    assert torch.equal(block(embedded, position_embeddings=rotary, attention_mask=None), alone)


def test_deepnorm_and_scaled_init_on_a_fused_projection_with_shared_keys() -> None:
    config = transformers.Phi3Config(**SIZES | {"hidden_size": 128}, num_key_value_heads=2, pad_token_id=0)
    twin = transformers.Phi3ForCausalLM(copy.deepcopy(config))
    model = apply_norm_placement(transformers.Phi3ForCausalLM(config), "deepnorm")
    query, key, value = model.model.layers[0].self_attn.qkv_proj.weight.detach().split([128, 64, 64])
    beta = 16**-0.25
    found = [float(query.std()), float(key.std()), float(value.std())]
    wide, narrow = math.sqrt(2 / 256), math.sqrt(2 / 192)
    assert found == pytest.approx([wide, narrow, beta * narrow], rel=0.05)
    attention = apply_norm_placement(twin, "pre", scaled_init=True).model.layers[0].self_attn
    assert float(attention.o_proj.weight.detach().std()) == pytest.approx(0.01, rel=0.05)
    assert float(attention.qkv_proj.weight.detach().std()) == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("gpt_neox", "attention and MLP in parallel.*use_parallel_residual=False"),
        ("gemma2", "nothing else; this one has .*pre_feedforward_layernorm"),
        ("olmo2", "nothing else; this one has self_attn, mlp, post_attention_layernorm, post_feedforward_layernorm"),
        ("bert", "No feed-forward module found in a BertLayer"),
        ("marian", "No feed-forward module"),
    ],
)
def test_other_blocks_are_refused_with_the_family_and_the_reason(architecture: str, reason: str) -> None:
    model = tiny(architecture)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ModelError, match=rf"'{architecture}' model.*{reason}") as error:
        apply_norm_placement(model)
    assert "Allowed: decoders whose blocks compute h = x + Attn(N1(x)), y = h + MLP(N2(h))" in str(error.value)
    assert unchanged(model, before)


def test_blocks_that_compute_something_else_are_refused_whatever_they_hold() -> None:
    granite = transformers.GraniteForCausalLM(transformers.GraniteConfig(**SIZES, residual_multiplier=0.5))
    with pytest.raises(ModelError, match=r"Block 0 of this 'granite' model does not compute h = x \+ Attn\(N1\(x\)\)"):
        apply_norm_placement(granite)

    def parallel(self, hidden_states, **kwargs):
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        return hidden_states + attended + self.mlp(self.post_attention_layernorm(hidden_states))

    def functional_dropout(self, hidden_states, **kwargs):
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden = hidden_states + nn.functional.dropout(attended, 0.5, self.training)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))

    def behind(self, hidden_states, **kwargs):
        attended, _ = self.self_attn(hidden_states, **kwargs)
        hidden = hidden_states + self.input_layernorm(attended)
        return hidden + self.post_attention_layernorm(self.mlp(hidden))

    def skipping(self, hidden_states, **kwargs):
        return hidden_states

    for forward, reason in (
        (parallel, "attention and MLP in parallel"),
        (functional_dropout, "something else scales, drops or adds"),
        (behind, "is not Pre-LN, so there is no pre-norm to move"),
        (skipping, "did not run self_attn, mlp, input_layernorm, post_attention_layernorm"),
    ):
        model = tiny("llama").eval()
        state = torch.get_rng_state()
        model.model.layers[2].forward = forward.__get__(model.model.layers[2])
        with pytest.raises(ModelError, match=reason):
            apply_norm_placement(model)
        assert torch.equal(torch.get_rng_state(), state)
        assert not any(module.training for module in model.modules())
        assert not any(module._forward_hooks for module in model.modules())


def test_other_things_than_decoders_are_refused() -> None:
    with pytest.raises(ModelError, match=r"Linear"):
        apply_norm_placement(nn.Linear(2, 2))
    shared = tiny("llama")
    shared.model.layers = nn.ModuleList([shared.model.layers[0]] * 4)
    with pytest.raises(ModelError, match=r"'llama' model share their weights"):
        apply_norm_placement(shared)
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=8
    )
    with pytest.raises(ModelError, match=r"'vit' models"):
        apply_norm_placement(transformers.ViTForImageClassification(config))


def test_trained_weights_are_refused(tmp_path) -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight[3] = 1.01
    message = r"architecture for training from scratch, and this 'llama' model is trained"
    with pytest.raises(ModelError, match=rf"{message} \(the gains of 'post_attention_layernorm' in block 1"):
        apply_norm_placement(model)
    tiny("llama").save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ModelError, match=rf"{message} \(it was loaded from .*from_scratch=True"):
        apply_norm_placement(loaded)
    with pytest.raises(ModelError, match=message):
        apply_norm_placement(loaded, "pre", scaled_init=True)
    with pytest.raises(ModelError, match=r"from_scratch = False says so"):
        apply_norm_placement(tiny("llama"), from_scratch=False)
    assert surgery.recorded(loaded) == []
    assert apply_norm_placement(copy.deepcopy(loaded), "pre") is not None, "nothing is changed, so nothing is refused"
    assert type(apply_norm_placement(loaded, from_scratch=True).model.layers[0]).__name__.startswith("PostNorm")


def test_applied_twice_or_with_layernorm_scaling_is_refused() -> None:
    for placement in ("mix", "pre", "sandwich"):
        model = apply_norm_placement(tiny("llama"), placement)
        with pytest.raises(ModelError, match=r"mix-ln was applied to this 'llama' model already"):
            apply_norm_placement(model)
    stripped = tiny("llama")
    stripped.config.gnomon = apply_norm_placement(tiny("llama")).config.gnomon
    with pytest.raises(ModelError, match=r"its blocks are stock.*gnomon.load_model"):
        apply_norm_placement(stripped)
    with pytest.raises(ModelError, match=r"carries LayerNorm scaling"):
        apply_norm_placement(apply_layernorm_scaling(tiny("llama")))
    with pytest.raises(ModelError, match=r"norm placement 'mix' \(mix-ln\)"):
        apply_layernorm_scaling(apply_norm_placement(tiny("llama")))
    assert apply_layernorm_scaling(apply_norm_placement(tiny("llama"), "pre")) is not None


def test_the_cards_refuse_both_in_a_recipe() -> None:
    for first, second in (("mix-ln", "layernorm-scaling"), ("layernorm-scaling", "mix-ln")):
        assert second in catalog.get(first).conflicts
        recipe = Recipe.model_validate(
            {
                "name": "both",
                "model": {"architecture": "llama"},
                "data": "python-docs",
                "stages": [{"train": {"tokens": 10_000, "methods": [{"uses": first}, {"uses": second}]}}],
            }
        )
        with pytest.raises(ConfigError, match=r"cannot share a recipe: LayerNorm scaling multiplies pre-norms"):
            check_recipe(recipe)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"placement": "mixed"}, r"placement = 'mixed' is unknown. Did you mean 'mix'"),
        ({"post_ratio": -0.1}, r"post_ratio = -0.1. .* between 0 and 1; the paper uses 0.25"),
        ({"post_ratio": math.nan}, r"post_ratio = nan"),
        ({"num_post_layers": 5}, r"num_post_layers = 5, but the model has 4 blocks. Allowed: 0 to 4"),
        ({"num_post_layers": -1}, r"num_post_layers = -1. It must be between 0"),
        ({"placement": "post", "num_post_layers": 2}, r"goes with placement 'mix' or 'pre_post'; 'post' treats all"),
        ({"embed_std": 0.0}, r"embed_std = 0.0. It is a standard deviation over 0"),
        ({"placement": "deepnorm", "scaled_init": True}, r"Choose one"),
        ({"residual_scale": 2.0}, r"residual_scale = 2.0 is DeepNorm's factor; placement = 'mix' has none"),
        ({"placement": "deepnorm", "residual_scale": -1.0}, r"residual_scale = -1.0. It must be a finite number"),
        ({"layer_placements": ["post", "peri"]}, r"layer_placements holds 'peri'. Did you mean 'pre'"),
    ],
)
def test_options_out_of_range_are_refused(options: dict, message: str) -> None:
    model = tiny("llama")
    before = copy.deepcopy(model.state_dict())
    for call in (apply_norm_placement, check_options):
        with pytest.raises(MethodError, match=message):
            call(model, **options)
    assert unchanged(model, before)


def test_blocks_of_any_mixture() -> None:
    kinds = ["sandwich", "deepnorm", "pre", "post"]
    model = apply_norm_placement(tiny("llama"), layer_placements=kinds)
    names = [type(block).__name__.removesuffix("LlamaDecoderLayer") for block in model.model.layers]
    assert names == ["Sandwich", "DeepNorm", "", "PostNorm"]
    with pytest.raises(ModelError, match=r"layer_placements names 2 blocks, but this 'llama' model has 4"):
        apply_norm_placement(tiny("llama"), layer_placements=["post", "pre"])


def test_what_has_no_effect_or_often_fails_is_warned_of() -> None:
    with pytest.warns(NoEffectWarning, match=r"post_ratio = 0.2 of 4 blocks rounds down to none: the model is Pre-LN"):
        model = apply_norm_placement(tiny("llama"), post_ratio=0.2)
    assert surgery.recorded(model)[0]["options"]["placement"] == "pre"
    with pytest.warns(GnomonWarning, match=r"Post-LN in all 13 blocks"):
        apply_norm_placement(tiny("llama", num_layers=13, hidden_size=16), "post")
    with pytest.warns(GnomonWarning, match=r"head of this 'qwen2' model is tied to its embeddings"):
        apply_norm_placement(tiny("qwen"), embed_std=0.632)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for options in ({}, {"post_ratio": 0.0}, {"num_post_layers": 0}, {"placement": "post"}, {"embed_std": 0.632}):
            apply_norm_placement(tiny("llama"), **options)


def test_models_without_storage() -> None:
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
        twin = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    check_options(model, "deepnorm")
    assert surgery.recorded(model) == []
    apply_norm_placement(model, "mix", 0.5)
    assert type(model.model.layers[0]).__name__ == "PostNormLlamaDecoderLayer"
    with pytest.raises(ModelError, match=r"has no storage \(meta\)"):
        apply_norm_placement(twin, "deepnorm")
    assert surgery.recorded(twin) == []


@pytest.mark.parametrize("options", [{"placement": "deepnorm"}, {"scaled_init": True}])
def test_initial_weights_of_experts_are_not_defined(options: dict) -> None:
    model = tiny("mixtral")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ModelError, match=r"'mixtral' model are not made of linear layers alone"):
        apply_norm_placement(model, **options)
    assert unchanged(model, before)


def test_an_output_projection_that_cannot_be_told_is_not_guessed() -> None:
    model = tiny("llama")
    for block in model.model.layers:
        block.mlp.down, block.mlp.down_proj = block.mlp.down_proj, nn.Identity()
        block.mlp.act_fn = nn.Sequential(nn.SiLU())
        block.mlp.forward = lambda x, mlp=block.mlp: mlp.down(mlp.up_proj(x) * mlp.gate_proj(x))
    with pytest.raises(ModelError, match=r"Which linear layer of 'mlp' in this 'llama' model .* it has gate_proj"):
        apply_norm_placement(model, "pre", scaled_init=True)
