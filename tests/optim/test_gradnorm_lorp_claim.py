"""The trainings behind GradNormLoRP's claims, a few steps of them."""

from __future__ import annotations

import pytest
import torch

from gnomon.claims.gradnorm_lorp import adapter_form, beats_galore, eight_bit_state, train
from gnomon.errors import ConfigError


@pytest.mark.slow
def test_a_few_steps() -> None:
    before = torch.get_rng_state()
    losses = {arm: train(arm, 0, steps=3) for arm in ("weightnorm", "galore")}
    assert torch.equal(torch.get_rng_state(), before)
    assert len(set(losses.values())) == 2
    assert all(3.0 < loss < 5.6 for loss in losses.values())


def test_state_of_eight_bits() -> None:
    assert eight_bit_state("adamw", 0, "small") == 1.0
    assert 0.05 < eight_bit_state("gradnorm-lorp-8bit", 0, "small") < 0.105


def test_arms_are_checked() -> None:
    with pytest.raises(ConfigError, match="there is no arm 'adam'"):
        beats_galore("adam", 0)
    assert adapter_form.arms == ("adapter", "lora")
