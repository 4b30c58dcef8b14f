"""The training behind Mix-LN's claims, a few steps of it."""

from __future__ import annotations

import itertools

import pytest
import torch

from gnomon.claims import deep_llama, mix_ln
from gnomon.claims.mix_ln import even_gradients, lower_loss, small_embeddings
from gnomon.errors import ConfigError


@pytest.mark.slow
def test_a_few_steps_of_every_arm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(deep_llama.SCALES, "small", (4, 2, 3e-3))
    stream, windows = deep_llama.streams()
    monkeypatch.setattr(mix_ln, "streams", lambda: (stream, windows[:4]))
    state = torch.get_rng_state()
    losses = {arm: lower_loss(arm, 17) for arm in lower_loss.arms}
    assert torch.equal(torch.get_rng_state(), state)
    assert len(set(losses.values())) == 4
    assert all(4.0 < loss < 6.5 for loss in losses.values())
    assert small_embeddings("wide", 17) == losses["pre_wide"] - losses["mix_wide"], "trained once"


def test_the_schedule_warms_up_and_ends_at_a_tenth() -> None:
    rates = [deep_llama.learning_rate(step, 100, 1.0) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[100] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))


def test_arms_are_checked() -> None:
    with pytest.raises(ConfigError, match="there is no arm 'lns'"):
        lower_loss("lns", 0)
    assert even_gradients.arms == ("pre", "mix", "post")
