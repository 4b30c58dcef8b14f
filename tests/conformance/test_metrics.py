"""What every metric owes, tested over all members the catalog finds; an exception is a line with its reason."""

from __future__ import annotations

import copy
import inspect
import math
import random
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from gnomon import catalog
from gnomon.common.models import tiny
from gnomon.common.text import byte_tokenizer
from gnomon.errors import GnomonError

SLUGS = [card.slug for card in catalog.methods(plugs="metric")]
FAMILIES = ["llama", "qwen", "gpt2", "gpt_neox", "bert"]
TEXTS = ["a short text", "def area(r): return 3.14 * r * r", "the quick brown fox jumps over it", "x = [i for i in y]"]

OPTIONS: dict[str, dict[str, Any]] = {}  # arguments without a default, or small ones for speed

EXCEPTIONS: dict[tuple[str, str], str] = {}  # (slug, check): reason

TOLERANCE = 1e-4  # batches of other shapes sum in another order


def excuse(slug: str, check: str) -> None:
    if (slug, check) in EXCEPTIONS:
        pytest.skip(f"{slug}: {EXCEPTIONS[slug, check]}")


def model_of(family: str = "llama") -> nn.Module:
    return tiny(family, vocab_size=257, num_layers=2, hidden_size=32).eval()


def call_of(slug: str) -> Any:
    """What a recipe calls: the card's `call`, else the entry."""
    card = catalog.get(slug)
    return catalog.resolve(str(card.recipe.get("call", card.entry)))


def result(slug: str, model: nn.Module, texts: list[str] | None = None, tokenizer: Any = None, **more: Any) -> Any:
    """Call a metric by its parameters' names, as recipes do."""
    entry = call_of(slug)
    offered = {
        "model": model,
        "compressed_model": model,
        "original_model": model,
        "tokenizer": byte_tokenizer() if tokenizer is None else tokenizer,
        "texts": TEXTS if texts is None else texts,
        "calibration": torch.randint(1, 257, (4, 32), generator=torch.Generator().manual_seed(0)),
        "seed": 0,
        **OPTIONS.get(slug, {}),
        **more,
    }
    taken = inspect.signature(entry).parameters
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return entry(**{name: value for name, value in offered.items() if name in taken})


def summary(slug: str, model: nn.Module, *args: Any, **more: Any) -> dict[str, float]:
    numbers: dict[str, float] = result(slug, model, *args, **more).summary()
    return numbers


def same(a: dict[str, float], b: dict[str, float]) -> None:
    assert set(a) == set(b)
    for name in a:
        assert a[name] == pytest.approx(b[name], rel=TOLERANCE, abs=TOLERANCE), name


def takes(slug: str, name: str) -> bool:
    return name in inspect.signature(call_of(slug)).parameters


@pytest.mark.parametrize("slug", SLUGS)
def test_a_recipe_can_call_it(slug):
    """What a stage does not offer has a default, and an annotation that the recipe schema can check."""
    offered = {"model", "compressed_model", "original_model", "tokenizer", "calibration", "texts", "seed", "on_layer"}
    for parameter in inspect.signature(call_of(slug)).parameters.values():
        if parameter.name in offered:
            continue
        assert parameter.annotation is not inspect.Parameter.empty, parameter
        assert parameter.default is not inspect.Parameter.empty or parameter.name in OPTIONS.get(slug, {}), parameter
    assert catalog.get(slug).recipe.get("stages") == ["evaluate"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("slug", SLUGS)
def test_the_summary_is_finite_floats_by_name(slug, family):
    excuse(slug, family)
    numbers = summary(slug, model_of(family))
    assert numbers
    for name, value in numbers.items():
        assert isinstance(name, str)
        assert type(value) is float, name
        assert math.isfinite(value), name


@pytest.mark.parametrize("slug", SLUGS)
def test_it_is_deterministic(slug):
    assert summary(slug, model_of()) == summary(slug, model_of())


@pytest.mark.parametrize("slug", SLUGS)
def test_it_looks_at_the_model_and_at_the_texts(slug):
    base = summary(slug, model_of())
    other = tiny("llama", vocab_size=257, num_layers=2, hidden_size=32, seed=1).eval()
    assert base != summary(slug, other)
    if takes(slug, "texts"):
        assert base != summary(slug, model_of(), TEXTS[:2])


@pytest.mark.parametrize("slug", SLUGS)
def test_the_model_is_left_as_it_was(slug):
    model = model_of().train()
    model.model.layers[0].eval()
    before = copy.deepcopy(model.state_dict())
    flags = [m.training for m in model.modules()]
    wanted = [p.requires_grad for p in model.parameters()]
    config = model.config.to_dict()
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()]
    summary(slug, model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert [m.training for m in model.modules()] == flags
    assert [p.requires_grad for p in model.parameters()] == wanted
    assert all(p.grad is None for p in model.parameters())
    assert model.config.to_dict() == config
    after = [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()]
    assert after == hooks
    ids = torch.arange(1, 9)[None]
    model(input_ids=ids, labels=ids).loss.backward()  # and it can be trained on


@pytest.mark.parametrize("slug", SLUGS)
def test_the_random_states_are_left_as_they_were(slug):
    torch.manual_seed(3)
    states = torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002 - the legacy state is what is watched
    summary(slug, model_of())
    assert torch.equal(torch.random.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])  # noqa: NPY002


@pytest.mark.parametrize("slug", SLUGS)
def test_a_model_in_training_mode_gives_the_same(slug):
    excuse(slug, "training mode")
    dropping = tiny("llama", vocab_size=257, num_layers=2, hidden_size=32, attention_dropout=0.5)
    same(summary(slug, dropping.eval()), summary(slug, dropping.train()))


@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize("slug", SLUGS)
def test_the_batch_size_does_not_matter(slug, batch_size):
    excuse(slug, "batch size")
    if not takes(slug, "batch_size"):
        pytest.skip(f"{slug} takes no batch_size")
    same(summary(slug, model_of()), summary(slug, model_of(), batch_size=batch_size))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("slug", SLUGS)
def test_the_padding_side_does_not_matter_nor_a_missing_pad_token(slug, family):
    excuse(slug, "padding")
    if not takes(slug, "tokenizer"):
        pytest.skip(f"{slug} takes no tokenizer")
    left, bare = byte_tokenizer(), byte_tokenizer()
    left.padding_side = "left"
    bare.pad_token = None
    expected = summary(slug, model_of(family))
    for tokenizer in (left, bare):
        same(summary(slug, model_of(family), tokenizer=tokenizer), expected)


@pytest.mark.parametrize("slug", SLUGS)
def test_the_order_of_the_texts_does_not_matter(slug):
    excuse(slug, "order")
    if not takes(slug, "texts"):
        pytest.skip(f"{slug} takes no texts")
    same(summary(slug, model_of()), summary(slug, model_of(), TEXTS[::-1]))


@pytest.mark.parametrize("slug", SLUGS)
def test_bfloat16_is_close(slug):
    excuse(slug, "bfloat16")
    exact, half = summary(slug, model_of()), summary(slug, model_of().to(torch.bfloat16))
    for name, value in exact.items():
        assert half[name] == pytest.approx(value, rel=0.1, abs=0.05), name


@pytest.mark.parametrize("slug", SLUGS)
def test_texts_that_are_none_are_refused(slug):
    if not takes(slug, "texts"):
        pytest.skip(f"{slug} takes no texts")
    for texts in ([], "one string", [3], [""]):
        with pytest.raises(GnomonError) as caught:
            summary(slug, model_of(), texts)
        assert len(str(caught.value)) > 20, texts
