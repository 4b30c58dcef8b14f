"""What every communication hook owes, over all members the catalog finds: as a hook, and in a recipe on two ranks."""

from __future__ import annotations

import inspect
import json
import math
import os
import socket
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import yaml
from transformers import TrainerCallback

import gnomon
from gnomon import catalog
from gnomon.common import corpora
from gnomon.recipes.options import call_of

SLUGS = [card.slug for card in catalog.methods(plugs="comm-hook")]


@pytest.mark.parametrize("slug", SLUGS)
def test_the_entry_is_a_hook_that_ddp_accepts(slug):
    signature = inspect.signature(catalog.load(slug))
    state, bucket = signature.parameters.values()
    assert bucket.name == "bucket"
    assert bucket.annotation in (dist.GradBucket, inspect.Parameter.empty)
    assert signature.return_annotation in (torch.futures.Future[torch.Tensor], inspect.Signature.empty)
    assert state.name == "state"


@pytest.mark.parametrize("slug", SLUGS)
def test_a_recipe_gets_a_callback_with_plain_options_and_defaults(slug):
    call = call_of(slug, "train")
    assert issubclass(call, TrainerCallback)
    for parameter in inspect.signature(call).parameters.values():
        assert parameter.annotation is not inspect.Parameter.empty, parameter
        assert parameter.default is not inspect.Parameter.empty, parameter
    call()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.mark.slow
@pytest.mark.parametrize("slug", SLUGS)
def test_a_recipe_trains_with_it_on_two_ranks_and_on_one(slug, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(corpora.load("python-docs").train)[:40_000], encoding="utf-8")
    recipe = {
        "name": "t",
        "model": {"architecture": "llama", "size": "nano", "vocab_size": 300, "options": {"num_layers": 2}},
        "data": {"corpus": str(text), "context": 32},
        "stages": [
            {"train": {"tokens": 5000, "batch_size": 8, "lr": 3e-3, "methods": [slug]}},
            {"evaluate": {"metrics": ["perplexity"], "tokens": 1000}},
        ],
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    ranks = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    found = {}
    for out, launcher in (("one", []), ("two", ranks)):
        words = [sys.executable, *launcher, "-m", "gnomon.cli.main", "run", "r.yaml", "--out", out, "--json"]
        done = subprocess.run(
            words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found[out] = json.loads(done.stdout)
    assert any("single process" in warning for warning in found["one"]["warnings"])
    assert not any("single process" in warning for warning in found["two"]["warnings"])
    one, two = (math.log(run["arms"][0]["stages"][-1]["metrics"]["perplexity"]["value"]) for run in found.values())
    untrained = math.log(300)
    assert untrained - one > 1
    assert untrained - two > 0.75 * (untrained - one), "twenty steps in, a hundredth of the gradient is sent"
    gnomon.load_model(tmp_path / "two" / "model")
