"""Adapters, callbacks, optimizers in recipes: each trains by plain options, and a cut run ends as a whole one does."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest

from gnomon import catalog
from gnomon.common import corpora
from gnomon.recipes.options import call_of, check_recipe
from gnomon.recipes.runner import run_recipe
from gnomon.recipes.schema import load_recipe

train_stage: Any = importlib.import_module("gnomon.recipes.stages.train")  # the package has a function of that name

ADAPTERS = [card.slug for card in catalog.methods(plugs="adapter") if "call" in card.recipe]
CALLBACKS = [card.slug for card in catalog.methods(plugs="callback")]
OPTIMIZERS = [card.slug for card in catalog.methods(plugs="optimizer")]
BASELINES = [
    (name, card.plugs)
    for card in catalog.methods()
    if card.plugs in ("adapter", "callback", "optimizer")
    for name in card.baselines
]
MEMBERS = [
    *[(slug, "adapter") for slug in ADAPTERS],
    ("allora:update", "adapter"),
    *[(slug, "callback") for slug in CALLBACKS],
    *[(slug, "optimizer") for slug in OPTIMIZERS],
    *BASELINES,
]

OPTIONS: dict[str, dict[str, Any]] = {  # where the defaults do not fit 64 channels, and further cases of a slug
    "nola": {"num_basis_a": 16},
    "allora:update": {"apply": "update"},
}


def options_of(slug: str, kind: str) -> dict[str, Any]:
    taken = inspect.signature(call_of(slug.partition(":")[0], "train")).parameters
    small: dict[str, Any] = {"r": 4, "target_modules": "all-linear"} if kind == "adapter" else {}
    if kind == "optimizer":
        small = {"rank": 4}
        return {**small, **OPTIONS.get(slug, {})}
    return {**{name: value for name, value in small.items() if name in taken}, **OPTIONS.get(slug, {})}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(corpora.load("python-docs").train)[:40_000], encoding="utf-8")
    return path


def recipe(slug: str, kind: str, text: Path) -> Any:
    methods: list[Any] = [{"uses": slug.partition(":")[0], "with": options_of(slug, kind)}]
    if kind == "callback" and catalog.get(slug).pillar == "adapters":  # acts on a LoRA
        methods.insert(0, {"uses": "lora", "with": {"r": 4, "target_modules": "all-linear"}})
    return load_recipe(
        {
            "name": "t",
            "model": {"architecture": "llama", "size": "nano", "vocab_size": 300, "options": {"num_layers": 2}},
            "data": {"corpus": str(text), "context": 32},
            "stages": [
                {
                    "train": {
                        "tokens": 12 * 8 * 32,
                        "batch_size": 8,
                        "accumulate": 2,
                        "lr": 1e-2,
                        "checkpoint_every": 4,
                        "methods": methods,
                    }
                },
                {"evaluate": {"metrics": ["perplexity"], "tokens": 1000}},
            ],
        }
    )


def ids(members: list[tuple[str, str]]) -> list[str]:
    return [slug for slug, _ in members]


@pytest.mark.slow
@pytest.mark.parametrize(("slug", "kind"), MEMBERS, ids=ids(MEMBERS))
def test_a_run_that_is_cut_ends_where_the_whole_one_does(
    slug: str, kind: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = recipe(slug, kind, text)
    check_recipe(job)
    whole = run_recipe(job, out=tmp_path / "whole")
    stage = whole.run["arms"][0]["stages"][-1]
    assert stage["details"]["loss_curve"][-1][1] > 0
    if kind == "adapter" or (kind == "callback" and catalog.get(slug).pillar == "adapters"):
        assert 0 < stage["details"]["trainable_parameters"] < 0.5 * stage["parameters"]

    ordinary = train_stage._Watch.on_step_end

    def cut(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        ordinary(self, args, state, control, **kwargs)
        if state.global_step == 6:
            raise KeyboardInterrupt

    monkeypatch.setattr(train_stage._Watch, "on_step_end", cut)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(job, out=tmp_path / "cut")
    monkeypatch.setattr(train_stage._Watch, "on_step_end", ordinary)
    again = run_recipe(job, out=tmp_path / "cut")
    assert again.metrics == whole.metrics
    assert again.run["arms"][0]["stages"][-1]["details"]["loss_curve"][-1] == stage["details"]["loss_curve"][-1]
