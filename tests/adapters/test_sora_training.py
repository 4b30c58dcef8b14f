"""SoRA in the Trainer, its schedule, its recipe calls."""

from __future__ import annotations

import inspect
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from gnomon import catalog
from gnomon.adapters.sora import (
    SoRACallback,
    SoRAProximal,
    SparsifyingSchedule,
    apply_sora,
    prune_sora,
    sora_callback,
    sora_ranks,
    sora_summary,
)
from gnomon.adapters.sora.schedule import thresholds
from gnomon.common.models import tiny
from gnomon.errors import MethodError, ModelError, NoEffectWarning

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
SIZES = {"vocab_size": 64, "hidden_size": 16, "num_layers": 1, "num_heads": 2, "max_positions": 32}
ROWS = torch.randint(1, 64, (16, 12), generator=torch.Generator().manual_seed(9))


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Sixteen rows of tokens."""

    def __len__(self) -> int:
        return len(ROWS)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": ROWS[index], "labels": ROWS[index]}


def adapted(**options: Any) -> Any:
    return apply_sora(tiny("llama", **SIZES), **{"r": 4, "target_modules": "all-linear", **options})


def trained(model: Any) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def trainer(folder: Path, steps: int, callback: Any = None, optimizer: Any = None, **options: Any) -> Trainer:
    given: dict[str, Any] = {
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 0.02, "warmup_steps": 1,
        "weight_decay": 0.1, "max_grad_norm": 0.1, "save_steps": 3, "logging_steps": 1, **options,
    }  # fmt: skip
    model = adapted()
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, report_to=[], use_cpu=True, disable_tqdm=True, seed=3,
        label_names=["labels"], **given,
    )  # fmt: skip
    made = optimizer(model) if optimizer is not None else None
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=Rows(),
        callbacks=[callback] if callback is not None else None,
        optimizers=(made, None),
    )


def wrapped(model: Any) -> SoRAProximal:
    gates = [p for name, p in model.named_parameters() if "lora_gate" in name]
    others = [p for p in trained(model) if not any(p is gate for gate in gates)]
    groups = [{"params": others, "weight_decay": 0.1}, {"params": gates}]
    return SoRAProximal(torch.optim.AdamW(groups, lr=0.02, weight_decay=0.0), model, 0.02, 3.0)


def test_callback_and_optimizer_train_alike(tmp_path: Path) -> None:
    first = trainer(tmp_path / "a", 5, SoRACallback(0.02, 3.0), save_strategy="no")
    second = trainer(tmp_path / "b", 5, SoRACallback(), wrapped, save_strategy="no")
    for run in (first, second):
        run.train()
    for mine, theirs in zip(trained(first.model), trained(second.model), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)  # fused and not
    assert 0 < sora_summary(first.model).kept < 1
    alone = trainer(tmp_path / "c", 5, None, wrapped, max_grad_norm=0.0, save_strategy="no")
    beside = trainer(tmp_path / "d", 5, SoRACallback(0.02, 3.0), max_grad_norm=0.0, save_strategy="no")
    for run in (alone, beside):
        run.train()
    for mine, theirs in zip(trained(alone.model), trained(beside.model), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)  # fused and not


def test_the_callback_is_the_penalty_in_the_loss_under_clipping_and_accumulation(tmp_path: Path) -> None:
    norms: list[float] = []

    class Penalised(Trainer):
        def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
            gates = [p for name, p in model.named_parameters() if "lora_gate" in name]
            return super().compute_loss(model, *args, **kwargs) + 3.0 * sum(g.abs().sum() for g in gates) / 28

    ours = trainer(tmp_path / "a", 3, SoRACallback(0.0, 3.0), save_strategy="no")
    ours.model_accepts_loss_kwargs = False
    ours.train()
    reference = trainer(tmp_path / "b", 3, SoRACallback(0.0, 0.0), save_strategy="no")
    reference.__class__ = Penalised
    reference.model_accepts_loss_kwargs = False
    reference.train()
    norms = [[e["grad_norm"] for e in run.state.log_history if "grad_norm" in e] for run in (ours, reference)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    for mine, theirs in zip(trained(ours.model), trained(reference.model), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_any_optimizer_is_joined_and_left(tmp_path: Path) -> None:
    run = trainer(tmp_path, 3, SoRACallback(0.05), lambda m: torch.optim.SGD(trained(m), lr=0.02, weight_decay=9.0))
    start = [p.detach().clone() for n, p in run.model.named_parameters() if "lora_gate" in n]
    run.train()
    gates = [p for n, p in run.model.named_parameters() if "lora_gate" in n]
    moved = torch.cat([(p - q).abs() for p, q in zip(gates, start, strict=True)])
    assert float(moved.max()) < 3 * (0.05 + 0.03)  # by the map and Adam, not by the decay
    assert float(moved.min()) > 0.01
    inner = run.optimizer.optimizer
    assert not inner._optimizer_step_pre_hooks
    assert not inner._optimizer_step_post_hooks
    logs = [entry for entry in run.state.log_history if "loss" in entry]
    found = sora_summary(run.model)
    assert (logs[-1]["sora_gates"], logs[-1]["sora_parameters"]) == (found.gates, found.parameters)
    assert logs[-1]["sora_kept"] == round(found.kept, 4)
    assert logs[-1]["sora_xi"] == 0.05


@pytest.mark.parametrize("way", ["callback", "optimizer"])
def test_a_run_cut_in_two_ends_where_the_whole_one_does(way: str, tmp_path: Path) -> None:
    def schedule() -> Any:
        measured = SoRACallback(
            0.02, 3.0, schedule=SparsifyingSchedule([0.0, 0.02, 0.04], first=1, further=1), measure=lambda m: (1.0, 2.0)
        )
        return measured

    optimizer = wrapped if way == "optimizer" else None
    options: dict[str, Any] = {"lr_scheduler_type": "constant"}
    whole = trainer(tmp_path / "whole", 6, schedule(), optimizer, **options)
    whole.train()

    class Stop(SoRACallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = True

    half = trainer(tmp_path / "half", 6, None, optimizer, **options)
    first = schedule()
    first.__class__ = Stop
    half.add_callback(first)
    half.train()
    assert half.state.global_step == 3
    again = schedule()
    resumed = trainer(tmp_path / "half", 6, again, optimizer, **options)
    resumed.train(resume_from_checkpoint=True)
    for mine, theirs in zip(trained(resumed.model), trained(whole.model), strict=True):
        assert torch.equal(mine, theirs)
    assert [record.stage for record in again.schedule.records] == [0, 1, 2]
    assert sora_ranks(resumed.model) == sora_ranks(whole.model)


def test_the_trainers_steps_are_divided_among_the_stages(tmp_path: Path) -> None:
    seen: list[bool] = []

    def measure(model: Any) -> tuple[float, float]:
        seen.append(model.training)
        return (0.9 - 0.1 * len(seen), 0.5 + 0.1 * len(seen))

    schedule = SparsifyingSchedule.spaced(0.0, 0.1, 3, first=2, further=1)
    callback = SoRACallback(schedule=schedule, measure=measure)
    run = trainer(tmp_path, 8, callback)
    run.train()
    assert seen == [False] * 3
    assert [e["sora_xi"] for e in run.state.log_history if "sora_xi" in e] == [0.0] * 4 + [0.05] * 2 + [0.1] * 2
    table = schedule.table()
    assert [row["xi"] for row in table] == [0.0, 0.05, 0.1]
    assert [row["memorisation"] for row in table] == pytest.approx([100.0, 87.5, 75.0])
    assert [row["generalisation"] for row in table] == pytest.approx([75.0, 87.5, 100.0])
    assert [row["best"] for row in table] == [False, False, True]
    assert table[0]["gates"] == table[0]["all_gates"] == 28
    assert table[-1]["gates"] < 28
    assert table[-1]["parameters"] == sora_summary(run.model).parameters
    assert json.loads(json.dumps(run.state.log_history))


def test_ranks_are_repacked_in_the_trainer_and_the_run_can_be_resumed(tmp_path: Path) -> None:
    whole = trainer(tmp_path, 6, SoRACallback(0.08, repack_after=2))
    whole.train()
    sizes = [p.numel() for n, p in whole.model.named_parameters() if "lora_gate" in n]
    assert sum(sizes) < 28
    expected = [p.detach().clone() for p in trained(whole.model)]
    resumed = trainer(tmp_path, 6, SoRACallback(0.08, repack_after=2))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert all(torch.equal(p, q) for p, q in zip(trained(resumed.model), expected, strict=True))
    pruned = prune_sora(resumed.model)
    assert sum(layer.r["default"] for layer in pruned.modules() if isinstance(layer, peft.tuners.lora.LoraLayer)) > 0


# --- the schedule by itself


def test_lists_of_thresholds() -> None:
    a, b = 1e-3, 1.5
    np.testing.assert_allclose(thresholds(a, b, 5), np.linspace(a, b, 5))
    np.testing.assert_allclose(thresholds(a, b, 5, "log_linear"), np.log(np.linspace(np.exp(a), np.exp(b), 5)))
    np.testing.assert_allclose(thresholds(a, b, 5, "exp_linear"), np.exp(np.linspace(np.log(a), np.log(b), 5)))
    assert thresholds(0.0, 7e-4, 2) == [0.0, 7e-4]
    steps = [np.diff(thresholds(a, b, 9, spacing)) for spacing in ("log_linear", "exp_linear")]  # type: ignore[arg-type]
    assert (np.diff(steps[0]) < 0).all()
    assert (np.diff(steps[1]) > 0).all()


def test_stages_end_in_proportion() -> None:
    schedule = SparsifyingSchedule([0.0, 0.1, 0.2], first=50, further=15)
    assert schedule.ends(160) == [100, 130, 160]
    assert [schedule.stage_at(step, 160) for step in (0, 99, 100, 129, 130, 159, 500)] == [0, 0, 1, 1, 2, 2, 2]
    assert schedule.xi_at(130, 160) == 0.2
    assert SparsifyingSchedule([0.3]).ends(7) == [7]


def test_a_killed_schedule_goes_on_from_its_file(tmp_path: Path) -> None:
    def parts() -> tuple[Any, Any, Any, Any]:
        model = adapted()
        optimizer = SoRAProximal(torch.optim.AdamW(trained(model), lr=0.02), model)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return model, optimizer, scheduler, SparsifyingSchedule([0.0, 0.02, 0.05], first=2, further=1)

    def training(model: Any, optimizer: Any, scheduler: Any, killed_in: int | None = None) -> Any:
        def train(stage: int, length: float) -> None:
            generator = torch.Generator().manual_seed(stage)
            for _ in range(int(length)):
                rows = ROWS[torch.randint(len(ROWS), (4,), generator=generator)]
                model(input_ids=rows, labels=rows).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            scheduler.step()
            if stage == killed_in:
                raise KeyboardInterrupt

        return train

    def measured() -> tuple[float, float]:
        return 0.5, 0.25

    model, optimizer, scheduler, schedule = parts()
    schedule.run(model, optimizer, training(model, optimizer, scheduler), measured, scheduler=scheduler)
    assert [r.xi for r in schedule.records] == [0.0, 0.02, 0.05]
    other = parts()
    file = tmp_path / "stages.pt"
    with pytest.raises(KeyboardInterrupt):
        other[3].run(other[0], other[1], training(*other[:3], killed_in=1), measured, path=file, scheduler=other[2])
    again = parts()
    records = again[3].run(again[0], again[1], training(*again[:3]), measured, path=file, scheduler=again[2])
    assert records == schedule.records
    assert all(torch.equal(p, q) for p, q in zip(trained(again[0]), trained(model), strict=True))
    assert again[1].param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    assert not list(tmp_path.glob("*.part"))
    with pytest.raises(MethodError, match=r"the saved schedule has the thresholds \[0.0, 0.02, 0.05\], this one"):
        SparsifyingSchedule([0.0, 1.0]).run(again[0], again[1], lambda *_: None, path=file)
    with pytest.raises(MethodError, match=r"all 3 stages have ended"):
        schedule.record(model)
    for p in model.base_model.model.lm_head.parameters():
        p.requires_grad_(True)
    with pytest.raises(MethodError, match=r"the saved run trains other parameters than this model"):
        parts()[3].run(model, optimizer, lambda *_: None, path=file)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: thresholds(1e-3, 1e-4, 3), r"start = 0.001, end = 0.0001: thresholds rise"),
        (lambda: thresholds(0.0, 1e-4, 1), r"stages = 1: a whole number of at least 2"),
        (lambda: thresholds(0.0, 1e-4, 3, "exp_linear"), r"start = 0 has no logarithm"),
        (lambda: thresholds(0.0, 1e-4, 3, "cubic"), r"spacing = 'cubic'. Allowed: 'linear'"),  # type: ignore[arg-type]
        (lambda: SparsifyingSchedule([]), r"xi = \[\]: thresholds rise from 0 or more"),
        (lambda: SparsifyingSchedule([0.0, 0.0]), r"thresholds rise from 0 or more"),
        (lambda: SparsifyingSchedule([-1.0, 0.0]), r"thresholds rise from 0 or more"),
        (lambda: SparsifyingSchedule([0.0], first=0), r"first = 0, further = 15: lengths of stages above 0"),
        (lambda: SparsifyingSchedule([0.0, 1.0, 2.0]).ends(2), r"2 steps do not suffice for 3 stages"),
        (lambda: SparsifyingSchedule([0.0]).record(adapted(), math.nan), r"train_metric = nan: a finite number"),
        (lambda: SoRACallback(-1.0), r"xi = -1.0"),
        (lambda: SoRACallback(repack_after=0), r"repack_after = 0: a whole number of steps"),
        (lambda: sora_callback(adapted(), xi=0.1, xi_end=0.05), r"start = 0.1, end = 0.05"),
        (lambda: sora_callback(adapted(), prox="hard"), r"prox = 'hard'"),  # type: ignore[arg-type]
    ],
)
def test_what_is_not_allowed(make: Any, message: str) -> None:
    with pytest.raises(MethodError, match=message):
        make()


def test_callbacks_that_cannot_work(tmp_path: Path) -> None:
    with pytest.warns(NoEffectWarning, match=r"measure is called at the end of the stages"):
        SoRACallback(measure=lambda model: (0.0, 0.0))
    with pytest.raises(ModelError, match=r"has no SoRA layers"):
        sora_callback(tiny("llama", **SIZES))
    with pytest.raises(ModelError, match=r"the Trainer's optimizer is a object"):
        SoRACallback().on_train_begin(None, None, None, adapted(), object())
    model = adapted()
    callback, optimizer = SoRACallback(), torch.optim.SGD(trained(model), lr=0.1)
    callback.on_train_begin(None, None, None, model, optimizer)
    with pytest.raises(MethodError, match=r"was given a closure"):
        optimizer.step(lambda: 0.0)
    with pytest.raises(MethodError, match=r"2 steps do not suffice for 3 stages"):
        trainer(tmp_path, 2, SoRACallback(schedule=SparsifyingSchedule([0.0, 0.1, 0.2]))).train()


# --- recipes


def test_the_recipes_calls_take_plain_options_of_their_own_names() -> None:
    card = catalog.get("sora")
    call, callback = (catalog.resolve(card.recipe[key]) for key in ("call", "callback"))
    names = [set(inspect.signature(f).parameters) - {"model"} for f in (call, callback)]
    assert not names[0] & names[1]
    model = call(tiny("llama", **SIZES), r=3, seed=1)
    made = callback(model, xi=0.1, xi_end=0.2, stages=3, spacing="exp_linear", first=1, further=2, gate_lr=0.5)
    assert made.schedule.xi == pytest.approx([0.1, math.sqrt(0.02), 0.2])
    assert made.schedule.ends(10) == [2, 6, 10]
    assert callback(model).schedule is None
    bert = tiny("bert", vocab_size=64, hidden_size=16, num_layers=1, num_heads=2, max_positions=32)
    assert call(bert, target_modules=["query"]).peft_config["default"].r == 8
