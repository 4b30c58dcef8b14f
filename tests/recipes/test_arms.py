"""Named arms, and training on prompts with completions."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from gnomon import catalog
from gnomon.common.models import tiny
from gnomon.errors import ConfigError, DataError
from gnomon.recipes.arms import arms_of
from gnomon.recipes.dry import plan
from gnomon.recipes.options import check_recipe
from gnomon.recipes.runner import run_recipe
from gnomon.recipes.schema import load_recipe
from gnomon.reports import write_report
from gnomon.reports.arms import arm_rows
from gnomon.reports.reading import read_run

train_stage: Any = importlib.import_module("gnomon.recipes.stages.train")  # the package has a function of that name

ADAPTER = {"uses": "nola", "with": {"r": 4, "num_basis_a": 8, "target_modules": "all-linear"}}


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    rows = [{"q": f"say {word} {i}: ", "a": word} for i in range(40) for word in ("yes", "no", "maybe")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def paired(pairs: Path) -> dict[str, Any]:
    return {
        "name": "pairs",
        "model": {"architecture": "llama", "size": "nano", "vocab_size": 300, "options": {"num_layers": 2}},
        "data": {"corpus": str(pairs), "prompt_field": "q", "completion_field": "a", "context": 40},
        "arm": "nola",
        "arms": {
            "lora": {"train.methods": [{"uses": "lora", "with": {"r": 2, "lr": 0.02}}]},
            "full": {"train.methods": []},
        },
        "stages": [
            {"train": {"epochs": 2, "batch_size": 16, "lr": 0.01, "methods": [ADAPTER]}},
            {"evaluate": {"metrics": ["perplexity", "accuracy"], "tokens": 500, "texts": 12}},
        ],
    }


def test_arms_side_by_side_on_prompts_with_completions(paired: dict[str, Any], tmp_path: Path) -> None:
    result = run_recipe(load_recipe(paired), out=tmp_path / "run")
    arms = {arm["name"]: arm["stages"][-1] for arm in result.run["arms"]}
    assert list(arms) == ["nola", "lora", "full"]
    trained = {name: stage["details"]["trainable_parameters"] for name, stage in arms.items()}
    assert trained["nola"] < trained["lora"] < trained["full"] == arms["full"]["parameters"]
    state = {name: stage["details"]["optimizer_bytes"] for name, stage in arms.items()}
    assert state["full"] == pytest.approx(8 * trained["full"], rel=0.01), "two moments of four bytes"
    assert state["lora"] == pytest.approx(8 * trained["lora"], rel=0.05)
    assert arms["full"]["metrics"]["perplexity"]["value"] < 30
    assert 0 <= arms["full"]["metrics"]["accuracy"]["value"] <= 1
    rows = 120 - 12
    assert arms["full"]["details"]["steps"] == pytest.approx(2 * rows / 16, abs=2)
    assert result.run["ablation"] == []
    assert (result.folder / "model" / "adapter" / "adapter_config.json").is_file(), "the model of the recipe as written"

    page = write_report(result.folder).read_text(encoding="utf-8")
    assert "Arms side by side" in page
    assert "against memory of weights and optimizer" in page
    table = {row.name: row for row in arm_rows(read_run(result.folder))}
    assert table["full"].trainable == trained["full"]
    assert table["full"].memory == state["full"] + arms["full"]["details"]["weight_bytes"]
    assert table["lora"].methods[0].uses == "lora"
    assert "What each method bought" not in page

    again = run_recipe(load_recipe(paired), out=tmp_path / "run")
    assert all(stage["skipped"] for arm in again.run["arms"] for stage in arm["stages"])


def test_ablation_and_named_arms_in_one_run(paired: dict[str, Any]) -> None:
    arms = arms_of(load_recipe(paired, {"ablate": True}))
    assert [arm.name for arm in arms] == ["nola", "lora", "full", "without nola"]
    assert [u.uses for _, s in arms[1].steps for u in getattr(s, "methods", [])] == ["lora"]
    assert arms[1].without is None


def test_an_adapter_brings_its_own_learning_rate(paired: dict[str, Any]) -> None:
    recipe = load_recipe(paired).with_arm("lora")
    check_recipe(recipe)
    stage: Any = recipe.steps[0][1]
    own = train_stage.with_own_lr(stage)
    assert (stage.lr, own.lr) == (0.01, 0.02)
    assert own.methods[0].with_ == {"r": 2}
    assert train_stage.with_own_lr(own) == own
    model = catalog.resolve(catalog.get("lora").entry)(tiny("llama"))
    assert {group["lr"] for group in train_stage.build_optimizer(stage, model).param_groups} == {0.02}


def test_the_dry_run_counts_rows_and_lists_the_arms(paired: dict[str, Any]) -> None:
    found = plan(load_recipe(paired))
    assert found["arms"] == ["nola", "lora", "full"]
    assert found["data"]["rows"] == 120
    assert found["stages"][0]["steps"] == pytest.approx(2 * 108 / 16, abs=2)


def test_tokens_count_for_rows_of_different_length(paired: dict[str, Any]) -> None:
    paired["stages"][0]["train"] = {"tokens": 2000, "batch_size": 4, "methods": []}
    paired["arms"] = {}
    found = plan(load_recipe(paired))
    length = found["data"]["train_tokens"] / 108
    assert found["stages"][0]["steps"] == pytest.approx(2000 / (4 * length), rel=0.1)


def test_rows_longer_than_the_context_are_set_aside(paired: dict[str, Any], pairs: Path, tmp_path: Path) -> None:
    with pairs.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"q": "long " * 200, "a": "x"}) + "\n")
    paired |= {"arms": {}}
    paired["stages"][0]["train"] |= {"epochs": 0.2}
    result = run_recipe(load_recipe(paired), out=tmp_path / "run")
    assert result.run["data"]["quarantined"] == 1
    line = json.loads((tmp_path / "run" / "quarantine.jsonl").read_text())
    assert line["row"] == 121
    assert "more than data.context = 40" in line["reason"]
    paired["data"]["context"] = 4
    with pytest.raises(DataError, match=r"all \d+ training rows are longer than data.context = 4"):
        plan(load_recipe(paired))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": {"x": {"train.lr": "much"}}}, r"arms\.x: stages\.0\.train\.lr"),
        ({"arms": {"x": {"trian.lr": 1}}}, r"arms\.x: trian\.lr: this recipe has no 'trian'"),
        ({"arms": {"x": {"data.context": 8}}}, "arms.x: an arm changes stages, not 'data'"),
        ({"arms": {"nola": {"train.lr": 1}}}, "this is the name of the recipe as written"),
        ({"data": {"corpus": "x.jsonl", "prompt_field": "p"}}, "'prompt_field' and 'completion_field' go together"),
        (
            {"data": {"corpus": "x", "prompt_field": "p", "completion_field": "c", "text_field": "t"}},
            "'text_field' is for plain text",
        ),
        ({"stages": [{"train": {"batch_size": 4}}]}, "give either 'tokens' or 'epochs'"),
        ({"stages": [{"train": {"tokens": 5, "epochs": 1}}]}, "give either 'tokens' or 'epochs'"),
    ],
)
def test_messages_of_the_schema(paired: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe({**paired, **changes})


def test_messages_of_the_checks(paired: dict[str, Any], text_file: Path) -> None:
    paired["arms"]["lora"]["train.methods"] = [{"uses": "lora", "with": {"rank": 2}}]
    with pytest.raises(ConfigError, match=r"arms\.lora: .*unknown option 'rank'"):
        check_recipe(load_recipe(paired))
    paired["arms"] = {}
    with pytest.raises(ConfigError, match=r"accuracy.*the data are plain text"):
        check_recipe(load_recipe({**paired, "data": {"corpus": str(text_file)}}))
    select = {"select": {"methods": [{"uses": "data-diet"}]}}
    with pytest.raises(ConfigError, match="selection works on windows of plain text"):
        check_recipe(load_recipe({**paired, "stages": [select, *paired["stages"]]}))


def test_baselines_are_found_by_name_but_are_no_methods() -> None:
    card = catalog.get("galore")
    assert (card.plugs, card.claims) == ("optimizer", ())
    assert card.recipe["groups"] == catalog.get("fira").recipe["groups"]
    assert "galore" not in [c.slug for c in catalog.methods()]
    for card in catalog.methods():
        for name, target in card.baselines.items():
            assert callable(catalog.resolve(target))
            assert catalog.get(name).plugs == card.plugs


@pytest.mark.slow
def test_pretrain_lowmem_small(tmp_path: Path) -> None:
    small = {"train.tokens": 6000, "model.size": "nano", "data.context": 32, "evaluate.tokens": 2000}
    result = run_recipe(load_recipe("pretrain-lowmem", small), out=tmp_path / "run")
    ends = {arm["name"]: arm["stages"][-1]["details"] for arm in result.run["arms"]}
    memory = {name: found["weight_bytes"] + found["optimizer_bytes"] for name, found in ends.items()}
    assert list(memory) == ["adamw", "galore", "fira", "gradnorm-lorp", "gradnorm-lorp 8 bits", "sltrain"]
    assert all(memory[name] < memory["adamw"] for name in memory if name != "adamw")
    assert memory["gradnorm-lorp 8 bits"] < memory["gradnorm-lorp"]
    assert ends["sltrain"]["weight_bytes"] < ends["adamw"]["weight_bytes"]
    page = write_report(result.folder).read_text(encoding="utf-8")
    assert "Perplexity against memory of weights and optimizer" in page


@pytest.mark.slow
@pytest.mark.parametrize("line", ["lora-sb", "sora", "allora", "nola", "lora-xs"])
def test_finetune_small_with_another_line(line: str, tmp_path: Path) -> None:
    options = {"r": 4, "target_modules": "all-linear", "lr": 0.01}
    small = {
        "model": {"architecture": "llama", "size": "nano", "vocab_size": 500},
        "train.epochs": 0.02,
        "train.methods": [{"uses": line, "with": options | ({"num_basis_a": 8} if line == "nola" else {})}],
        "evaluate.tokens": 1000,
        "evaluate.texts": 8,
        "arms": {},
    }
    result = run_recipe(load_recipe("finetune-small", small), out=tmp_path / "run")
    assert result.run["arms"][0]["name"] == "adapter"
    assert {"perplexity", "accuracy"} <= set(result.metrics)
    assert 0 < result.run["arms"][0]["stages"][-1]["details"]["trainable_parameters"] < 30_000
