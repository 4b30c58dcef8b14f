"""The training behind Fira's claims, a few steps of it."""

from __future__ import annotations

import pytest
import torch

from gnomon.claims.fira import beats_galore, scaling_factor_similarity, train
from gnomon.errors import ConfigError


@pytest.mark.slow
def test_a_few_steps_of_every_arm() -> None:
    before = torch.get_rng_state()
    runs = {method: train(method, 0, steps=4) for method in ("fira", "galore", "adamw")}
    again = train("fira", 0, steps=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert again.loss == runs["fira"].loss
    assert len({run.loss for run in runs.values()}) == 3
    assert all(3.0 < run.loss < 5.6 for run in runs.values())
    assert runs["fira"].state_bytes - runs["galore"].state_bytes == 4 * 14
    assert runs["adamw"].state_bytes > 3 * runs["fira"].state_bytes
    # both say what they did to each row or column, along the same axis
    fira, adamw = runs["fira"].factors, runs["adamw"].factors
    assert fira.keys() == adamw.keys()
    assert all(fira[name].shape == adamw[name].shape for name in fira)
    assert train("fira", 1, steps=4).loss != runs["fira"].loss


def test_arms_are_checked() -> None:
    with pytest.raises(ConfigError, match="there is no arm 'adam'"):
        beats_galore("adam", 0)
    assert scaling_factor_similarity.arms == ("matrices", "columns", "shuffled")
