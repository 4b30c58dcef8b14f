"""MEDEC's scores against plain loops, the official script's published numbers, closed forms and invariances."""

from __future__ import annotations

import math
import random
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gnomon.errors import ConfigError, DataError
from gnomon.evals.medec import (
    Note,
    Prediction,
    Submission,
    note_scores,
    read_notes,
    read_run,
    reward,
    rouge,
    score_files,
    score_run,
)

sys.path.insert(0, str(Path(__file__).parent))
from medec_definition import NOTES, PERFECT, RIGHT, WRONG, rouge_loop, scores_loop

SENTENCE = st.text(alphabet="ab c.\n\\A", max_size=24)


@given(SENTENCE, SENTENCE)
def test_rouge_agrees_with_the_loop(hypothesis, reference):
    assert rouge(hypothesis, reference) == rouge_loop(hypothesis, reference)


@given(st.lists(st.sampled_from("abcd"), max_size=12), st.lists(st.sampled_from("abcd"), max_size=12))
def test_rouge_l_takes_the_same_subsequence_among_equally_long_ones(x, y):
    assert rouge(" ".join(x), " ".join(y)) == rouge_loop(" ".join(x), " ".join(y))


@pytest.mark.parametrize(
    ("text", "distinct"), [("The patient has gout.", 4), ("a b a b", 2), ("He is well. He is not ill.", 5)]
)
def test_rouge_of_a_text_with_itself(text, distinct):
    assert rouge(text, text).rouge1 == rouge(text, text).rougeL == 2.0 / (2.0 + 1e-8)
    assert len(set(text.replace(".", "").split())) == distinct


def test_rouge_keeps_case_and_punctuation_and_cuts_at_full_stops():
    assert rouge("Gout", "gout") == (0.0, 0.0, 0.0)
    assert rouge("gout,", "gout").rouge1 == 0.0
    assert rouge("b a", "a.b").rougeL == pytest.approx(1.0)  # two sentences: both tokens are found
    assert rouge("b a", "a b").rougeL == pytest.approx(0.5)
    # a space after the last stop is an empty token; the package has it so, and the published numbers need it
    assert rouge("gout.", "gout. ").rouge1 == pytest.approx(2 / 3)
    assert rouge("", "gout") == rouge("...", "gout") == rouge("gout", "") == (0.0, 0.0, 0.0)
    assert rouge("gout", "gout").rouge2 == 0.0


def test_the_official_scripts_numbers(shared_data):
    """402 of the 574 validation notes with the published baseline run, scored by the official script."""
    folder = shared_data("medec")
    report = score_files(folder / "baseline_run_ms_val.txt", folder / "ms_val.csv.gz")
    expected = {
        "flag": 0.4950248756, "sentence": 0.3134328358, "answered": 1.0,
        "rouge1": 0.4280453595, "rouge2": 0.3343645120, "rougeL": 0.4256704321,
        "composite_rouge1": 0.2261208282, "composite_rouge2": 0.1820768477, "composite_rougeL": 0.2250042579,
    }  # fmt: skip
    for name, value in expected.items():
        assert report.figures[name].value == pytest.approx(value, abs=5e-11), name
    assert report.counts == {
        "total": 402, "reference_na": 169, "system_na": 54, "both_na": 10, "pairs": 189, "missing": 0, "extra": 0,
    }  # fmt: skip
    assert report.missing_components == ("bertscore", "bleurt")
    assert any("No aggregate: bertscore and bleurt" in note for note in report.notes)
    assert report.figures["rouge1"].n == 189
    assert report.figures["flag[diagnosis]"].n == 63


def test_the_figures_agree_with_the_walk_over_ids(shared_data):
    folder = shared_data("medec")
    notes = read_notes(folder / "ms_val.csv.gz")
    run = read_run(folder / "baseline_run_ms_val.txt").predictions
    some = {k: v for i, (k, v) in enumerate(run.items()) if i % 3}
    for predictions in (run, some):
        found = score_run(predictions, notes).summary()
        for i, name in enumerate(("rouge1", "rouge2", "rougeL")):
            loop = scores_loop(notes, predictions, lambda h, r, i=i: rouge_loop(h, r)[i])
            assert found["flag"] == pytest.approx(loop["flag"], abs=1e-12)
            assert found["sentence"] == pytest.approx(loop["sentence"], abs=1e-12)
            assert found[name] == pytest.approx(loop["subset"], abs=1e-12)
            assert found[f"composite_{name}"] == pytest.approx(loop["composite"], abs=1e-12)


def test_a_perfect_run_and_an_all_na_run():
    perfect = score_run(PERFECT, NOTES).summary()
    assert perfect["flag"] == perfect["sentence"] == perfect["answered"] == 1.0
    assert perfect["composite_rouge1"] == pytest.approx(1.0, abs=1e-8)
    silent = score_run({n.text_id: Prediction(0, -1, "NA") for n in NOTES}, NOTES)
    share = 1 / 3
    for name in ("flag", "sentence", "composite_rouge1", "composite_rougeL"):
        assert silent.summary()[name] == pytest.approx(share)
    assert math.isnan(silent.summary()["rouge1"])
    assert silent.baselines == pytest.approx(
        {"always_error.flag": 2 / 3, "always_correct.flag": share, "always_correct.sentence": share,
         "always_correct.composite": share}
    )  # fmt: skip


def test_trivial_systems_reach_the_baselines_on_real_counts(shared_data):
    notes = read_notes(shared_data("medec") / "ms_test.csv.gz")
    q = sum(n.flag for n in notes) / len(notes)
    assert (len(notes), sum(n.flag for n in notes)) == (418, 219)
    error = score_run({n.text_id: Prediction(1, 0, n.sentences[0][1]) for n in notes}, notes)
    correct = score_run({n.text_id: Prediction(0, -1, "NA") for n in notes}, notes)
    assert error.summary()["flag"] == pytest.approx(q) == error.baselines["always_error.flag"]
    for name in ("flag", "sentence", "composite_rouge1"):
        assert correct.summary()[name] == pytest.approx(1 - q) == correct.baselines["always_correct.flag"]


def test_flagging_at_random_gives_the_closed_form():
    """Flag with probability p, independently: A = p q + (1 - p)(1 - q), within three standard deviations."""
    generator, notes, p = np.random.default_rng(0), [], 0.7
    for i in range(4000):
        flag = i % 5 < 3
        notes.append(Note(f"n-{i}", ((0, "a b."),), int(flag), 0 if flag else -1, "a c." if flag else "NA"))
    flags = generator.random(4000) < p
    run = {n.text_id: Prediction(1, 0, "a b.") if f else Prediction(0, -1, "NA")
           for n, f in zip(notes, flags, strict=True)}  # fmt: skip
    found, q = score_run(run, notes), 0.6
    expected = p * q + (1 - p) * (1 - q)
    assert abs(found.summary()["flag"] - expected) < 3 * math.sqrt(expected * (1 - expected) / 4000)
    assert found.figures["flag"].stderr == pytest.approx(math.sqrt(expected * (1 - expected) / 4000), rel=0.05)
    composite = p * q * rouge("a b.", "a c.").rouge1 + (1 - p) * (1 - q)
    assert abs(found.summary()["composite_rouge1"] - composite) < 0.03


def test_the_order_of_rows_and_unknown_ids_change_nothing():
    run = {"my-0": Prediction(1, 2, "The patient has gout."), "my-2": Prediction(1, 0, "Aspirin is given.")}
    base = score_run(run, NOTES)
    shuffled = list(NOTES)
    random.Random(1).shuffle(shuffled)
    assert score_run(dict(reversed(run.items())), shuffled).figures == base.figures
    more = score_run(run | {"no-9": Prediction(1, 1, "x")}, NOTES)
    assert more.figures == base.figures
    assert more.counts["extra"] == 1
    assert any("1 predictions are for ids that are no note" in note for note in more.notes)
    assert any("1 of 3 notes have no prediction; they count as wrong" in note for note in base.notes)


@given(st.sets(st.sampled_from(["my-0", "my-1", "my-2"])))
def test_fewer_predictions_never_raise_accuracy_or_composite(left):
    full = score_run(PERFECT, NOTES).summary()
    some = score_run({k: v for k, v in PERFECT.items() if k in left}, NOTES).summary()
    for name in ("flag", "sentence", "answered", "composite_rouge1", "composite_rouge2", "composite_rougeL"):
        assert some[name] <= full[name] + 1e-15


def test_one_na_on_either_side_scores_nothing_and_is_no_pair():
    said = note_scores(RIGHT, Prediction(1, 0, "He has gout."))
    assert math.isnan(said["rouge1"])
    assert said["composite_rouge1"] == 0.0
    unsaid = note_scores(WRONG, Prediction(1, 2, "NA"))
    assert (unsaid["flag"], unsaid["sentence"], unsaid["composite_rouge1"]) == (1.0, 1.0, 0.0)
    assert math.isnan(unsaid["rouge1"])
    # flag and sentence number are judged apart from each other and from the correction
    odd = note_scores(WRONG, Prediction(0, 2, "NA"))
    assert (odd["flag"], odd["sentence"]) == (0.0, 1.0)
    assert note_scores(RIGHT, None) == pytest.approx(
        {k: math.nan if k in ("rouge1", "rouge2", "rougeL") else 0.0 for k in said}, nan_ok=True
    )


def test_pairs_made_of_one_vignette_share_a_cluster(shared_data):
    notes = read_notes(shared_data("medec") / "ms_test.csv.gz")
    clusters = [note.cluster for note in notes]
    assert (len(notes), len(set(clusters))) == (418, 282)
    # always 'error' is right in one of the two: the clustered error is smaller than that of independent notes
    report = score_run({n.text_id: Prediction(1, 0, "x") for n in notes}, notes)
    q = report.figures["flag"].value
    assert report.figures["flag"].stderr < 0.75 * math.sqrt(q * (1 - q) / len(notes))


def test_the_aggregate_is_the_mean_of_three_clipped_parts():
    calls = []

    def bertscore(predictions, references):
        calls.append(list(predictions))
        return [-0.5 if "gout" in p else 0.75 for p in predictions]

    run = dict(PERFECT) | {"my-9": Prediction(1, 1, "x")}
    report = score_run(run, NOTES, bertscore=bertscore, bleurt=lambda p, r: [0.25] * len(p))
    assert report.missing_components == ()
    pairs = [(1.0, 0.0, 0.25), (1.0, 0.75, 0.25)]
    aggregate = np.mean(pairs, axis=1)
    assert report.summary()["bertscore"] == 0.375
    assert report.summary()["aggregate"] == pytest.approx(aggregate.mean(), abs=1e-8)
    assert report.summary()["composite_aggregate"] == pytest.approx((aggregate.sum() + 1) / 3, abs=1e-8)
    assert report.summary()["composite_bleurt"] == pytest.approx((0.5 + 1) / 3)
    assert len(calls) == 1
    assert calls[0] == sorted(calls[0], key=len, reverse=True), "one call, longest first"


def test_equal_pairs_are_scored_once():
    notes = [Note(f"n-{i}", ((0, "a."),), 1, 0, "b c.") for i in range(5)]
    seen = []
    run = {n.text_id: Prediction(1, 0, "b.") for n in notes}
    score_run(run, notes, bertscore=lambda p, r: seen.extend(p) or [0.5] * len(p))
    assert seen == ["b."]


def test_no_aggregate_from_what_happens_to_be_there_unless_asked():
    half = score_run(PERFECT, NOTES, bleurt=lambda p, r: [0.5] * len(p))
    assert "aggregate" not in half.figures
    assert half.missing_components == ("bertscore",)
    assert half.summary()["bleurt"] == 0.5
    chosen = score_run(PERFECT, NOTES, components=["rouge1", "rougeL"])
    assert chosen.summary()["aggregate"] == pytest.approx(1.0, abs=1e-8)
    assert chosen.missing_components == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"components": ["rouge3"]}, "'rouge3' is no part. Did you mean 'rouge"),
        ({"components": ["bleurt"]}, "components names 'bleurt', which was not given"),
        ({"bertscore": "bertscore"}, "'bertscore' is no scorer of texts. Did you mean 'bert-score'"),
        ({"bertscore": "no.module:f"}, "cannot be imported"),
        ({"bertscore": "bert-score"}, "pip install bert-score"),
        ({"bleurt": "bleurt"}, "needs the package bleurt"),
        ({"bleurt": lambda p, r: [0.1]}, "bleurt returned 1 values for 2 pairs"),
        ({"bleurt": lambda p, r: [math.nan, 0.1]}, "some of them NaN"),
    ],
)
def test_components_that_cannot_be_used(options, message):
    with pytest.raises(ConfigError, match=message):
        score_run(PERFECT, NOTES, **options)


def test_named_functions_serve_as_components():
    report = score_run(PERFECT, NOTES, bertscore="tests_medec_component:score")
    assert report.summary()["bertscore"] == 0.75


@pytest.fixture(autouse=True)
def _component_module(monkeypatch):
    import types

    module = types.ModuleType("tests_medec_component")
    module.score = lambda predictions, references: [0.75] * len(predictions)
    monkeypatch.setitem(sys.modules, "tests_medec_component", module)


def test_the_named_components_call_their_packages(monkeypatch):
    import types

    from gnomon.evals.medec import bert_score_component, bleurt_component

    class Scorer:
        def __init__(self, *args, **options):
            self.options = options

        def score(self, predictions=None, references=None, **options):
            if options:  # bleurt
                assert options == {"candidates": ["a"], "batch_size": 16}
                return [0.5]
            assert self.options["rescale_with_baseline"]
            assert self.options["model_type"] == "microsoft/deberta-xlarge-mnli"
            return np.zeros(1), np.ones(1), np.array([0.25])

    monkeypatch.setitem(sys.modules, "bert_score", types.SimpleNamespace(BERTScorer=Scorer))
    bleurt = types.ModuleType("bleurt")
    bleurt.score = types.SimpleNamespace(BleurtScorer=Scorer)
    monkeypatch.setitem(sys.modules, "bleurt", bleurt)
    assert bert_score_component()(["a"], ["b"]) == [0.25]
    assert bleurt_component()(["a"], ["b"]) == [0.5]


def test_runs_for_notes_that_are_not_there():
    with pytest.raises(DataError, match=r"predictions for UW notes, such as 'uw-test-1'.*data-use agreement"):
        score_run(dict(PERFECT) | {"uw-test-1": Prediction(0, -1, "NA")}, NOTES)
    with pytest.raises(DataError, match="no note to score against"):
        score_run(PERFECT, [])
    uw = Note("uw-test-1", ((0, "a."),), 0, -1)
    assert score_run({"uw-test-1": Prediction(0, -1, "NA")}, [uw]).summary()["flag"] == 1.0


def test_a_submission_brings_its_notices_along():
    submission = Submission({"my-0": Prediction(1, 2, "NA")}, ignored=[(3, "what")], odd=["my-0"])
    notes = score_run(submission, NOTES).notes
    assert any("1 lines have not the form of a submission" in note and "line 3" in note for note in notes)
    assert any("flag 1 without a correction" in note for note in notes)


def test_the_reward_is_one_for_the_gold_answer_and_graded_below():
    assert reward("2 The patient is diagnosed with gout.", WRONG) == pytest.approx(1.0, abs=1e-8)
    assert reward("CORRECT", RIGHT) == 1.0
    close = reward("2 The patient has gout.", WRONG)
    assert reward("I do not know", WRONG) == 0.0 < reward("0 He is well.", WRONG) < close < 1.0
