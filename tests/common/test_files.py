"""Files are whole or absent; memory and environment are measured."""

from __future__ import annotations

import json
import os
import sys
import time

import pytest
import torch

from gnomon.common.environment import environment
from gnomon.common.files import atomic_folder, cache_dir, content_hash, read_json, write_json, write_text
from gnomon.common.memory import PeakMemory, tensor_bytes


def test_write_text_replaces_whole_and_keeps_the_old_file_on_failure(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "a.txt"
    write_text(path, "one")
    write_text(path, "two")
    assert path.read_text() == "two"

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_text(path, "three")
    assert path.read_text() == "two"
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]


def test_json_refuses_nan_and_round_trips(tmp_path):
    write_json(tmp_path / "a.json", {"x": [1, 2.5, "ü"]})
    assert read_json(tmp_path / "a.json") == {"x": [1, 2.5, "ü"]}
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert json.loads((tmp_path / "a.json").read_text())["x"][1] == 2.5


def test_atomic_folder_is_all_or_nothing(tmp_path):
    with atomic_folder(tmp_path / "f") as part:
        (part / "a").write_text("1")

    def half_way():
        with atomic_folder(tmp_path / "f") as part:
            (part / "a").write_text("2")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        half_way()
    assert (tmp_path / "f" / "a").read_text() == "1"
    with atomic_folder(tmp_path / "f") as part:
        (part / "b").write_text("3")
    assert sorted(p.name for p in (tmp_path / "f").iterdir()) == ["b"]
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_content_hash_ignores_key_order_only():
    assert content_hash({"a": 1, "b": 2}) == content_hash({"b": 2, "a": 1})
    assert content_hash({"a": 1}) != content_hash({"a": 2})


def test_cache_dir_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("GNOMON_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("GNOMON_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "gnomon"


@pytest.mark.parametrize("kernel", [True, False])
def test_peak_memory_sees_an_allocation_that_is_gone_at_the_end(kernel, monkeypatch):
    from gnomon.common import memory as module

    if not kernel:
        monkeypatch.setattr(module, "_restart_kernel_peak", lambda: False)
    with PeakMemory(every=0.001) as memory:
        block = torch.ones(30_000_000)
        block.add_(1)
        if not kernel:
            time.sleep(0.5)  # on a busy machine the reading thread waits for its turn
        del block
    assert 80_000_000 < memory.added < 400_000_000


@pytest.mark.skipif(sys.platform != "linux", reason="other allocators cannot be told")
def test_memory_that_the_allocator_kept_is_not_taken_for_free():
    """Many small blocks, freed under a last one that stays, are what the allocator keeps."""
    kept = [torch.ones(30_000) for _ in range(1500)]
    last = torch.ones(30_000)
    del kept
    with PeakMemory() as memory:
        again = [torch.ones(30_000) for _ in range(1500)]
    assert memory.added > 100_000_000
    del again, last


def test_blocks_within_blocks_lose_no_peak():
    with PeakMemory() as outer:
        block = torch.ones(30_000_000)
        del block
        with PeakMemory() as inner:
            small = torch.ones(5_000_000)
            del small
    assert outer.added > 80_000_000
    assert inner.added < 60_000_000


def test_tensor_bytes_counts_shared_storage_once():
    weight = torch.zeros(10, 10)
    assert tensor_bytes({"a": weight, "b": [weight, torch.zeros(5, dtype=torch.int8)]}) == 405
    assert tensor_bytes(torch.nn.Linear(3, 2)) == 4 * 8


def test_environment_says_what_was_measured_on():
    found = environment()
    assert found["torch"] == torch.__version__ or found["torch"] in torch.__version__
    assert found["cores"] >= 1
    assert found["memory_bytes"] > 1 << 28
    json.dumps(found)
