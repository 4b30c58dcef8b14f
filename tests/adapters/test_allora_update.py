"""ALLoRA at the optimizer: any optimizer, the Trainer with a resume, and what says that nothing is scaled."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import Trainer, TrainingArguments

from gnomon import catalog
from gnomon.adapters import (
    ALLoRACallback,
    ALLoRAConfig,
    allora_callback,
    row_scales,
    scale_allora_updates,
    train_as_allora,
)
from gnomon.common.lora import lora_pairs
from gnomon.common.models import tiny
from gnomon.errors import GnomonWarning, MethodError

# What the definition is computed with is followed by nobody.
pytestmark = pytest.mark.filterwarnings("ignore:.*trains as plain LoRA:gnomon.errors.GnomonWarning")
SIZES = {"vocab_size": 64, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "max_positions": 32}
ETA = 3.0


def ids(rows: int = 4, seed: int = 9) -> Tensor:
    return torch.randint(1, 64, (rows, 12), generator=torch.Generator().manual_seed(seed))


def adapted(apply: str = "update", dtype: torch.dtype = torch.float32, shake: bool = True) -> Any:
    config = ALLoRAConfig(r=3, eta=ETA, apply=apply, target_modules="all-linear", task_type="CAUSAL_LM")
    generator = torch.Generator().manual_seed(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = peft.get_peft_model(tiny("llama", **SIZES), config).to(dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name and shake:
                p.add_(0.3 * torch.randn(p.shape, generator=generator).to(dtype))
    return model.train()


def trained(model: Any) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def backward(model: Any, step: int = 0) -> None:
    rows = ids(seed=step)
    model(input_ids=rows, labels=rows, use_cache=False).loss.backward()


def definition(model: Any, optimizer: torch.optim.Optimizer) -> None:
    """One step: what the optimizer does to row i of B, times s_i of the factors before."""
    before = [(p.b.detach().clone(), row_scales(p.b, p.a, ETA)) for p in lora_pairs(model)]
    optimizer.step()
    with torch.no_grad():
        for (b, scales), p in zip(before, lora_pairs(model), strict=True):
            for i in range(len(b)):
                p.b[i] = b[i] + scales[i] * (p.b[i] - b[i])


MAKERS: dict[str, Any] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float64) for name in MAKERS), ("AdamW", torch.float32), ("AdamW", torch.bfloat16)],
)
def test_any_optimizer_steps_by_the_rule(name: str, dtype: torch.dtype) -> None:
    ours, theirs = adapted(dtype=dtype), adapted(dtype=dtype)
    followed, plain = MAKERS[name](trained(ours)), MAKERS[name](trained(theirs))
    scale_allora_updates(followed, ours)
    for step in range(3):
        for model, optimizer in ((ours, followed), (theirs, plain)):
            backward(model, step)
            if optimizer is followed:
                optimizer.step()
            else:
                definition(model, optimizer)
            optimizer.zero_grad()
    for a, b in zip(trained(ours), trained(theirs), strict=True):
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
        assert a.dtype == dtype


def test_the_first_update_of_b_is_eta_times_that_of_adam_and_a_is_adam_s() -> None:
    models = [adapted(shake=False), adapted(shake=False)]
    optimizers = [torch.optim.AdamW(trained(m), lr=0.01, weight_decay=0.0) for m in models]
    scale_allora_updates(optimizers[0], models[0])
    for model, optimizer in zip(models, optimizers, strict=True):
        backward(model)
        optimizer.step()
    for p, q in zip(lora_pairs(models[0]), lora_pairs(models[1]), strict=True):
        assert q.b.abs().max() > 0.009
        torch.testing.assert_close(p.b, ETA * q.b)
        assert torch.equal(p.a, q.a)


def test_a_step_that_is_left_out_and_one_with_a_closure() -> None:
    model = adapted()
    optimizer = torch.optim.AdamW(trained(model), lr=0.01, weight_decay=0.0)
    scale_allora_updates(optimizer, model)
    before = [p.clone() for p in trained(model)]
    optimizer.step()  # no gradients
    assert all(torch.equal(p, q) for p, q in zip(trained(model), before, strict=True))
    twin = adapted()
    other = torch.optim.AdamW(trained(twin), lr=0.01, weight_decay=0.0)

    def closure() -> Tensor:
        backward(model)
        return torch.tensor(0.0)

    optimizer.step(closure)
    backward(twin)
    definition(twin, other)
    for p, q in zip(trained(model), trained(twin), strict=True):
        torch.testing.assert_close(p, q)


def test_the_end_of_it_and_doing_it_twice() -> None:
    model = adapted()
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    followed = scale_allora_updates(optimizer, model)
    with pytest.raises(MethodError, match=r"scales its updates already\. Call remove\(\)"):
        scale_allora_updates(optimizer, model)
    followed.remove()
    twin = copy.deepcopy(model)
    other = torch.optim.SGD(trained(twin), lr=0.1)
    for m, o in ((model, optimizer), (twin, other)):
        backward(m)
        o.step()
    assert all(torch.equal(p, q) for p, q in zip(trained(model), trained(twin), strict=True))
    scale_allora_updates(optimizer, model)


def test_only_the_adapters_in_update_mode_are_scaled() -> None:
    model = adapted()
    config = ALLoRAConfig(r=2, eta=5.0, target_modules="all-linear")
    model.add_adapter("second", config)
    model.base_model.set_adapter(["default", "second"])
    twin = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(trained(m), lr=0.1) for m in (model, twin)]
    scale_allora_updates(optimizers[0], model)
    for m, optimizer in zip((model, twin), optimizers, strict=True):
        backward(m)
        optimizer.step()
    for p, q in zip(lora_pairs(model, "second"), lora_pairs(twin, "second"), strict=True):
        assert torch.equal(p.b, q.b)
    assert not torch.equal(lora_pairs(model, "default")[0].b, lora_pairs(twin, "default")[0].b)


def test_what_cannot_be_followed() -> None:
    model = adapted()
    with pytest.raises(MethodError, match=r"no adapter of the model has apply='update'.*train_as_allora"):
        scale_allora_updates(torch.optim.SGD(trained(model), lr=0.1), adapted("gradient"))
    with pytest.raises(MethodError, match=r"optimizer \(SGD\) holds none of the model's factors B"):
        scale_allora_updates(torch.optim.SGD(trained(adapted()), lr=0.1), model)
    with pytest.raises(MethodError, match=r"the optimizer is a dict\. Give a torch\.optim\.Optimizer"):
        scale_allora_updates({}, model)


def test_a_loaded_lora_is_followed_too() -> None:
    model = adapted("gradient")
    train_as_allora(model, eta=ETA, apply="update")
    twin = adapted()
    for m in (model, twin):
        optimizer = torch.optim.SGD(trained(m), lr=0.1)
        scale_allora_updates(optimizer, m)
        backward(m)
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(trained(model), trained(twin), strict=True))


def test_accelerate_s_wrapper() -> None:
    model, twin = adapted(), adapted()
    accelerator = Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(model, torch.optim.AdamW(trained(model), lr=0.01))
    scale_allora_updates(optimizer, model)
    rows = ids(seed=0)
    accelerator.backward(prepared(input_ids=rows, labels=rows, use_cache=False).loss)
    optimizer.step()
    backward(twin)
    definition(twin, torch.optim.AdamW(trained(twin), lr=0.01))
    for p, q in zip(trained(model), trained(twin), strict=True):
        torch.testing.assert_close(p, q)


def test_training_that_nobody_scales_warns_once() -> None:
    model = adapted()
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", GnomonWarning)
        backward(model)
        backward(model)  # two passes of one step
    optimizer.step()
    optimizer.zero_grad()
    with pytest.warns(GnomonWarning, match=r"trains as plain LoRA\. Call scale_allora_updates\(optimizer, model\)"):
        backward(model)
    optimizer.step()
    optimizer.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("error", GnomonWarning)
        backward(model)
        for quiet in (adapted(), adapted("gradient")):
            made = torch.optim.SGD(trained(quiet), lr=0.1)
            if quiet.peft_config["default"].apply == "update":
                scale_allora_updates(made, quiet)
            for _ in range(3):
                backward(quiet)
                made.step()
                made.zero_grad()


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Eight rows of tokens."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": ids(8)[index], "labels": ids(8)[index]}


def trainer(folder: Path, steps: int, callbacks: list[Any], model: Any = None) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        save_steps=2,
        learning_rate=0.01,
        lr_scheduler_type="constant",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        label_names=["labels"],
        seed=3,
    )
    return Trainer(model=model or adapted(), args=arguments, train_dataset=Rows(), callbacks=callbacks)


def test_the_callback_scales_resumes_and_lets_go(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", GnomonWarning)
        whole = trainer(tmp_path / "whole", 4, [ALLoRACallback()])
        whole.train()
        trainer(tmp_path / "half", 2, [ALLoRACallback()]).train()
        resumed = trainer(tmp_path / "half", 4, [ALLoRACallback()])
        resumed.train(resume_from_checkpoint=True)
    for p, q in zip(trained(whole.model), trained(resumed.model), strict=True):
        assert torch.equal(p, q)
    assert not whole.optimizer.optimizer._optimizer_step_post_hooks
    own = adapted()  # an optimizer that is followed already is left alone
    optimizer = torch.optim.AdamW(trained(own), lr=0.01, weight_decay=0.0)
    scale_allora_updates(optimizer, own)
    by_hand = trainer(tmp_path / "hand", 4, [ALLoRACallback()], own)
    by_hand.optimizer = optimizer
    by_hand.train()
    for p, q in zip(trained(whole.model), trained(own), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    without = trainer(tmp_path / "without", 4, [])
    with pytest.warns(GnomonWarning, match="trains as plain LoRA"):
        without.train()
    assert not torch.allclose(trained(whole.model)[1], trained(without.model)[1], atol=1e-3)


def test_recipes_get_the_callback_that_the_mode_needs() -> None:
    make = catalog.resolve(catalog.get("allora").recipe["callback"])
    assert make is allora_callback
    assert isinstance(make(adapted()), ALLoRACallback)
    assert make(adapted("gradient")) is None
