"""The bounds of whole models: what is captured in each family, verdicts, adapters, training, refusals."""

from __future__ import annotations

import copy
import math
import re

import pandas as pd
import peft
import pytest
import torch
import transformers
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.modeling_utils import AttentionInterface

from gnomon.adapters.lora_limits import (
    LimitsCallback,
    head_scores,
    limits_report,
    lora_gradient_errors,
    lora_norm_bound,
    needed_degree,
)
from gnomon.adapters.lora_limits.capture import watching
from gnomon.adapters.lora_limits.verdict import judged
from gnomon.common.models import tiny
from gnomon.common.text import byte_tokenizer
from gnomon.errors import DataError, GnomonWarning, MethodError, ModelError

IDS = torch.randint(1, 256, (2, 20), generator=torch.Generator().manual_seed(0))
FAMILIES = ["llama", "qwen", "qwen3", "mistral", "gpt2", "gpt_neox", "bert", "olmo2", "mixtral"]


def model_of(family: str = "llama", **options):
    return tiny(family, num_layers=2, hidden_size=32, **options).eval()


def with_lora(family: str = "llama", size: float = 0.1, **options):
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules="all-linear", **options)
    model = peft.get_peft_model(model_of(family), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(size * torch.randn(p.shape, generator=generator))
    return model.eval()


# what is captured


@pytest.mark.parametrize("family", FAMILIES)
def test_captured_queries_and_keys_give_the_models_own_attention(family):
    """softmax of the captured scores is the attention that the eager implementation returns."""
    model = model_of(family, attn_implementation="eager")
    calls = []
    with watching(model, calls.append), torch.no_grad():
        output = model(input_ids=IDS, output_attentions=True)
    assert [call.name for call in calls] == sorted(call.name for call in calls)
    assert len(calls) == 2
    for call, expected in zip(calls, output.attentions, strict=True):
        keys = call.key.repeat_interleave(call.query.shape[1] // call.key.shape[1], 1)
        scores = call.query @ keys.transpose(-1, -2) * call.scaling
        if call.causal:
            scores = scores.masked_fill(torch.ones(20, 20, dtype=torch.bool).triu(1), -torch.inf)
        torch.testing.assert_close(scores.softmax(-1), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_tables_do_not_depend_on_the_attention_implementation(family):
    tables = [lora_norm_bound(model_of(family, attn_implementation=a), IDS) for a in ("sdpa", "eager")]
    pd.testing.assert_frame_equal(*tables, rtol=1e-4, atol=1e-6)
    assert len(tables[0]) == 8
    assert tables[0]["layer"].tolist() == [0] * 4 + [1] * 4


def test_numbers_follow_their_definitions():
    model, calls = model_of(num_kv_heads=2), []
    with watching(model, calls.append), torch.no_grad():
        model(input_ids=IDS)
    table = lora_norm_bound(model, IDS, eps=1e-3, crossover=2.0)
    call, width = calls[1], 8
    for head, row in table[table["layer"] == 1].set_index("head").iterrows():
        q = call.query[:, head] * width**-0.25
        k, v = call.key[:, head // 2] * width**-0.25, call.value[:, head // 2]
        z = (q @ k.transpose(-1, -2)).tril()
        middle = (q @ (k - k.mean(1, keepdim=True)).transpose(-1, -2)).tril()
        for name, tensor in (("Q", q), ("K", k), ("V", v)):
            assert row[f"Gamma_{name}"] == pytest.approx(float(tensor.abs().max()), rel=1e-5)
        assert row["Gamma_QK"] == pytest.approx(math.sqrt(float(z.abs().max()) / width), rel=1e-5)
        assert row["tau"] == pytest.approx(row["Gamma_QK"] / math.sqrt(math.log(20)))
        assert row["threshold"] == pytest.approx(math.sqrt(math.log(20)))
        assert row["z_star"] == pytest.approx(float(middle.abs().max()), rel=1e-4)
        assert row["g_bound"] == needed_degree(row["z_star"], 1e-3)
        assert row["k1"] == math.comb(width + row["g"], row["g"])
        assert row["L_cross"] == 2.0 * row["k1"] * width
        scores = [head_scores(q[i : i + 1], k[i : i + 1], v[i : i + 1], [2, 4, 6, 8], causal=True) for i in range(2)]
        output = torch.stack([s.output[:, 0] for s in scores]).amax(0)
        gradient = torch.stack([s.gradient[:, 0] for s in scores]).amax(0)
        at = [2, 4, 6, 8].index(row["g"])
        assert row["error_output"] == pytest.approx(float(output[at]), rel=1e-3)
        assert row["error_gradient"] == pytest.approx(float(gradient[at]), rel=1e-3)
        assert max(row["error_output"], row["error_gradient"]) <= 1e-3
        assert at == 0 or max(output[at - 1], gradient[at - 1]) > 1e-3


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_left_out(family, side):
    model = model_of(family)
    mask = torch.ones_like(IDS)
    ids = IDS.clone()
    cut = slice(0, 5) if side == "left" else slice(15, 20)
    mask[1, cut] = 0
    ids[1, cut] = 0
    if side == "left" and family != "llama":
        pytest.skip("positions of left padding are the model's own matter")
    padded = lora_norm_bound(model, {"input_ids": ids, "attention_mask": mask}, per_sequence=True)
    alone = lora_norm_bound(model, [IDS[:1], ids[1:, mask[1].bool()]], per_sequence=True)
    # RoPE is relative, so a left-padded row has the same scores but other entries of Q and K
    rotated = ["Gamma_Q", "Gamma_K"] if side == "left" else []
    pd.testing.assert_frame_equal(padded.drop(columns=rotated), alone.drop(columns=rotated), rtol=1e-3, atol=1e-6)
    assert sorted(padded["L"].unique()) == [15, 20]


def test_batches_do_not_matter_and_the_worst_sequence_counts():
    model = model_of()
    whole, single = lora_norm_bound(model, IDS), lora_norm_bound(model, IDS, batch_size=1)
    pd.testing.assert_frame_equal(whole, single, rtol=1e-4, atol=1e-6)
    parts = lora_norm_bound(model, IDS, per_sequence=True)
    assert parts["sequence"].tolist() == [0] * 4 + [1] * 4 + [0] * 4 + [1] * 4
    for name in ("Gamma_Q", "tau", "z_star"):
        assert whole[name].tolist() == pytest.approx(parts.groupby(["layer", "head"])[name].max().tolist())


# adapters


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "bert"])
def test_the_share_is_that_of_the_adapter_on_the_same_input(family):
    """In the first layer, whose input has no adapter before it, the base model's own q, k and v are what it is over."""
    model = with_lora(family)
    tuned, bare = [], []
    with torch.no_grad():
        with watching(model.get_base_model(), tuned.append):
            model(input_ids=IDS)
        with watching(model.get_base_model(), bare.append), model.disable_adapter():
            model(input_ids=IDS)
    table = lora_norm_bound(model, IDS)
    assert bare[0].bare is None
    for letter, name in (("Q", "query"), ("K", "key"), ("V", "value")):
        full, base = getattr(tuned[0], name), getattr(bare[0], name)
        for head in range(4):
            # the largest of the sequences' own shares
            shares = (full - base)[:, head].abs().amax((1, 2)) / full[:, head].abs().amax((1, 2))
            assert table[f"share_{letter}"][head] == pytest.approx(float(shares.max()), rel=1e-3)
            assert float(shares.min()) > 0
    assert (table["adapter_share"] == table[["share_Q", "share_K", "share_V"]].max(axis=1)).all()


def test_shares_without_adapters_disabled_merged_and_of_other_tuners():
    assert not lora_norm_bound(model_of(), IDS)["adapter_share"].any()
    model = with_lora()
    expected = lora_norm_bound(model_of(), IDS)
    with model.disable_adapter():
        pd.testing.assert_frame_equal(lora_norm_bound(model, IDS), expected)
    before = lora_norm_bound(model, IDS)
    model.merge_adapter()
    with pytest.warns(GnomonWarning, match="adapters are merged into .* Call unmerge_adapter"):
        merged = lora_norm_bound(model, IDS)
    assert not merged["adapter_share"].any()
    assert merged["tau"].tolist() == pytest.approx(before["tau"].tolist(), rel=1e-3)
    model.unmerge_adapter()
    other = peft.get_peft_model(model_of(), peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    with torch.no_grad():
        for name, p in other.named_parameters():
            if "ia3" in name:
                p.fill_(2.0)
    table = lora_norm_bound(other, IDS)
    assert table["share_K"].tolist() == pytest.approx([0.5] * 8)
    assert not table["share_Q"].any()


def test_scaled_factors_move_heads_across_the_line():
    model = with_lora(size=0.05)
    assert (lora_norm_bound(model, IDS, crossover=0.0)["verdict"] == "approximate").all()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.mul_(40)
    table = lora_norm_bound(model, IDS, crossover=0.0)
    assert (table["verdict"] == "exact").any()
    assert (
        table["reason"][table["verdict"] == "exact"].str.startswith("no degree up to 8 has an error of at most").all()
    )


def test_the_model_is_left_as_it_was():
    model = with_lora(lora_dropout=0.5).train()
    state = copy.deepcopy(model.state_dict())
    wanted = {n: p.requires_grad for n, p in model.named_parameters()}
    lookup = AttentionInterface.get_interface
    torch.manual_seed(0)
    random = torch.random.get_rng_state()
    first = lora_norm_bound(model, IDS)
    assert torch.equal(random, torch.random.get_rng_state())
    pd.testing.assert_frame_equal(first, lora_norm_bound(model, IDS))
    assert AttentionInterface.get_interface is lookup
    assert all(m.training for m in model.modules())
    assert {n: p.requires_grad for n, p in model.named_parameters()} == wanted
    assert all(torch.equal(v, state[n]) for n, v in model.state_dict().items())
    assert not any(m._forward_pre_hooks for m in model.modules())
    with pytest.raises(RuntimeError, match="stop"), watching(model.get_base_model(), lambda _: stop()):
        model(input_ids=IDS)
    assert AttentionInterface.get_interface is lookup
    assert not any(m._forward_pre_hooks for m in model.modules())


def stop() -> None:
    raise RuntimeError("stop")


def test_another_models_calls_are_not_seen():
    model, other, calls = model_of(), model_of("gpt2"), []
    with watching(model, calls.append), torch.no_grad():
        other(input_ids=IDS)
    assert calls == []


# verdicts


def test_softcapping_windows_and_alibi_are_not_applicable():
    capped = lora_norm_bound(model_of("gemma2"), IDS)
    assert (capped["verdict"] == "not applicable").all()
    assert capped["reason"][0] == "scores are capped at 50"
    assert capped[["tau", "z_star", "error_output"]].isna().all().all()
    assert (capped["Gamma_Q"] > 0).all()
    window = lora_norm_bound(model_of("mistral", sliding_window=8), IDS)
    assert (window["reason"] == "a sliding window of 8 tokens").all()
    assert (lora_norm_bound(model_of("mistral", sliding_window=20), IDS)["verdict"] == "exact").all()
    bloom = transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=256, hidden_size=32, n_layer=2, n_head=4))
    config = transformers.FalconConfig(vocab_size=256, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    config.alibi = True
    for model in (bloom, transformers.FalconForCausalLM(config)):
        table = lora_norm_bound(model.eval(), IDS)
        assert len(table) == 8
        assert (table["reason"] == "ALiBi adds a bias to scores").all()
        assert not table["adapter_share"].any()
        assert limits_report(model, byte_tokenizer(), ["abc"]).summary()["not_applicable"] == 8


def test_masks_that_are_neither_causal_nor_padding_are_not_applicable():
    model = model_of()
    block = torch.ones(20, 20, dtype=torch.bool).tril()
    block[10:, :10] = False
    calls = []
    with watching(model, calls.append), torch.no_grad():
        model(input_ids=IDS, attention_mask=block.expand(2, 1, 20, 20))
    from gnomon.adapters.lora_limits.visible import causality

    every = torch.arange(20)
    assert causality(calls[0], 0, every) == "a mask that is neither causal nor padding"
    biased = torch.zeros(1, 1, 20, 20).index_fill(3, every[:3], -2.0)
    for mask, expected in ((biased, "a bias is added to scores"), (torch.zeros(1, 1, 1, 20), False), (None, True)):
        assert causality(type(calls[0])(**{**vars(calls[0]), "mask": mask}), 1, every) == expected


def test_verdicts_by_error_features_and_length():
    row = {"name": "a", "layer": 0, "head": 0, "sequence": 0, "L": 1000, "width": 4, "reason": "", "Gamma_Q": 1.0,
           "Gamma_K": 1.0, "Gamma_V": 1.0, "Gamma_QK": 1.0, "tau": 0.4, "z_star": 1.0, "share_Q": 0.0, "share_K": 0.0,
           "share_V": 0.0, "output_2": 0.5, "gradient_2": 0.1, "output_4": 0.001, "gradient_4": 0.005}  # fmt: skip

    def one(eps: float = 0.01, crossover: float = 1.0, max_features: int = 100, **changes):
        rows = pd.DataFrame([{**row, **changes}])
        return judged(rows, [2, 4], eps, crossover=crossover, max_features=max_features, per_sequence=False).iloc[0]

    good = one()
    assert (good["verdict"], good["g"], good["k1"], good["L_cross"]) == ("approximate", 4, 70, 280)
    assert good["reason"] == "an error of 0.005 at degree 4, 1000 tokens above 280"
    assert (one(L=280)["verdict"], one(L=281)["verdict"]) == ("exact", "approximate")
    assert one(crossover=4.0)["reason"] == "1000 tokens, of which more than 1,120 would be needed to be faster"
    assert one(max_features=69)["reason"] == "70 features at degree 4, more than 69"
    bad = one(eps=1e-3)
    assert bad["verdict"] == "exact"
    assert bad["g"] is pd.NA
    assert one(gradient_4=0.02)["verdict"] == "exact"
    assert one(eps=0.6)["g"] == 2
    assert one(reason="x")["verdict"] == "not applicable"


# training


def test_gradient_errors_of_a_model_shrink_with_the_degree():
    model = with_lora()
    mask = torch.ones_like(IDS)
    mask[1, 15:] = 0
    batch = {"input_ids": IDS, "attention_mask": mask}
    errors = [lora_gradient_errors(model, batch, g, chunk=4) for g in (2, 6)]
    assert len(errors[0]) == 2 * 2 * 7
    assert (errors[0]["norm"] > 0).any()
    assert errors[1]["error"].max() < 1e-4 < errors[0]["error"].max() < 0.5
    exact = lora_gradient_errors(model, batch, 2, chunk=32)  # one causal chunk is exact attention
    assert exact["error"].max() < 1e-4
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(ModelError, match=r"self_attn cannot be approximated .*: scores are capped at 50"):
        lora_gradient_errors(with_lora("gemma2"), IDS)


class _Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        ids = torch.roll(IDS.flatten(), i)[:12]
        return {"input_ids": ids, "labels": ids}


def train(callback: LimitsCallback, folder, model=None) -> Trainer:
    options = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "report_to": "none"}
    args = TrainingArguments(
        str(folder), logging_steps=2, use_cpu=True, disable_tqdm=True, save_strategy="no", **options
    )
    trainer = Trainer(model or with_lora(), args, train_dataset=_Rows(), callbacks=[callback])
    trainer.train()
    return trainer


def test_the_callback_logs_what_it_measures(tmp_path):
    callback = LimitsCallback(every=2, eps=0.05)
    trainer = train(callback, tmp_path)
    assert [step for step, _ in callback.tables] == [2, 4]
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    for entry, (_, table) in zip(logged, callback.tables, strict=True):
        assert entry["limits/tau_max"] == pytest.approx(table["tau"].max())
        assert entry["limits/heads"] == 8
    history = callback.history()
    assert history["step"].tolist() == [2] * 8 + [4] * 8
    torch.testing.assert_close(
        torch.tensor(callback.tables[-1][1]["L"].tolist()), torch.full((8,), 12)
    )  # the batch of the step
    assert not any(m._forward_pre_hooks for m in trainer.model.modules())


def test_the_callback_with_a_probe_and_without_changing_training(tmp_path):
    callback = LimitsCallback(every=3, batches=IDS)
    trainer = train(callback, tmp_path / "a")
    assert [step for step, _ in callback.tables] == [0, 3]
    pd.testing.assert_frame_equal(callback.tables[0][1], lora_norm_bound(with_lora(), IDS))
    plain = train(LimitsCallback(every=100), tmp_path / "b")
    for a, b in zip(trainer.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(a, b)


# reports and refusals


def test_the_report_is_the_bound_on_texts():
    model, tokenizer = model_of(vocab_size=257), byte_tokenizer()
    texts = ["one text", "a", "another text that is longer"]
    with pytest.warns(GnomonWarning, match="1 of 3 texts have fewer than 2 tokens"):
        report = limits_report(model, tokenizer, texts, max_length=16)
    rows = [torch.tensor(tokenizer(t)["input_ids"][:16]) for t in (texts[0], texts[2])]
    pd.testing.assert_frame_equal(report.to_frame(), lora_norm_bound(model, rows))
    numbers = report.summary()
    assert numbers["tau_max"] == pytest.approx(report.table["tau"].max())
    assert numbers["heads"] == numbers["exact"] == 8.0


def test_a_real_text(shared_data):
    rows = shared_data("llm2llm") / "gsm8k_train.jsonl.gz"
    texts = pd.read_json(rows, lines=True, nrows=3)["question"].tolist()
    numbers = limits_report(model_of(vocab_size=257), byte_tokenizer(), texts, max_length=128).summary()
    assert numbers["heads"] == 8
    assert numbers["z_star_max"] > 0


def broken(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[0, 0] = torch.nan
    return model


BAD = [
    (lambda: lora_norm_bound(broken(model_of()), IDS), ModelError, "k of model.layers.1.self_attn holds NaN"),
    (lambda: lora_norm_bound(model_of(), IDS, eps=0), MethodError, "eps = 0: the error allowed"),
    (lambda: lora_norm_bound(model_of(), IDS, max_degree=3), MethodError, "max_degree = 3: give an even number"),
    (lambda: lora_norm_bound(model_of(), IDS, crossover=-1), MethodError, "crossover = -1: give a number"),
    (lambda: lora_norm_bound(model_of(), IDS, max_features=0), MethodError, "max_features = 0"),
    (lambda: lora_norm_bound(model_of(), IDS[:, :1]), DataError, "every sequence has 1 token, and log 1 is 0"),
    (lambda: lora_norm_bound(model_of(), IDS + 500), DataError, "is not in the model's vocabulary (0 to 255)"),
    (lambda: lora_norm_bound(nn.Linear(2, 2), IDS), ModelError, "a Linear is no transformers model"),
    (lambda: lora_norm_bound(tiny("marian"), IDS), ModelError, "is an encoder-decoder. Give one half of it"),
    (lambda: limits_report(model_of(), byte_tokenizer(), "text"), DataError, "texts is one string"),
    (lambda: limits_report(model_of(), byte_tokenizer(), []), DataError, "There are no texts"),
    (lambda: limits_report(model_of(), byte_tokenizer(), [1]), DataError, "row 1: texts must be strings; got int"),
    (lambda: limits_report(model_of(), byte_tokenizer(), ["a"]), DataError, "no text has 2 tokens"),
    (lambda: limits_report(model_of(), byte_tokenizer(), ["ab"], max_length=999), MethodError, "max_length = 999"),
    (lambda: LimitsCallback(every=0), MethodError, "every = 0: give a number of steps of at least 1"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=[m[:30] for _, _, m in BAD])
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()


def test_models_without_attention_prompts_and_batches_without_ids_are_refused(tmp_path):
    mamba = transformers.MambaForCausalLM(transformers.MambaConfig(vocab_size=256, hidden_size=16, num_hidden_layers=1))
    with pytest.raises(ModelError, match="no attention layer was found in a 'mamba' model"):
        lora_norm_bound(mamba.eval(), IDS)
    prompt = peft.get_peft_model(model_of(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ModelError, match="the model has a prompt-learning adapter"):
        lora_norm_bound(prompt, IDS)
    callback = LimitsCallback(every=1)
    callback._due = True
    with pytest.raises(ModelError, match="LimitsCallback saw no batch with input_ids"):
        callback.on_step_end(None, None, None, model=model_of())
