"""The built-in recipe for a model that exists: a user's own folder, of several families."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

import gnomon
from gnomon.common.layers import decoder_blocks, linear_layers, weight_of
from gnomon.common.models import save_model, tiny
from gnomon.common.text import train_tokenizer
from gnomon.errors import ConfigError
from gnomon.recipes.options import check_recipe
from gnomon.recipes.runner import run_recipe
from gnomon.recipes.schema import load_recipe

pytestmark = pytest.mark.slow


@pytest.fixture(params=["qwen", "gpt2"])
def folder(request, tmp_path, text_file):
    """A Hugging Face folder: Qwen2 with grouped queries and tied embeddings, or GPT-2 with Conv1D."""
    tokenizer = train_tokenizer([text_file.read_text()], 300)
    model = tiny(request.param, vocab_size=len(tokenizer), num_layers=2)
    return save_model(model, tmp_path / request.param, tokenizer)


SMALL = {"train.tokens": 2000, "data.context": 32, "compress.calibration": 8, "eora.rank": 4, "evaluate.tokens": 1000,
         "evaluate.texts": 4}  # fmt: skip


def test_squeeze_on_a_users_own_folder(folder, text_file, tmp_path):
    before = {f.name: f.read_bytes() for f in folder.iterdir()}
    recipe = load_recipe("squeeze", {"model": str(folder), "data": str(text_file), **SMALL})
    result = run_recipe(recipe, out=tmp_path / "run")
    arm = result.run["arms"][0]
    assert [s["label"] for s in arm["stages"]] == ["as loaded", "train", "compress"]
    loaded, trained, squeezed = arm["stages"]
    assert trained["metrics"]["perplexity"]["value"] < loaded["metrics"]["perplexity"]["value"]
    assert squeezed["nonzero_parameters"] < trained["nonzero_parameters"]
    assert {r["method"] for r in result.run["ablation"]} == {"fira", "dsnot", "eora"}
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == before, "the user's folder is untouched"

    ids = torch.arange(2, 34)[None]
    with torch.no_grad():
        ours = gnomon.load_model(tmp_path / "run" / "model").eval()(input_ids=ids).logits
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "export").eval()(input_ids=ids).logits
    torch.testing.assert_close(stock, ours, rtol=0, atol=1e-5)


def test_pruned_weights_stay_zero_when_training_goes_on(folder, text_file, tmp_path):
    recipe = load_recipe(
        {
            "name": "prune-then-train",
            "model": str(folder),
            "data": {"corpus": str(text_file), "context": 32},
            "stages": [
                {"compress": {"calibration": 4, "methods": [{"uses": "dsnot", "with": {"sparsity": 0.5}}]}},
                {"train": {"tokens": 1000, "batch_size": 4}},
                {"evaluate": {"metrics": ["perplexity"], "tokens": 500}},
            ],
        }
    )
    stages = run_recipe(recipe, out=tmp_path / "run").run["arms"][0]["stages"]
    model = gnomon.load_model(tmp_path / "run" / "model")
    for block in decoder_blocks(model):
        for layer in linear_layers(block).values():
            weight = weight_of(layer)
            assert int((weight == 0).sum()) >= weight.shape[0] * (weight.shape[1] // 2)
    assert stages[2]["metrics"]["perplexity"]["value"] < stages[1]["metrics"]["perplexity"]["value"]


def test_fresh_weights_of_an_existing_configuration_take_scratch_methods(folder, text_file, tmp_path):
    methods = [{"uses": "layernorm-scaling"}]
    recipe = {
        "name": "fresh",
        "model": {"path": str(folder)},
        "data": {"corpus": str(text_file), "context": 32},
        "stages": [{"train": {"tokens": 500, "batch_size": 4, "methods": methods}},
                   {"evaluate": {"metrics": ["perplexity"], "tokens": 500}}],
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"model\.weights: random"):
        check_recipe(load_recipe(recipe))
    recipe["model"]["weights"] = "random"
    run = run_recipe(load_recipe(recipe), out=tmp_path / "run").run
    assert [s["label"] for s in run["arms"][0]["stages"]] == ["train"]


def test_squeeze_without_model_or_data_says_how_to_give_them():
    with pytest.raises(ConfigError, match=r"--set model=FOLDER_OR_HUB_ID; data: .*--set data=TEXT_FILE"):
        load_recipe("squeeze")
