"""Replicated and sharded models on two gloo ranks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    script = Path(__file__).with_name("checkpoint_averaging_two_ranks.py")
    ranks = [
        subprocess.Popen(
            [sys.executable, script, str(rank), str(folder / "store"), str(folder)], stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        errors = [rank.communicate(timeout=240)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert all(rank.returncode == 0 for rank in ranks), errors
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"found{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("keep", ["online", "disk"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_every_rank_ends_with_the_average(found: list[dict[str, Any]], kind: str, keep: str) -> None:
    for rank in found:
        assert rank[kind][f"{keep} error"] < 3e-7
        assert rank[kind][f"{keep} saved"] < 3e-7
        assert rank[kind][f"{keep} resumed"] < 3e-7


def test_replicated_ranks_take_the_same_snapshots_and_one_keeps_the_mean(found: list[dict[str, Any]]) -> None:
    first, second = (rank["ddp"] for rank in found)
    assert first["online steps"] == second["online steps"] == [3, 6, 9]
    assert first["online held"] > 0
    assert second["online held"] == 0
    assert first["online resumed"] == second["online resumed"] == 0


def test_sharded_ranks_write_whole_tensors(found: list[dict[str, Any]], folder: Path) -> None:
    assert all(rank["fsdp2"]["online divided"] for rank in found)
    held = load_file(folder / "fsdp-online" / "checkpoint-2" / "checkpoint_averaging.safetensors")
    assert held["model.embed_tokens.weight"].shape == (32, 16)
