"""Fixtures shared by the whole suite."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

# Examples are bounded in number; how long one takes depends on what else the machine does.
settings.register_profile("gnomon", deadline=None, max_examples=50)
settings.load_profile("gnomon")

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

DATA_ROOT = Path(os.environ.get("GNOMON_SHARED_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """Return the folder of a real data set by name; without it the test is skipped, or fails when data is required."""

    def folder(name: str) -> Path:
        path = DATA_ROOT / name
        if path.is_dir():
            return path
        message = f"the data set {name!r} is not at {path} (set GNOMON_SHARED_DATA)"
        if os.environ.get("GNOMON_REQUIRE_DATA") == "1":
            pytest.fail(message)
        pytest.skip(message)

    return folder


@pytest.fixture(scope="session", autouse=True)
def _two_threads_at_most() -> None:
    import torch

    torch.set_num_threads(1 if os.environ.get("PYTEST_XDIST_WORKER") else 2)
