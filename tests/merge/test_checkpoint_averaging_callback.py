"""The callback inside transformers.Trainer: when snapshots are taken, what the model holds afterwards, resuming."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments

sys.path.insert(0, str(Path(__file__).parent))
from checkpoint_averaging_definition import mean_of

from gnomon.common.models import load_model, tiny
from gnomon.errors import DataError, GnomonWarning, MethodError, ModelError
from gnomon.merge import CheckpointAveraging, average_checkpoints, find_checkpoints

SIZES: dict[str, Any] = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 32}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Any:
    """The models are so small that threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Rows(Dataset[dict[str, Tensor]]):
    def __init__(self, count: int = 24) -> None:
        self.rows = torch.randint(0, 32, (count, 8), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[i], "labels": self.rows[i]}


class Stream(IterableDataset[dict[str, Tensor]]):
    def __iter__(self) -> Any:
        return (Rows()[i] for i in range(24))


class Watch(TrainerCallback):
    """Keeps the weights after every optimizer step; may end the run like a kill does."""

    def __init__(self, kill_at: int = 0) -> None:
        self.states: dict[int, dict[str, Tensor]] = {}
        self.kill_at = kill_at

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.states[state.global_step] = {k: v.detach().clone() for k, v in model.state_dict().items()}
        if state.global_step == self.kill_at:
            raise KeyboardInterrupt


def trainer(folder: Path, *callbacks: TrainerCallback, model: Any = None, data: Any = None, **options: Any) -> Trainer:
    settings: dict[str, Any] = {"num_train_epochs": 4, "save_strategy": "no", **options}
    args = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, learning_rate=0.01, report_to="none", use_cpu=True,
        disable_tqdm=True, logging_strategy="no", seed=1, **settings,
    )  # fmt: skip
    rows = data or Rows()
    return Trainer(model or tiny(**SIZES), args, train_dataset=rows, eval_dataset=Rows(4), callbacks=list(callbacks))


def difference(found: Any, expected: dict[str, Tensor]) -> float:
    return max(float((found[k].double() - v.double()).abs().max()) for k, v in expected.items())


@pytest.mark.parametrize(
    ("options", "training", "steps"),
    [
        ({}, {}, [6, 12, 18, 24]),
        ({"every": "epoch"}, {"num_train_epochs": 2}, [6, 12]),
        ({"every": "epoch"}, {"max_steps": 15}, [6, 12]),
        ({"per_epoch": 2}, {"num_train_epochs": 2}, [3, 6, 9, 12]),
        ({"per_epoch": 4}, {"num_train_epochs": 1}, [2, 3, 5, 6]),
        ({}, {"max_steps": 10}, list(range(1, 11))),
        ({}, {"num_train_epochs": 0.5}, [1, 2, 3]),
        ({"snapshots": 4}, {"max_steps": 10}, [3, 5, 8, 10]),
        ({"snapshots": 3}, {}, [8, 16, 24]),
        ({"every": 7}, {}, [7, 14, 21]),
        ({"skip_first": 1}, {}, [12, 18, 24]),
        ({"keep": "disk", "last_k": 2}, {}, [18, 24]),
        ({}, {"gradient_accumulation_steps": 4}, [2, 4, 6, 8]),
        ({"every": "epoch"}, {"data": Stream(), "max_steps": 20}, [6, 12, 18]),
        ({}, {"data": Stream(), "max_steps": 20}, list(range(2, 21, 2))),
    ],
)
def test_the_model_is_the_mean_of_equidistant_snapshots(
    options: dict[str, Any], training: dict[str, Any], steps: list[int], tmp_path: Path
) -> None:
    watch, callback = Watch(), CheckpointAveraging(**options)
    run = trainer(tmp_path, callback, watch, **training)
    run.train()
    assert difference(run.model.state_dict(), mean_of([watch.states[i] for i in steps])) < 3e-7
    if "last_k" not in options:
        assert callback.steps == steps


@pytest.mark.parametrize(
    ("keep", "strategy", "kill_at"),
    [
        ("online", "steps", 6),
        ("online", "steps", 13),
        ("online", "epoch", 13),
        ("disk", "steps", 13),
        ("disk", "epoch", 6),
    ],
)
def test_a_killed_run_resumes_to_the_same_average_bit_for_bit(
    keep: Any, strategy: str, kill_at: int, tmp_path: Path
) -> None:
    options = {"num_train_epochs": 3, "save_strategy": strategy, "save_steps": 5}
    whole = trainer(tmp_path / "whole", CheckpointAveraging(keep=keep), **options)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "killed", CheckpointAveraging(keep=keep), Watch(kill_at), **options).train()
    again = trainer(tmp_path / "killed", CheckpointAveraging(keep=keep), **options)
    found = find_checkpoints(tmp_path / "killed")
    again.train(resume_from_checkpoint=str(found[-1]) if found else None)
    expected = whole.model.state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in again.model.state_dict().items())


def test_mean_and_count_stand_in_every_checkpoint(tmp_path: Path) -> None:
    watch = Watch()
    trainer(tmp_path, CheckpointAveraging(), watch, save_strategy="epoch").train()
    for epoch, path in enumerate(find_checkpoints(tmp_path), 1):
        held = load_file(path / "checkpoint_averaging.safetensors")
        assert (
            difference(held, mean_of([{k: watch.states[6 * i][k] for k in held} for i in range(1, epoch + 1)])) < 3e-7
        )
        assert {t.dtype for t in held.values()} == {torch.float32}
    assert not list(tmp_path.glob(".checkpoint_averaging*")), "nothing is left beside the checkpoints"
    average_checkpoints(tmp_path, tmp_path / "average")


def test_a_kill_between_the_checkpoint_and_its_callbacks_loses_nothing(tmp_path: Path) -> None:
    class Kill(TrainerCallback):
        def on_save(self, *args: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

    whole = trainer(tmp_path / "whole", CheckpointAveraging(), save_strategy="epoch")
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "killed", Kill(), CheckpointAveraging(), save_strategy="epoch").train()
    assert not (tmp_path / "killed" / "checkpoint-6" / "checkpoint_averaging.safetensors").exists()
    again = trainer(tmp_path / "killed", CheckpointAveraging(), save_strategy="epoch")
    again.train(resume_from_checkpoint=True)
    expected = whole.model.state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in again.model.state_dict().items())


def test_a_finished_run_that_is_resumed_gives_its_average_again(tmp_path: Path) -> None:
    first = trainer(tmp_path, CheckpointAveraging(), save_strategy="epoch")
    first.train()
    again = trainer(tmp_path, CheckpointAveraging(), save_strategy="epoch")
    again.train(resume_from_checkpoint=True)
    expected = first.model.state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in again.model.state_dict().items())


def test_resuming_without_its_state_is_told_and_can_be_asked_for(tmp_path: Path) -> None:
    trainer(tmp_path, save_strategy="epoch", num_train_epochs=2).train()
    with pytest.raises(
        DataError, match=r"checkpoint_averaging.safetensors: training resumes at step 12, but .*'nothing'"
    ):
        trainer(tmp_path, CheckpointAveraging()).train(resume_from_checkpoint=True)
    watch, callback = Watch(), CheckpointAveraging(resume_from="nothing")
    run = trainer(tmp_path, callback, watch)
    run.train(resume_from_checkpoint=True)
    assert callback.steps == [18, 24]
    assert difference(run.model.state_dict(), mean_of([watch.states[18], watch.states[24]])) < 3e-7


def test_resuming_from_elsewhere_with_other_options_or_damage(tmp_path: Path) -> None:
    trainer(tmp_path / "a", CheckpointAveraging(), save_strategy="epoch").train()
    source = tmp_path / "a" / "checkpoint-12"
    run = trainer(tmp_path / "b", CheckpointAveraging(resume_from=str(source)))
    run.train(resume_from_checkpoint=str(source))
    expected = trainer(tmp_path / "c", CheckpointAveraging())
    expected.train()
    assert all(torch.equal(v, expected.model.state_dict()[k]) for k, v in run.model.state_dict().items())
    with pytest.raises(MethodError, match=r"every is 3 now and was 'auto' in .*checkpoint-12.*not be equidistant"):
        trainer(tmp_path / "a", CheckpointAveraging(every=3)).train(resume_from_checkpoint=str(source))
    (source / "checkpoint_averaging.safetensors").write_bytes(b"\0" * 30)
    with pytest.raises(DataError, match="the state of the average is damaged"):
        trainer(tmp_path / "a", CheckpointAveraging()).train(resume_from_checkpoint=str(source))


def test_a_snapshot_that_was_removed_is_missed_on_resuming(tmp_path: Path) -> None:
    import shutil

    trainer(tmp_path, CheckpointAveraging(keep="disk"), save_strategy="epoch").train()
    for step in (18, 24):
        shutil.rmtree(tmp_path / f"checkpoint-{step}")
    shutil.rmtree(tmp_path / "snapshots" / "snapshot-6")
    with pytest.raises(DataError, match="snapshot-6: this snapshot of the run to be resumed is gone"):
        trainer(tmp_path, CheckpointAveraging(keep="disk")).train(resume_from_checkpoint=True)


def test_snapshots_on_disk_load_by_themselves_and_average_to_the_same(tmp_path: Path) -> None:
    watch = Watch()
    run = trainer(tmp_path, CheckpointAveraging(keep="disk"), watch)
    run.train()
    paths = find_checkpoints(tmp_path / "snapshots")
    assert [p.name for p in paths] == [f"snapshot-{6 * i}" for i in range(1, 5)]
    for i, path in enumerate(paths, 1):
        assert difference(load_model(path).state_dict(), watch.states[6 * i]) == 0
    online = trainer(tmp_path / "online", CheckpointAveraging())
    online.train()
    assert all(torch.equal(v, online.model.state_dict()[k]) for k, v in run.model.state_dict().items())
    assert difference(load_model(tmp_path / "average").state_dict(), online.model.state_dict()) == 0


@pytest.mark.parametrize("family", ["gpt2", "qwen"])
def test_tied_weights_stay_tied_and_are_saved_once(family: str, tmp_path: Path) -> None:
    watch, out = Watch(), tmp_path / "out"
    run = trainer(tmp_path, CheckpointAveraging(out=str(out)), watch, model=tiny(family, **SIZES))
    run.train()
    assert difference(run.model.state_dict(), mean_of([watch.states[6 * i] for i in range(1, 5)])) < 3e-7
    assert run.model.get_input_embeddings().weight is run.model.get_output_embeddings().weight
    assert difference(load_model(out).state_dict(), run.model.state_dict()) == 0


def test_without_loading_the_model_keeps_its_last_weights(tmp_path: Path) -> None:
    watch = Watch()
    run = trainer(tmp_path, CheckpointAveraging(load_at_end=False), watch)
    run.train()
    assert difference(run.model.state_dict(), watch.states[24]) == 0
    mean = mean_of([watch.states[6 * i] for i in range(1, 5)])
    assert difference(load_model(tmp_path / "average").state_dict(), mean) < 3e-7


@pytest.mark.parametrize("load", [True, False])
def test_beside_load_best_model_at_end(load: bool, tmp_path: Path) -> None:
    watch, callback = Watch(), CheckpointAveraging(load_at_end=load)
    options = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
    run = trainer(tmp_path, callback, watch, metric_for_best_model="eval_loss", greater_is_better=True, **options)
    if load:
        with pytest.warns(GnomonWarning, match="both want the model at the end: it will hold the average"):
            run.train()
    else:
        run.train()
    best = run.state.best_global_step
    assert best != 24, "the test wants a best snapshot that is not the last"
    mean = mean_of([watch.states[6 * i] for i in range(1, 5)])
    assert difference(run.model.state_dict(), mean if load else watch.states[best]) < 3e-7


def test_save_total_limit_does_not_matter_to_the_running_mean(tmp_path: Path) -> None:
    watch = Watch()
    run = trainer(tmp_path, CheckpointAveraging(), watch, save_strategy="epoch", save_total_limit=1)
    run.train()
    assert difference(run.model.state_dict(), mean_of([watch.states[6 * i] for i in range(1, 5)])) < 3e-7


@pytest.mark.parametrize("keep", ["online", "disk"])
def test_lora_adapters_are_averaged_and_the_base_is_left_alone(keep: Any, tmp_path: Path) -> None:
    import peft

    base = tiny(**SIZES)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], modules_to_save=["lm_head"])
    model = peft.get_peft_model(base, config)
    frozen = {k: p.detach().clone() for k, p in model.named_parameters() if not p.requires_grad}
    watch, callback = Watch(), CheckpointAveraging(keep=keep, out=str(tmp_path / "out"))
    trainer(tmp_path, callback, watch, model=model).train()
    mean = mean_of([watch.states[6 * i] for i in range(1, 5)])
    assert difference(model.state_dict(), mean) < 3e-7
    assert all(torch.equal(model.get_parameter(k), v) for k, v in frozen.items())
    if keep == "online":
        assert not set(callback.average.mean) & set(frozen), "frozen weights need no memory"
    again = peft.PeftModel.from_pretrained(tiny(**SIZES), tmp_path / "out").eval()
    x = torch.arange(8)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=x).logits, model.eval()(input_ids=x).logits, rtol=0, atol=1e-6)


def test_plain_modules_buffers_and_batchnorm(tmp_path: Path) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.norm, self.out = nn.Embedding(32, 4), nn.BatchNorm1d(4), nn.Linear(4, 32)

        def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
            hidden = self.norm(self.embed(input_ids).transpose(1, 2)).transpose(1, 2)
            return {"loss": nn.functional.cross_entropy(self.out(hidden).flatten(0, 1), labels.flatten())}

    for keep in ("online", "disk"):
        watch = Watch()
        run = trainer(tmp_path / keep, CheckpointAveraging(keep=keep), watch, model=Plain())
        with pytest.warns(GnomonWarning, match="BatchNorm .*update_bn"):
            run.train()
        mean = mean_of([watch.states[6 * i] for i in range(1, 5)])
        assert difference(run.model.state_dict(), mean) < 3e-7
        assert int(run.model.norm.num_batches_tracked) == 24


def test_bfloat16_weights_are_averaged_in_float32(tmp_path: Path) -> None:
    watch = Watch()
    run = trainer(tmp_path, CheckpointAveraging(every=1), watch, model=tiny(**SIZES).to(torch.bfloat16))
    run.train()
    exact = mean_of(list(watch.states.values()))
    for name, tensor in run.model.state_dict().items():
        assert tensor.dtype == torch.bfloat16
        wrong = (tensor.double() - exact[name]).abs() - (exact[name].bfloat16().double() - exact[name]).abs()
        assert float(wrong.max()) < 1e-6, name


def test_each_snapshot_can_be_scored_and_the_callback_used_again(tmp_path: Path) -> None:
    seen: list[int] = []
    callback = CheckpointAveraging(on_snapshot=lambda step, model: seen.append(step))
    first = trainer(tmp_path, callback)
    first.train()
    second = trainer(tmp_path, callback)
    second.train()
    assert seen == [6, 12, 18, 24] * 2
    assert callback.average.count == 4
    assert all(torch.equal(v, second.model.state_dict()[k]) for k, v in first.model.state_dict().items())


def test_a_run_that_ends_early_averages_what_it_has_or_says_so(tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def __init__(self, at: int) -> None:
            self.at = at

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            control.should_training_stop = state.global_step >= self.at
            return control

    watch = Watch()
    run = trainer(tmp_path, CheckpointAveraging(), watch, Stop(14))
    run.train()
    assert difference(run.model.state_dict(), mean_of([watch.states[6], watch.states[12]])) < 3e-7
    run = trainer(tmp_path, CheckpointAveraging(), watch, Stop(4))
    with pytest.warns(GnomonWarning, match="ended at step 4 before a snapshot was due"):
        run.train()
    assert difference(run.model.state_dict(), watch.states[4]) == 0


def test_diverged_weights_are_told_with_their_step(tmp_path: Path) -> None:
    class Spoil(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step == 12:
                model.lm_head.weight.data[0, 0] = torch.nan

    with pytest.raises(MethodError, match=r"snapshot at step 12: 'lm_head.weight' holds values that are not finite"):
        trainer(tmp_path, Spoil(), CheckpointAveraging()).train()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": "epochs"}, "every = 'epochs' is unknown. Did you mean 'epoch'"),
        ({"every": 0}, "every = 0. Allowed: 'auto', 'epoch' or a number of steps"),
        ({"every": True}, "every = True. Allowed"),
        ({"every": 5, "per_epoch": 2}, "per_epoch = 2 does not go with every = 5 steps"),
        ({"per_epoch": 0}, "per_epoch = 0. Allowed: 1 or more"),
        ({"snapshots": 1}, "Give 2 snapshots or more"),
        ({"snapshots": 4, "every": 3}, "snapshots = 4 with every = 3"),
        ({"skip_first": -1}, "skip_first = -1. Allowed"),
        ({"last_k": 2}, "a running mean cannot forget snapshots. Use keep='disk'"),
        ({"last_k": 0, "keep": "disk"}, "last_k = 0"),
        ({"keep": "disc"}, "keep = 'disc' is unknown. Did you mean 'disk'"),
        ({"space": "deltas", "keep": "disk"}, "space = 'deltas' is unknown"),
        ({"space": "delta"}, "Use keep='disk' with it"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MethodError, match=message):
        CheckpointAveraging(**options)


@pytest.mark.parametrize(
    ("options", "training", "message"),
    [
        (
            {"every": "epoch"},
            {"max_steps": 8},
            r"every = 'epoch', .* 8 steps of 6 to the epoch would average 1 snapshots",
        ),
        ({"every": 20}, {}, "snapshots=10 spreads them over the steps"),
        ({"snapshots": 9}, {"max_steps": 8}, "would average 0 snapshots"),
        ({"skip_first": 3}, {}, "skip_first = 3: a run of 24 steps of 6 to the epoch would average 1"),
    ],
)
def test_a_run_too_short_is_refused_before_it_starts(
    options: dict[str, Any], training: dict[str, Any], message: str, tmp_path: Path
) -> None:
    watch = Watch()
    with pytest.raises(MethodError, match=message):
        trainer(tmp_path, CheckpointAveraging(**options), watch, **training).train()
    assert not watch.states


def test_parts_of_an_epoch_without_a_length_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MethodError, match="per_epoch = 2, but the training data have no length"):
        trainer(tmp_path, CheckpointAveraging(per_epoch=2), data=Stream(), max_steps=20).train()


def test_weights_that_are_taken_apart_are_refused() -> None:
    from gnomon.merge.checkpoint_averaging.tensors import refuse_split

    model = nn.Linear(2, 2)
    refuse_split(model)
    model.weight.ds_id = 0  # type: ignore[attr-defined]
    with pytest.raises(ModelError, match="DeepSpeed ZeRO-3 takes the weights apart"):
        refuse_split(model)


def test_the_run_itself_is_not_changed_by_being_averaged(tmp_path: Path) -> None:
    plain, watched = Watch(), Watch()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(tmp_path / "a", plain).train()
        trainer(tmp_path / "b", CheckpointAveraging(every=1), watched).train()
    assert all(torch.equal(plain.states[24][k], v) for k, v in watched.states[24].items())
