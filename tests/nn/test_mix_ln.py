"""Norm placements against their equations, written out in float64, and the arithmetic behind them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from gnomon.common import corpora
from gnomon.common.depth import gradient_norms
from gnomon.common.models import tiny
from gnomon.errors import MethodError
from gnomon.nn import apply_norm_placement, block_placements, deepnorm_constants, post_layer_count

IDS = torch.randint(1, 256, (2, 13), generator=torch.Generator().manual_seed(3))
PLACEMENTS = ["mix", "pre", "post", "pre_post", "sandwich", "deepnorm"]


def shaken(model: nn.Module, seed: int = 1) -> nn.Module:
    """Give every gain and bias a random value, so that exchanged norms show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def norm(x: Tensor, module: nn.Module) -> Tensor:
    """RMSNorm with statistics in float32, as in transformers; LayerNorm as it is."""
    if isinstance(module, nn.LayerNorm):
        return nn.functional.layer_norm(x, x.shape[-1:], module.weight, module.bias, module.eps)
    x = x.float()
    return module.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon)).double()


def equations(x: Tensor, block: nn.Module, kind: str, attend, feed, depth: int) -> Tensor:
    """One block of a placement; norms by the names that a block of this placement has."""
    if kind == "pre":
        first = getattr(block, "input_layernorm", None) or block.ln_1
        second = block.ln_2 if hasattr(block, "ln_2") else block.post_attention_layernorm
        h = x + attend(norm(x, first))
        return h + feed(norm(h, second))
    if kind == "sandwich":
        h = x + norm(attend(norm(x, block.input_layernorm)), block.post_attention_layernorm)
        return h + norm(feed(norm(h, block.pre_feedforward_layernorm)), block.post_feedforward_layernorm)
    a = (2 * depth) ** 0.25 if kind == "deepnorm" else 1.0
    h = norm(a * x + attend(x), block.post_attention_layernorm)
    return norm(a * h + feed(h), block.post_feedforward_layernorm)


def llama(model: nn.Module, ids: Tensor, kinds: list[str]) -> Tensor:
    base = model.model
    x = base.embed_tokens(ids)
    rotary = base.rotary_emb(x, torch.arange(ids.shape[1])[None])
    for block, kind in zip(base.layers, kinds, strict=True):

        def attend(h: Tensor, block: nn.Module = block) -> Tensor:
            return block.self_attn.forward(h, rotary, attention_mask=None)[0]

        x = equations(x, block, kind, attend, block.mlp.forward, len(kinds))
    return model.lm_head(norm(x, base.norm))


def gpt2(model: nn.Module, ids: Tensor, kinds: list[str]) -> Tensor:
    base = model.transformer
    x = base.wte(ids) + base.wpe(torch.arange(ids.shape[1]))
    for block, kind in zip(base.h, kinds, strict=True):

        def attend(h: Tensor, block: nn.Module = block) -> Tensor:
            return block.attn.forward(h)[0]

        x = equations(x, block, kind, attend, block.mlp.forward, len(kinds))
    return model.lm_head(norm(x, base.ln_f))


def neox(model: nn.Module, ids: Tensor, kinds: list[str]) -> Tensor:
    base = model.gpt_neox
    x = base.embed_in(ids)
    rotary = base.rotary_emb(x, torch.arange(ids.shape[1])[None])
    for block, kind in zip(base.layers, kinds, strict=True):

        def attend(h: Tensor, block: nn.Module = block) -> Tensor:
            return block.attention.forward(h, attention_mask=None, position_embeddings=rotary)[0]

        x = equations(x, block, kind, attend, block.mlp.forward, len(kinds))
    return (
        model.embed_out(norm(x, base.final_layer_norm))
        if hasattr(model, "embed_out")
        else model.lm_head(norm(x, base.final_layer_norm))
    )


def test_the_number_of_post_ln_blocks_is_the_floor_of_the_ratio() -> None:
    assert [post_layer_count(n, r) for n, r in ((12, 0.25), (24, 0.25), (32, 0.0625))] == [3, 6, 2]
    assert [post_layer_count(n, r) for n, r in ((7, 0.25), (3, 0.25), (10, 1.0), (10, 0.0))] == [1, 0, 10, 0]


@given(st.integers(1, 200), st.integers(1, 200))
def test_a_ratio_that_is_a_whole_number_of_blocks_gives_that_number(count: int, length: int) -> None:
    count = min(count, length)
    assert post_layer_count(length, count / length) == count
    assert post_layer_count(length, (count + 0.5) / (length + 1)) == math.floor(length * (count + 0.5) / (length + 1))


def test_which_blocks_are_placed_how() -> None:
    assert block_placements(12) == ["post"] * 3 + ["pre"] * 9
    assert block_placements(12, "pre_post", num_post_layers=5) == ["pre"] * 7 + ["post"] * 5, "the authors' K = 7"
    assert block_placements(3, "mix", num_post_layers=3) == block_placements(3, "post", 0.0) == ["post"] * 3
    for kind in ("pre", "post", "sandwich", "deepnorm"):
        assert block_placements(2, kind) == [kind] * 2
    with pytest.raises(MethodError, match=r"post_ratio = 1.5. .* between 0 and 1"):
        post_layer_count(12, 1.5)


@pytest.mark.parametrize(
    ("architecture", "definition", "options"),
    [
        ("llama", llama, {}),
        ("qwen", llama, {}),
        ("gpt2", gpt2, {}),
        ("gpt_neox", neox, {"use_parallel_residual": False, "hidden_dropout": 0.0}),
    ],
)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_placement_computes_its_definition(architecture: str, definition, options, placement: str) -> None:
    model = tiny(architecture, num_layers=5, initializer_range=0.2, **options).double()
    apply_norm_placement(model, placement, 0.4)
    shaken(model)
    logits = model(IDS).logits
    expected = definition(model, IDS, block_placements(5, placement, 0.4))
    tolerance = {"atol": 1e-9, "rtol": 1e-8}
    torch.testing.assert_close(logits, expected, **tolerance)
    ours = torch.autograd.grad(logits.square().mean(), list(model.parameters()))
    theirs = torch.autograd.grad(expected.square().mean(), list(model.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mistral", "gpt2"])
@pytest.mark.filterwarnings("ignore:.*rounds down to none:UserWarning")
def test_without_post_ln_blocks_it_is_the_stock_model_bit_for_bit(architecture: str) -> None:
    stock = tiny(architecture)
    for options in ({"placement": "pre"}, {"post_ratio": 0.0}, {"num_post_layers": 0}, {"post_ratio": 0.1}):
        model = apply_norm_placement(tiny(architecture), **options)
        assert list(model.state_dict()) == list(stock.state_dict())
        model.load_state_dict(shaken(tiny(architecture)).state_dict())
        assert torch.equal(model(IDS).logits, shaken(tiny(architecture))(IDS).logits)
        assert all(type(a) is type(b) for a, b in zip(model.modules(), stock.modules(), strict=True))


def test_a_post_ln_block_gives_rows_of_rms_one_whatever_the_scale_of_the_sum() -> None:
    model = apply_norm_placement(tiny("llama", num_layers=1, initializer_range=1.0), "post").double()
    block = model.model.layers[0]
    seen: list[Tensor] = []
    block.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    model(IDS)
    torch.testing.assert_close(seen[0].pow(2).mean(-1).sqrt(), torch.ones_like(seen[0][..., 0]), atol=1e-5, rtol=0)
    handle = block.post_feedforward_layernorm.register_forward_pre_hook(lambda module, args: (7.0 * args[0],))
    model(IDS)
    torch.testing.assert_close(seen[1], seen[0], atol=1e-5, rtol=1e-5)
    handle.remove()


def test_names_tell_the_placement_and_parameters_are_as_many() -> None:
    stock = tiny("llama", num_layers=12)
    model = apply_norm_placement(tiny("llama", num_layers=12))
    keys = set(model.state_dict())
    for index in range(12):
        post = index < 3
        assert (f"model.layers.{index}.input_layernorm.weight" in keys) is not post
        assert (f"model.layers.{index}.post_feedforward_layernorm.weight" in keys) is post
        assert f"model.layers.{index}.post_attention_layernorm.weight" in keys
    assert model.num_parameters() == stock.num_parameters()
    assert "model.norm.weight" in apply_norm_placement(tiny("llama"), "post").state_dict(), "the final norm stays"
    sandwich = apply_norm_placement(tiny("llama", num_layers=12), "sandwich")
    assert sandwich.num_parameters() == stock.num_parameters() + 2 * 12 * 64
    gpt = set(apply_norm_placement(tiny("gpt2", num_layers=4)).state_dict())
    assert "transformer.h.0.ln_1.weight" not in gpt
    assert {"transformer.h.0.post_attention_layernorm.bias", "transformer.h.1.ln_1.weight"} <= gpt


def test_only_what_an_option_names_is_initialised_anew() -> None:
    stock = tiny("llama")
    for placement in ("mix", "post", "pre_post", "sandwich"):
        model = apply_norm_placement(tiny("llama"), placement)
        weights = [p for p in model.parameters() if p.dim() == 2]
        assert all(
            torch.equal(a, b) for a, b in zip(weights, [p for p in stock.parameters() if p.dim() == 2], strict=True)
        )
        assert all(bool((p == 1).all()) for p in model.parameters() if p.dim() == 1)


def stds(model: nn.Module, name: str) -> list[float]:
    return [float(block.get_submodule(name).weight.detach().std()) for block in model.model.layers]


def test_deepnorm_has_the_factor_and_gains_of_its_paper() -> None:
    alpha, beta = deepnorm_constants(18)
    assert alpha == pytest.approx(36**0.25)
    assert beta == pytest.approx(144**-0.25)
    assert beta < 1
    model = apply_norm_placement(tiny("llama", num_layers=2, hidden_size=128, intermediate_size=320), "deepnorm")
    beta = 16**-0.25
    assert model.model.layers[0].residual_scale == pytest.approx(4**0.25)
    square, wide = math.sqrt(2 / 256), math.sqrt(2 / 448)
    for name in ("q_proj", "k_proj"):
        assert stds(model, f"self_attn.{name}") == pytest.approx([square] * 2, rel=0.03)
    for name in ("v_proj", "o_proj"):
        assert stds(model, f"self_attn.{name}") == pytest.approx([beta * square] * 2, rel=0.03)
    for name in ("gate_proj", "up_proj", "down_proj"):
        assert stds(model, f"mlp.{name}") == pytest.approx([beta * wide] * 2, rel=0.03)
    released = apply_norm_placement(tiny("llama"), "deepnorm", residual_scale=2.828)
    assert released.model.layers[3].residual_scale == 2.828


def test_fused_projections_get_the_variance_of_separate_ones() -> None:
    model = apply_norm_placement(tiny("gpt2", num_layers=2, hidden_size=128), "deepnorm")
    parts = model.transformer.h[0].attn.c_attn.weight.detach().t().chunk(3)
    square, beta = math.sqrt(2 / 256), 16**-0.25
    assert [float(p.std()) for p in parts] == pytest.approx([square, square, beta * square], rel=0.03)
    model = tiny("gpt_neox", num_layers=2, hidden_size=128, use_parallel_residual=False)
    apply_norm_placement(model, "deepnorm")
    by_head = model.gpt_neox.layers[1].attention.query_key_value.weight.detach().view(4, 3, 32, 128)
    found = [float(by_head[:, part].std()) for part in range(3)]
    assert found == pytest.approx([square, square, beta * square], rel=0.03)
    assert float(model.gpt_neox.layers[1].attention.dense.weight.detach().std()) == pytest.approx(
        beta * square, rel=0.03
    )


@pytest.mark.parametrize("placement", ["pre", "mix"])
def test_scaled_init_draws_the_output_projections_by_depth(placement: str) -> None:
    model = apply_norm_placement(tiny("llama", num_layers=8, hidden_size=128), placement, scaled_init=True)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        assert stds(model, name) == pytest.approx([0.02 / 4] * 8, rel=0.05)
    assert torch.equal(
        model.model.layers[2].mlp.up_proj.weight,
        tiny("llama", num_layers=8, hidden_size=128).model.layers[2].mlp.up_proj.weight,
    )
    gpt = apply_norm_placement(tiny("gpt2", num_layers=2), placement, 0.5, scaled_init=True)
    assert float(gpt.transformer.h[0].mlp.c_proj.weight.detach().std()) == pytest.approx(0.01, rel=0.05), (
        "not a second time"
    )


def test_the_standard_deviation_of_the_embeddings_is_set_without_drawing() -> None:
    stock = tiny("llama", initializer_range=0.1).model.embed_tokens.weight
    model = apply_norm_placement(tiny("llama", initializer_range=0.1), embed_std=math.sqrt(0.4))
    weight = model.model.embed_tokens.weight
    assert not weight[0].any(), "the padding row"
    assert float(weight.detach()[1:].std(correction=0)) == pytest.approx(0.632456, rel=1e-4)
    torch.testing.assert_close(weight / weight[1, 0], stock / stock[1, 0])


def test_draws_follow_the_seed_and_leave_the_global_random_state_alone() -> None:
    state = torch.get_rng_state()
    first, same, other = (
        apply_norm_placement(tiny("llama"), "deepnorm", seed=seed).model.layers[1].mlp.up_proj.weight
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    apply_norm_placement(tiny("gpt2"), "sandwich")
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("seed", [0, 1])
def test_on_text_gradients_are_more_even_at_initialisation_than_in_pre_ln(seed: int) -> None:
    text = "\n\n".join(corpora.load("python-docs").train[:40]).encode()
    stream = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    starts = torch.randint(0, len(stream) - 64, (48,), generator=torch.Generator().manual_seed(seed))
    ids = stream[starts[:, None] + torch.arange(64)]

    def ratio(placement: str) -> float:
        model = tiny("llama", num_layers=12, intermediate_size=172, seed=seed)
        norms = gradient_norms(apply_norm_placement(model, placement), ids, batch_size=16)
        return float(norms[0] / norms[-1])

    assert ratio("pre") > 1.5
    assert ratio("mix") < 1.6
    assert 0.8 < ratio("post") < 1.25, "flat; that early gradients vanish shows in larger or partly trained nets alone"
