"""Sharded and replicated weights on two gloo ranks against one rank."""

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
    script = Path(__file__).with_name("fira_two_ranks.py")
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
    assert len(found["sharded"]) == 11
    for name, difference in found["sharded"].items():
        assert difference < 1e-12, name


def test_ranks_share_the_first_ones_projector(found: dict[str, Any]) -> None:
    assert found["apart with broadcast"] == 0.0
    assert found["apart without"] > 1e-3


def test_state_goes_through_a_distributed_checkpoint(found: dict[str, Any]) -> None:
    assert found["checkpoint"] == 0.0


def test_stepping_in_the_backward_pass_is_refused(found: dict[str, Any]) -> None:
    assert "the 2 ranks have not averaged yet" in found["refusals"]["step_in_backward"]
