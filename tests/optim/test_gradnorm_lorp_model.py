"""GradNormLoRP as an optimizer: groups, 8-bit state, counted memory, checkpoints, layer-wise steps, refusals."""

from __future__ import annotations

import io
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from gnomon import catalog
from gnomon.common import quantized_state
from gnomon.common.memory import tensor_bytes
from gnomon.common.models import tiny
from gnomon.errors import GnomonWarning, MethodError, ModelError
from gnomon.optim import GradNormLoRP, gradnorm_lorp_groups, training_memory

sys.path.insert(0, str(Path(__file__).parent))
from gradnorm_lorp_definition import draws, run

BATCH = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(0))
MODES = ("weightnorm", "authors")
pytestmark = pytest.mark.filterwarnings("ignore:.* rows of parameter")


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int = 3) -> None:
    for _ in range(count):
        model(input_ids=BATCH, labels=BATCH).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def small(**options: Any) -> Any:
    return tiny("llama", vocab_size=64, **{"hidden_size": 32, "num_layers": 2, **options})


def gpt2() -> GPT2LMHeadModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=16, resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0,
        )  # fmt: skip
        return GPT2LMHeadModel(config).eval()


def weight(m: int = 6, n: int = 9) -> nn.Parameter:
    return nn.Parameter(draws(m, n, 1, torch.float32)[0])


def test_card_names_entry_and_groups() -> None:
    card = catalog.get("gradnorm-lorp")
    assert catalog.load("gradnorm-lorp") is GradNormLoRP
    assert catalog.resolve(card.recipe["groups"]) is gradnorm_lorp_groups
    for claim in card.claims:
        assert catalog.resolve(claim.run).arms


def test_groups_of_a_model() -> None:
    model = small()
    projected, rest = gradnorm_lorp_groups(model, 4, alpha=0.25, update_proj_gap=50)
    assert len(projected["params"]) == 14
    assert {k: projected[k] for k in ("rank", "alpha", "update_proj_gap", "proj_type")} == {
        "rank": 4, "alpha": 0.25, "update_proj_gap": 50, "proj_type": "std",
    }  # fmt: skip
    assert len(projected["params"]) + len(rest["params"]) == len(list(model.parameters()))
    only = gradnorm_lorp_groups(small(), 4, ["q_proj"])
    assert all("q_proj" in name for name, _ in only[0]["params"])
    assert len(gradnorm_lorp_groups(small(), 4, "all-linear")[0]["params"]) == 15
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=50)
    names = {name.split("encoder.layer.0.")[-1] for name, _ in gradnorm_lorp_groups(BertModel(config), 4)[0]["params"]}
    assert names == {
        "attention.self.query.weight", "attention.self.key.weight", "attention.self.value.weight",
        "attention.output.dense.weight", "intermediate.dense.weight", "output.dense.weight",
    }  # fmt: skip


def test_layers_stored_the_other_way_round_are_normalised_over_their_inputs() -> None:
    groups = gradnorm_lorp_groups(gpt2(), 4)
    assert [group.get("fan_in_fan_out", False) for group in groups] == [True, False]
    assert all("c_" in name for name, _ in groups[0]["params"])
    mixed = gradnorm_lorp_groups(gpt2(), 4, ["mlp"])
    assert [("rank" in group, group.get("fan_in_fan_out", False)) for group in mixed] == [
        (True, True), (False, False), (False, True),
    ]  # fmt: skip
    for mode in MODES:
        model = gpt2()
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        optimizer = GradNormLoRP(gradnorm_lorp_groups(model, 4), lr=0.01, mode=mode)
        model(input_ids=BATCH, labels=BATCH).loss.backward()
        name, p = "transformer.h.0.mlp.c_fc.weight", model.transformer.h[0].mlp.c_fc.weight
        G = p.grad.detach().T.clone()
        optimizer.step()
        expected, _ = run(GradNormLoRP, before[name].T.contiguous(), [G], {"rank": 4}, lr=0.01, mode=mode)
        assert torch.allclose(p.T, expected, atol=1e-6)
        assert optimizer.state[p]["magnitude_avg"].shape == (128,)
        steps(model, optimizer)
        assert all(torch.isfinite(q).all() for q in model.parameters())


def test_state_is_the_formula() -> None:
    shapes, rank = [(40, 24), (24, 40), (32, 32)], 5
    params = [weight(m, n) for m, n in shapes]
    sizes = {}
    for mode in MODES:
        optimizer = GradNormLoRP([{"params": params, "rank": rank}], mode=mode)
        for p in params:
            p.grad = draws(*p.shape, 1, torch.float32, seed=p.shape[0])[0]
        optimizer.step()
        sizes[mode] = tensor_bytes(dict(optimizer.state))
    numbers = sum(min(s) * rank + 2 * max(s) * rank + 2 * s[0] for s in shapes)
    assert sizes["weightnorm"] == 4 * numbers
    assert sizes["authors"] == 4 * (numbers + sum(m * n for m, n in shapes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"bits": 8}, {"bits": 8, "proj_type": "full"}, {"proj_type": "right"}])
def test_counted_memory_is_the_measured(dtype: torch.dtype, options: dict[str, Any]) -> None:
    model = small(hidden_size=96).to(dtype)
    bits = options.get("bits", 32)
    others = {k: v for k, v in options.items() if k != "bits"}
    optimizer = GradNormLoRP(gradnorm_lorp_groups(model, 64, **others), lr=0.01, bits=bits)
    steps(model, optimizer, 1)
    memory = training_memory(model, 64, bits=bits, **others)
    assert memory.state == tensor_bytes(dict(optimizer.state))
    assert memory.weights == tensor_bytes(model)
    assert memory.gradients == sum(p.numel() * p.element_size() for p in model.parameters())
    layerwise = training_memory(model, 64, step_in_backward=True)
    assert layerwise.gradients == max(p.numel() * p.element_size() for p in model.parameters())
    assert layerwise.total == sum(layerwise[:4])
    plain = torch.optim.AdamW(model.float().parameters())
    steps(model, plain, 1)
    steps_taken = 4 * len(list(model.parameters()))  # torch counts steps in tensors
    assert memory.adam_state == tensor_bytes(dict(plain.state)) - steps_taken


def test_memory_of_other_layouts() -> None:
    model = gpt2()
    optimizer = GradNormLoRP(gradnorm_lorp_groups(model, 4), lr=0.01)
    steps(model, optimizer, 1)
    assert training_memory(model, 4).state == tensor_bytes(dict(optimizer.state))


def test_seven_billion_parameters_on_24_gigabytes() -> None:
    """Pre-training LLaMA-7B at rank 1024 with 8-bit state, stepping in the backward pass, counted."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(), dtype=torch.bfloat16)
    memory = training_memory(model, 1024, bits=8, step_in_backward=True)
    assert sum(p.numel() for p in model.parameters()) == 6_738_415_616
    assert 17e9 < memory.total < 24e9 - 3e9  # with room for activations
    assert memory.state / memory.adam_state == pytest.approx(0.106, abs=0.001)
    assert training_memory(model, 1024, bits=32).total > 24 * 2**30


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kernels", [True, False])
def test_eight_bits(mode: str, kernels: bool, monkeypatch) -> None:
    if not kernels:
        monkeypatch.setattr(quantized_state, "_kernels", lambda: None)
    W, grads = draws(96, 128, 1, torch.float32, seed=1)[0], draws(96, 128, 6, torch.float32)
    group = {"rank": 64, "update_proj_gap": 3}
    for count, bound in ((1, 0.02), (6, 0.1)):
        exact, _ = run(GradNormLoRP, W, grads[:count], group, lr=0.01, mode=mode)
        seen, optimizer = run(GradNormLoRP, W, grads[:count], group, lr=0.01, mode=mode, bits=8)
        assert (seen - exact).norm() < bound * (exact - W).norm()
    (state,) = optimizer.state.values()
    for name in ("exp_avg", "exp_avg_sq"):
        assert name not in state
        assert state[f"{name}_codes"].dtype == torch.uint8
        assert state[f"{name}_codes"].untyped_storage().nbytes() == 64 * 128
        assert state[f"{name}_absmax"].dtype == torch.float32
    assert state["magnitude_avg"].dtype == state["magnitude_avg_sq"].dtype == state["proj"].dtype == torch.float32
    few = {"rank": 8}
    assert torch.equal(*(run(GradNormLoRP, W, grads, few, lr=0.01, bits=b, mode=mode)[0] for b in (8, 32)))


def test_the_two_quantisers_store_the_same_form() -> None:
    pytest.importorskip("bitsandbytes")
    x = torch.randn(70, 101, generator=torch.Generator().manual_seed(0))
    for signed, value in ((True, x), (False, x**2)):
        state: dict[str, Any] = {}
        quantized_state.store_moment(state, "m", value, bits=8, signed=signed)
        codes, absmax = quantized_state.quantize(value, signed=signed)
        assert torch.equal(state["m_absmax"], absmax)
        assert state["m_codes"].shape == codes.shape
        loaded = quantized_state.load_moment(state, "m", value, signed=signed)
        assert torch.allclose(
            loaded, quantized_state.dequantize(state["m_codes"], absmax, value.shape, signed=signed), atol=1e-7
        )
        own = quantized_state.dequantize(codes, absmax, value.shape, signed=signed)
        worse = (loaded - value).abs() - (own - value).abs()  # the kernels may miss the nearest of very small values
        assert worse.max() < 1e-4 * absmax.max()
        assert (loaded - value).norm() < 0.012 * value.norm()


def test_promoted_state_is_refused() -> None:
    W, grads = draws(96, 128, 1, torch.float32, seed=1)[0], draws(96, 128, 1, torch.float32)
    _, optimizer = run(GradNormLoRP, W, grads, {"rank": 64}, bits=8)
    p = optimizer.param_groups[0]["params"][0]
    optimizer.state[p]["exp_avg_codes"] = optimizer.state[p]["exp_avg_codes"].float()
    with pytest.raises(MethodError, match=r"8-bit codes of 'exp_avg' are stored as torch.float32.*must be torch.uint8"):
        optimizer.step()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bits", [8, 32])
def test_a_checkpoint_goes_on_bit_for_bit(mode: str, bits: int) -> None:
    W, grads = draws(80, 90, 1, torch.bfloat16, seed=1)[0], draws(80, 90, 6, torch.bfloat16)
    group = {"rank": 60, "update_proj_gap": 2}
    whole, optimizer = run(GradNormLoRP, W, grads, group, lr=0.01, mode=mode, bits=bits)
    half, optimizer = run(GradNormLoRP, W, grads[:3], group, lr=0.01, mode=mode, bits=bits)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed = nn.Parameter(half.clone())
    other = GradNormLoRP([{"params": [resumed], **group}])
    other.load_state_dict(torch.load(file, weights_only=True))
    assert (other.param_groups[0]["mode"], other.param_groups[0]["bits"]) == (mode, bits)
    for name, value in next(iter(optimizer.state.values())).items():
        if torch.is_tensor(value):
            assert value.dtype == other.state[resumed][name].dtype
    for grad in grads[3:]:
        resumed.grad = grad
        other.step()
    assert torch.equal(resumed, whole)


@pytest.mark.parametrize("mode", MODES)
def test_stepping_in_the_backward_pass(mode: str) -> None:
    model, other = small(), small()
    layerwise = GradNormLoRP(gradnorm_lorp_groups(model, 4, update_proj_gap=2), lr=0.01, mode=mode)
    stop = layerwise.step_in_backward()
    for _ in range(3):
        model(input_ids=BATCH, labels=BATCH).loss.backward()
        assert all(p.grad is None for p in model.parameters())
        layerwise.step()
    steps(other, GradNormLoRP(gradnorm_lorp_groups(other, 4, update_proj_gap=2), lr=0.01, mode=mode))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    model(input_ids=BATCH, labels=BATCH).loss.backward()
    with pytest.raises(MethodError, match="gradients cannot be accumulated"):
        model(input_ids=BATCH, labels=BATCH).loss.backward()
    stop()
    with pytest.raises(MethodError, match="gradient_accumulation_steps = 4"):
        layerwise.step_in_backward(gradient_accumulation_steps=4)


@pytest.mark.parametrize("mode", MODES)
def test_half_precision_rounds_the_weight_once(mode: str) -> None:
    W, grads = draws(24, 40, 1, torch.bfloat16, seed=1)[0], draws(24, 40, 4, torch.bfloat16)
    seen, optimizer = run(GradNormLoRP, W, grads, {"rank": 4, "alpha": 0.25}, lr=0.03, mode=mode)
    (state,) = optimizer.state.values()
    assert seen.dtype == state["exp_avg"].dtype == state["proj"].dtype == torch.bfloat16
    assert state["magnitude_avg"].dtype == torch.float32
    exact, _ = run(GradNormLoRP, W.float(), [g.float() for g in grads], {"rank": 4, "alpha": 0.25}, lr=0.03, mode=mode)
    # the authors' v gathers the rounding of every step
    bound = 0.2 if mode == "weightnorm" else 0.7
    assert (seen.float() - exact).norm() < bound * (exact - W.float()).norm()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("group", [{"rank": 2, "update_proj_gap": 2}, {}])
def test_gradients_that_are_not_finite_are_named(value: float, mode: str, group: dict[str, Any]) -> None:
    if mode == "weightnorm" and not group:
        pytest.skip("ordinary AdamW")
    for bad in (1, 2):
        p = weight(10, 8)
        optimizer = GradNormLoRP([{"params": [("layers.3.up.weight", p)], **group}], mode=mode)
        for step in range(bad + 1):
            p.grad = draws(10, 8, 1, torch.float32, seed=step)[0]
            if step < bad:
                optimizer.step()
        p.grad[1, 2] = value
        before, state = p.detach().clone(), {k: v for k, v in optimizer.state[p].items() if torch.is_tensor(v)}
        copies = {k: v.clone() for k, v in state.items()}
        with pytest.raises(MethodError, match=rf"'layers.3.up.weight' holds NaN or infinite entries at step {bad};"):
            optimizer.step()
        assert torch.equal(p, before)
        assert all(torch.equal(copies[k], v) for k, v in state.items())


@pytest.mark.parametrize(
    ("group", "options", "message"),
    [
        ({}, {"mode": "author"}, r"mode = 'author'. Did you mean 'authors'"),
        ({}, {"bits": 16}, r"bits = 16; the moments are kept in 32"),
        ({}, {"lr": -1.0}, r"lr = -1.0; it must be 0 or more"),
        ({}, {"betas": (0.9, 1.5)}, r"betas\[1\] = 1.5"),
        ({"rank": 0}, {}, r"rank = 0; it must be a whole number of at least 1"),
        ({"rank": 2, "alpha": 0.0}, {}, r"alpha = 0.0; the scale of the projected update"),
        ({"rank": 2, "proj_type": "standard"}, {}, r"proj_type = 'standard'"),
    ],
)
def test_messages_of_the_constructor(group: dict, options: dict, message: str) -> None:
    with pytest.raises(MethodError, match=message):
        GradNormLoRP([{"params": [weight()], **group}], **options)


def test_tensors_of_more_dimensions() -> None:
    kernel = nn.Parameter(torch.ones(2, 3, 4))
    with pytest.raises(MethodError, match=r"'conv' has the shape \(2, 3, 4\); a group with a rank takes matrices only"):
        GradNormLoRP([{"params": [("conv", kernel)], "rank": 2}])
    with pytest.raises(MethodError, match=r"'conv' has the shape \(2, 3, 4\); the mode 'authors' normalises the rows"):
        GradNormLoRP([("conv", kernel)], mode="authors")
    for options in ({}, {"mode": "authors"}):
        optimizer = GradNormLoRP([{"params": [kernel], "weight_norm": False}], **options)
        kernel.grad = torch.ones_like(kernel)
        optimizer.step()
    assert float(kernel.detach().max()) < 1.0


def test_rank_above_the_matrix_warns_and_is_cut() -> None:
    p = weight()
    with pytest.warns(GnomonWarning, match=r"rank = 8 is above the smaller dimension of parameter '0 of group 0'"):
        optimizer = GradNormLoRP([{"params": [p], "rank": 8}])
    p.grad = draws(6, 9, 1, torch.float32)[0]
    optimizer.step()
    assert optimizer.state[p]["proj"].shape == (6, 6)


def test_messages_of_the_groups() -> None:
    with pytest.raises(ModelError, match=r"target_modules = \['atention'\]: no linear layers match"):
        gradnorm_lorp_groups(small(), 4, ["atention"])
    with pytest.raises(MethodError, match=r"rank = -1"):
        gradnorm_lorp_groups(small(), -1)
    with pytest.raises(MethodError, match=r"form = 'adapt'. Did you mean 'adapter'"):
        gradnorm_lorp_groups(small(), 4, form="adapt")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"has no LoRA layers. In the adapter form.*use_dora=True"):
        gradnorm_lorp_groups(small(), 4, form="adapter")


def test_the_global_generator_is_left_alone() -> None:
    W, grads = draws(40, 50, 1, torch.float32)[0], draws(40, 50, 3, torch.float32)
    before = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        group = {"rank": 4, "update_proj_gap": 1, "refresh": "randomized"}
        seen = [run(GradNormLoRP, W, grads, group, lr=0.01, bits=8)[0] for _ in range(2)]
    assert torch.equal(*seen)
    assert torch.equal(torch.get_rng_state(), before)
