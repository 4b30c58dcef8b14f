"""What a recipe may say, and what each mistake is answered with."""

from __future__ import annotations

import jsonschema
import pytest
import yaml

from gnomon.errors import ConfigError
from gnomon.recipes.arms import arms_of
from gnomon.recipes.options import check_recipe
from gnomon.recipes.overrides import apply_overrides, parse_assignments
from gnomon.recipes.schema import Recipe, builtin_recipes, json_schema, load_recipe


def _check(recipe):
    check_recipe(load_recipe(recipe))


def test_the_small_recipe_is_fine_and_every_default_is_filled_in(recipe):
    checked = load_recipe(recipe)
    check_recipe(checked)
    assert checked.plain()["stages"][0]["train"]["schedule"] == "cosine"
    assert Recipe.parse(checked.plain()) == checked


@pytest.mark.parametrize("name", sorted(builtin_recipes()))
def test_built_in_recipes_are_fine_and_obey_the_json_schema(name):
    given = {"model": "a/folder", "data": "a.txt"} if name == "squeeze" else {}
    check_recipe(load_recipe(name, given))
    jsonschema.validate({**yaml.safe_load(builtin_recipes()[name].read_text()), **given}, json_schema())


def test_the_json_schema_refuses_what_the_recipe_refuses(recipe):
    recipe["stages"][0]["train"]["tokns"] = 3
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(recipe, json_schema())


def _set(recipe, path, value):
    *way, last = path
    for part in way:
        recipe = recipe[part]
    recipe[last] = value


TRAIN = ("stages", 0, "train")
COMPRESS = ("stages", 1, "compress")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("modl",), 1, r"unknown key 'modl'\. Did you mean 'model'"),
        ((*TRAIN, "tokns"), 1, r"stages\.0\.train: unknown key 'tokns'\. Did you mean 'tokens'"),
        ((*TRAIN, "tokens"), "many", r"stages\.0\.train\.tokens: .*valid integer.*value seen: 'many'"),
        ((*TRAIN, "tokens"), 0, r"greater than or equal to 1.*value seen: 0"),
        ((*TRAIN, "precision"), "fp8", r"'float32' or 'bfloat16'.*value seen: 'fp8'"),
        (("name",), "../x", r"name: .*value seen: '../x'"),
        (("seed",), -1, "seed: .*value seen: -1"),
        (("stages", 0), {"trian": {}}, r"no stage 'trian'\. Did you mean 'train'"),
        (("stages", 0), {"train": {}, "compress": {}}, "no stage 'train, compress'"),
        (("stages",), [], "stages: .*at least 1 item"),
        (("model",), {"architecture": "llama", "path": "x"}, "give either 'architecture'"),
        (("model",), {"size": "tiny"}, "give either 'architecture'"),
        (("model",), {"architecture": "llama", "size": "tny"}, "Did you mean 'tiny'"),
        (("model",), {"path": "x", "size": "tiny"}, "'size' goes with 'architecture'"),
        (("data", "validation"), 1.5, "less than 1.*value seen: 1.5"),
        (("stages", 2), {"evaluate": {"metrics": []}}, "at least 1 item"),
    ],
)
def test_mistakes_in_the_recipe(recipe, path, value, message):
    _set(recipe, path, value)
    with pytest.raises(ConfigError, match=message):
        load_recipe(recipe)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ((*TRAIN, "methods", 1, "uses"), "fria", r"no method 'fria'\. Did you mean 'fira'"),
        ((*TRAIN, "methods", 1), "dsnot", r"cannot join a train stage; it can join: compress\. Methods for a train"),
        ((*COMPRESS, "methods", 0), "fira", "of the kind 'optimizer' and cannot join a compress stage"),
        ((*COMPRESS, "methods", 0), "matrix-nuclear-norm", "it can join: evaluate"),
        (("stages", 2, "evaluate", "metrics", 0), "perplexty", "Built-in metrics: perplexity"),
        ((*TRAIN, "methods", 1, "with"), {"rnk": 4}, r"unknown option 'rnk'\. Did you mean 'rank'"),
        ((*TRAIN, "methods", 1, "with"), {"rank": "four"}, r"option 'rank' = 'four': .*valid integer"),
        ((*COMPRESS, "methods", 0, "with"), {"base": "wand"}, r"option 'base' = 'wand': .*'wanda'"),
        ((*COMPRESS, "methods", 0, "with"), {"calibration": 3}, "unknown option 'calibration'"),
    ],
)
def test_mistakes_in_methods_and_their_options(recipe, path, value, message):
    _set(recipe, path, value)
    with pytest.raises(ConfigError, match=message):
        _check(recipe)


def test_a_missing_option_is_named(recipe, monkeypatch):
    from gnomon.recipes import options

    def needs_two(model, rank: int, width: int, depth: int = 3):
        """A method with two options that have no default."""

    monkeypatch.setattr(options, "_calls", lambda slug, stage: [needs_two])
    for use in recipe["stages"][0]["train"]["methods"]:
        use["with"] = {}
    with pytest.raises(ConfigError, match=r"the option 'rank' is missing\. Add it: with: \{rank.*Also needed: width"):
        _check(recipe)


def test_two_optimizers_in_one_stage_are_refused(recipe):
    recipe["stages"][0]["train"]["methods"].append({"uses": "fira", "with": {"rank": 2}})
    with pytest.raises(ConfigError, match="fira and fira are both optimizers; a stage takes one"):
        _check(recipe)


def test_conflicting_methods_are_refused_with_the_reason(recipe, monkeypatch):
    from dataclasses import replace

    from gnomon import catalog

    cards = dict(catalog._all())
    cards["eora"] = replace(cards["eora"], conflicts={"dsnot": "both own the mask."})
    monkeypatch.setattr(catalog, "_all", lambda: cards)
    with pytest.raises(ConfigError, match=r"eora and dsnot cannot share a recipe: both own the mask\. Drop one"):
        _check(recipe)


def test_a_method_for_fresh_weights_is_refused_on_trained_ones_with_the_ways_out(recipe):
    recipe["model"] = {"path": "some/folder"}
    with pytest.raises(ConfigError, match=r"'some/folder' has trained ones\. Set model\.weights: random.*or drop"):
        _check(recipe)
    recipe["model"] = {"path": "some/folder", "weights": "random"}
    _check(recipe)
    recipe["model"] = {"architecture": "llama"}
    recipe["stages"].insert(0, {"train": {"tokens": 100}})
    with pytest.raises(ConfigError, match="an earlier stage trains the model already"):
        _check(recipe)


def test_recipes_that_are_no_recipes(tmp_path):
    with pytest.raises(ConfigError, match=r"no recipe 'quikstart'.*Did you mean 'quickstart'"):
        load_recipe("quikstart")
    (tmp_path / "a.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_recipe(tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_text("- a")
    with pytest.raises(ConfigError, match="a recipe is a mapping"):
        load_recipe(tmp_path / "a.yaml")


def test_assignments_are_yaml_and_reach_stage_and_method_by_name(recipe):
    changed = apply_overrides(
        recipe,
        parse_assignments(
            ["train.tokens=64", "fira.rank=2", "stages.1.compress.calibration=3", "dsnot.sparsity=.25", "seed=7",
             "matrix-nuclear-norm.layers=-2", "model.vocab_size=400"]
        ),
    )  # fmt: skip
    checked = load_recipe(changed)
    train, compress, evaluate = (stage for _, stage in checked.steps)
    assert (train.tokens, checked.seed, compress.calibration) == (64, 7, 3)
    assert train.methods[1].with_["rank"] == 2
    assert compress.methods[0].with_["sparsity"] == 0.25
    assert evaluate.metrics[1].with_ == {"layers": -2}
    assert recipe["stages"][0]["train"]["tokens"] == 6000, "the original is untouched"


def test_short_forms_of_model_and_data(recipe):
    changed = load_recipe(recipe, {"model": "my/model", "data": "my.txt"})
    assert changed.model.path == "my/model"
    assert (changed.data.corpus, changed.data.context) == ("my.txt", 32)
    assert load_recipe({**recipe, "model": "x", "data": "y.txt"}).data.corpus == "y.txt"
    assert parse_assignments(["model=123", "data=007.txt"]) == {"model": "123", "data": "007.txt"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tokens", "write it as key=value"),
        ("=3", "write it as key=value"),
        ("a=[", "the value is no YAML"),
        ("trian.tokens=3", r"has no 'trian'\. Did you mean 'train'"),
        ("stages.9.train.tokens=3", "no item '9'; allowed: 0 to 2"),
        ("seed.x=3", "'seed'"),
    ],
)
def test_assignments_that_lead_nowhere(recipe, text, message):
    recipe["seed"] = 0
    with pytest.raises(ConfigError, match=message):
        apply_overrides(recipe, parse_assignments([text]))


def test_arms_leave_a_method_out_or_switch_it_off_as_its_card_says(recipe):
    arms = arms_of(load_recipe(recipe, {"ablate": True}))
    assert [a.name for a in arms] == [
        "all", "without layernorm-scaling", "without fira", "without dsnot", "without eora",
    ]  # fmt: skip
    by_name = {a.name: a for a in arms}
    assert [u.uses for u in by_name["without fira"].steps[0][1].methods] == ["layernorm-scaling"]
    dsnot = by_name["without dsnot"].steps[1][1].methods[0]
    assert dsnot.with_["max_cycles"] == 0, "the base pruning stays"
    assert dsnot.with_["sparsity"] == 0.5
    assert [a.name for a in arms_of(load_recipe(recipe))] == ["all"]
