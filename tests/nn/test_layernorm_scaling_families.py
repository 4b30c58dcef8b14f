"""Which models LayerNorm scaling accepts, how it counts their depth, and what it refuses with which words."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
import transformers
from torch import nn

from gnomon.common import surgery
from gnomon.common.models import tiny
from gnomon.errors import MethodError, ModelError
from gnomon.nn import (
    LNSLlamaConfig,
    apply_layer_scale,
    apply_layernorm_scaling,
    depth_scales,
    fold_layernorm_scaling,
    scale_init,
    unfold_layernorm_scaling,
)

IDS = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(3))
SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
PAIR = {"vocab_size": 64, "d_model": 32, "encoder_layers": 3, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "pad_token_id": 0,
        "decoder_start_token_id": 0}  # fmt: skip


def names(model: nn.Module) -> set[str]:
    return {".".join(name.split(".")[-2:]) for name in depth_scales(model)}


@pytest.mark.parametrize(
    ("architecture", "norms"),
    [
        ("llama", ("input_layernorm", "post_attention_layernorm")),
        ("qwen3", ("input_layernorm", "post_attention_layernorm")),
        ("gpt2", ("ln_1", "ln_2")),
        ("gpt_neox", ("input_layernorm", "post_attention_layernorm")),
        ("gemma2", ("input_layernorm", "pre_feedforward_layernorm")),
        ("mixtral", ("input_layernorm", "post_attention_layernorm")),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_pre_norms_are_found_by_what_consumes_them(architecture: str, norms: tuple[str, str]) -> None:
    model = apply_layernorm_scaling(tiny(architecture, num_layers=2))
    assert names(model) == {f"{index}.{norm}" for index in (0, 1) for norm in norms}


@pytest.mark.parametrize(
    ("cls", "options", "norms"),
    [
        ("PhiForCausalLM", {"intermediate_size": 48}, {"0.input_layernorm", "1.input_layernorm"}),
        ("OPTForCausalLM", {"ffn_dim": 48, "word_embed_proj_dim": 32},
         {f"{i}.{n}" for i in (0, 1) for n in ("self_attn_layer_norm", "final_layer_norm")}),
        ("MambaForCausalLM", {}, {"0.norm", "1.norm"}),
        ("RobertaPreLayerNormForMaskedLM", {"intermediate_size": 48},
         {"attention.LayerNorm", "intermediate.LayerNorm"}),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_families_of_other_shapes(cls: str, options: dict, norms: set[str]) -> None:
    kind = getattr(transformers, cls)
    model = kind(kind.config_class(**SIZES, **options, pad_token_id=0, bos_token_id=0, eos_token_id=0)).eval()
    apply_layernorm_scaling(model)
    assert names(model) == norms
    logits = model(IDS).logits
    torch.testing.assert_close(fold_layernorm_scaling(model)(IDS).logits, logits, atol=1e-5, rtol=1e-5)


def test_encoder_and_decoder_are_counted_separately_and_cross_attention_is_scaled() -> None:
    model = transformers.PegasusForConditionalGeneration(transformers.PegasusConfig(**PAIR)).eval()
    apply_layernorm_scaling(model)
    scales = depth_scales(model)
    assert scales["model.encoder.layers.2.final_layer_norm"] == (1 / math.sqrt(3),)
    assert scales["model.decoder.layers.0.self_attn_layer_norm"] == (1.0,)
    assert scales["model.decoder.layers.1.encoder_attn_layer_norm"] == (1 / math.sqrt(2),)
    assert len(scales) == 3 * 2 + 2 * 3
    logits = model(input_ids=IDS, decoder_input_ids=IDS).logits
    folded = fold_layernorm_scaling(model)(input_ids=IDS, decoder_input_ids=IDS).logits
    torch.testing.assert_close(folded, logits, atol=1e-5, rtol=1e-5)


def test_vision_transformers_scale_behind_the_branch() -> None:
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=8
    )
    model = transformers.ViTForImageClassification(config).eval()
    apply_layernorm_scaling(model, position="branch")
    assert depth_scales(model)["vit.layers.2.mlp"] == (1 / math.sqrt(3),)
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    logits = model(pixels).logits
    torch.testing.assert_close(fold_layernorm_scaling(model)(pixels).logits, logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_shared_block_takes_the_depth_of_the_call(checkpointing: bool) -> None:
    shared = tiny("llama", num_layers=4)
    shared.model.layers = nn.ModuleList([shared.model.layers[0]] * 4)
    unshared = tiny("llama", num_layers=4)
    unshared.load_state_dict(shared.state_dict())
    apply_layernorm_scaling(shared)
    apply_layernorm_scaling(unshared)
    scales = depth_scales(shared)
    assert scales["model.layers.0.input_layernorm"] == tuple(1 / math.sqrt(depth) for depth in (1, 2, 3, 4))
    ids = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(0))
    if checkpointing:
        shared.gradient_checkpointing_enable({"use_reentrant": False})
    for _ in range(2):  # the second pass starts at depth 1 again
        shared.zero_grad()
        loss = shared(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
    expected = unshared(input_ids=ids, labels=ids).loss
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for name, parameter in shared.model.layers[0].named_parameters():
        total = sum(block.get_parameter(name).grad for block in unshared.model.layers)
        torch.testing.assert_close(parameter.grad, total, atol=1e-6, rtol=1e-4)
    with pytest.raises(ModelError, match=r"called at 4 depths with different scales"):
        fold_layernorm_scaling(shared)


def test_an_interrupted_pass_does_not_shift_the_depth_of_a_shared_block() -> None:
    model = tiny("llama", num_layers=3).eval()
    model.model.layers = nn.ModuleList([model.model.layers[0]] * 3)
    apply_layernorm_scaling(model)
    ids = torch.arange(6)[None]
    logits = model(ids, use_cache=False).logits
    model.model.layers[0](torch.zeros(1, 6, 64), position_embeddings=model.model.rotary_emb(torch.zeros(1, 6, 64), ids))
    assert torch.equal(model(ids, use_cache=False).logits, logits)
    assert torch.equal(copy.deepcopy(model)(ids, use_cache=False).logits, logits)


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [("bert", "Post-LN"), ("marian", "Post-LN"), ("olmo2", "no pre-norm .* self_attn reads the residual stream")],
)
def test_other_placements_are_refused_with_the_family_and_the_reason(architecture: str, reason: str) -> None:
    with pytest.raises(ModelError, match=rf"'{architecture}' model .*{reason}") as error:
        apply_layernorm_scaling(tiny(architecture))
    assert "Allowed: Pre-LN models such as Llama" in str(error.value)
    assert not hasattr(tiny(architecture).config, "gnomon")


def test_models_without_blocks_are_refused() -> None:
    class Plain(transformers.PreTrainedModel):
        config_class = transformers.PreTrainedConfig

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return input_ids

    with pytest.raises(ModelError, match=r"model \(Plain\) has no list of transformer blocks"):
        apply_layernorm_scaling(Plain(transformers.PreTrainedConfig()))
    with pytest.raises(ModelError, match=r"Linear has no transformers configuration"):
        apply_layernorm_scaling(nn.Linear(2, 2))


def test_a_forward_that_cannot_run_on_two_tokens_is_told() -> None:
    model = transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**PAIR, max_source_positions=8))
    with pytest.raises(ModelError, match=r"'whisper' model .* could not be watched"):
        apply_layernorm_scaling(model)


def test_norm_placements_of_mix_ln_are_refused() -> None:
    model = tiny("llama")
    surgery.record(model, "mix-ln", {"placement": "sandwich"})
    with pytest.raises(ModelError, match=r"'llama' model has the norm placement 'sandwich'"):
        apply_layernorm_scaling(model)


def test_applied_twice_is_refused() -> None:
    model = apply_layernorm_scaling(tiny("llama"))
    with pytest.raises(ModelError, match=r"applied to this 'llama' model already"):
        apply_layernorm_scaling(model)
    with pytest.raises(ModelError, match=r"already"):
        unfold_layernorm_scaling(model)
    stripped = tiny("llama")
    stripped.config.gnomon = model.config.gnomon
    with pytest.raises(ModelError, match=r"its scales are missing.*gnomon.load_model"):
        apply_layernorm_scaling(stripped)


def test_trained_weights_are_refused_without_preserve(tmp_path) -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[3] = 1.01
    with pytest.raises(ModelError, match=r"trained \(the gains of 'model.layers.1.input_layernorm' are no longer 1\)"):
        apply_layernorm_scaling(model)
    tiny("llama").save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"it was loaded from .*preserve=True .* from_scratch=True"):
        apply_layernorm_scaling(loaded)
    assert depth_scales(apply_layernorm_scaling(loaded, from_scratch=True))
    with pytest.raises(ModelError, match=r"from_scratch = False says so"):
        apply_layernorm_scaling(tiny("llama"), from_scratch=False)


def test_contradictory_and_unknown_options_are_refused() -> None:
    model = tiny("llama")
    with pytest.raises(MethodError, match=r"position = 'norms' is unknown. Did you mean 'norm'"):
        apply_layernorm_scaling(model, position="norms")
    with pytest.raises(MethodError, match=r"kind = 'layerscale' is unknown. Did you mean 'layer_scale'"):
        apply_layernorm_scaling(model, kind="layerscale")
    with pytest.raises(MethodError, match=r"Choose one"):
        apply_layernorm_scaling(model, preserve=True, from_scratch=True)
    with pytest.raises(MethodError, match=r"nothing to initialise"):
        apply_layernorm_scaling(model, init=0.1)
    with pytest.raises(MethodError, match=r"init = nan"):
        apply_layer_scale(model, init=math.nan)
    with pytest.raises(MethodError, match=r"neither position = 'residual'"):
        apply_layernorm_scaling(model, kind="skip_init", position="residual")
    with pytest.raises(MethodError, match=r"position = 'residual' cannot be undone"):
        apply_layernorm_scaling(model, position="residual", preserve=True)
    with pytest.raises(MethodError, match=r"kind = 'deep' is unknown"):
        scale_init(model, "deep")
    assert not depth_scales(model)


def test_a_different_number_of_blocks_is_refused() -> None:
    with pytest.raises(ModelError, match=r"made for 6 blocks, but this 'llama' model has 4.*fold before removing"):
        apply_layernorm_scaling(tiny("llama", num_layers=4), blocks=6)


def test_single_norm_blocks_have_no_first_and_last_norm() -> None:
    model = transformers.PhiForCausalLM(transformers.PhiConfig(**SIZES, intermediate_size=48))
    with pytest.raises(ModelError, match=r"'phi' model has one norm"):
        apply_layernorm_scaling(model, position="mlp_norm")


def test_sub_layers_that_add_the_stream_themselves_take_no_branch_scale() -> None:
    config = transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)
    with pytest.raises(ModelError, match=r"'bloom' model adds the residual stream itself"):
        apply_layernorm_scaling(transformers.BloomForCausalLM(config), position="branch")
    assert len(depth_scales(apply_layernorm_scaling(transformers.BloomForCausalLM(config)))) == 4


def test_what_no_weight_can_hold_is_not_folded() -> None:
    with pytest.raises(ModelError, match=r"'llama' model carries no LayerNorm scaling"):
        fold_layernorm_scaling(tiny("llama"))
    for position in ("before_norm", "residual"):
        with pytest.raises(ModelError, match=r"no stock model computes that"):
            fold_layernorm_scaling(apply_layernorm_scaling(tiny("llama"), position=position))
    with pytest.raises(ModelError, match=r"mixture of experts"):
        fold_layernorm_scaling(apply_layernorm_scaling(tiny("mixtral"), position="branch"))
    olmo = transformers.OlmoForCausalLM(transformers.OlmoConfig(**SIZES, intermediate_size=48))
    apply_layernorm_scaling(olmo)
    with pytest.raises(ModelError, match=r"OlmoLayerNorm\) has no parameters"):
        fold_layernorm_scaling(olmo)
    tied = tiny("llama")
    tied.model.layers[1].input_layernorm.weight = tied.model.layers[0].input_layernorm.weight
    with pytest.raises(ModelError, match=r"share one weight"):
        fold_layernorm_scaling(apply_layernorm_scaling(tied))


def test_depth_scaled_initialisation_and_post_norms_give_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"'gpt2' model were initialised smaller by depth"):
        apply_layernorm_scaling(tiny("gpt2"))
    for kind in ("scaled", "depth"):
        with pytest.warns(UserWarning, match=r"initialised smaller by depth"):
            apply_layernorm_scaling(scale_init(tiny("llama"), kind))
    with pytest.warns(UserWarning, match=r"'gemma2' blocks have a norm behind each sub-layer"):
        apply_layernorm_scaling(tiny("gemma2"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for architecture in ("llama", "qwen", "mistral", "gpt_neox"):
            apply_layernorm_scaling(tiny(architecture))
        apply_layernorm_scaling(scale_init(tiny("gpt2"), "plain"))


def test_rescaling_the_initialisation_twice_is_refused() -> None:
    with pytest.raises(ModelError, match=r"have the 'scaled' initialisation already"):
        scale_init(tiny("gpt2"), "scaled")
    with pytest.raises(ModelError, match=r"have the 'plain' initialisation already"):
        scale_init(tiny("llama"), "plain")
    model = tiny("llama")
    model.config.name_or_path = "somewhere"
    with pytest.raises(ModelError, match=r"trained"):
        scale_init(model, "scaled")


def test_configurations() -> None:
    llama = tiny("llama").config
    config = apply_layernorm_scaling(llama)
    assert isinstance(config, LNSLlamaConfig)
    assert (config.model_type, config.hidden_size, config.num_hidden_layers) == ("lns_llama", 64, 4)
    assert llama.model_type == "llama"
    with pytest.raises(ModelError, match=r"applied to this 'lns_llama' configuration already"):
        apply_layernorm_scaling(config)
    with pytest.raises(ModelError, match=r"applied to this 'llama' configuration already"):
        apply_layernorm_scaling(apply_layernorm_scaling(tiny("llama")).config)
    with pytest.raises(ModelError, match=r"'gpt2' configuration cannot carry the scales"):
        apply_layernorm_scaling(tiny("gpt2").config)
    with pytest.raises(MethodError, match=r"takes the method as it is"):
        apply_layernorm_scaling(llama, position="branch")
