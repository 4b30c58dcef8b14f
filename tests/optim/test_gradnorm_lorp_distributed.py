"""GradNormLoRP's sharded and replicated weights on two gloo ranks against one rank."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("ranks")
    script = Path(__file__).with_name("gradnorm_lorp_two_ranks.py")
    tail = [str(folder / "store"), str(folder / "found.json")]
    ranks = [
        subprocess.Popen([sys.executable, script, str(rank), *tail], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        errors = [rank.communicate(timeout=240)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert all(rank.returncode == 0 for rank in ranks), errors
    return json.loads((folder / "found.json").read_text())


def test_sharded_weights_equal_one_rank(found: dict[str, Any]) -> None:
    assert len(found["sharded"]) == 32
    for name, difference in found["sharded"].items():
        # off the diagonal of a two-sided projection Adam brings rounding noise to size
        assert difference < (1e-8 if "both sides" in name else 1e-12), name


def test_state_goes_through_a_distributed_checkpoint(found: dict[str, Any]) -> None:
    for name, (difference, eight) in found["checkpoint"].items():
        assert difference == 0.0, name
        assert eight == name.endswith(" 8"), name


def test_what_several_ranks_are_told(found: dict[str, Any]) -> None:
    assert "the 2 ranks have not averaged yet" in found["messages"]["step_in_backward"]
    assert "bits = 8 does not reach parameter 'embed' and 0 further sharded weights" in found["messages"]["eight bits"]
