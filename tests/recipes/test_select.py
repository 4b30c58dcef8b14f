"""The select stage: which training rows the later stages see; and methods that a recipe calls by another name."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch

from gnomon import catalog
from gnomon.catalog import Card, Paper
from gnomon.common.corpora import windows
from gnomon.errors import ConfigError, DataError
from gnomon.recipes.prepare import prepare_data
from gnomon.recipes.runner import run_recipe
from gnomon.recipes.schema import load_recipe
from gnomon.recipes.stages.train import _Rows

pytestmark = pytest.mark.slow

METHODS = '''
import torch
from transformers import TrainerCallback

def entry(model):
    raise AssertionError("a recipe calls what `call` names")

def every(model, rows, seed, by: int = 2):
    """Keeps every `by`-th row, in no order."""
    assert rows.ndim == 2
    return torch.arange(0, len(rows), by).flip(0)

def none(model, rows):
    return []

class Count(TrainerCallback):
    seen = 0
    def on_step_end(self, *args, **kwargs):
        Count.seen += 1
'''


@pytest.fixture
def outside(tmp_path, monkeypatch):
    (tmp_path / "select_methods.py").write_text(METHODS)
    monkeypatch.syspath_prepend(tmp_path)
    made = {
        "every": ("dataset", {"stages": ["select"], "call": "select_methods:every", "without": {"by": 1}}),
        "none": ("dataset", {"stages": ["select"], "call": "select_methods:none"}),
        "hook": ("comm-hook", {"call": {"train": "select_methods:Count"}}),
    }
    cards = {
        slug: Card(slug, slug, "test", "nn", kind, "select_methods:entry", Paper("none"), recipe=recipe)
        for slug, (kind, recipe) in made.items()
    }
    cards = {**catalog._all(), **cards}
    monkeypatch.setattr(catalog, "_all", lambda: cards)
    import select_methods

    yield select_methods
    del sys.modules["select_methods"]


def recipe(text_file, *stages):
    return load_recipe(
        {
            "name": "t",
            "model": {"architecture": "llama", "size": "nano", "vocab_size": 300, "options": {"num_layers": 1}},
            "data": {"corpus": str(text_file), "context": 32},
            "stages": [*stages, {"evaluate": {"metrics": ["perplexity"], "tokens": 500, "each_stage": False}}],
        }
    )


TRAIN = {"train": {"tokens": 1500, "batch_size": 4}}


def test_training_sees_the_rows_that_two_selections_kept(outside, text_file, tmp_path, monkeypatch):
    seen = []
    get = _Rows.__getitem__
    monkeypatch.setattr(_Rows, "__init__", lambda self, rows: (seen.append(rows), setattr(self, "rows", rows))[0])
    monkeypatch.setattr(_Rows, "__getitem__", get)
    job = recipe(text_file, {"select": {"methods": ["every", {"uses": "every", "with": {"by": 3}}]}}, TRAIN)
    run = run_recipe(job, out=tmp_path / "r").run
    every_row = windows(prepare_data(job).train_tokens, 32)
    assert torch.equal(seen[0], every_row[::6])
    chosen, _ = run["arms"][0]["stages"]
    assert chosen["details"]["rows"] == len(every_row)
    assert chosen["details"]["kept"] == len(every_row[::6])
    assert chosen["details"]["notes"][0].startswith(f"every kept {len(every_row[::2]):,} of {len(every_row):,} rows")
    file = tmp_path / "r" / "stages" / chosen["key"] / "rows.npy"
    assert np.array_equal(np.load(file), np.arange(0, len(every_row), 6))


def test_a_second_run_uses_the_selection_it_has(outside, text_file, tmp_path, monkeypatch):
    job = recipe(text_file, {"select": {"methods": ["every"]}}, TRAIN)
    first = run_recipe(job, out=tmp_path / "r").run
    (tmp_path / "r" / "stages" / first["arms"][0]["stages"][1]["key"] / "result.json").unlink()

    def fail(model, rows, seed, by: int = 2):
        raise AssertionError("the selection is there already")

    monkeypatch.setattr(outside, "every", fail)
    again = run_recipe(job, out=tmp_path / "r").run
    old, new = (json.dumps(r["arms"][0]["stages"][1]["details"]["loss_curve"]) for r in (first, again))
    assert old == new


def test_the_arm_without_it_takes_the_options_of_its_card(outside, text_file, tmp_path):
    job = recipe(text_file, {"select": {"methods": ["every"]}}, TRAIN).model_copy(update={"ablate": True})
    run = run_recipe(job, out=tmp_path / "r").run
    kept = {arm["name"]: arm["stages"][0]["details"]["kept"] for arm in run["arms"]}
    assert kept["without every"] == run["arms"][0]["stages"][0]["details"]["rows"] > kept["all"]


def test_a_selection_of_nothing_is_refused(outside, text_file, tmp_path):
    with pytest.raises(DataError, match=r"none kept none of \d+ training rows"):
        run_recipe(recipe(text_file, {"select": {"methods": ["none"]}}, TRAIN), out=tmp_path / "r")


def test_a_method_is_called_by_what_its_card_names_for_the_stage(outside, text_file, tmp_path):
    outside.Count.seen = 0
    run_recipe(recipe(text_file, {"train": {**TRAIN["train"], "methods": ["hook"]}}), out=tmp_path / "r")
    assert outside.Count.seen == 12


def test_a_dataset_method_in_a_train_stage_is_refused(outside, text_file, tmp_path):
    with pytest.raises(ConfigError, match=r"cannot join a train stage; it can join: select"):
        run_recipe(recipe(text_file, {"train": {**TRAIN["train"], "methods": ["every"]}}), out=tmp_path / "r")
