"""What every planner owes, tested over all members the catalog finds; an exception is a line with its reason."""

from __future__ import annotations

import copy
import inspect
import itertools
import json
import random
import warnings
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gnomon import catalog
from gnomon.common.models import tiny
from gnomon.errors import GnomonError

CARDS = {card.slug: card for card in catalog.methods(plugs="planner")}
VERBS = [(slug, verb) for slug, card in CARDS.items() for verb in card.verbs]
ON_RUNS = [(slug, verb) for slug, verb in VERBS if verb in ("fit", "compare")]

# what `gnomon plan` offers by name; a planner takes some of it
OFFERED = {"model", "tokens", "seq_len", "batch_tokens", "micro_batch", "devices", "law", "loss", "runs"}
OPTIONS: dict[str, dict[str, Any]] = {}  # further arguments a planner needs in these tests

EXCEPTIONS: dict[tuple[str, str], str] = {}  # (slug, check): reason


def excuse(slug: str, check: str) -> None:
    if (slug, check) in EXCEPTIONS:
        pytest.skip(f"{slug}: {EXCEPTIONS[slug, check]}")


def model_of(**sizes: Any) -> LlamaForCausalLM:
    """A model of 0.3 billion parameters without memory for them."""
    options = {"hidden_size": 1024, "intermediate_size": 2736, "num_hidden_layers": 24, "num_attention_heads": 16}
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**{**options, **sizes}))


@pytest.fixture
def runs(tmp_path):
    """A table of runs: 16 groups, each an exact bowl."""
    rows = []
    for n, d in itertools.product((1e8, 3e8, 1e9, 3e9), (2e9, 1e10, 5e10, 3e11)):
        lr, bs = 1.8 * n**-0.7 * d**0.3, 0.6 * d**0.57 / 2048
        for i, j in itertools.product(range(-2, 3), range(-2, 3)):
            loss = (1.7 + 60 * n**-0.25 + 400 * d**-0.28) * (1 + 0.004 * i * i + 0.003 * j * j)
            rows.append((n, d, lr * 2 ** (i / 2), bs * 2 ** (j / 2), loss))
    path = tmp_path / "runs.csv"
    pd.DataFrame(rows, columns=["N", "D", "lr", "bs", "smooth loss"]).to_csv(path, index=False)
    return path


def ask(slug: str, verb: str, **values: Any) -> dict[str, Any]:
    function = catalog.resolve(CARDS[slug].verbs[verb])
    taken = inspect.signature(function).parameters
    offered = {"tokens": 2e10, "devices": 8, **OPTIONS.get(slug, {}), **values}
    if verb == "plan":
        offered.setdefault("model", model_of())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(**{name: value for name, value in offered.items() if name in taken})


@pytest.mark.parametrize("slug", CARDS)
def test_it_has_the_verb_plan(slug):
    assert "plan" in CARDS[slug].verbs
    assert not CARDS[slug].recipe, "planners plan recipes, they do not join them"


@pytest.mark.parametrize(("slug", "verb"), VERBS)
def test_the_command_line_can_call_it(slug, verb):
    function = catalog.resolve(CARDS[slug].verbs[verb])
    assert "Parameters\n" in (function.__doc__ or "")
    for name, parameter in inspect.signature(function).parameters.items():
        assert name in OFFERED, f"gnomon plan offers no {name}"
        if verb == "plan" and name not in ("model", "tokens", "devices"):
            assert parameter.default is not inspect.Parameter.empty, name


@pytest.mark.parametrize(("slug", "verb"), VERBS)
def test_a_section_can_be_printed_and_is_json(slug, verb, runs):
    section = ask(slug, verb, **({"runs": runs} if verb != "plan" else {}))
    assert set(section) <= {"title", "rows", "tables", "notes", "data"}
    assert isinstance(section["title"], str)
    assert section["title"]
    assert section["rows"]
    for label, text in section["rows"]:
        assert isinstance(label, str)
        assert isinstance(text, str)
        assert "nan" not in text.lower().split(), label
    for table in section.get("tables", ()):
        assert table["title"]
        for row in table["rows"]:
            assert len(row) == len(table["columns"])
            assert all(isinstance(cell, str) for cell in row)
    assert all(isinstance(note, str) and note for note in section["notes"])
    assert json.loads(json.dumps(section["data"], allow_nan=False))


@pytest.mark.parametrize(("slug", "verb"), VERBS)
def test_it_is_deterministic_and_leaves_the_random_states(slug, verb, runs):
    values = {"runs": runs} if verb != "plan" else {}
    states = torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002 - the legacy state is what is watched
    first = ask(slug, verb, **values)
    assert torch.equal(torch.random.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])  # noqa: NPY002
    assert ask(slug, verb, **values) == first


@pytest.mark.parametrize("slug", CARDS)
def test_the_model_is_left_as_it_was(slug):
    model = tiny("llama")
    before, config, training = copy.deepcopy(model.state_dict()), model.config.to_dict(), model.training
    ask(slug, "plan", model=model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.config.to_dict() == config
    assert model.training == training
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("slug", CARDS)
def test_it_looks_at_the_model_and_at_the_tokens(slug):
    base = ask(slug, "plan")["data"]
    assert ask(slug, "plan", model=model_of(num_hidden_layers=12))["data"] != base
    if "tokens" in inspect.signature(catalog.resolve(CARDS[slug].verbs["plan"])).parameters:
        assert ask(slug, "plan", tokens=4e10)["data"] != base


@pytest.mark.parametrize("slug", CARDS)
def test_a_configuration_says_what_its_model_says(slug):
    model = model_of()
    assert ask(slug, "plan", model=model.config) == ask(slug, "plan", model=model)


@pytest.mark.parametrize("slug", CARDS)
def test_a_number_of_parameters_is_enough(slug):
    excuse(slug, "number")
    assert ask(slug, "plan", model=3e8)["data"]
    for number in (0.0, -1e9, float("nan"), float("inf")):
        with pytest.raises(GnomonError) as caught:
            ask(slug, "plan", model=number)
        assert len(str(caught.value)) > 20, number


@pytest.mark.parametrize("name", ["tokens", "seq_len", "batch_tokens", "micro_batch", "devices"])
@pytest.mark.parametrize("slug", CARDS)
def test_counts_that_are_none_are_refused(slug, name):
    if name not in inspect.signature(catalog.resolve(CARDS[slug].verbs["plan"])).parameters:
        pytest.skip(f"{slug} takes no {name}")
    for value in (0, -8):
        with pytest.raises(GnomonError) as caught:
            ask(slug, "plan", **{name: value})
        assert str(value) in str(caught.value)


@pytest.mark.parametrize("slug", CARDS)
def test_what_is_no_model_is_refused(slug):
    for model in (torch.nn.Linear(2, 2), object()):
        with pytest.raises(GnomonError) as caught:
            ask(slug, "plan", model=model)
        assert type(model).__name__ in str(caught.value)


@pytest.mark.parametrize(("slug", "verb"), ON_RUNS)
def test_tables_that_are_none_are_refused(slug, verb, tmp_path, runs):
    empty, short = tmp_path / "empty.csv", tmp_path / "short.csv"
    empty.write_text("")
    pd.read_csv(runs).drop(columns=["lr"]).to_csv(short, index=False)
    for path in (tmp_path / "missing.csv", empty, short):
        with pytest.raises(GnomonError) as caught:
            ask(slug, verb, runs=path)
        assert str(path) in str(caught.value)
