"""LM-Infinite on models: every family against independent computations, training, saving, refusals."""

from __future__ import annotations

import copy
import pickle
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, BloomConfig, DynamicCache, LlamaForCausalLM, MptConfig

from gnomon.common import surgery
from gnomon.common.models import load_model, save_model, tiny
from gnomon.context import (
    LambdaCache,
    apply_lm_infinite,
    evaluate_nll_by_position,
    remove_lm_infinite,
    using_lm_infinite,
)
from gnomon.errors import GnomonWarning, MethodError, ModelError

sys.path.insert(0, str(Path(__file__).parent))
import lm_infinite_models as small
from lm_infinite_models import by_definition, ids, in_pieces, llama, logits

L, G = 6, 3


@pytest.mark.parametrize("g", [0, 1, 3, 9])
def test_a_whole_model_equals_the_definition(g: int) -> None:
    model = llama()
    expected = by_definition(model, ids(), window=L, sinks=g)
    plain = logits(model, ids())
    apply_lm_infinite(model, L, g)
    found = logits(model, ids())
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    assert float((found - plain).abs().max()) > 0.05


def test_texts_within_the_window_give_the_same_bits() -> None:
    model = llama()
    before = logits(model, ids(tokens=20))
    apply_lm_infinite(model, 20)
    assert torch.equal(logits(model, ids(tokens=20)), before)
    assert torch.equal(logits(model, ids(tokens=20), attention_mask=torch.ones(2, 20)), before)
    assert not torch.equal(logits(model, ids(tokens=22))[:, -1], before[:, -1])


def windows_by_positions(model: Any, text: Tensor, **at: int) -> Tensor:
    """Last logits of a one-layer stock model that reads sinks and window alone, the sinks placed at distance L."""
    last = text.shape[1] - 1
    kept = [*range(G), *range(last - L + 1, last + 1)]
    positions = torch.tensor([[last - L] * G + list(range(last - L + 1, last + 1))])
    return logits(model, text[:, kept], position_ids=positions, attention_mask=torch.ones(1, len(kept)))[:, -1]


@pytest.mark.parametrize("name", sorted(small.ROTARY))
def test_every_rotary_family_equals_its_own_attention_on_kept_tokens(name: str) -> None:
    model, text = small.family(name), ids(1, 16)
    expected = windows_by_positions(model, text)
    apply_lm_infinite(model, L, G)
    torch.testing.assert_close(logits(model, text)[:, -1], expected, rtol=0, atol=2e-6)
    steps, cache = in_pieces(model, text, list(range(4, 16)))
    torch.testing.assert_close(steps[:, -1], expected, rtol=0, atol=2e-6)
    assert isinstance(cache, LambdaCache)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 16},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    ],
    ids=lambda rope: rope["rope_type"],
)  # fmt: skip
def test_scaled_frequencies_are_the_models_own(rope: dict[str, Any]) -> None:
    model, text = small.family("llama", rope_parameters={"rope_theta": 1e4, **rope}), ids(1, 25)
    expected = windows_by_positions(model, text)
    assert (model.model.rotary_emb.attention_scaling != 1.0) == (rope["rope_type"] == "yarn")
    apply_lm_infinite(model, L, G)
    torch.testing.assert_close(logits(model, text)[:, -1], expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(in_pieces(model, text, [7, 8, 20])[0][:, -1], expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", ["gptj", "codegen"])
def test_tables_of_angles_go_on_past_their_end(name: str) -> None:
    short, long = small.family(name, layers=2), small.family(name, layers=2, n_positions=64)
    long.load_state_dict(short.state_dict())
    for model in (short, long):
        apply_lm_infinite(model, L, G)
    torch.testing.assert_close(logits(short, ids(tokens=40)), logits(long, ids(tokens=40)), rtol=0, atol=1e-6)
    remove_lm_infinite(short)
    with pytest.raises(IndexError):
        logits(short, ids(tokens=40))


def alibi_model(name: str, layers: int = 3) -> Any:
    config: Any = (
        MptConfig(vocab_size=64, d_model=32, n_heads=4, n_layers=layers, max_seq_len=24)
        if name == "mpt"
        else BloomConfig(vocab_size=64, hidden_size=32, n_head=4, n_layer=layers)
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return small.shaken(AutoModelForCausalLM.from_config(config)).eval()


def clipped(name: str) -> Any:
    """A pre-hook that gives a stock attention the bias -m min(d, L) and the Lambda mask."""

    def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        tokens = kwargs["attention_mask"].shape[-1]
        i, j = torch.arange(tokens)[:, None], torch.arange(tokens)
        hidden = (j > i) | ((i - j >= L) & (j >= G))
        distance = (i - j).clamp(0, L)
        if name == "mpt":
            slopes = (kwargs["position_bias"][..., -1] - kwargs["position_bias"][..., -2])[..., None]
            kwargs |= {"position_bias": -slopes * distance, "attention_mask": hidden}
        else:
            slopes = (kwargs["alibi"][..., 1] - kwargs["alibi"][..., 0])[..., None]
            kwargs |= {"alibi": -slopes * distance, "attention_mask": torch.zeros(1).masked_fill(hidden, -torch.inf)}
        return args, kwargs

    return hook


@pytest.mark.parametrize("name", ["mpt", "bloom"])
def test_alibi_models_equal_their_own_attention_with_clipped_biases(name: str) -> None:
    model, text = alibi_model(name), ids(tokens=24)
    blocks = model.base_model.blocks if name == "mpt" else model.base_model.h
    hooks = [
        (b.attn if name == "mpt" else b.self_attention).register_forward_pre_hook(clipped(name), with_kwargs=True)
        for b in blocks
    ]
    expected = logits(model, text)
    for hook in hooks:
        hook.remove()
    plain = logits(model, text)
    apply_lm_infinite(model, L, G)
    torch.testing.assert_close(logits(model, text), expected, rtol=0, atol=3e-5)
    found, cache = in_pieces(model, text, [1, 2, 9, 10, 20])
    torch.testing.assert_close(found, expected, rtol=0, atol=3e-5)
    assert isinstance(cache, LambdaCache)
    longer = ids(tokens=60)  # past MPT's table of biases
    torch.testing.assert_close(in_pieces(model, longer, [50])[0], logits(model, longer), rtol=0, atol=3e-5)
    remove_lm_infinite(model)
    assert torch.equal(logits(model, text), plain)


@pytest.mark.parametrize("name", ["mpt", "bloom"])
def test_alibi_models_take_padding_generate_and_train(name: str) -> None:
    model, text = apply_lm_infinite(alibi_model(name), L, G), ids(2, 20)
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.int64), text[:1, 5:]], 1)
    mask = torch.cat([torch.zeros(1, 5), torch.ones(1, 15)], 1)
    alone = logits(model, text[:1, 5:])
    torch.testing.assert_close(logits(model, padded, attention_mask=mask)[:, 5:], alone, rtol=0, atol=3e-5)
    out = model.generate(text, max_new_tokens=8, do_sample=False, output_logits=True, return_dict_in_generate=True)
    full = logits(model, out.sequences)
    torch.testing.assert_close(torch.stack(out.logits, 1), full[:, 19:-1], rtol=0, atol=3e-5)
    half = copy.deepcopy(model).bfloat16()
    assert float((logits(half, text).float() - full[:, :20]).abs().max()) < 0.1 * float(full.abs().max())
    model.train()(input_ids=text, labels=text, use_cache=False).loss.backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters())


@pytest.mark.parametrize("layer", [0, 1])
def test_top_k_reaches_the_middle_from_its_layer_on(layer: int) -> None:
    model, text = llama(), ids()
    expected = by_definition(model, text, window=L, sinks=G, top_k=4, middle=3, from_layer=layer)
    without = by_definition(model, text, window=L, sinks=G)
    apply_lm_infinite(model, L, G, 4, top_k_from_layer=layer)
    found = logits(model, text)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(found[:, :-1], without[:, :-1], rtol=0, atol=2e-5)
    assert float((found[:, -1] - without[:, -1]).abs().max()) > 1e-3
    # each decoded token is the last query of its pass
    assert type(in_pieces(model, text, [29])[1]) is DynamicCache
    one = llama(layers=1)
    expected = by_definition(one, text, window=L, sinks=G, top_k=4, middle=3)
    apply_lm_infinite(one, L, G, 4, top_k_from_layer=0)
    torch.testing.assert_close(in_pieces(one, text, [29])[0][:, -1], expected[:, -1], rtol=0, atol=2e-5)
    padded = torch.cat([torch.zeros(2, 4, dtype=torch.int64), text], 1)
    mask = (padded > 0).long()
    found = logits(one, padded, attention_mask=mask)[:, -1]
    torch.testing.assert_close(found, expected[:, -1], rtol=0, atol=2e-5)


def test_top_k_of_biases_and_its_distance() -> None:
    model = apply_lm_infinite(alibi_model("bloom", 1), L, G, 20, top_k_from_layer=0, top_k_distance=0)
    text = ids(1, 29)
    # with every key of the middle kept, at no distance, the row is a plain table
    q, k, v = (t.double() for t in qkv(model, text))
    slopes = torch.tensor([2.0 ** (-2 * (n + 1)) for n in range(4)], dtype=torch.float64)
    d = torch.arange(28, -1, -1)
    d = torch.where((d >= L) & (torch.arange(29) >= G), 0, d.clamp(max=L))
    weights = ((q[:, :, -1:] @ k.mT) / 8**0.5 - slopes[:, None, None] * d).softmax(-1)
    found: list[Tensor] = []
    dense = model.transformer.h[0].self_attention.dense
    handle = dense.register_forward_pre_hook(lambda module, args: found.append(args[0]))
    logits(model, text)
    handle.remove()
    expected = (weights @ v)[:, :, 0].flatten(1)
    torch.testing.assert_close(found[0][:, -1].double(), expected, rtol=0, atol=1e-5)


def qkv(model: Any, text: Tensor) -> Any:
    block, base = model.transformer.h[0], model.transformer
    with torch.no_grad():
        hidden = block.input_layernorm(base.word_embeddings_layernorm(base.word_embeddings(text)))
        return block.self_attention._reshape(block.self_attention.query_key_value(hidden))


@pytest.mark.parametrize("kind", ["cache", "true"])
def test_the_schemes_to_compare_with(kind: Any) -> None:
    model, text = llama(), ids()
    by = {"cache": lambda i, j: G + L - 1 - j + 0 * i, "true": lambda i, j: i - j}[kind]
    expected = by_definition(model, text, window=L, sinks=G, distance_of_sinks=by)
    apply_lm_infinite(model, L, G, sink_distance=kind)
    torch.testing.assert_close(logits(model, text), expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(in_pieces(model, text, [5, 6, 17, 18])[0], expected, rtol=0, atol=2e-5)


def test_a_ceiling_above_the_window() -> None:
    model, text = llama(), ids()
    expected = by_definition(model, text, window=L, sinks=G, ceiling=11)
    apply_lm_infinite(model, L, G, ceiling=11)
    torch.testing.assert_close(logits(model, text), expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(in_pieces(model, text, [5, 6, 7, 17, 18, 19])[0], expected, rtol=0, atol=2e-5)


def state(model: Any) -> Any:
    config = model.config.to_dict()
    hooks = [(n, len(m._forward_pre_hooks), len(m._forward_hooks), type(m)) for n, m in model.named_modules()]
    return config, hooks, model.config._attn_implementation, set(vars(model))


@pytest.mark.parametrize("name", ["llama", "gptj", "mpt", "eager"])
def test_removal_leaves_nothing(name: str) -> None:
    model = alibi_model("mpt") if name == "mpt" else small.family("gptj" if name == "gptj" else "llama", 2)
    if name == "eager":
        model.set_attn_implementation("eager")
    text = ids(tokens=16)
    before, was = logits(model, text), state(model)
    weights = copy.deepcopy(model.state_dict())
    apply_lm_infinite(model, L, G)
    assert state(model) != was
    logits(model, text)
    assert remove_lm_infinite(model) is model
    assert state(model) == was
    assert torch.equal(logits(model, text), before)
    assert all(torch.equal(weights[k], v) for k, v in model.state_dict().items())
    with pytest.raises(ModelError, match="not applied"):
        remove_lm_infinite(model)


def test_the_context_manager_removes_it_after_an_error_too() -> None:
    model = llama()
    was = state(model)
    with pytest.raises(MethodError, match="chunk = 0"), using_lm_infinite(model, L, sink_distance="true") as same:
        evaluate_nll_by_position(same, ids(), length=20, chunk=0)
    assert state(model) == was


def test_saved_with_its_options_and_loaded(tmp_path: Path) -> None:
    model = apply_lm_infinite(llama(), L, G, 4, ceiling=9, top_k_from_layer=1, top_k_distance=2)
    expected = logits(model, ids())
    save_model(model, tmp_path / "model")
    again = load_model(tmp_path / "model")
    assert surgery.recorded(again) == surgery.recorded(model)
    assert torch.equal(logits(again, ids()), expected)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert not torch.equal(logits(stock, ids()), expected)
    remove_lm_infinite(again)
    assert torch.equal(logits(again, ids()), logits(stock, ids()))


def test_copies_generate_by_themselves() -> None:
    model = apply_lm_infinite(llama(), L, G)
    options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    expected = model.generate(ids(), **options).sequences
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin._prepare_cache_for_generation.model is twin
        out = twin.generate(ids(), **options)
        assert torch.equal(out.sequences, expected)
        assert isinstance(out.cache, LambdaCache)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_training_under_the_mask_has_the_definitions_gradients(reentrant: bool | None) -> None:
    """Two passes of different lengths before one backward: each layer recomputes with its own pass's layout."""
    reference = llama().train()
    model = apply_lm_infinite(copy.deepcopy(reference), L, G).train()
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    small._BY_DEFINITION.clear()
    small._BY_DEFINITION.update(window=L, sinks=G)
    reference.set_attn_implementation("lm_infinite_by_definition")
    for each in (model, reference):
        losses = [each(input_ids=t, labels=t, use_cache=False).loss for t in (ids(2, 25), ids(1, 11, seed=5))]
        torch.stack(losses).sum().backward()
    for (name, a), b in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_training_keeps_no_bounded_cache_and_learns() -> None:
    model = apply_lm_infinite(llama(), L, G).train()
    text = ids(4, 30)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        output = model(input_ids=text, labels=text)
        assert not isinstance(output.cache, LambdaCache)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(output.loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


def test_an_adapter_before_or_after() -> None:
    config = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    first = get_peft_model(llama(), config)
    state_dict = copy.deepcopy(first.state_dict())
    assert apply_lm_infinite(first, L, G) is first
    second = get_peft_model(apply_lm_infinite(llama(), L, G), config)
    second.load_state_dict(state_dict)
    found = [logits(m.eval(), ids()) for m in (first, second)]
    assert torch.equal(*found)
    for model in (first, second):
        out = model.generate(input_ids=ids(), max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
        assert isinstance(out.cache, LambdaCache)
        merged = model.merge_and_unload()
        torch.testing.assert_close(logits(merged, ids()), found[0], rtol=0, atol=1e-4)
        remove_lm_infinite(merged)


def test_attention_dropout_is_the_models_own() -> None:
    model = apply_lm_infinite(llama(attention_dropout=0.4), L, G)
    calm = logits(model, ids())
    assert torch.equal(logits(model, ids()), calm)
    torch.manual_seed(0)
    assert not torch.equal(logits(model.train(), ids()), calm)


def test_global_randomness_and_weights_are_untouched() -> None:
    model = llama()
    weights, before = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    logits(apply_lm_infinite(model, L, G), ids())
    assert torch.equal(torch.get_rng_state(), before)
    assert list(weights) == list(model.state_dict())
    assert all(torch.equal(weights[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_gives_the_same(backend: str) -> None:
    model = apply_lm_infinite(llama(), L, G)
    expected = logits(model, ids())
    compiled = torch.compile(model, backend=backend)
    torch.testing.assert_close(logits(compiled, ids()), expected, rtol=0, atol=1e-5)
    torch._dynamo.reset()


REFUSED = [
    ("gpt2", {}, "does not support 'gpt2'.*learned absolute.*Supported families: bloom"),
    ("bert", {}, "does not support 'bert'.*learned absolute"),
    ("marian", {}, "does not support 'marian'"),
    ("gemma2", {}, "does not support 'gemma2'"),
    ("mistral", {"sliding_window": 8}, "native sliding window of 8 tokens.*sliding_window = None"),
    ("qwen", {"layer_types": ["full_attention", "sliding_attention"], "use_sliding_window": True}, "sliding_attention"),
    ("llama", {"is_causal": False}, "attends in both directions"),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "'dynamic'.*linear"),
]


@pytest.mark.parametrize(
    ("name", "options", "message"), REFUSED, ids=[f"{n}-{i}" for i, (n, _, _) in enumerate(REFUSED)]
)
def test_models_it_cannot_work_on(name: str, options: dict[str, Any], message: str) -> None:
    model = tiny(name, num_layers=2, **options)
    was = state(model)
    with pytest.raises(ModelError, match=message):
        apply_lm_infinite(model, 8)
    assert state(model) == was


def test_relative_buckets_are_named() -> None:
    config = AutoConfig.for_model("t5", d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=32)
    from transformers import T5ForConditionalGeneration

    with pytest.raises(ModelError, match="relative buckets"):
        apply_lm_infinite(T5ForConditionalGeneration(config), 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"local": 0}, "local = 0: allowed is a whole number from 1"),
        ({"local": 2.5}, "local = 2.5"),
        ({"local": 8, "sinks": -1}, "sinks = -1: allowed is a whole number from 0"),
        ({"local": 8, "top_k": 0}, "top_k = 0: allowed is a whole number from 1 or None"),
        ({"local": 8, "ceiling": 7}, "ceiling = 7 is below local = 8"),
        ({"local": 8, "sink_distance": "tru"}, "sink_distance = 'tru'. Did you mean 'true'"),
        ({"local": 8, "ceiling": 9, "sink_distance": "true"}, "no ceiling"),
        ({"local": 8, "top_k": 2, "sink_distance": "cache"}, "top_k = 2 with sink_distance"),
        ({"local": 8, "top_k_from_layer": -1}, "top_k_from_layer = -1"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    model = llama()
    was = state(model)
    with pytest.raises(MethodError, match=message.replace("(", r"\(")):
        apply_lm_infinite(model, **options)
    assert state(model) == was


def test_the_window_is_the_trained_length_unless_said() -> None:
    model = apply_lm_infinite(llama(max_positions=40))
    assert surgery.recorded(model)[0]["options"] | {"local": 40, "sinks": 10} == surgery.recorded(model)[0]["options"]
    with pytest.warns(GnomonWarning, match="local = 41 is more than the 40 tokens"):
        apply_lm_infinite(llama(max_positions=40), 41)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_lm_infinite(llama(max_positions=40), 39)
    assert surgery.recorded(apply_lm_infinite(alibi_model("mpt")))[0]["options"]["local"] == 24
    with pytest.raises(MethodError, match=r"local is missing.*'bloom'"):
        apply_lm_infinite(alibi_model("bloom"))


def test_another_models_configuration_does_not_carry_it() -> None:
    model = apply_lm_infinite(llama(), L, G)
    other = LlamaForCausalLM(model.config).eval()
    with pytest.raises(ModelError, match="apply_lm_infinite of its own"):
        logits(other, ids())
    model.set_attn_implementation("sdpa")
    with pytest.raises(ModelError, match="was set to 'sdpa' after"):
        logits(model, ids())


def test_attentions_are_not_returned_and_a_warning_says_so() -> None:
    model = apply_lm_infinite(llama(), L, G)
    with pytest.warns(GnomonWarning, match="no attentions are returned"):
        output = model(input_ids=ids(), output_attentions=True)
    assert not output.attentions
    assert model(input_ids=ids(), output_hidden_states=True).hidden_states
