"""The report of a model on texts: what is measured, batching, layers, families, dropped texts, comparisons, errors."""

from __future__ import annotations

import math
import warnings
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch
from torch import nn

from gnomon.common.models import tiny
from gnomon.common.text import byte_tokenizer
from gnomon.errors import DataError, MethodError, ModelError
from gnomon.evals.matrix_nuclear_norm import (
    RepresentationWarning,
    compare_reports,
    diff_erank,
    isotropic_mnn,
    matrix_entropy,
    matrix_nuclear_norm,
    mnn_bounds,
    representation_report,
)

TEXTS = ["a short text", "def area(r): return 3.14 * r * r", "the quick brown fox jumps", "ab", "x = [i for i in y]"]
pytestmark = pytest.mark.filterwarnings("ignore:Texts have")


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def llama(**sizes):
    return tiny("llama", vocab_size=257, num_layers=2, hidden_size=32, **sizes).eval()


def one_at_a_time(model, tokenizer, text: str, layer: int = -1) -> torch.Tensor:
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    with torch.no_grad():
        output = model(ids, output_hidden_states=True)
    return output.hidden_states[layer]


def test_scores_are_those_of_the_last_hidden_state_after_the_norm(tokenizer):
    model = llama()
    report = representation_report(model, tokenizer, TEXTS, batch_size=3)
    for k, text in enumerate(TEXTS):
        hidden = one_at_a_time(model, tokenizer, text)
        assert report.values("mnn")[k] == pytest.approx(float(matrix_nuclear_norm(hidden)), rel=1e-5)
        assert report.values("matrix_entropy")[k] == pytest.approx(float(matrix_entropy(hidden)), abs=1e-5)
        assert hidden.square().mean().item() == pytest.approx(1, rel=1e-2)  # it passed the norm


@pytest.mark.parametrize("batch_size", [1, 2, 8])
@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_size_and_padding_side_do_not_matter(batch_size, side, tokenizer):
    tokenizer.padding_side = side
    expected = representation_report(llama(), tokenizer, TEXTS, batch_size=5).to_frame()
    found = representation_report(llama(), tokenizer, TEXTS, batch_size=batch_size).to_frame()
    numbers = expected.select_dtypes("number").columns
    np.testing.assert_allclose(found[numbers], expected[numbers], rtol=1e-5)


def test_the_table_holds_every_fact_about_each_text(tokenizer):
    report = representation_report(llama(), tokenizer, TEXTS)
    table = report.to_frame()
    lengths = [len(tokenizer(text)["input_ids"]) for text in TEXTS]
    assert table["length"].tolist() == lengths
    for row in table.itertuples():
        low, high = mnn_bounds(row.length, 32)
        assert (row.mnn_low, row.mnn_high, row.mnn_iso) == (low, high, isotropic_mnn(row.length, 32))
        assert low - 1e-6 <= row.mnn <= high + 1e-6
        assert row.mnn_over_iso == pytest.approx(row.mnn / row.mnn_iso)
        assert row.effective_rank == pytest.approx(math.exp(row.matrix_entropy * math.log(32)))
    assert (report.features, report.dtype, report.layers, report.dropped) == (32, "float32", (-1,), {})
    table["mnn"] = 0  # a copy
    assert report.mean("mnn") > 0


def test_the_summary_is_means_as_plain_floats(tokenizer):
    report = representation_report(llama(), tokenizer, TEXTS)
    summary = report.summary()
    assert all(type(v) is float and math.isfinite(v) for v in summary.values())
    assert summary["mnn"] == pytest.approx(report.to_frame()["mnn"].mean())
    assert {"mnn", "mnn_iso", "mnn_over_iso", "matrix_entropy", "effective_rank", "nuclear_norm", "rankme"} < set(
        summary
    )
    assert (summary["texts"], summary["dropped"], summary["hidden_size"]) == (5.0, 0.0, 32.0)
    short = representation_report(llama(), tokenizer, TEXTS, spectra=False).summary()
    assert set(summary) - set(short) == {"matrix_entropy", "effective_rank", "nuclear_norm", "rankme"}
    assert short["mnn"] == pytest.approx(summary["mnn"])


def test_corpus_entropy_by_each_algorithm(tokenizer):
    report = representation_report(llama(), tokenizer, TEXTS)
    entropies = report.values("matrix_entropy")
    assert report.matrix_entropy() == pytest.approx(entropies.mean())
    assert report.matrix_entropy("b") == pytest.approx(32 ** entropies.mean() / 32)
    assert report.matrix_entropy("c") == pytest.approx((32**entropies).mean() / 32)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen", "gpt_neox", "gemma2", "olmo2", "bert"])
def test_layers_of_every_family(family, tokenizer):
    model = tiny(family, vocab_size=257, num_layers=2, hidden_size=32).eval()
    report = representation_report(model, tokenizer, TEXTS[:3], layers="all")
    assert report.layers == (0, 1, 2)
    for layer in report.layers:
        hidden = one_at_a_time(model, tokenizer, TEXTS[1], layer)
        assert report.values("mnn", layer=layer)[1] == pytest.approx(float(matrix_nuclear_norm(hidden)), rel=1e-4)
    last = representation_report(model, tokenizer, TEXTS[:3])
    np.testing.assert_allclose(last.values("mnn"), report.values("mnn", layer=2), rtol=1e-6)
    chosen = representation_report(model, tokenizer, TEXTS[:3], layers=[0, -1])
    np.testing.assert_allclose(chosen.values("mnn", layer=-1), last.values("mnn"), rtol=1e-6)
    assert {"layer0/mnn", "layer-1/mnn"} < set(chosen.summary())


def test_an_encoder_of_an_encoder_decoder_is_measured_but_not_the_whole(tokenizer):
    model = tiny("marian", vocab_size=257, num_layers=1)
    with pytest.raises(ModelError, match=r"MarianMTModel is an encoder-decoder.*model.get_encoder\(\)"):
        representation_report(model, tokenizer, TEXTS)
    assert representation_report(model.get_encoder(), tokenizer, TEXTS).mean() > 0


def test_a_base_model_and_a_head_give_the_same(tokenizer):
    model = llama()
    whole, base = (representation_report(m, tokenizer, TEXTS).mean() for m in (model, model.model))
    assert whole == base


def test_an_adapter_counts_and_prompt_learning_is_refused(tokenizer):
    plain = representation_report(llama(), tokenizer, TEXTS).mean()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        lora = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["v_proj"], init_lora_weights=False))
        prompt = peft.get_peft_model(llama(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    adapted = representation_report(lora, tokenizer, TEXTS).mean()
    assert adapted != pytest.approx(plain, rel=1e-4)
    assert adapted == pytest.approx(representation_report(lora.merge_and_unload(), tokenizer, TEXTS).mean(), rel=1e-5)
    with pytest.raises(ModelError, match="prompt-learning"):
        representation_report(prompt, tokenizer, TEXTS)


def test_half_precision_states_are_named_and_measured_in_float32(tokenizer):
    report = representation_report(llama().to(torch.bfloat16), tokenizer, TEXTS)
    assert report.dtype == "bfloat16"
    assert report.mean() == pytest.approx(representation_report(llama(), tokenizer, TEXTS).mean(), rel=0.01)


def test_texts_without_a_score_are_named_not_dropped_in_silence(tokenizer):
    class Constant(nn.Module):
        """Every token gets one state, except in texts that hold an x."""

        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(257, 8)

        def get_input_embeddings(self):
            return self.embedding

        def forward(self, input_ids, attention_mask, return_dict):
            seen = (input_ids == byte_tokenizer()("x")["input_ids"][0]).any(1)
            states = self.embedding(torch.where(seen[:, None], input_ids, 0))
            return SimpleNamespace(last_hidden_state=states)

    texts = ["a", "aaa", "xyz", ""]
    with pytest.warns(RepresentationWarning, match="3 of 4 texts were dropped; text 0 has fewer than 2 tokens"):
        report = representation_report(Constant(), tokenizer, texts)
    few = "fewer than 2 tokens"
    assert report.dropped == {0: few, 1: "fewer than 2 distinct token states", 3: few}
    assert np.isnan(report.values("mnn")).tolist() == [True, True, False, True]
    assert report.summary()["dropped"] == 3
    assert math.isfinite(report.summary()["mnn"])
    with pytest.raises(DataError, match="Every text was dropped: text 0 has fewer than 2 distinct token states"):
        representation_report(Constant(), tokenizer, ["aaa", "bb"])
    with pytest.raises(DataError, match="Every text was dropped: text 0 has fewer than 2 tokens"):
        representation_report(Constant(), tokenizer, ["a", ""])


def test_different_lengths_are_said_and_one_length_can_be_asked_for(tokenizer):
    with pytest.warns(RepresentationWarning, match=r"Texts have 2 to 32 tokens at width 32.*min_length = max_length"):
        representation_report(llama(), tokenizer, TEXTS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*texts were dropped")
        report = representation_report(llama(), tokenizer, TEXTS, min_length=12, max_length=12)
    assert report.dropped == {3: "fewer than 12 tokens"}
    assert set(report.to_frame().query("dropped == ''")["length"]) == {12}
    cut = representation_report(llama(), tokenizer, [t[:12] for t in TEXTS if len(t) >= 12])
    np.testing.assert_allclose(np.delete(report.values("mnn"), 3), cut.values("mnn"), rtol=1e-5)


def test_leading_tokens_are_read_but_not_measured(tokenizer):
    model, text = llama(), TEXTS[1]
    report = representation_report(model, tokenizer, [text, TEXTS[0]], skip_first=3)
    hidden = one_at_a_time(model, tokenizer, text)[:, 3:]
    assert report.values("length").tolist() == [len(text) - 3, len(TEXTS[0]) - 3]
    assert report.values("mnn")[0] == pytest.approx(float(matrix_nuclear_norm(hidden)), rel=1e-5)
    with pytest.warns(RepresentationWarning, match="text 1 has fewer than 5 tokens"):
        assert representation_report(model, tokenizer, [text, "abcd"], skip_first=3).dropped


def test_reports_side_by_side_warn_where_they_do_not_compare(tokenizer):
    wide = tiny("llama", vocab_size=257, num_layers=1, hidden_size=64)
    a, b = representation_report(llama(), tokenizer, TEXTS), representation_report(wide, tokenizer, TEXTS)
    with pytest.warns(RepresentationWarning, match=r"different widths \(small 32, wide 64\)"):
        frame = compare_reports({"small": a, "wide": b})
    assert frame.loc["wide", "mnn"] == pytest.approx(b.mean())
    shorter = representation_report(llama(), tokenizer, TEXTS[:1])
    with pytest.warns(RepresentationWarning, match="different mean lengths"):
        compare_reports({"all": a, "one": shorter})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compare_reports({"a": a, "again": a})
    with pytest.raises(DataError, match="no reports"):
        compare_reports({})


def test_diff_erank_is_a_difference_on_the_same_texts(tokenizer):
    a, b = (representation_report(llama(seed=s), tokenizer, TEXTS) for s in (0, 1))
    assert diff_erank(a, b) == pytest.approx(a.mean("effective_rank") - b.mean("effective_rank"))
    with pytest.raises(MethodError, match="different lengths"):
        diff_erank(a, representation_report(llama(), tokenizer, TEXTS[:2]))
    wide = tiny("llama", vocab_size=257, num_layers=1, hidden_size=64)
    with pytest.raises(MethodError, match="widths 32 and 64"):
        diff_erank(a, representation_report(wide, tokenizer, TEXTS))


def test_width_alone_moves_the_score_of_untrained_models(tokenizer):
    """The published fall with model size appears without any training: the score peaks where width equals length."""
    text = "".join(chr(33 + (7 * k * k + k) % 90) for k in range(96))
    at = {
        width: representation_report(
            tiny("llama", vocab_size=257, num_layers=1, hidden_size=width), tokenizer, [text], spectra=False
        ).mean()
        for width in (32, 96, 384)
    }
    assert at[96] > at[32] + 0.1
    assert at[96] > at[384] + 0.1


def test_progress_counts_texts(tokenizer):
    seen = []
    representation_report(llama(), tokenizer, TEXTS, batch_size=2, on_progress=lambda *n: seen.append(n))
    assert seen == [(2, 5), (4, 5), (5, 5)]


@pytest.mark.parametrize(
    ("texts", "options", "error", "message"),
    [
        ([], {}, DataError, "There are no texts to measure"),
        ("one string", {}, DataError, "texts is one string"),
        (["a b", 3], {}, DataError, "texts, row 2: texts must be strings; got int"),
        (["abc"], {"batch_size": 0}, MethodError, "batch_size is 0; it must be 1 or more"),
        (["abc"], {"min_length": 1}, MethodError, "min_length is 1; it must be 2 or more"),
        (["abc"], {"skip_first": -1}, MethodError, "skip_first is -1"),
        (["abc"], {"max_length": 8, "min_length": 9}, MethodError, r"max_length is 8; .*min_length \(9\)"),
        (["abc"], {"max_length": 5, "skip_first": 4}, MethodError, r"skip_first \+ 2 \(6\)"),
        (["abc"], {"max_length": 1000}, ModelError, "max_length is 1000, but LlamaModel has 256 positions"),
        (["abc"], {"layers": 3}, MethodError, r"layers names 3; this model has 0 \(embeddings\) to 2"),
        (["abc"], {"layers": ["last"]}, MethodError, "layers names 'last'"),
        (["abc"], {"layers": []}, MethodError, "layers is empty"),
    ],
)
def test_what_cannot_be_measured_says_why(texts, options, error, message, tokenizer):
    with pytest.raises(error, match=message):
        representation_report(llama(), tokenizer, texts, **options)


def test_models_that_do_not_fit_say_why(tokenizer):
    class Tuples(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(257, 4)

        def get_input_embeddings(self):
            return self.embedding

        def forward(self, input_ids, attention_mask, return_dict):
            return (self.embedding(input_ids),)

    with pytest.raises(ModelError, match=r"Tuples gives no last_hidden_state \(it returned a tuple"):
        representation_report(Tuples(), tokenizer, TEXTS)
    broken = llama()
    with torch.no_grad():
        broken.model.embed_tokens.weight[tokenizer("q")["input_ids"][0]] = math.nan
    with pytest.raises(ModelError, match="LlamaModel at layer -1 hold NaN or infinity on text 2"):
        representation_report(broken, tokenizer, TEXTS)
    small = tiny("llama", vocab_size=16, num_layers=1)
    with pytest.raises(DataError, match=r"is not in the model's vocabulary \(0 to 15\)"):
        representation_report(small, tokenizer, TEXTS)
    report = representation_report(llama(), tokenizer, TEXTS)
    with pytest.raises(MethodError, match=r"There is no 'loss' at layer -1\. Layers: -1; columns: text, layer, length"):
        report.values("loss")
