"""Per-layer updates: equal to the wrapped optimizer, with no two gradients at once, and refused where they fail."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from gnomon.common.memory import tensor_bytes
from gnomon.common.models import load_model, save_model, tiny
from gnomon.common.per_layer import PerLayerCallback, PerLayerOptimizer, per_layer_optimizer
from gnomon.errors import MethodError, ModelError
from gnomon.optim import GaLoreAdamW

CLASSES: list[tuple[Any, dict[str, Any]]] = [
    (torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    (torch.optim.Adafactor, {"lr": 1e-2}),
    (bitsandbytes.optim.Adam8bit, {"lr": 1e-2}),
    (GaLoreAdamW, {"lr": 1e-2, "bits": 8}),
]


def network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(64, 80), nn.Tanh(), nn.Linear(80, 64, bias=False), nn.Tanh(), nn.Linear(64, 3))


def loss(model: nn.Module, step: int) -> Tensor:
    return model(torch.randn(8, 64, generator=torch.Generator().manual_seed(step))).square().sum()


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize(("cls", "options"), CLASSES)
def test_steps_and_schedule_are_those_of_the_wrapped_class(cls: Any, options: dict[str, Any]) -> None:
    plain, layered = network(), network()
    one, many = cls(plain.parameters(), **options), per_layer_optimizer(layered, cls, **options)
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)) for o in (one, many)]
    for step in range(5):
        for model, optimizer, schedule in ((plain, one, schedules[0]), (layered, many, schedules[1])):
            loss(model, step).backward()
            if optimizer is many:
                assert all(p.grad is None for p in model.parameters())
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        assert same(plain, layered)
    assert many.param_groups[0]["lr"] == one.param_groups[0]["lr"] == pytest.approx(options["lr"] / 6)


@pytest.mark.parametrize(("cls", "options"), CLASSES)
@pytest.mark.parametrize("way", ["file", "copy", "pickle", "from plain"])
def test_a_resumed_run_ends_in_the_same_weights(cls: Any, options: dict[str, Any], way: str, tmp_path: Path) -> None:
    whole = network().bfloat16() if cls is torch.optim.AdamW else network()
    twin = copy.deepcopy(whole)
    optimizer = per_layer_optimizer(whole, cls, **options)
    other = cls(twin.parameters(), **options)

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        dtype = next(model.parameters()).dtype
        for step in steps:
            inputs = torch.randn(8, 64, generator=torch.Generator().manual_seed(step)).to(dtype)
            model(inputs).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    train(whole, optimizer, range(3))
    train(twin, other, range(3))
    if way == "file":
        torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
        resumed = copy.deepcopy(whole)
        again = per_layer_optimizer(resumed, cls, **{**options, "lr": 1.0})
        again.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    elif way == "from plain":
        resumed = copy.deepcopy(whole)
        again = per_layer_optimizer(resumed, cls, **options)
        again.load_state_dict(copy.deepcopy(other.state_dict()))
    else:
        pair = (whole, optimizer)
        resumed, again = copy.deepcopy(pair) if way == "copy" else pickle.loads(pickle.dumps(pair))
    train(whole, optimizer, range(3, 6))
    before = [p.detach().clone() for p in whole.parameters()]
    train(resumed, again, range(3, 6))
    assert same(whole, resumed)
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), before, strict=True))
    own, kept = again.state_dict()["state"], optimizer.state_dict()["state"]
    assert tensor_bytes(own) == tensor_bytes(kept)


def test_gradients_never_stand_beside_each_other() -> None:
    model = network()
    alive: list[int] = []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(q.grad is not None for q in model.parameters()))
        )
    optimizer = per_layer_optimizer(model, torch.optim.AdamW)
    loss(model, 0).backward()
    assert alive == [1] * len(list(model.parameters()))
    optimizer.step()


def test_groups_keep_their_own_options_and_can_be_added() -> None:
    plain, layered = network(), network()

    def groups(model: nn.Module) -> list[dict[str, Any]]:
        return [{"params": [model[0].weight], "lr": 0.1}, {"params": [model[0].bias, model[2].weight]}]

    one, many = torch.optim.SGD(groups(plain), lr=0.01), PerLayerOptimizer(groups(layered), torch.optim.SGD, lr=0.01)
    one.add_param_group({"params": list(plain[4].parameters()), "lr": 0.5})
    many.add_param_group({"params": list(layered[4].parameters()), "lr": 0.5})
    for step in range(2):
        for model, optimizer in ((plain, one), (layered, many)):
            loss(model, step).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert same(plain, layered)


def test_no_decay_names_and_frozen_parameters() -> None:
    model = network()
    model[0].requires_grad_(False)
    optimizer = per_layer_optimizer(model, torch.optim.AdamW, no_decay=["bias"], weight_decay=0.3)
    assert [g["param_names"] for g in optimizer.param_groups] == [["2.weight", "4.weight"], ["4.bias"]]
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.3, 0.0]
    with pytest.raises(ModelError, match="Sequential has no trainable parameters"):
        per_layer_optimizer(model.requires_grad_(False), torch.optim.AdamW)


def test_closures_gradients_set_by_hand_and_hooks_taken_off() -> None:
    plain, layered = network(), network()
    one, many = torch.optim.SGD(plain.parameters(), lr=0.01), per_layer_optimizer(layered, torch.optim.SGD, lr=0.01)

    def closure(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
        def run() -> Tensor:
            optimizer.zero_grad()
            value = loss(model, 0)
            value.backward()
            return value

        return run

    assert torch.equal(one.step(closure(plain, one)), many.step(closure(layered, many)))
    for model, optimizer in ((plain, one), (layered, many)):
        optimizer.zero_grad()
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert same(plain, layered)
    many.detach()
    for model, optimizer in ((plain, one), (layered, many)):
        optimizer.zero_grad()
        loss(model, 1).backward()
        loss(model, 2).backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
    assert same(plain, layered)


def test_tied_weights_and_models_are_stepped_once(tmp_path: Path) -> None:
    ids = torch.randint(1, 256, (2, 8), generator=torch.Generator().manual_seed(0))
    plain, layered = tiny("gpt2", num_layers=1), tiny("gpt2", num_layers=1)
    one, many = torch.optim.AdamW(plain.parameters()), per_layer_optimizer(layered, torch.optim.AdamW)
    for _ in range(2):
        for model, optimizer in ((plain, one), (layered, many)):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert same(plain, layered)
    save_model(layered, tmp_path / "model")  # hooks on parameters must not be in the way
    assert same(load_model(tmp_path / "model"), layered)


# ---- what is refused ---------------------------------------------------------------------------------------------


def test_accumulation_is_refused_before_and_at_the_second_pass() -> None:
    with pytest.raises(MethodError, match=r"gradient_accumulation_steps = 4: .* Use 1 with a larger batch"):
        per_layer_optimizer(network(), torch.optim.AdamW, gradient_accumulation_steps=4)
    model = network()
    optimizer = per_layer_optimizer(model, torch.optim.AdamW)
    loss(model, 0).backward()
    with pytest.raises(MethodError, match=r"A second backward pass reached parameter '4.\w+' before step\(\)"):
        loss(model, 1).backward()
    optimizer.step()
    optimizer.zero_grad()
    loss(model, 2).backward()


def test_clipping_is_refused() -> None:
    with pytest.raises(MethodError, match=r"max_grad_norm = 1.0: clipping needs all gradients at once"):
        per_layer_optimizer(network(), torch.optim.AdamW, max_grad_norm=1.0)
    per_layer_optimizer(network(), torch.optim.AdamW, max_grad_norm=0.0)


def test_exchanged_parameters_are_noticed() -> None:
    optimizer = per_layer_optimizer(network(), torch.optim.AdamW)
    optimizer.param_groups[0]["params"][1] = nn.Parameter(torch.zeros(2))
    with pytest.raises(MethodError, match=r"parameter '0.bias' was exchanged after the optimizer was made"):
        optimizer.step()


# ---- the Trainer -------------------------------------------------------------------------------------------------


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    plain = {"max_steps": 4, "learning_rate": 1e-2, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    return TrainingArguments(output_dir=str(folder), **{**plain, "max_grad_norm": 0.0, "save_steps": 2, **options})


def trainer(folder: Path, layered: bool, **options: Any) -> Trainer:
    model = tiny("llama", num_layers=1)
    rows = torch.randint(1, 256, (32, 8), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row} for row in rows]
    made = per_layer_optimizer(model, torch.optim.AdamW, lr=1e-2) if layered else None
    optimizer = made or torch.optim.AdamW(model.parameters(), lr=1e-2)
    callbacks = [PerLayerCallback()] if layered else []
    kept = arguments(folder, **options)
    return Trainer(model=model, args=kept, train_dataset=data, optimizers=(optimizer, None), callbacks=callbacks)


def test_the_trainer_runs_it_saves_it_and_resumes(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        plain, layered = trainer(tmp_path / "plain", False), trainer(tmp_path / "layered", True)
        plain.train()
        layered.train()
        assert same(plain.model, layered.model)
        again = trainer(tmp_path / "again", True)
        again.train(resume_from_checkpoint=str(tmp_path / "layered" / "checkpoint-2"))
    assert same(again.model, layered.model)
    assert layered.lr_scheduler.last_epoch == 4  # once a step


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_grad_norm": 1.0}, "max_grad_norm = 1.0"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps = 2"),
    ],
)
def test_the_callback_refuses_arguments_before_the_first_step(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    run = trainer(tmp_path, True, **options)
    before = copy.deepcopy(run.model.state_dict())
    with torch.random.fork_rng(), pytest.raises(MethodError, match=message):
        run.train()
    assert all(torch.equal(before[name], tensor) for name, tensor in run.model.state_dict().items())


def test_the_callback_refuses_loss_scaling() -> None:
    class Scaled:
        gradient_accumulation_steps, max_grad_norm, fp16 = 1, 0.0, True

    with pytest.raises(MethodError, match="fp16 = True scales the loss"):
        PerLayerCallback().on_train_begin(Scaled(), None, None)
