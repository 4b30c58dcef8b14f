"""Runs, end to end at a small size: numbers, reuse, resume, and what the folder holds."""

from __future__ import annotations

import importlib
import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

import gnomon
from gnomon.common.corpora import windows
from gnomon.errors import ConfigError, DataError, MethodError, ModelError
from gnomon.recipes import runner
from gnomon.recipes.prepare import prepare_data
from gnomon.recipes.runner import run_recipe
from gnomon.recipes.schema import load_recipe

pytestmark = pytest.mark.slow


def _weights(folder):
    return dict(gnomon.load_model(folder).state_dict())


def _same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, small_recipe):
    out = tmp_path_factory.mktemp("runs") / "full"
    recipe = load_recipe(small_recipe, {"ablate": True})
    return run_recipe(recipe, out=out), recipe


def test_every_arm_and_stage_has_its_numbers(finished):
    result, _ = finished
    run = result.run
    assert run["status"] == "finished"
    assert [a["name"] for a in run["arms"]] == [
        "all", "without layernorm-scaling", "without fira", "without dsnot", "without eora",
    ]  # fmt: skip
    for arm in run["arms"]:
        assert [s["kind"] for s in arm["stages"]] == ["train", "compress"]
        for stage in arm["stages"]:
            figure = stage["metrics"]["perplexity"]
            assert figure["low"] < figure["value"] < figure["high"]
            assert stage["metrics"]["matrix-nuclear-norm.mnn"]["value"] > 0
            assert stage["peak_memory_bytes"] > 0
            assert stage["seconds"] > 0
    trained, compressed = run["arms"][0]["stages"]
    assert trained["nonzero_parameters"] > 0.99 * trained["parameters"]
    assert compressed["nonzero_parameters"] < 0.85 * compressed["parameters"]
    assert len(trained["details"]["loss_curve"]) > 5
    assert len(trained["details"]["depth"]) == 2
    assert {layer["method"] for layer in compressed["details"]["layers"]} == {"dsnot", "eora"}
    json.dumps(run, allow_nan=False)


def test_arms_share_what_they_have_in_common(finished):
    stages = {a["name"]: a["stages"] for a in finished[0].run["arms"]}
    assert stages["without eora"][0]["skipped"]
    assert stages["without eora"][0]["key"] == stages["all"][0]["key"]
    assert not stages["without fira"][0]["skipped"]
    keys = {s["key"] for row in stages.values() for s in row}
    assert len(keys) == 3 + 5, "three trainings, five compressions"


def test_the_ablation_is_with_minus_without_at_the_end(finished):
    run = finished[0].run
    end = {a["name"]: a["stages"][-1]["metrics"]["perplexity"]["value"] for a in run["arms"]}
    rows = {r["method"]: r for r in run["ablation"] if r["metric"] == "perplexity"}
    assert set(rows) == {"layernorm-scaling", "fira", "dsnot", "eora"}
    for method, row in rows.items():
        assert row["difference"] == pytest.approx(end["all"] - end[f"without {method}"])
        assert row["low"] <= row["difference"] <= row["high"]
        assert row["spread"] == "windows"


def test_the_saved_model_and_its_stock_copy_give_the_same_logits(finished):
    result, recipe = finished
    data = prepare_data(recipe)
    ids = windows(data.valid_tokens, data.context)[:4]
    changed = gnomon.load_model(result.folder / "model").eval()
    stock = AutoModelForCausalLM.from_pretrained(result.folder / "export").eval()
    with torch.no_grad():
        torch.testing.assert_close(stock(input_ids=ids).logits, changed(input_ids=ids).logits, rtol=0, atol=1e-5)
    assert not hasattr(stock.config, "gnomon")


def test_the_folder_describes_itself_and_keeps_no_leftovers(finished):
    result, recipe = finished
    assert load_recipe(result.folder / "recipe.yaml") == recipe
    assert json.loads((result.folder / "run.json").read_text()) == result.run
    events = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert {e["event"] for e in events} == {"train", "stage"}
    assert not list(result.folder.rglob("checkpoint-*"))
    assert not list(result.folder.rglob("*.part"))
    models = list((result.folder / "stages").glob("*/model"))
    assert [m.parent.name for m in models] == [result.run["arms"][0]["stages"][-1]["key"]]


def test_a_second_run_computes_nothing(finished, tmp_path, monkeypatch):
    result, recipe = finished
    copy = tmp_path / "copy"
    shutil.copytree(result.folder, copy)
    monkeypatch.setattr(runner, "run_stage", lambda *a: pytest.fail("a finished stage was run again"))
    monkeypatch.setattr(runner, "evaluate", lambda *a: pytest.fail("a finished measurement was made again"))
    again = run_recipe(recipe, out=copy)
    assert all(s["skipped"] for a in again.run["arms"] for s in a["stages"])
    assert again.run["ablation"] == result.run["ablation"]
    assert again.metrics == result.metrics


def test_a_dropped_model_is_made_again_when_a_later_stage_needs_it(finished, tmp_path):
    result, recipe = finished
    copy = tmp_path / "copy"
    shutil.copytree(result.folder, copy)
    last = result.run["arms"][0]["stages"][-1]["key"]
    shutil.rmtree(copy / "stages" / last)
    again = run_recipe(recipe, out=copy)
    assert again.metrics == result.metrics
    assert _same(_weights(copy / "model"), _weights(result.folder / "model"))


class _Stop(KeyboardInterrupt):
    pass


@pytest.mark.parametrize("step", [7, 12])
def test_interrupted_in_training_and_run_again_ends_in_the_same_weights(recipe, tmp_path, monkeypatch, step):
    stage = importlib.import_module("gnomon.recipes.stages.train")
    recipe["stages"][0]["train"]["checkpoint_every"] = 5
    del recipe["stages"][1]
    checked = load_recipe(recipe)
    whole = run_recipe(checked, out=tmp_path / "whole")

    original = stage._Watch.on_step_end

    def stop(self, args, state, control, **kwargs):
        original(self, args, state, control, **kwargs)
        if state.global_step == step:
            raise _Stop

    monkeypatch.setattr(stage._Watch, "on_step_end", stop)
    with pytest.raises(_Stop):
        run_recipe(checked, out=tmp_path / "cut")
    assert json.loads((tmp_path / "cut" / "run.json").read_text())["status"] == "interrupted"
    assert not (tmp_path / "cut" / "model").exists()
    monkeypatch.setattr(stage._Watch, "on_step_end", original)

    # What a kill in the middle of a save leaves behind: a checkpoint without its mark.
    (cut,) = (tmp_path / "cut" / "stages").glob("*/checkpoints")
    shutil.copytree(cut / f"checkpoint-{step // 5 * 5}", cut / "checkpoint-14")
    (cut / "checkpoint-14" / stage.COMPLETE).unlink()

    again = run_recipe(checked, out=tmp_path / "cut")
    assert _same(_weights(tmp_path / "cut" / "model"), _weights(tmp_path / "whole" / "model"))
    assert again.metrics == whole.metrics
    curves = [r.run["arms"][0]["stages"][0]["details"]["loss_curve"] for r in (again, whole)]
    assert [p[0] for p in curves[0]] == [p[0] for p in curves[1]]


def test_interrupted_between_stages_and_run_again(recipe, tmp_path, monkeypatch):
    checked = load_recipe(recipe)
    whole = run_recipe(checked, out=tmp_path / "whole")
    real = runner.run_stage

    def stop(kind, *rest):
        if kind == "compress":
            raise KeyboardInterrupt
        return real(kind, *rest)

    monkeypatch.setattr(runner, "run_stage", stop)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(checked, out=tmp_path / "cut")
    monkeypatch.setattr(runner, "run_stage", real)
    again = run_recipe(checked, out=tmp_path / "cut")
    assert [s["skipped"] for s in again.run["arms"][0]["stages"]] == [True, False]
    assert again.metrics == whole.metrics


def test_seeds_are_repetitions_with_a_range(recipe, tmp_path):
    del recipe["stages"][1]
    recipe["stages"][0]["train"]["methods"] = [{"uses": "layernorm-scaling"}]
    recipe["stages"][0]["train"]["tokens"] = 2000
    recipe["stages"][1]["evaluate"]["metrics"] = ["perplexity"]
    run = run_recipe(load_recipe(recipe, {"seeds": 3, "ablate": True}), out=tmp_path / "r").run
    assert [(a["name"], a["seed"]) for a in run["arms"]] == [
        (name, seed) for name in ("all", "without layernorm-scaling") for seed in range(3)
    ]
    (row,) = run["ablation"]
    assert row["spread"] == "seeds"
    assert row["seeds"] == 3
    assert row["low"] < row["high"]
    values = {a["stages"][0]["metrics"]["perplexity"]["value"] for a in run["arms"]}
    assert len(values) == 6


def test_a_changed_recipe_is_refused_in_the_same_folder(recipe, tmp_path):
    del recipe["stages"][1]
    run_recipe(load_recipe(recipe), out=tmp_path / "r")
    before = (tmp_path / "r" / "run.json").read_text()
    recipe["stages"][0]["train"]["tokens"] = 7000
    with pytest.raises(ConfigError, match=r"another recipe \(stages\.0\.train\.tokens: 6000 -> 7000\).*--out"):
        run_recipe(load_recipe(recipe), out=tmp_path / "r")
    assert (tmp_path / "r" / "run.json").read_text() == before


def test_folders_that_are_not_ours_are_left_alone(recipe, tmp_path):
    (tmp_path / "f").write_text("x")
    with pytest.raises(ConfigError, match="is a file"):
        run_recipe(load_recipe(recipe), out=tmp_path / "f")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match="is not empty and holds no run"):
        run_recipe(load_recipe(recipe), out=tmp_path / "d")
    assert [p.name for p in (tmp_path / "d").iterdir()] == ["thesis.tex"]


def test_a_folder_in_use_is_refused(recipe, tmp_path):
    from filelock import FileLock

    (tmp_path / "r").mkdir()
    with FileLock(tmp_path / "r" / ".lock"), pytest.raises(ConfigError, match="in use by another run"):
        run_recipe(load_recipe(recipe), out=tmp_path / "r")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"dsnot.sparsity": 1.0}, ConfigError, r"stages\.1\.compress \(dsnot\): .*sparsity.*1\.0"),
        ({"dsnot.sparsity": -0.1}, ConfigError, r"sparsity"),
        ({"eora.rank": 0}, ConfigError, r"stages\.1\.compress \(eora\): .*rank"),
        ({"fira.rank": 0}, ConfigError, r"stages\.0\.train \(fira\): .*rank"),
        ({"data.context": 512}, ConfigError, r"data\.context = 512: this model has 64 positions"),
        ({"data": "EMPTY"}, DataError, "no usable text"),
        ({"data": "SHORT"}, DataError, "fewer than one context of 32"),
        ({"model": "EMPTYDIR"}, ModelError, "no usable tokenizer|is no model"),
        ({"train.batch_size": 9, "train.accumulate": 2}, ConfigError, "does not divide.*multiple of 2"),
    ],
)
def test_what_can_be_known_beforehand_is_refused_before_anything_is_written(recipe, tmp_path, changes, error, message):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "emptydir").mkdir()
    named = {"EMPTY": "empty.txt", "SHORT": "short.txt", "EMPTYDIR": "emptydir"}
    changes = {k: str(tmp_path / named[v]) if v in named else v for k, v in changes.items()}
    if "model" in changes:
        recipe["stages"][0]["train"]["methods"].pop(0)
    if "data.context" in changes:
        recipe["model"]["options"]["max_positions"] = 64
    with pytest.raises(error, match=message):
        run_recipe(load_recipe(recipe, changes), out=tmp_path / "r")
    assert not list((tmp_path / "r").rglob("model"))
    assert not list((tmp_path / "r").rglob("result.json"))


def test_quarantined_rows_are_counted_and_listed(recipe, tmp_path, text_file):
    rows = [json.dumps({"text": t}) for t in text_file.read_text().split("\n\n") if t.strip()]
    (tmp_path / "a.jsonl").write_text("\n".join([*rows, "{broken"]))
    del recipe["stages"][1]
    recipe["stages"][0]["train"]["tokens"] = 500
    run = run_recipe(load_recipe(recipe, {"data": str(tmp_path / "a.jsonl")}), out=tmp_path / "r").run
    assert (run["data"]["quarantined"], run["data"]["quarantine_file"]) == (1, "quarantine.jsonl")
    assert json.loads((tmp_path / "r" / "quarantine.jsonl").read_text())["row"] == len(rows) + 1
    assert any("1 rows of the data" in w for w in run["warnings"])
    with pytest.raises(DataError, match=r"a\.jsonl, row \d+: not JSON"):
        run_recipe(load_recipe(recipe, {"data": str(tmp_path / "a.jsonl"), "data.strict": True}), out=tmp_path / "s")


def test_a_fault_in_a_method_names_it_and_leaves_no_half_stage(recipe, tmp_path, monkeypatch):
    from gnomon.recipes.stages import context

    def broken(model, rank):
        raise MethodError("rank is wrong")

    real = context.call_of
    monkeypatch.setattr(context, "call_of", lambda slug, stage: broken if slug == "eora" else real(slug, stage))
    del recipe["stages"][0]
    recipe["stages"][0]["compress"]["methods"].pop(0)
    with pytest.raises(MethodError, match="eora: rank is wrong"):
        run_recipe(load_recipe(recipe), out=tmp_path / "r")
    assert json.loads((tmp_path / "r" / "run.json").read_text())["status"] == "failed"
    assert not list((tmp_path / "r").rglob("result.json"))


def test_a_rank_above_the_matrix_is_lowered_and_the_run_says_so(recipe, tmp_path, recwarn):
    recipe["stages"][0]["train"]["tokens"] = 500
    run = run_recipe(load_recipe(recipe, {"fira.rank": 999, "eora.rank": 999}), out=tmp_path / "r").run
    notes = [w for w in run["warnings"] if "999" in w]
    assert any("rank = 999 is above the smaller dimension" in w for w in notes), "the optimizer says it"
    assert any("exceeds min(out, in)" in w for w in notes), "the adapter says it"
    assert not [w for w in recwarn if "999" in str(w.message)], "in the run, not on the terminal"
