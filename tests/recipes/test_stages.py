"""Stages whose kinds of method come from outside: extend, merge, callbacks, by cards made for the test."""

from __future__ import annotations

import sys

import pytest
import torch

import gnomon
from gnomon import catalog
from gnomon.catalog import Card, Paper
from gnomon.common.models import save_model, tiny
from gnomon.common.text import train_tokenizer
from gnomon.errors import ConfigError
from gnomon.recipes.runner import run_recipe
from gnomon.recipes.schema import load_recipe

pytestmark = pytest.mark.slow

METHODS = '''
import torch
from transformers import TrainerCallback
from gnomon.common import surgery
from gnomon.common.models import load_model, save_model

def shift(model, by: float = 0.5):
    """Adds a constant to every logit of one token."""
    model.get_output_embeddings().register_forward_hook(lambda m, a, out: out + by)
    surgery.record(model, "shift", {"by": by})
    return model

def average(paths, out):
    """Mean of the weights of several folders."""
    models = [load_model(p) for p in paths]
    with torch.no_grad():
        for parts in zip(*[m.parameters() for m in models], strict=True):
            parts[0].copy_(torch.stack(list(parts)).mean(0))
    save_model(models[0], out)

def first(model, models):
    """Takes the other model."""
    return models[0]

class Count(TrainerCallback):
    """Counts steps."""
    seen = 0
    def __init__(self, by: int = 1):
        self.by = by
    def on_step_end(self, *args, **kwargs):
        Count.seen += self.by
'''


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """Four methods by their cards; returns their module."""
    (tmp_path / "outside_methods.py").write_text(METHODS)
    monkeypatch.syspath_prepend(tmp_path)
    kinds = {"shift": ("architecture", "shift"), "average": ("merger", "average"), "first": ("merger", "first"),
             "count": ("callback", "Count")}  # fmt: skip
    cards = {
        slug: Card(slug, slug, "test", "nn", kind, f"outside_methods:{name}", Paper("none"))
        for slug, (kind, name) in kinds.items()
    }
    cards = {**catalog._all(), **cards}
    monkeypatch.setattr(catalog, "_all", lambda: cards)
    import outside_methods

    yield outside_methods
    del sys.modules["outside_methods"]


@pytest.fixture
def folder(tmp_path, text_file):
    tokenizer = train_tokenizer([text_file.read_text()], 300)
    return save_model(tiny(vocab_size=len(tokenizer), num_layers=1, seed=1), tmp_path / "user", tokenizer)


def _recipe(folder, text_file, *stages):
    evaluate = {"evaluate": {"metrics": ["perplexity"], "tokens": 500}}
    data = {"corpus": str(text_file), "context": 32}
    return load_recipe({"name": "t", "model": str(folder), "data": data, "stages": [*stages, evaluate]})


def test_extend_changes_the_trained_model_and_the_change_survives_saving(outside, folder, text_file, tmp_path):
    recipe = _recipe(folder, text_file, {"extend": {"methods": [{"uses": "shift", "with": {"by": 2.0}}]}})
    run = run_recipe(recipe, out=tmp_path / "r").run
    before, after = run["arms"][0]["stages"]
    assert after["kind"] == "extend"
    assert after["metrics"]["perplexity"]["value"] == pytest.approx(before["metrics"]["perplexity"]["value"], rel=1e-5)
    ids = torch.arange(2, 10)[None]
    with torch.no_grad():
        plain = gnomon.load_model(folder)(input_ids=ids).logits
        shifted = gnomon.load_model(tmp_path / "r" / "model")(input_ids=ids).logits
    torch.testing.assert_close(shifted, plain + 2.0)
    assert not (tmp_path / "r" / "export").exists(), "it has no fold"
    assert any("'shift' cannot be folded" in w for w in run["warnings"])


@pytest.mark.parametrize("slug", ["average", "first"])
def test_merge_takes_mergers_that_write_a_folder_or_return_a_model(outside, folder, text_file, tmp_path, slug):
    other = tiny(vocab_size=300, num_layers=1, seed=2)
    save_model(other, tmp_path / "other")
    recipe = _recipe(folder, text_file, {"merge": {"models": [str(tmp_path / "other")], "methods": [slug]}})
    run_recipe(recipe, out=tmp_path / "r")
    merged = gnomon.load_model(tmp_path / "r" / "model").state_dict()
    own = gnomon.load_model(folder).state_dict()
    for name, tensor in other.state_dict().items():
        want = (own[name] + tensor) / 2 if slug == "average" else tensor
        torch.testing.assert_close(merged[name], want)


def test_merge_without_models_says_what_is_missing(outside, folder, text_file, tmp_path):
    recipe = _recipe(folder, text_file, {"merge": {"methods": ["average"]}})
    with pytest.raises(ConfigError, match="'models' is empty"):
        run_recipe(recipe, out=tmp_path / "r")


def test_train_takes_callbacks(outside, folder, text_file, tmp_path):
    stage = {"tokens": 1000, "batch_size": 4, "methods": [{"uses": "count", "with": {"by": 2}}]}
    run_recipe(_recipe(folder, text_file, {"train": stage}), out=tmp_path / "r")
    assert outside.Count.seen == 2 * 8


def test_bfloat16_accumulation_and_checkpointing_train_too(folder, text_file, tmp_path):
    plain = {"tokens": 2000, "batch_size": 8}
    ends = {}
    for name, extra in {
        "plain": {},
        "accumulated": {"accumulate": 4},
        "checkpointed": {"gradient_checkpointing": True},
        "bfloat16": {"precision": "bfloat16"},
    }.items():
        run = run_recipe(_recipe(folder, text_file, {"train": {**plain, **extra}}), out=tmp_path / name).run
        ends[name] = run["arms"][0]["stages"][-1]["metrics"]["perplexity"]["value"]
    assert ends["accumulated"] == pytest.approx(ends["plain"], rel=1e-4)
    assert ends["checkpointed"] == pytest.approx(ends["plain"], rel=1e-5)
    assert ends["bfloat16"] == pytest.approx(ends["plain"], rel=0.03)
