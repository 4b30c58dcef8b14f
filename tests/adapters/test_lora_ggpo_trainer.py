"""GGPO and MGPO in transformers.Trainer: accumulation, clipping, evaluation, resume, logs; and what is refused."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from gnomon import catalog
from gnomon.adapters import GGPO, MGPO, FlatLoRACallback, GGPOCallback, MGPOCallback, Perturbation
from gnomon.common.lora import lora_pairs
from gnomon.common.models import tiny
from gnomon.errors import GnomonWarning, MethodError, ModelError

MAKE: dict[str, Any] = {
    "ggpo": lambda backend="auto": GGPOCallback(0.2, 0.5, backend=backend),
    "mgpo": lambda backend="auto": MGPOCallback(0.2, 0.8, backend=backend),
    "flat": lambda backend="auto": FlatLoRACallback(0.2, backend=backend),
}


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    rows = torch.randint(1, 64, (24, 8), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def lora(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    base = tiny("llama", vocab_size=64, hidden_size=16, num_layers=1, num_heads=2, max_positions=32).to(dtype)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        return peft.get_peft_model(
            base, peft.LoraConfig(**{"r": 3, "lora_alpha": 6, "target_modules": "all-linear", **options})
        )


def trainer(folder: Path, callback: Any, model: Any = None, **options: Any) -> Trainer:
    arguments: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.02,
        "max_grad_norm": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 0,
        **options,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Trainer(
            model=lora() if model is None else model,
            args=TrainingArguments(**arguments),
            train_dataset=Rows(),
            eval_dataset=Rows(),
            callbacks=[] if callback is None else [callback],
        )


def losses(run: Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def factors(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("backend", ["weight", "functional"])
@pytest.mark.parametrize("rule", MAKE)
def test_the_trainer_is_the_bare_loop(rule: str, backend: str, tmp_path: Path) -> None:
    """Accumulation and clipping by the Trainer against a loop that measures before it clips."""
    callback = MAKE[rule](backend)
    batches: list[Tensor] = []
    model = lora()
    model.register_forward_pre_hook(lambda m, a, k: batches.append(k["input_ids"].clone()), with_kwargs=True)
    run = trainer(tmp_path, callback, model, lr_scheduler_type="constant", max_steps=4)
    base = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    run.train()
    assert all(torch.equal(p, base[n]) for n, p in model.named_parameters() if n in base)

    other = lora().train()
    optimizer = torch.optim.AdamW([p for p in other.parameters() if p.requires_grad], lr=0.02, weight_decay=0.0)
    options = callback.rule
    if rule == "flat":
        options = GGPO(0.2, 0.0, "cosine", 4)
    perturbation = Perturbation(other, optimizer, options, backend=backend)
    found = []
    for step in range(4):
        total = 0.0
        for ids in batches[2 * step : 2 * step + 2]:
            with perturbation:
                loss = other(input_ids=ids, labels=ids).loss / 2
                loss.backward()
            total += float(loss.detach())
        found.append(total)
        torch.nn.utils.clip_grad_norm_(other.parameters(), 1e-3)
        optimizer.step()
        optimizer.zero_grad()
    assert losses(run) == pytest.approx(found, abs=1e-4)
    for name, value in factors(model).items():
        torch.testing.assert_close(dict(other.named_parameters())[name].data, value, atol=2e-5, rtol=1e-4)
    ours = callback.perturbation
    assert ours.steps == perturbation.steps == 4
    assert ours.memory.keys() == perturbation.memory.keys()
    for name, norm in ours.memory.items():
        torch.testing.assert_close(norm, perturbation.memory[name], rtol=1e-3, atol=0)


@pytest.mark.parametrize("rule", MAKE)
def test_evaluation_sees_the_weights_as_they_are(rule: str, tmp_path: Path) -> None:
    """A model evaluated while training is the one that an untouched copy of its weights is."""
    model = lora()
    run = trainer(
        tmp_path,
        MAKE[rule](),
        model,
        max_steps=3,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
    )
    run.train()
    logged = next(e["eval_loss"] for e in run.state.log_history if e.get("step") == 2 and "eval_loss" in e)
    plain = peft.PeftModel.from_pretrained(lora().unload(), str(tmp_path / "checkpoint-2")).eval()
    ids = Rows.rows
    with torch.no_grad():
        expected = float(plain(input_ids=ids, labels=ids).loss)
    assert logged == pytest.approx(expected, abs=1e-5)


class KilledError(Exception):
    """The run is killed."""


class Cut(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 4:
            raise KilledError


@pytest.mark.parametrize("rule", MAKE)
def test_a_cut_run_ends_where_the_whole_one_does(rule: str, tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "constant"}
    whole = trainer(tmp_path / "whole", MAKE[rule](), **options)
    whole.train()
    cut = trainer(tmp_path / "cut", MAKE[rule](), **options)
    cut.add_callback(Cut())
    with pytest.raises(KilledError):
        cut.train()
    checkpoint = tmp_path / "cut" / "checkpoint-3"
    resumed = trainer(tmp_path / "cut", MAKE[rule](), **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    for name, value in factors(whole.model).items():
        assert torch.equal(value, factors(resumed.model)[name]), name
    (checkpoint / {"ggpo": "lora-ggpo.pt", "mgpo": "mgpo.pt", "flat": "flat-lora.pt"}[rule]).unlink()
    forgetful = trainer(tmp_path / "cut", MAKE[rule](), **options)
    with pytest.warns(GnomonWarning, match="so the gradient norms are averaged anew from step 3"):
        forgetful.train(resume_from_checkpoint=str(checkpoint))
    same = all(torch.equal(value, factors(forgetful.model)[name]) for name, value in factors(whole.model).items())
    assert same == (rule == "flat")  # which has no memory of gradients


def test_the_saved_adapter_is_a_plain_lora_and_nothing_stays_on_the_model(tmp_path: Path) -> None:
    model = lora()
    callback = GGPOCallback(0.1, backend="functional")
    run = trainer(tmp_path, callback, model, max_steps=2)
    run.train()
    linear = [m for m in model.modules() if isinstance(m, (nn.Linear, peft.tuners.lora.LoraLayer))]
    assert not any("forward" in m.__dict__ or m._forward_hooks or m._forward_pre_hooks for m in linear)
    model.save_pretrained(str(tmp_path / "adapter"))
    again = peft.PeftModel.from_pretrained(lora().unload(), str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        assert torch.equal(again(input_ids=Rows.rows).logits, model.eval()(input_ids=Rows.rows).logits)


def test_logs_and_mu(tmp_path: Path) -> None:
    run = trainer(tmp_path, MGPOCallback(rho=0.05, mu=0.7), max_steps=3)
    run.train()
    entries = [e for e in run.state.log_history if "loss" in e]
    assert all(e["mgpo_gradient_norm"] > 0 and e["mgpo_skipped"] == 0 for e in entries)
    assert run.optimizer is not None
    assert run.optimizer.param_groups[0]["betas"][0] == 0.7
    flat = trainer(tmp_path, FlatLoRACallback(0.05), max_steps=3)
    flat.train()
    sigmas = [e["ggpo_sigma"] for e in flat.state.log_history if "loss" in e]
    assert sigmas == pytest.approx([0.0, 0.0125, 0.0375])


@pytest.mark.parametrize("precision", ["bf16", "checkpointed"])
def test_mixed_precision_and_checkpointing(precision: str, tmp_path: Path) -> None:
    changes = {"bf16": True} if precision == "bf16" else {"gradient_checkpointing": True}
    for rule in ("ggpo", "mgpo"):
        plain = trainer(tmp_path / "a", MAKE[rule]("functional"), max_steps=3)
        changed = trainer(tmp_path / "b", MAKE[rule]("functional"), max_steps=3, **changes)
        plain.train()
        changed.train()
        assert losses(changed) == pytest.approx(losses(plain), abs=0.02 if precision == "bf16" else 1e-6)


def test_a_base_in_bfloat16_takes_the_functional_backend(tmp_path: Path) -> None:
    for dtype, expected in ((torch.bfloat16, "functional"), (torch.float32, "weight")):
        model = lora(dtype)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        perturbation = Perturbation(model, optimizer, GGPO())
        assert {perturbation._backend_of(pair) for pair in perturbation.pairs} == {expected}


def test_an_interrupted_step_is_closed_by_the_next_training(tmp_path: Path) -> None:
    model = lora()
    callback = MGPOCallback(0.2)
    run = trainer(tmp_path, callback, model, max_steps=3)
    calls = []

    def fail(grad: Tensor) -> None:
        calls.append(1)
        if len(calls) == 5:
            raise RuntimeError("in backward")

    handle = model.base_model.model.lm_head.register_forward_hook(lambda m, a, y: y.register_hook(fail) and None)
    with pytest.raises(RuntimeError, match="in backward"):
        run.train()
    handle.remove()
    assert callback.perturbation is not None
    assert callback.perturbation.is_open
    second = trainer(tmp_path, GGPOCallback(), model, max_steps=1)
    with pytest.raises(
        MethodError, match=r"another perturbation of .* is open. Use one at a time, and call its close\(\)"
    ):
        second.train()
    callback.close()
    trainer(tmp_path, callback, model, max_steps=1).train()
    assert not callback.perturbation.is_open


# -- what is refused -----------------------------------------------------------------------------------------------


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])


def merged() -> Any:
    model = lora()
    model.merge_adapter()
    return model


def two_active() -> Any:
    model = lora()
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "second"])
    return model


def quantised() -> Any:
    bnb = pytest.importorskip("bitsandbytes")
    base = tiny("llama", vocab_size=64, hidden_size=16, num_layers=1, num_heads=2)
    mlp = base.model.layers[0].mlp
    mlp.up_proj = bnb.nn.Linear8bitLt(16, mlp.up_proj.out_features, bias=False, has_fp16_weights=False)
    return peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["up_proj"]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tiny("llama"), "the model has no LoRA at a linear layer"),
        (merged, r"the adapter 'default' is merged into .* Call unmerge_adapter\(\) first"),
        (lambda: lora(use_dora=True), r"has a variant of LoRA \(DoraLinearVariant\), whose merged weight is not W"),
    ],
)
def test_refused_models(make: Any, message: str) -> None:
    model = make()
    with pytest.raises(ModelError, match=message):
        Perturbation(model, adamw(model), GGPO())


def test_several_active_adapters_are_refused() -> None:
    model = two_active()
    with pytest.raises(MethodError, match=r"2 adapters are active \(default, second\). Name one"):
        Perturbation(model, adamw(model), GGPO())


def test_a_quantised_base_is_refused_by_the_weight_backend_alone() -> None:
    model = quantised()
    with pytest.raises(
        ModelError, match=r"backend = 'weight' cannot be used at .*up_proj: its base weight is quantised"
    ):
        Perturbation(model, adamw(model), GGPO(), backend="weight")
    perturbation = Perturbation(model, adamw(model), GGPO())
    assert perturbation._backend_of(perturbation.pairs[0]) == "functional"


def test_merging_between_steps_is_refused() -> None:
    model = lora()
    perturbation = Perturbation(model, adamw(model), GGPO())
    model.merge_adapter()
    with pytest.raises(ModelError, match=r"is merged into .* so there is nothing to train"):
        perturbation.open()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1), "SGD with these options keeps no momentum. MGPO moves along"),
        (lambda p: torch.optim.Adafactor(p), "Adafactor with these options keeps no momentum"),
        (lambda p: torch.optim.AdamW([{"params": p, "rank": 4}]), "keeps the momentum of .* projected to a lower rank"),
        (lambda p: torch.optim.AdamW([nn.Parameter(torch.zeros(2))]), "is not among the optimizer's parameters"),
        (lambda p: "adamw", "the optimizer is a str. Give the torch.optim.Optimizer"),
    ],
)
def test_refused_optimizers(make: Any, message: str) -> None:
    model = lora()
    with pytest.raises(MethodError, match=message):
        Perturbation(model, make([p for p in model.parameters() if p.requires_grad]), MGPO())


def test_optimizers_found_out_by_their_state() -> None:
    model = lora()
    ids = Rows.rows[:2]

    def steps(optimizer: torch.optim.Optimizer, spoil: Any = None) -> None:
        perturbation = Perturbation(model, optimizer, MGPO())
        for _ in range(2):
            with perturbation:
                model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            if spoil is not None:
                spoil(optimizer.state[lora_pairs(model)[0].a])

    with pytest.raises(MethodError, match=r"Adagrad keeps no momentum of lora_B .*its state: step, sum"):
        steps(torch.optim.Adagrad([p for p in model.parameters() if p.requires_grad]))
    with pytest.raises(MethodError, match=r"in the shape \(2, 2\), not \(3, 16\): projected or flattened"):
        steps(adamw(model), lambda state: state.update(exp_avg=torch.zeros(2, 2)))
    with pytest.raises(MethodError, match="which is not understood"):
        steps(adamw(model), lambda state: state.update(exp_avg=torch.zeros(3, 16, dtype=torch.uint8)))
    with pytest.raises(MethodError, match=r"mu = 1.5; it must be in"):
        MGPOCallback(mu=1.5)._rule(adamw(model), 1)
    with pytest.raises(MethodError, match=r"Adagrad has neither betas nor momentum, so mu = 0.9 has no place"):
        MGPOCallback(mu=0.9)._rule(torch.optim.Adagrad([nn.Parameter(torch.zeros(1))]), 1)
    with pytest.raises(MethodError, match=r"backend = 'fast'. Allowed: 'auto', 'weight', 'functional'"):
        Perturbation(model, adamw(model), GGPO(), backend="fast")  # type: ignore[arg-type]


def test_deepspeed_is_refused(tmp_path: Path) -> None:
    from types import SimpleNamespace

    model = lora()
    arguments = SimpleNamespace(deepspeed={"zero": 3})
    with pytest.raises(ModelError, match=r"DeepSpeed keeps gradients and momenta to itself. Train with DDP or FSDP2"):
        GGPOCallback().on_train_begin(arguments, None, None, model=model, optimizer=adamw(model))
    model.base_model.model.lm_head.weight.ds_id = 0
    with pytest.raises(ModelError, match="held by DeepSpeed ZeRO-3"):
        Perturbation(model, adamw(model), GGPO())


def test_the_card() -> None:
    assert catalog.load("lora-ggpo") is GGPOCallback
    assert catalog.load("mgpo") is MGPOCallback
    assert catalog.load("flat-lora") is FlatLoRACallback
    assert catalog.get("lora-ggpo").plugs == catalog.get("mgpo").plugs == "callback"
