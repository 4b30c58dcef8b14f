"""LayerNorm scaling against the paper's equations, written out in float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from gnomon.common.depth import residual_variance
from gnomon.common.models import tiny
from gnomon.errors import MethodError
from gnomon.nn import (
    apply_layer_scale,
    apply_layernorm_scaling,
    apply_skip_init,
    depth_scale,
    depth_scales,
    fold_layernorm_scaling,
    scale_init,
    unfold_layernorm_scaling,
)

IDS = torch.randint(1, 256, (2, 13), generator=torch.Generator().manual_seed(3))


def shaken(model: nn.Module, seed: int = 1) -> nn.Module:
    """Give every gain and bias a random value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def rms_norm(x: Tensor, norm: nn.Module) -> Tensor:
    """RMSNorm; its statistics are float32, as in transformers."""
    x = x.float()
    return norm.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)).double()


def definition(model: nn.Module, ids: Tensor, position: str = "norm", scale=depth_scale) -> Tensor:
    """The equations of a Llama with LayerNorm scaling (or an ablation of it), on the model's own weights."""
    base = model.model
    x = base.embed_tokens(ids)
    rotary = base.rotary_emb(x, torch.arange(ids.shape[1])[None])
    for depth, block in enumerate(base.layers, start=1):
        s = scale(depth)
        s1 = s if position in ("norm", "attention_norm") else 1.0
        s2 = s if position in ("norm", "mlp_norm") else 1.0
        before = s if position == "before_norm" else 1.0
        branch = s if position == "branch" else 1.0
        after = s if position == "residual" else 1.0
        attended = block.self_attn.forward(
            s1 * rms_norm(before * x, block.input_layernorm), rotary, attention_mask=None
        )[0]
        h = after * (x + branch * attended)
        x = after * (h + branch * block.mlp.forward(s2 * rms_norm(before * h, block.post_attention_layernorm)))
    return model.lm_head(rms_norm(x, base.norm))


def test_the_scales_are_one_over_the_root_of_the_depth() -> None:
    assert [round(depth_scale(depth), 4) for depth in (1, 2, 3, 4)] == [1.0, 0.7071, 0.5774, 0.5]
    model = apply_layernorm_scaling(tiny("llama", num_layers=4))
    scales = depth_scales(model)
    assert len(scales) == 8, "two norms a block and not the final norm"
    for index in range(4):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            assert scales[f"model.layers.{index}.{norm}"] == (1 / math.sqrt(index + 1),)
    with pytest.raises(MethodError, match=r"depth = 0. Blocks are counted from 1"):
        depth_scale(0)


@pytest.mark.parametrize("position", ["norm", "attention_norm", "mlp_norm", "before_norm", "branch", "residual"])
def test_every_position_computes_its_definition(position: str) -> None:
    model = shaken(tiny("llama", num_layers=5, initializer_range=0.2)).double()
    apply_layernorm_scaling(model, position=position, from_scratch=True)
    logits = model(IDS).logits
    expected = definition(model, IDS, position)
    # where a norm's input is scaled and unscaled again, its float32 statistics may round the other way
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if position == "residual" else {"atol": 1e-10, "rtol": 1e-9}
    torch.testing.assert_close(logits, expected, **tolerance)
    ours = torch.autograd.grad(logits.square().mean(), list(model.parameters()))
    theirs = torch.autograd.grad(expected.square().mean(), list(model.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def test_before_the_norm_is_no_change_but_for_eps() -> None:
    model = tiny("llama", initializer_range=1.0)
    plain = model(IDS).logits
    scaled = apply_layernorm_scaling(model, position="before_norm")(IDS).logits
    torch.testing.assert_close(scaled, plain, atol=1e-2, rtol=1e-3)


def test_one_block_is_the_stock_model_bit_for_bit() -> None:
    model = tiny("llama", num_layers=1)
    plain = model(IDS).logits
    assert torch.equal(apply_layernorm_scaling(model)(IDS).logits, plain)


def test_parameters_and_keys_stay_those_of_the_stock_model() -> None:
    stock, model = tiny("llama"), apply_layernorm_scaling(tiny("llama"))
    assert list(model.state_dict()) == list(stock.state_dict())
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in stock.named_parameters()]
    assert [n for n, _ in model.named_buffers()] == [n for n, _ in stock.named_buffers()]
    assert [n for n, _ in model.named_modules()] == [n for n, _ in stock.named_modules()]


def test_branch_inputs_have_exactly_the_scale_as_their_rms() -> None:
    model = apply_layernorm_scaling(tiny("llama", num_layers=6, initializer_range=1.0)).double()
    seen: dict[str, float] = {}
    for index, block in enumerate(model.model.layers):
        for name, module in (("attention", block.self_attn), ("mlp", block.mlp)):

            def note(module: nn.Module, args, kwargs, key: str = f"{name} {index + 1}") -> None:
                given = args[0] if args else kwargs["hidden_states"]
                seen[key] = float(given.detach().pow(2).mean(-1).sqrt().mean())

            module.register_forward_pre_hook(note, with_kwargs=True)
    model(IDS)
    for depth in range(1, 7):
        assert seen[f"attention {depth}"] == pytest.approx(1 / math.sqrt(depth), abs=1e-5)
        assert seen[f"mlp {depth}"] == pytest.approx(1 / math.sqrt(depth), abs=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "qwen", "qwen3", "mistral", "gpt2", "gpt_neox", "gemma2", "mixtral"])
@pytest.mark.filterwarnings("ignore:.*initialised smaller:UserWarning", "ignore:.*norm behind each:UserWarning")
def test_folding_keeps_the_logits_and_unfolding_brings_the_weights_back(architecture: str) -> None:
    model = apply_layernorm_scaling(tiny(architecture, num_layers=6)).eval()
    shaken(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    logits = model(IDS).logits
    folded = fold_layernorm_scaling(model)
    assert folded is model
    assert not depth_scales(folded)
    stock = tiny(architecture, num_layers=6).eval()
    stock.load_state_dict(folded.state_dict())
    assert float((stock(IDS).logits - logits).detach().abs().max()) < 1e-5
    unfolded = unfold_layernorm_scaling(folded)
    assert len(depth_scales(unfolded)) > 0
    assert float((unfolded(IDS).logits - logits).detach().abs().max()) < 1e-5
    for name, tensor in unfolded.state_dict().items():
        torch.testing.assert_close(tensor, before[name], atol=1e-6, rtol=1e-6)


def test_the_gradient_of_a_gain_is_its_scale_times_that_of_the_folded_model() -> None:
    model = shaken(tiny("llama", num_layers=5)).double()
    apply_layernorm_scaling(model, from_scratch=True)
    folded = fold_layernorm_scaling(copy.deepcopy(model))
    for each in (model, folded):
        each(input_ids=IDS, labels=IDS).loss.backward()
    for index, (ours, theirs) in enumerate(zip(model.model.layers, folded.model.layers, strict=True)):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            mine, stock = getattr(ours, norm).weight.grad, getattr(theirs, norm).weight.grad
            torch.testing.assert_close(mine, stock / math.sqrt(index + 1), atol=1e-12, rtol=1e-9)
        torch.testing.assert_close(ours.mlp.up_proj.weight.grad, theirs.mlp.up_proj.weight.grad)


def test_folding_in_bfloat16_rounds_once() -> None:
    model = shaken(tiny("llama", num_layers=3)).bfloat16()
    gain = model.model.layers[2].input_layernorm.weight.detach().clone()
    folded = fold_layernorm_scaling(apply_layernorm_scaling(model, from_scratch=True))
    exact = (gain.double() / math.sqrt(3)).to(torch.bfloat16)
    assert torch.equal(folded.model.layers[2].input_layernorm.weight, exact)
    twice_rounded = gain * torch.tensor(1 / math.sqrt(3)).bfloat16()
    assert not torch.equal(exact, twice_rounded), "the test must be able to tell"


def test_preserve_keeps_the_function_of_trained_weights() -> None:
    model = shaken(tiny("gpt_neox", num_layers=4)).eval()
    before = model(IDS).logits
    unchanged = model.gpt_neox.layers[1].input_layernorm.weight.detach().clone()
    apply_layernorm_scaling(model, preserve=True)
    torch.testing.assert_close(model(IDS).logits, before, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.gpt_neox.layers[1].input_layernorm.weight, unchanged * math.sqrt(2))


@pytest.mark.parametrize("position", ["branch", "attention_norm", "mlp_norm"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.filterwarnings("ignore:.*initialised smaller:UserWarning")
def test_the_foldable_ablations_fold(architecture: str, position: str) -> None:
    model = shaken(tiny(architecture)).eval()
    apply_layernorm_scaling(model, position=position, from_scratch=True)
    logits = model(IDS).logits
    folded = fold_layernorm_scaling(model)
    stock = tiny(architecture).eval()
    stock.load_state_dict(folded.state_dict())
    assert float((stock(IDS).logits - logits).detach().abs().max()) < 1e-5


def test_scaling_tames_the_growth_of_the_residual_stream() -> None:
    ids = torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(0))
    plain = residual_variance(tiny("llama", num_layers=12, initializer_range=0.2), ids)
    scaled = residual_variance(apply_layernorm_scaling(tiny("llama", num_layers=12, initializer_range=0.2)), ids)
    assert (plain.diff() > 0).all(), "Pre-LN: monotone in depth"
    assert plain[0] == pytest.approx(float(scaled[0]))
    assert plain[-1] > 2 * scaled[-1]
    assert plain[-1] >= 12 / 2 * plain[0] * 0.5, "at least linear growth"


def test_layer_scale_computes_its_definition_and_folds() -> None:
    model = apply_layer_scale(tiny("llama", num_layers=3), init=0.3).double().eval()
    names = {n for n, _ in model.named_parameters()} - {n for n, _ in tiny("llama", num_layers=3).named_parameters()}
    assert names == {f"model.layers.{i}.{part}.depth_gamma" for i in range(3) for part in ("self_attn", "mlp")}
    assert model.model.layers[1].mlp.depth_gamma.shape == (64,)
    gamma = float(torch.tensor(0.3))  # the parameter was made in float32
    expected = definition(model, IDS, "branch", lambda depth: gamma)
    torch.testing.assert_close(model(IDS).logits, expected, atol=1e-10, rtol=1e-9)
    shaken(model)
    logits = model(IDS).logits
    folded = fold_layernorm_scaling(model)
    assert list(folded.state_dict()) == list(tiny("llama", num_layers=3).state_dict())
    torch.testing.assert_close(folded(IDS).logits, logits)
    assert float(apply_layer_scale(tiny("llama")).model.layers[0].mlp.depth_gamma[0].detach()) == pytest.approx(1e-5)


def test_skip_init_computes_its_definition_and_folds() -> None:
    model = apply_skip_init(tiny("gpt2", num_layers=4)).eval()
    gamma = model.transformer.h[2].attn.depth_gamma
    assert gamma.shape == (1,)
    assert float(gamma.detach()) == pytest.approx(0.5)
    logits = model(IDS).logits
    torch.testing.assert_close(fold_layernorm_scaling(model)(IDS).logits, logits, atol=1e-6, rtol=1e-5)
    model = apply_skip_init(tiny("llama"), init=0.001).double()
    torch.testing.assert_close(model(IDS).logits, definition(model, IDS, "branch", lambda depth: 1e-3))


def test_initialisation_baselines_have_the_stated_standard_deviation() -> None:
    def stds(model: nn.Module) -> list[float]:
        return [float(b.self_attn.o_proj.weight.std()) for b in model.model.layers]

    plain = stds(tiny("llama", num_layers=4))
    scaled = stds(scale_init(tiny("llama", num_layers=4), "scaled"))
    by_depth = stds(scale_init(tiny("llama", num_layers=4), "depth"))
    for index, std in enumerate(plain):
        assert scaled[index] == pytest.approx(std / math.sqrt(8), rel=1e-5)
        assert by_depth[index] == pytest.approx(std / math.sqrt(2 * (index + 1)), rel=1e-5)
    back = scale_init(scale_init(tiny("llama", num_layers=4), "depth"), "plain")
    assert stds(back) == pytest.approx(plain, rel=1e-5)


def test_nothing_is_drawn_from_the_global_random_state() -> None:
    state = torch.get_rng_state()
    fold_layernorm_scaling(apply_layernorm_scaling(tiny("llama")))
    apply_layer_scale(tiny("gpt_neox"))
    assert torch.equal(torch.get_rng_state(), state)
