"""What every method that rebuilds a model owes, over all members the catalog finds; exceptions carry a reason."""

from __future__ import annotations

import copy
import inspect
import pickle
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from gnomon import catalog
from gnomon.common import surgery
from gnomon.common.models import load_model, save_model, tiny
from gnomon.errors import GnomonError, ModelError

SLUGS = [card.slug for card in catalog.methods(plugs="architecture")]

OPTIONS: dict[str, dict[str, Any]] = {  # arguments without a default, or small ones for speed
    "lm-infinite": {"local": 5, "sinks": 2},  # shorter than the texts here
    "mix-ln": {"post_ratio": 0.5},  # a quarter of three blocks is none
    "sltrain": {"rank": 8},
}

WRONG_FAMILY: dict[str, str] = {}  # a family the method refuses; bert where nothing is said

RENAMES: set[str] = {"mix-ln", "sltrain"}  # methods that declare parameter names other than the stock model's

EXCEPTIONS: dict[tuple[str, str], str] = {
    ("sltrain", "family"): "it replaces linear layers by their names, in every family",
}

CHECKS = ("round trip", "generate", "checkpointing", "family", "twice", "fold", "names", "copy", "bfloat16")


def excused(slug: str, check: str) -> None:
    assert check in CHECKS
    if (slug, check) in EXCEPTIONS:
        pytest.skip(EXCEPTIONS[slug, check])


def ids(rows: int = 2, tokens: int = 12, seed: int = 9) -> Tensor:
    return torch.randint(1, 256, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def apply(slug: str, model: nn.Module) -> nn.Module:
    """Call an entry by its parameters' names, as recipes do."""
    entry: Callable[..., nn.Module] = catalog.load(slug)
    offered = {"model": model, "seed": 0, **OPTIONS.get(slug, {})}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return entry(**{k: v for k, v in offered.items() if k in inspect.signature(entry).parameters})


def shaken(model: nn.Module) -> nn.Module:
    """Move every parameter a little, as training does: gains of 1 would hide a lost factor."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def made(slug: str, **sizes: Any) -> nn.Module:
    return shaken(apply(slug, tiny("llama", num_layers=3, **sizes))).eval()


def logits(model: nn.Module, given: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids() if given is None else given).logits


@pytest.mark.parametrize("slug", SLUGS)
def test_a_rebuilt_model_is_saved_and_loaded(slug: str, tmp_path: Path) -> None:
    excused(slug, "round trip")
    model = made(slug)
    assert surgery.is_recorded(model, slug)
    save_model(model, tmp_path / "model")
    again = load_model(tmp_path / "model")
    assert surgery.recorded(again) == surgery.recorded(model)
    assert type(again) is type(model)
    assert list(again.state_dict()) == list(model.state_dict())
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-6)
    save_model(again, tmp_path / "second")
    torch.testing.assert_close(logits(load_model(tmp_path / "second")), logits(model), rtol=0, atol=1e-6)


@pytest.mark.parametrize("slug", SLUGS)
def test_generation_with_cache_equals_the_full_forward(slug: str) -> None:
    excused(slug, "generate")
    model, prompt = made(slug), ids(tokens=5)
    made_text = model.generate(
        prompt, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    full = logits(model, made_text.sequences)
    for step, of_step in enumerate(made_text.logits):
        torch.testing.assert_close(of_step, full[:, prompt.shape[1] - 1 + step], rtol=1e-4, atol=1e-4)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    model(input_ids=ids(), labels=ids(), use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("slug", SLUGS)
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_gradient_checkpointing_gives_the_same_gradients(slug: str, reentrant: bool) -> None:
    excused(slug, "checkpointing")
    model = made(slug).train()
    plain = gradients(model)
    assert plain
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    checkpointed = gradients(model)
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("slug", SLUGS)
def test_a_family_it_does_not_support_is_refused_by_name_and_left_alone(slug: str) -> None:
    excused(slug, "family")
    family = WRONG_FAMILY.get(slug, "bert")
    model = tiny(family, num_layers=2)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ModelError, match=family):
        apply(slug, model)
    assert surgery.recorded(model) == []
    assert list(before) == list(model.state_dict())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("slug", SLUGS)
def test_applied_twice_is_refused_and_changes_nothing(slug: str) -> None:
    excused(slug, "twice")
    model = apply(slug, tiny("llama", num_layers=3)).eval()
    before, entries = logits(model), surgery.recorded(model)
    with pytest.raises(ModelError):
        apply(slug, model)
    assert torch.equal(logits(model), before)
    assert surgery.recorded(model) == entries


@pytest.mark.parametrize("slug", SLUGS)
def test_the_fold_is_a_stock_checkpoint_with_equal_logits(slug: str, tmp_path: Path) -> None:
    fold = catalog.get(slug).recipe.get("fold")
    if not fold:
        pytest.skip("its card names no fold")
    excused(slug, "fold")
    model = made(slug)
    expected = logits(model)
    folded = catalog.resolve(fold)(model)
    assert not surgery.is_recorded(folded, slug)
    folded.save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert list(stock.state_dict()) == list(tiny("llama", num_layers=3).state_dict())
    assert float((logits(stock) - expected).abs().max()) < 1e-5


@pytest.mark.parametrize("slug", SLUGS)
def test_parameter_names_are_the_stock_models_unless_declared(slug: str) -> None:
    excused(slug, "names")
    stock = [name for name, _ in tiny("llama", num_layers=3).named_parameters()]
    names = [name for name, _ in made(slug).named_parameters()]
    assert (names != stock) == (slug in RENAMES)


@pytest.mark.parametrize("slug", SLUGS)
def test_copies_and_pickles_are_equal_and_independent(slug: str) -> None:
    excused(slug, "copy")
    model = made(slug)
    expected = logits(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), expected)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        logits(twin)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("slug", SLUGS)
def test_bfloat16_weights_and_autocast_stay_near_float32(slug: str) -> None:
    excused(slug, "bfloat16")
    model = made(slug)
    expected = logits(model)
    scale = float(expected.abs().max())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = logits(model)
    half = copy.deepcopy(model).bfloat16()
    found = logits(half)
    assert found.dtype == torch.bfloat16
    for each in (autocast, found):
        assert float((each.float() - expected).abs().max()) < 0.05 * scale
    assert all(bool(torch.isfinite(g).all()) for g in gradients(half.train()).values())


@pytest.mark.parametrize("slug", SLUGS)
def test_the_same_call_gives_the_same_model_and_leaves_global_randomness_alone(slug: str) -> None:
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    first, second = (logits(apply(slug, tiny("llama", num_layers=3)).eval()) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002
    assert before[2] == random.getstate()


@pytest.mark.parametrize("slug", SLUGS)
def test_training_mode_is_kept(slug: str) -> None:
    for training in (True, False):
        model = apply(slug, tiny("llama", num_layers=2).train(training))
        assert all(module.training is training for module in model.modules())


@pytest.mark.parametrize("slug", SLUGS)
def test_every_option_has_a_plain_type_and_a_default_or_a_row_here(slug: str) -> None:
    for name, parameter in inspect.signature(catalog.load(slug)).parameters.items():
        if name in ("model", "original_model", "tokenizer", "calibration", "texts", "seed", "on_layer"):
            continue
        assert parameter.annotation is not inspect.Parameter.empty, name
        assert parameter.default is not inspect.Parameter.empty or name in OPTIONS.get(slug, {}), name


def test_the_tables_name_known_checks() -> None:
    assert {check for _, check in EXCEPTIONS} <= set(CHECKS)
    assert issubclass(ModelError, GnomonError)
