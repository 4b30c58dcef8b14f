"""Checkpoints on disk: the average of every layout, what is copied, and what is refused."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent))
from checkpoint_averaging_definition import mean_of, moved, save_run, seeded_states

from gnomon.common.models import load_model, save_model, tiny
from gnomon.common.text import byte_tokenizer
from gnomon.errors import GnomonWarning, MethodError, ModelError, NoEffectWarning
from gnomon.merge import average_checkpoints, average_states, find_checkpoints
from gnomon.merge.checkpoint_averaging import offline


def write(folder: Path, state: dict[str, torch.Tensor], name: str = "model.safetensors", **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / name, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    return folder


def write_run(root: Path, states: list[dict[str, torch.Tensor]]) -> list[Path]:
    return [write(root / f"checkpoint-{10 * (i + 1)}", state) for i, state in enumerate(states)]


@pytest.mark.parametrize("piece", [1, 7, 64, 1 << 18])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_offline_equals_in_memory_bit_for_bit(
    tmp_path: Path, dtype: torch.dtype, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offline, "PIECE", piece)
    states = seeded_states(4, dtype)
    paths = write_run(tmp_path, states)
    for weights in (None, [0.1, 0.2, 0.0, 0.7]):
        found = load_file(average_checkpoints(paths, tmp_path / "out", weights) / "model.safetensors")
        expected = average_states(states, weights)
        assert {k: v.dtype for k, v in found.items()} == {k: v.dtype for k, v in expected.items()}
        assert all(torch.equal(found[k], expected[k]) for k in expected)


@pytest.mark.parametrize("family", ["llama", "qwen", "gpt2", "bert", "marian", "mixtral"])
def test_the_result_loads_and_equals_the_mean_of_the_parameters(family: str, tmp_path: Path) -> None:
    paths = save_run(tmp_path, 3, family)
    found = load_model(average_checkpoints(paths, tmp_path / "out")).state_dict()
    expected = mean_of([load_model(p).state_dict() for p in paths])
    assert max(float((found[k].double() - v).abs().max()) for k, v in expected.items()) < 2e-7


def test_tied_weights_are_averaged_once_and_stay_tied(tmp_path: Path) -> None:
    out = average_checkpoints(save_run(tmp_path, 2, "gpt2"), tmp_path / "out")
    model = load_model(out)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert "lm_head.weight" not in load_file(out / "model.safetensors")


def test_shards_are_written_as_the_last_checkpoint_divides_them(tmp_path: Path) -> None:
    one = save_run(tmp_path / "one", 3)
    many = save_run(tmp_path / "many", 3, max_shard_size="20KB")
    assert (many[0] / "model.safetensors.index.json").is_file()
    out = average_checkpoints(many, tmp_path / "out")
    assert sorted(p.name for p in out.glob("*.safetensors*")) == sorted(p.name for p in many[0].glob("*.safetensors*"))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == json.loads((many[0] / "model.safetensors.index.json").read_text())["weight_map"]
    expected = load_file(average_checkpoints(one, tmp_path / "whole") / "model.safetensors")
    assert all(torch.equal(load_file(out / index["weight_map"][k])[k], v) for k, v in expected.items())
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in expected.values())
    load_model(out)


def test_torch_files_are_read_and_safetensors_written(tmp_path: Path) -> None:
    states = seeded_states(3)
    paths = write_run(tmp_path / "a", states)
    old = []
    for i, state in enumerate(states):
        old.append(tmp_path / "b" / f"checkpoint-{i + 1}")
        old[-1].mkdir(parents=True)
        torch.save(state, old[-1] / "pytorch_model.bin")
    found = load_file(average_checkpoints(old, tmp_path / "out-b") / "model.safetensors")
    expected = load_file(average_checkpoints(paths, tmp_path / "out-a") / "model.safetensors")
    assert all(torch.equal(found[k], v) for k, v in expected.items())


def test_single_files_may_be_named(tmp_path: Path) -> None:
    paths = write_run(tmp_path, seeded_states(2))
    out = average_checkpoints([p / "model.safetensors" for p in paths], tmp_path / "out")
    assert set(load_file(out / "model.safetensors")) == set(seeded_states(1)[0])
    assert (out / "config.json").is_file()


def test_the_file_is_what_the_safetensors_library_expects(tmp_path: Path) -> None:
    out = average_checkpoints(write_run(tmp_path, seeded_states(2, torch.float16)), tmp_path / "out")
    with safe_open(out / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert file.get_slice("layer.weight").get_shape() == [7, 13]
        assert file.get_tensor("none").shape == (0, 3)
        assert file.get_tensor("scale").shape == ()


def test_snapshots_are_sorted_by_step_as_a_number(tmp_path: Path) -> None:
    states = seeded_states(3)
    for step, state in zip((1000, 200, 600), states, strict=True):
        write(tmp_path / f"checkpoint-{step}", state)
    names = [p.name for p in find_checkpoints(tmp_path)]
    assert names == ["checkpoint-200", "checkpoint-600", "checkpoint-1000"]
    found = load_file(average_checkpoints(tmp_path, tmp_path / "out" / "a") / "model.safetensors")
    assert torch.equal(found["position_ids"], states[0]["position_ids"]), "the integers of step 1000"
    shuffled = [tmp_path / f"checkpoint-{step}" for step in (1000, 200, 600)]
    weighted = average_checkpoints(shuffled, tmp_path / "out" / "b", [0.5, 0.3, 0.2])
    expected = mean_of(states, [0.5, 0.3, 0.2])
    assert (
        float((load_file(weighted / "model.safetensors")["layer.weight"] - expected["layer.weight"]).abs().max()) < 1e-6
    )
    assert json.loads((weighted / "averaging.json").read_text())["steps"] == [200, 600, 1000]


def test_the_first_ones_may_be_skipped_and_the_last_ones_taken(tmp_path: Path) -> None:
    states = seeded_states(5)
    write_run(tmp_path, states)
    for options, chosen in (
        ({"skip_first": 2}, states[2:]),
        ({"last_k": 2}, states[3:]),
        ({"skip_first": 1, "last_k": 3}, states[2:]),
    ):
        found = load_file(average_checkpoints(tmp_path, tmp_path / "out" / "x", **options) / "model.safetensors")
        assert torch.equal(found["layer.weight"], average_states(chosen)["layer.weight"]), options
    with pytest.raises(MethodError, match=r"skip_first = 5 of 5 snapshots. Allowed: 0 to 4"):
        average_checkpoints(tmp_path, tmp_path / "out" / "x", skip_first=5)
    with pytest.raises(MethodError, match="last_k = 6 of 5 snapshots"):
        average_checkpoints(tmp_path, tmp_path / "out" / "x", last_k=6)
    with pytest.raises(MethodError, match="choose among the snapshots of one run"):
        average_checkpoints(
            [tmp_path / "checkpoint-10", write(tmp_path / "other", states[0])], tmp_path / "out" / "x", last_k=1
        )


def test_configuration_and_tokenizer_come_along_and_training_state_stays_behind(tmp_path: Path) -> None:
    paths = save_run(tmp_path, 2)
    for path in paths:
        byte_tokenizer().save_pretrained(path)
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
            torch.save({"junk": torch.ones(3)}, path / name)
        (path / "trainer_state.json").write_text(json.dumps({"log_history": []}))
        (path / "generation_config.json").write_text(json.dumps({"max_length": int(path.name[11:])}))
    out = average_checkpoints(paths, tmp_path / "out")
    held = {p.name for p in out.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"} < held
    assert not any(name.endswith((".pt", ".pth", ".bin")) or name == "trainer_state.json" for name in held)
    assert json.loads((out / "generation_config.json").read_text())["max_length"] == 200


def test_inputs_are_untouched_and_an_earlier_average_is_replaced(tmp_path: Path) -> None:
    paths = write_run(tmp_path, seeded_states(2))
    before = [(p / "model.safetensors").read_bytes() for p in paths]
    average_checkpoints(paths, tmp_path / "out")
    average_checkpoints(paths, tmp_path / "out", [1.0, 0.0])
    assert [(p / "model.safetensors").read_bytes() for p in paths] == before
    assert torch.equal(
        load_file(tmp_path / "out" / "model.safetensors")["scale"], load_file(paths[0] / "model.safetensors")["scale"]
    )
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint-10", "checkpoint-20", "out"}


def test_progress_is_told(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    average_checkpoints(write_run(tmp_path, seeded_states(2)), tmp_path / "out", on_progress=lambda *a: told.append(a))
    assert told == [(i, 7) for i in range(1, 8)]


def test_a_model_and_its_adapter_are_both_averaged(tmp_path: Path) -> None:
    import peft

    paths = []
    for i in range(2):
        model = peft.get_peft_model(tiny("llama", num_layers=1), peft.LoraConfig(r=2, target_modules=["q_proj"]))
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(1.0 + i)
        paths.append(save_model(model, tmp_path / f"checkpoint-{i}"))
    found = load_model(average_checkpoints(paths, tmp_path / "out"))
    assert all(torch.equal(v, torch.full_like(v, 1.5)) for k, v in found.state_dict().items() if v.is_floating_point())
    shutil.rmtree(paths[0] / "adapter")
    with pytest.raises(ModelError, match="Only 1 of 2 checkpoints have an adapter beside the model"):
        average_checkpoints(paths, tmp_path / "out")


def edited(name: str, value: torch.Tensor | None) -> dict[str, torch.Tensor]:
    state = seeded_states(2)[1]
    if value is None:
        state.pop(name)
    else:
        state[name] = value
    return state


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (edited("scale", None), r"checkpoint-20 has other tensors than .*checkpoint-10 \(missing: scale\)"),
        (edited("new", torch.zeros(2)), r"unexpected: new\). Average checkpoints of one run"),
        (
            edited("embed.weight", torch.zeros(40, 5)),
            r"\(37, 5\) in .*10 and \(40, 5\) in .*20.\nWas|vocabulary resized",
        ),
        (edited("scale", torch.tensor(torch.nan)), r"20/model.safetensors: 'scale' holds values that are not finite"),
        (edited("embed.weight", torch.full((37, 5), -torch.inf)), "'embed.weight' holds values that are not finite"),
        (edited("scale", torch.tensor(1)), "'scale' is torch.float32 in .* and torch.int64 in"),
        (edited("layer.weight", torch.zeros(7, 13, dtype=torch.int8)), r"'layer.weight' is quantised \(torch.int8\)"),
        (edited("layer.weight", torch.zeros(7, 13).to(torch.float8_e4m3fn)), "quantised"),
        (edited("layer.qweight", torch.zeros(3, dtype=torch.int32)), "'layer.qweight' is quantised"),
        (edited("scale", torch.tensor(1j)), "complex64. Complex tensors are not averaged"),
    ],
)
def test_checkpoints_that_do_not_fit_are_refused_and_nothing_is_left(
    state: dict[str, torch.Tensor], message: str, tmp_path: Path
) -> None:
    paths = write_run(tmp_path, [seeded_states(2)[0], state])
    with pytest.raises(ModelError, match=message):
        average_checkpoints(paths, tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint-10", "checkpoint-20"}


def test_what_is_no_checkpoint_is_told(tmp_path: Path) -> None:
    good = write(tmp_path / "good", seeded_states(1)[0])
    (tmp_path / "empty").mkdir()
    (tmp_path / "fsdp" / "pytorch_model_fsdp_0").mkdir(parents=True)
    torch.save({"a": 1}, good / "optimizer.pt")
    write(tmp_path / "gptq", seeded_states(1)[0], quantization_config={"quant_method": "gptq"})
    write(tmp_path / "both", seeded_states(1)[0])
    save_file(seeded_states(1)[0], tmp_path / "both" / "adapter_model.safetensors")
    write(tmp_path / "cut", seeded_states(1)[0])
    whole = (tmp_path / "cut" / "model.safetensors").read_bytes()
    (tmp_path / "cut" / "model.safetensors").write_bytes(whole[:-8])
    for path, message in (
        (tmp_path / "absent", "absent is no checkpoint: there is no such folder"),
        (tmp_path / "empty", "empty is no checkpoint: it has none of model.safetensors"),
        (tmp_path / "fsdp", "divided among ranks. Save consolidated ones"),
        (good / "optimizer.pt", "optimizer.pt is no file of model weights"),
        (tmp_path / "gptq", r"is quantised \(gptq\); a mean of codes means nothing"),
        (tmp_path / "both", "holds a whole model .* and an adapter"),
        (tmp_path / "cut", "damaged or cut short"),
        ("nobody/nothing", "neither a folder nor on the hub"),
    ):
        with pytest.raises(ModelError, match=message):
            average_checkpoints([good, path], tmp_path / "out")
    with pytest.raises(MethodError, match="no checkpoints to average: the list is empty"):
        average_checkpoints([], tmp_path / "out")


def test_a_run_that_kept_one_snapshot_names_the_argument(tmp_path: Path) -> None:
    write(tmp_path / "run" / "checkpoint-500", seeded_states(1)[0])
    with pytest.raises(MethodError, match=r"holds only checkpoint-500; .* TrainingArguments\(save_total_limit=...\)"):
        average_checkpoints(tmp_path / "run", tmp_path / "out")
    with pytest.warns(NoEffectWarning, match="the result is a copy"):
        out = average_checkpoints([tmp_path / "run" / "checkpoint-500"], tmp_path / "out")
    expected = load_file(tmp_path / "run" / "checkpoint-500" / "model.safetensors")
    assert all(torch.equal(v, expected[k]) for k, v in load_file(out / "model.safetensors").items())


def test_the_result_may_not_fall_on_an_input_or_on_foreign_files(tmp_path: Path) -> None:
    paths = write_run(tmp_path / "run", seeded_states(2))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    for out, message in (
        (paths[0], "would replace the input"),
        (tmp_path / "run", "would replace the input"),
        (tmp_path / "mine", "not empty and holds no averaged model"),
        (tmp_path / "mine" / "notes.txt", "is a file"),
    ):
        with pytest.raises(MethodError, match=message):
            average_checkpoints(paths, out)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"


def test_weights_and_options_are_checked(tmp_path: Path) -> None:
    paths = write_run(tmp_path, seeded_states(3))
    for options, message in (
        ({"weights": [0.5, 0.5]}, "2 weights were given for 3 checkpoints"),
        ({"weights": [1.0, 1.0, 1.0]}, "sum to 3, not to 1"),
        ({"weights": [0.5, 0.25, 0.25], "skip_first": 1}, "sum to 0.5, not to 1"),
        ({"space": "deltas"}, "space = 'deltas' is unknown. Did you mean 'delta'"),
        ({"rank": 4}, "need space='delta'"),
        ({"base": "x"}, "need space='delta'"),
        ({"rank": 0, "space": "delta"}, "rank = 0. Allowed"),
    ):
        with pytest.raises(MethodError, match=message):
            average_checkpoints(paths, tmp_path / "out", **options)
    with pytest.raises(ModelError, match="space = 'delta' averages LoRA adapters"):
        average_checkpoints(paths, tmp_path / "out", space="delta")
    out = average_checkpoints(paths, tmp_path / "out", [1, 1, 2], normalise=True)
    assert json.loads((out / "averaging.json").read_text())["weights"] == [0.25, 0.25, 0.5]


def test_other_kinds_of_model_are_refused_and_other_settings_told(tmp_path: Path) -> None:
    a, b = seeded_states(2)
    first = write(tmp_path / "a", a, num_attention_heads=4)
    with pytest.raises(ModelError, match=r"model_type is 'llama' in .* and 'qwen2' in .*different kinds of model"):
        average_checkpoints([first, write(tmp_path / "b", b, model_type="qwen2")], tmp_path / "out")
    with pytest.warns(GnomonWarning, match="num_attention_heads is 4 in .* and 8 in"):
        average_checkpoints([first, write(tmp_path / "b", b, num_attention_heads=8)], tmp_path / "out")


def test_other_dtypes_are_told_once(tmp_path: Path) -> None:
    a, b = seeded_states(2)
    low = {k: v.bfloat16() if v.is_floating_point() else v for k, v in b.items()}
    with pytest.warns(GnomonWarning, match="5 tensors differ in dtype") as told:
        out = average_checkpoints([write(tmp_path / "a", a), write(tmp_path / "b", low)], tmp_path / "out")
    assert len(told) == 1
    found = load_file(out / "model.safetensors")["layer.weight"]
    assert found.dtype == torch.float32
    assert torch.equal(found, average_states([a, low])["layer.weight"])


def test_gaps_histories_and_tokenizers_that_differ_are_told(tmp_path: Path) -> None:
    for step, state in zip((100, 200, 400), seeded_states(3), strict=True):
        write(tmp_path / "gaps" / f"checkpoint-{step}", state)
    with pytest.warns(GnomonWarning, match=r"\[100, 200, 400\] in .* are not equidistant .*|save_total_limit"):
        average_checkpoints(tmp_path / "gaps", tmp_path / "out")
    runs = write_run(tmp_path / "runs", seeded_states(2))
    for path, losses in zip(runs, ([3.0], [2.0, 1.0]), strict=True):
        history = [{"step": i, "loss": loss} for i, loss in enumerate(losses)]
        (path / "trainer_state.json").write_text(json.dumps({"log_history": history}))
        (path / "tokenizer.json").write_text(str(losses))
    with pytest.warns(GnomonWarning) as told:
        average_checkpoints(tmp_path / "runs", tmp_path / "out")
    text = " ".join(str(w.message) for w in told)
    assert "seem to belong to different runs" in text
    assert "tokenizer.json differs between" in text


def test_a_shorter_last_gap_and_several_runs_are_no_reason_to_warn(tmp_path: Path) -> None:
    for step, state in zip((100, 200, 250), seeded_states(3), strict=True):
        write(tmp_path / "a" / f"checkpoint-{step}", state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        average_checkpoints(tmp_path / "a", tmp_path / "out")
        write_run(tmp_path / "b", seeded_states(2))
        average_checkpoints([*find_checkpoints(tmp_path / "a"), *find_checkpoints(tmp_path / "b")], tmp_path / "out")


def test_models_from_different_starts_are_told(tmp_path: Path) -> None:
    paths = []
    for seed in range(2):
        paths.append(tmp_path / f"seed{seed}")
        tiny("llama", num_layers=1, seed=seed).save_pretrained(paths[-1])
    with pytest.warns(GnomonWarning, match=r"matrices point in different directions .*mean cosine under 0.3.*initial"):
        out = average_checkpoints(paths, tmp_path / "out")
    assert abs(json.loads((out / "averaging.json").read_text())["mean_cosine"]) < 0.1
    model = tiny("llama", num_layers=1)
    moved(model, 5, 0.002).save_pretrained(paths[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        average_checkpoints(paths, tmp_path / "out")


def test_reading_is_bounded_whatever_the_size(tmp_path: Path) -> None:
    from gnomon.common.memory import PeakMemory

    big = {f"w{i}": torch.ones(1000, 2000) for i in range(4)}  # 32 MB a checkpoint
    paths = write_run(tmp_path, [big, {k: v * 2 for k, v in big.items()}, {k: v * 3 for k, v in big.items()}])
    average_checkpoints(paths, tmp_path / "out")
    with PeakMemory(every=0.001) as memory:
        average_checkpoints(paths, tmp_path / "out")
    assert memory.added < 24e6, f"{memory.added / 1e6:.0f} MB"
