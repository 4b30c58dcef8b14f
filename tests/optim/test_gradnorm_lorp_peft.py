"""The adapter form: PEFT's DoRA trained by the projected Adam, and what is refused."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments

from gnomon.common.memory import tensor_bytes
from gnomon.common.models import tiny
from gnomon.errors import GnomonWarning, ModelError
from gnomon.optim import GaLoreAdamW, GradNormLoRP, gradnorm_lorp_groups, training_memory

BATCH = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(0))


def base() -> Any:
    return tiny("llama", vocab_size=64, hidden_size=32, num_layers=2)


def dora(use_dora: bool = True, **options: Any) -> PeftModel:
    config = LoraConfig(**{"r": 8, "target_modules": ["q_proj", "up_proj"], "use_dora": use_dora, **options})
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        return get_peft_model(base(), config)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=BATCH).logits


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int = 3) -> None:
    for _ in range(count):
        model(input_ids=BATCH, labels=BATCH).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_groups_of_a_dora() -> None:
    model = dora()
    factors, rest = gradnorm_lorp_groups(model, 4)
    assert len(factors["params"]) == 8
    assert all("lora_A" in name or "lora_B" in name for name, _ in factors["params"])
    assert len(rest["params"]) == 4
    assert all("magnitude" in name for name, _ in rest["params"])
    assert factors["weight_norm"] is rest["weight_norm"] is False
    some = gradnorm_lorp_groups(model, 4, ["up_proj"])
    assert {name.split(".lora")[0].rpartition(".")[2] for name, _ in some[0]["params"]} == {"up_proj"}
    assert sum(len(group["params"]) for group in some) == 12
    headed = gradnorm_lorp_groups(dora(modules_to_save=["lm_head"]), 4)
    assert any("lm_head" in name for name, _ in headed[1]["params"])
    assert not any("lm_head" in name for name, _ in headed[0]["params"])


def test_it_starts_as_the_base_and_is_projected_adam_on_the_factors() -> None:
    model, other = dora(), dora()
    assert torch.allclose(logits(model), logits(base()), atol=1e-5)
    steps(model, GradNormLoRP(gradnorm_lorp_groups(model, 4, update_proj_gap=2), lr=0.01))
    groups = gradnorm_lorp_groups(other, 4, update_proj_gap=2)
    galore = GaLoreAdamW([{k: v for k, v in group.items() if k != "weight_norm"} for group in groups], lr=0.01)
    steps(other, galore)
    changed = 0
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name
        changed += p.requires_grad
    assert changed == 12
    assert (logits(model) - logits(base())).abs().max() > 1e-4


@pytest.mark.parametrize("mode", ["weightnorm", "authors"])
def test_the_mode_does_not_matter_to_an_adapter(mode: str) -> None:
    models = [dora(), dora()]
    for model, own in zip(models, ("weightnorm", mode), strict=True):
        steps(model, GradNormLoRP(gradnorm_lorp_groups(model, 4), lr=0.01, mode=own))
    assert all(torch.equal(p, q) for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True))


def test_saving_loading_and_merging_are_pefts_own(tmp_path: Path) -> None:
    model = dora()
    optimizer = GradNormLoRP(gradnorm_lorp_groups(model, 4), lr=0.01)
    steps(model, optimizer)
    trained = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.allclose(logits(PeftModel.from_pretrained(base(), tmp_path)), trained, atol=1e-6)
    assert torch.allclose(logits(model.merge_and_unload()), trained, atol=1e-4)


def test_through_the_trainer(tmp_path: Path) -> None:
    model = dora()
    rows = [{"input_ids": ids, "labels": ids} for ids in BATCH.repeat(4, 1)]
    optimizer = GradNormLoRP(gradnorm_lorp_groups(model, 4), lr=0.01)
    arguments = TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=4, report_to=[], use_cpu=True, disable_tqdm=True,
        save_strategy="no",
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, None)).train()
    assert len(optimizer.state) == 12
    assert training_memory(model, 4).state == tensor_bytes(dict(optimizer.state))
    layerwise = GradNormLoRP(gradnorm_lorp_groups(model, 4), lr=0.01)
    layerwise.step_in_backward()
    model(input_ids=BATCH, labels=BATCH).loss.backward()
    assert all(p.grad is None for p in model.parameters())


def test_conv1d_layers_and_quantised_bases_need_nothing_more() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=16)
        model = get_peft_model(GPT2LMHeadModel(config), LoraConfig(r=8, target_modules=["c_fc"], use_dora=True))
        factors, rest = gradnorm_lorp_groups(model, 4)
        assert [tuple(p.shape) for _, p in factors["params"]] == [(8, 32), (128, 8)]
        assert [tuple(p.shape) for _, p in rest["params"]] == [(128,)]
        steps(model, GradNormLoRP([factors, rest], lr=0.01), 2)


def test_a_base_in_four_bits() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = base()
    for block in model.model.layers:
        old = block.mlp.up_proj
        new = bitsandbytes.nn.Linear4bit(old.in_features, old.out_features, bias=False, quant_type="nf4")
        new.load_state_dict(old.state_dict())
        block.mlp.up_proj = new.to("cpu")
    model.is_loaded_in_4bit = True
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(model, LoraConfig(r=8, target_modules=["up_proj"], use_dora=True))
        groups = gradnorm_lorp_groups(model, 4)
        assert [len(group["params"]) for group in groups] == [4, 2]
        factors = [p for _, p in groups[0]["params"]]
        before = [p.detach().clone() for p in factors]
        steps(model, GradNormLoRP(groups, lr=0.01), 2)
    assert not any(torch.equal(p, q) for p, q in zip(before, factors, strict=True))


def test_adapters_that_do_not_normalise_are_refused() -> None:
    plain = dora(use_dora=False)
    message = r"'default' has no magnitudes at .*q_proj \(use_dora is off\).*form='dense'"
    for form in ("auto", "adapter"):
        with pytest.raises(ModelError, match=message):
            gradnorm_lorp_groups(plain, 4, form=form)  # type: ignore[arg-type]
    groups = gradnorm_lorp_groups(plain, 4, form="dense")  # the factors as weights of their own
    assert len(groups[0]["params"]) == 8
    with pytest.raises(ModelError, match=r"target_modules = \['lm_head'\]"):
        gradnorm_lorp_groups(dora(), 4, ["lm_head"])
    headed = dora(modules_to_save=["lm_head"])
    with pytest.raises(ModelError, match=r"target_modules = \['lm_head'\] matches no layer with an adapter"):
        gradnorm_lorp_groups(headed, 4, ["lm_head"])


def test_a_rank_that_saves_nothing_is_told() -> None:
    with pytest.warns(GnomonWarning, match=r"rank = 8 is not below r = 8 of the adapter.*only rotated"):
        gradnorm_lorp_groups(dora(), 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradnorm_lorp_groups(dora(), 7)


def test_two_adapters_only_the_active_one_is_trained() -> None:
    model = dora()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_adapter("second", peft.LoraConfig(r=6, target_modules=["up_proj"], use_dora=True))
    model.set_adapter("second")
    groups = gradnorm_lorp_groups(model, 4)
    assert all(".second." in name for name, _ in groups[0]["params"])
    assert len(groups[0]["params"]) == 4
