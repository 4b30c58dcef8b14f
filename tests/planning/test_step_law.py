"""The law's numbers: published values, the formula as written, intervals, batches, warnings, refusals."""

from __future__ import annotations

import json
import math
import random
import warnings
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gnomon.errors import GnomonWarning, MethodError
from gnomon.planning import optimum, relative_spread, step_law
from gnomon.planning.step_law import FITTED, PAPER


@pytest.mark.parametrize(
    ("n", "d", "variant", "lr", "batch"),
    [
        (7e9, 1.4e12, "paper", 9.166e-4, 4_998_815),
        (7e9, 1.4e12, "fitted", 9.347e-4, 4_996_911),
        (1e9, 1e11, "paper", 1.632e-3, 1_107_715),
    ],
)
def test_published_predictions(n, d, variant, lr, batch):
    plan = step_law(n, d, 2048, variant=variant)
    assert plan.lr == pytest.approx(lr, rel=5e-4)
    assert plan.batch_tokens == batch
    assert plan.batch_sequences == pytest.approx(batch / 2048, abs=0.001)
    assert plan.steps == math.ceil(d / batch)


def test_the_default_is_the_fitted_variant():
    plan = step_law(7e9, 1.4e12)
    assert f"{plan.lr:.3e}" == "9.347e-04"
    assert round(plan.batch_sequences, 1) == 2439.9
    assert (plan.optimal_lr, plan.seq_len) == (plan.lr, 2048)


@given(st.floats(5e7, 1e10), st.floats(1e9, 1e13))
def test_both_variants_are_their_formulas(n, d):
    lr, batch = optimum(n, d, "paper")
    assert float(lr) == pytest.approx(1.79 * n**-0.713 * d**0.307, rel=1e-12)
    assert float(batch) == pytest.approx(0.58 * d**0.571, rel=1e-12)
    lr, batch = optimum(n, d)
    assert float(lr) == pytest.approx(math.exp(0.586308) * n**-0.712922 * d**0.307491, rel=1e-12)
    assert float(batch) == pytest.approx(math.exp(-0.543542) * d**0.570944, rel=1e-12)
    # logs are averaged, not their exponentials (2.187, 0.639)
    assert math.exp(FITTED.lr[0]) == pytest.approx(1.7973, abs=1e-4)
    assert math.exp(FITTED.batch[0]) == pytest.approx(0.58069, abs=1e-5)


def test_columns_are_predicted_as_numbers_are():
    frame = pd.DataFrame({"N": [1e8, 1e9, 7e9], "D": [1e10, 1e11, 1.4e12]})
    lr, batch = optimum(frame["N"], frame["D"])
    for i in range(3):
        one = optimum(frame["N"][i], frame["D"][i])
        assert (lr[i], batch[i]) == (float(one[0]), float(one[1]))
    lr, batch = optimum([1e8, 1e9], 1e10)
    assert lr.shape == batch.shape == (2,)
    assert batch[0] == batch[1], "the batch depends on the tokens alone"
    assert optimum(np.float32(1e9), 1e11)[0].dtype == np.float64


@pytest.mark.filterwarnings("ignore:extrapolation")
def test_intervals_are_those_of_the_published_fits(shared_data):
    fits = pd.read_csv(shared_data("step-law") / "fitted_bootstrap_1000.csv.gz")
    assert fits.mean().round(6).tolist() == pytest.approx([*FITTED.lr, *FITTED.batch], abs=1e-6)
    lr_rows, batch_rows = fits.iloc[:, :3].to_numpy(), fits.iloc[:, 3:].to_numpy()
    for n, d in ((7e9, 1.4e12), (1e9, 1e11), (2.1e8, 4e9), (1e9, 5e12), (5e7, 1e10)):
        x = np.array([1.0, math.log(n), math.log(d)])
        spread = [float(s) for s in relative_spread(n, d)]
        expected = [np.sqrt(x @ np.cov(lr_rows.T) @ x), np.sqrt(x[[0, 2]] @ np.cov(batch_rows.T) @ x[[0, 2]])]
        assert spread == pytest.approx(expected, rel=1e-3)
        plan = step_law(n, d)
        for name, rows, point in (("lr", lr_rows, x), ("batch_tokens", batch_rows, x[[0, 2]])):
            assert plan.intervals[name] == pytest.approx(np.exp(np.percentile(rows @ point, [2.5, 97.5])), rel=0.02)


def test_varying_coefficients_alone_would_be_far_too_wide():
    # what the standard deviations alone would say at 7B, 1.4T: an interval over a factor of 8
    alone = math.sqrt(0.624**2 + (0.0299 * math.log(7e9)) ** 2 + (0.0191 * math.log(1.4e12)) ** 2)
    assert float(relative_spread(7e9, 1.4e12)[0]) < alone / 8


def test_a_narrower_level_gives_a_narrower_interval_around_the_value():
    wide, narrow = step_law(1e9, 1e11, confidence=0.95), step_law(1e9, 1e11, confidence=0.5)
    for name, value in (("lr", wide.lr), ("batch_tokens", wide.batch_tokens), ("steps", wide.steps)):
        assert wide.intervals[name][0] < narrow.intervals[name][0] <= value <= narrow.intervals[name][1]
        assert narrow.intervals[name][1] < wide.intervals[name][1]
    assert math.sqrt(math.prod(wide.intervals["lr"])) == pytest.approx(wide.lr)
    low, high = wide.intervals["batch_tokens"]
    assert wide.intervals["steps"] == (math.ceil(1e11 / high), math.ceil(1e11 / low))


def test_the_batch_is_fitted_to_the_devices():
    plan = step_law(1e9, 1e11, micro_batch=8, devices=16)
    unit = 2048 * 8 * 16
    assert plan.batch_tokens == round(plan.optimal_batch_tokens / unit) * unit == 4 * unit
    assert (plan.accumulate, plan.micro_batch, plan.devices, plan.batch_sequences) == (4, 8, 16, 512.0)
    assert plan.steps == math.ceil(1e11 / plan.batch_tokens)
    assert plan.lr == pytest.approx(plan.optimal_lr * math.sqrt(plan.batch_tokens / plan.optimal_batch_tokens))
    assert plan.intervals["lr"][0] < plan.lr < plan.intervals["lr"][1]
    assert (step_law(1e9, 1e11, devices=16).micro_batch, step_law(1e9, 1e11, micro_batch=2).devices) == (1, 1)


@pytest.mark.filterwarnings("ignore:extrapolation")
def test_a_machine_too_large_for_the_optimum_gets_one_pass():
    plan = step_law(1e9, 4e9, micro_batch=64, devices=64)
    assert plan.accumulate == 1
    assert plan.batch_tokens == 2048 * 64 * 64
    assert "times the optimum" in " ".join(plan.notes)


@given(st.integers(1, 64), st.integers(1, 512), st.sampled_from([512, 2048, 8192]), st.floats(1e9, 1e13))
def test_the_fitted_batch_is_the_nearest_multiple(micro, devices, seq_len, tokens):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plan = step_law(1e9, tokens, seq_len, micro_batch=micro, devices=devices)
    unit = micro * devices * seq_len
    assert plan.batch_tokens % unit == 0
    assert plan.batch_tokens == plan.accumulate * unit
    assert abs(plan.batch_tokens - plan.optimal_batch_tokens) <= max(unit / 2, unit - plan.optimal_batch_tokens)
    assert (plan.steps - 1) * plan.batch_tokens < tokens <= plan.steps * plan.batch_tokens


def test_a_chosen_batch_rescales_by_the_square_root_and_says_whose_rule_that_is():
    plan = step_law(1e9, 1e11, batch_tokens=4 * 1024 * 2048)
    ratio = plan.batch_tokens / plan.optimal_batch_tokens
    assert plan.batch_sequences == 4096.0
    assert plan.lr == pytest.approx(plan.optimal_lr * math.sqrt(ratio))
    assert any("not from the paper" in note for note in plan.notes)
    kept = step_law(1e9, 1e11, batch_tokens=4 * 1024 * 2048, rescale="none")
    assert kept.lr == kept.optimal_lr
    assert any("the one for the optimal batch" in note for note in kept.notes)
    assert step_law(1e9, 1e11, batch_tokens=5000).batch_tokens == 4096, "whole sequences"
    assert not any("times the optimum" in note for note in step_law(1e9, 1e11).notes)


def test_seq_len_turns_tokens_into_sequences_and_nothing_else():
    short, long = step_law(1e9, 1e11, 512), step_law(1e9, 1e11, 8192)
    assert (short.lr, short.batch_tokens, short.steps) == (long.lr, long.batch_tokens, long.steps)
    assert short.batch_sequences == pytest.approx(16 * long.batch_sequences)


@pytest.mark.parametrize(
    ("n", "d", "words"),
    [
        (2e10, 1e12, "n_params = 2e+10 is above 1e10"),
        (8e9, 2e13, "above 1e13"),
        (2e8, 2e11, "1e+03 tokens per parameter"),
        (5e9, 1e10, "2 tokens per parameter"),
        (1e7, 2e9, "below 5e7"),
        (6e7, 9e8, "below 1e9 (tokens are meant: not steps, not samples)"),
        (7e9, 2.8e5, "not steps"),
    ],
)
def test_extrapolation_is_said(n, d, words):
    with pytest.warns(GnomonWarning, match="extrapolation") as caught:
        plan = step_law(n, d)
    assert words in str(caught[0].message)
    assert str(caught[0].message) in plan.notes
    assert caught[0].filename == __file__


def test_within_the_runs_there_is_no_note_and_beyond_them_a_quiet_one():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inside, beyond = step_law(5.4e8, 2e10), step_law(7e9, 1.4e12)
        mixture = step_law(2.15e9, 8e9, moe=True)
    assert len(inside.notes) == len(mixture.notes) == 1
    assert "this run lies outside that" in beyond.notes[0]
    for word in ("WSD", "Muon", "fine-tuning", "continued pre-training", "1e-5"):
        assert word in inside.notes[-1]
    with pytest.warns(GnomonWarning, match="tokens per parameter"):
        step_law(2.15e9, 8e9)


@pytest.mark.parametrize("bad", [0, -1e9, float("nan"), float("inf"), "7e9x", None])
def test_numbers_that_are_none_are_refused(bad):
    for call in (lambda: step_law(bad, 1e11), lambda: step_law(1e9, bad), lambda: optimum([1e9, 1e9], [1e11, bad])):
        with pytest.raises(MethodError, match=r"n_(params|tokens) = .*positive finite number"):
            call()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_tokens": 512}, "512 is less than one sequence of 2048 tokens.* 512 sequences are 1048576"),
        ({"batch_tokens": -4}, "batch_tokens = -4"),
        ({"seq_len": 0}, "seq_len = 0"),
        ({"seq_len": 2048.5}, "whole numbers"),
        ({"micro_batch": 0}, "micro_batch = 0"),
        ({"devices": -8}, "devices = -8"),
        ({"devices": 1.5}, "whole numbers"),
        ({"confidence": 95}, "confidence = 95"),
        ({"variant": "papr"}, "Did you mean 'paper'"),
        ({"rescale": "linear"}, "Known rules: none, sqrt"),
    ],
)
def test_options_that_cannot_be_are_refused(options, words):
    with pytest.raises(MethodError, match=words):
        step_law(1e9, 1e11, **options)


def test_the_result_is_json_plain_and_no_random_state_is_touched():
    states = random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002 - the legacy state is what is watched
    plan = step_law(1e9, 1e11, micro_batch=4)
    again = json.loads(json.dumps(plan.to_dict(), allow_nan=False))
    assert random.getstate() == states[0]
    assert np.array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002
    assert again["lr"] == plan.lr
    assert again["intervals"]["lr"] == list(plan.intervals["lr"])
    assert step_law(1e9, 1e11, micro_batch=4) == plan


def test_a_refit_takes_the_place_of_the_published_coefficients():
    fit = SimpleNamespace(
        coefficients=PAPER,
        lr_rows=np.ones((5, 3)),
        kept=9,
        groups=4,
        interval=lambda n, d, c: {"lr": (1e-4, 1e-2), "batch_tokens": (1e5, 1e6)},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = step_law(7e10, 1.4e12, fit=fit)
    assert plan.lr == pytest.approx(step_law(7e9, 1.4e12, variant="paper").lr * 10**-0.713)
    assert plan.intervals == {"lr": (1e-4, 1e-2), "batch_tokens": (1e5, 1e6), "steps": (1_400_000, 14_000_000)}
    assert "refitted on 9 runs of 4 groups" in plan.notes
    fit.lr_rows = np.empty((0, 3))
    assert step_law(1e9, 1e11, fit=fit).intervals == {}
