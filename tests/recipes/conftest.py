"""A recipe small enough to run in a second."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

from gnomon.common import corpora

RECIPE = {
    "name": "mini",
    "model": {"architecture": "llama", "size": "nano", "vocab_size": 300, "options": {"num_layers": 2}},
    "data": {"corpus": "", "context": 32},
    "stages": [
        {
            "train": {
                "tokens": 6000,
                "batch_size": 8,
                "methods": [{"uses": "layernorm-scaling"}, {"uses": "fira", "with": {"rank": 4, "lr": 0.01}}],
            }
        },
        {
            "compress": {
                "calibration": 8,
                "methods": [
                    {"uses": "dsnot", "with": {"base": "wanda", "sparsity": 0.5}},
                    {"uses": "eora", "with": {"rank": 4}},
                ],
            }
        },
        {"evaluate": {"metrics": ["perplexity", "matrix-nuclear-norm"], "tokens": 2000, "texts": 4}},
    ],
}


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("\n\n".join(corpora.load("python-docs").train)[:60_000], encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def small_recipe(text_file) -> dict:
    """The five methods in three stages; not to be changed."""
    made = copy.deepcopy(RECIPE)
    made["data"]["corpus"] = str(text_file)
    return made


@pytest.fixture
def recipe(small_recipe) -> dict:
    """The same; change it as you like."""
    return copy.deepcopy(small_recipe)
