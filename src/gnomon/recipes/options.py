"""Checks a recipe's methods against their cards and signatures, before anything runs."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pydantic import ConfigDict, PydanticSchemaGenerationError, PydanticUserError, TypeAdapter, ValidationError

from gnomon import catalog
from gnomon.catalog import Card
from gnomon.errors import ConfigError, nearest
from gnomon.recipes.schema import EvaluateStage, MethodUse, Recipe

__all__ = ["BUILTIN_METRICS", "OFFERED", "bind", "call_of", "callback_of", "check_recipe", "split_options", "stages_of"]

BUILTIN_METRICS = {
    "perplexity": "gnomon.evals.perplexity:perplexity",
    "accuracy": "gnomon.evals.completions:exact_match",
}

_STAGES_OF_KIND = {
    "architecture": ("train", "extend"),
    "optimizer": ("train",),
    "adapter": ("train",),
    "callback": ("train",),
    "comm-hook": ("train",),
    "compressor": ("compress",),
    "merger": ("merge",),
    "metric": ("evaluate",),
}

# What stages hand to a method by parameter name; everything else a method takes is an option.
# In a train stage these too, which elsewhere may be options.
OFFERED_IN_TRAINING = {"batches", "lr", "num_training_steps"}

OFFERED = {
    "model", "compressed_model", "original_model", "model_or_config", "tokenizer", "calibration", "texts", "seed",
    "on_layer", "params", "tokens_or_dataset", "on_progress", "paths", "models", "out", "generator", "closure", "rows",
    "engine", "prompts", "completions",
}  # fmt: skip


def stages_of(card: Card) -> tuple[str, ...]:
    """Return the stages a method can join."""
    return tuple(card.recipe.get("stages", _STAGES_OF_KIND.get(card.plugs, ())))


def call_of(slug: str, stage: str) -> Callable[..., Any]:
    """Return what a stage of the kind `stage` calls for a method: its card's `call`, else its entry."""
    if slug in BUILTIN_METRICS:
        return catalog.resolve(BUILTIN_METRICS[slug])
    card = catalog.get(slug)
    call = card.recipe.get("call", card.entry)
    return catalog.resolve(call.get(stage, card.entry) if isinstance(call, Mapping) else call)


def _parameters(call: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    # The decorated constructor of torch's Optimizer hides nothing; `signature` follows __wrapped__.
    return {
        name: p
        for name, p in inspect.signature(call).parameters.items()
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    }


def callback_of(slug: str) -> Callable[..., Any] | None:
    """Return the function that makes what an adapter needs during training, or None."""
    target = catalog.get(slug).recipe.get("callback")
    return None if target is None else catalog.resolve(target)


def _second_call(slug: str) -> Callable[..., Any] | None:
    """What takes options beside the method itself: an optimizer's function for its groups, an adapter's callback."""
    if slug in BUILTIN_METRICS:
        return None
    groups = catalog.get(slug).recipe.get("groups")
    return catalog.resolve(groups) if groups else callback_of(slug)


def _calls(slug: str, stage: str) -> list[Callable[..., Any]]:
    second = _second_call(slug)
    return [call_of(slug, stage), *([second] if second is not None else [])]


def split_options(slug: str, options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Divide options between a method and its second call (parameter groups, callback).

    An option that both name goes to both, but for the groups of an optimizer, whose constructor takes such values from
    the groups.
    """
    second = _second_call(slug)
    if second is None:
        return dict(options), {}
    of_second = set(_parameters(second))
    own = set() if "groups" in catalog.get(slug).recipe else set(_parameters(call_of(slug, "train")))
    return (
        {k: v for k, v in options.items() if k in own or k not in of_second},
        {k: v for k, v in options.items() if k in of_second},
    )


def bind(call: Callable[..., Any], offered: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments for `call`: what it names of `offered`, and the options.

    A value in `offered` may be a `Lazy`, computed only when the call takes it.
    """
    names = _parameters(call)
    arguments = {k: (v() if isinstance(v, Lazy) else v) for k, v in offered.items() if k in names and k not in options}
    return {**arguments, **options}


class Lazy:
    """A value that costs something, made when first asked for."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make
        self._made: list[Any] = []

    def __call__(self) -> Any:
        if not self._made:
            self._made.append(self._make())
        return self._made[0]


def check_recipe(recipe: Recipe) -> None:
    """Check every method of a recipe.

    Raises
    ------
    ConfigError
        On an unknown slug, a method in a stage it cannot join, an unknown, missing or wrongly typed option, two
        methods that conflict, or one that needs random weights put on loaded ones.
    """
    used: list[Card] = []
    for index, (kind, stage) in enumerate(recipe.steps):
        group = "metrics" if isinstance(stage, EvaluateStage) else "methods"
        for place, use in enumerate(getattr(stage, group)):
            where = f"stages.{index}.{kind}.{group}.{place} ({use.uses})"
            if not (kind == "evaluate" and use.uses in BUILTIN_METRICS):
                card = _joined(use, kind, where)
                _check_weights(card, recipe, index, where)
                used.append(card)
            _check_options(use, kind, where)
        _check_one_of_a_kind(stage, group, f"stages.{index}.{kind}")
    _check_conflicts(used)
    _check_data(recipe)
    for name in recipe.arms:
        try:
            check_recipe(recipe.with_arm(name))
        except ConfigError as error:
            raise ConfigError(f"arms.{name}: {error}") from error


def _check_data(recipe: Recipe) -> None:
    """Refuse what needs rows of another kind than the data gives."""
    for index, (kind, stage) in enumerate(recipe.steps):
        if kind == "select" and recipe.data.paired:
            raise ConfigError(
                f"stages.{index}.select: selection works on windows of plain text, and the data are prompts with "
                "completions. Drop the stage, or give plain text."
            )
        if isinstance(stage, EvaluateStage) and not recipe.data.paired:
            for use in stage.metrics:
                if use.uses == "accuracy":
                    raise ConfigError(
                        f"stages.{index}.evaluate (accuracy): it compares completions, and the data are plain text. "
                        "Give data.prompt_field and data.completion_field, or drop the metric."
                    )


def _joined(use: MethodUse, kind: str, where: str) -> Card:
    try:
        card = catalog.get(use.uses)
    except ConfigError as error:
        hint = f" Built-in metrics: {', '.join(BUILTIN_METRICS)}." if kind == "evaluate" else ""
        raise ConfigError(f"{where}: {error}{hint}") from error
    allowed = stages_of(card)
    if kind not in allowed:
        can = f"it can join: {', '.join(allowed)}" if allowed else "it joins no stage; call it from Python"
        fitting = [c.slug for c in catalog.methods() if kind in stages_of(c)]
        raise ConfigError(
            f"{where}: {card.title} is of the kind {card.plugs!r} and cannot join a {kind} stage; {can}. "
            f"Methods for a {kind} stage: {', '.join(fitting) or 'none yet'}."
        )
    return card


def _check_weights(card: Card, recipe: Recipe, index: int, where: str) -> None:
    if card.recipe.get("from_scratch") and not recipe.model.from_scratch:
        raise ConfigError(
            f"{where}: {card.title} only makes sense when training starts at random weights, but "
            f"{recipe.model.path!r} has trained ones. Set model.weights: random to keep its configuration with fresh "
            f"weights, or drop {card.slug} from the recipe."
        )
    trained = any(kind == "train" for kind, _ in recipe.steps[:index])
    if card.recipe.get("from_scratch") and trained:
        raise ConfigError(
            f"{where}: {card.title} only makes sense when training starts at random weights, but an earlier stage "
            f"trains the model already. Put {card.slug} into the first train stage, or drop it."
        )


def _check_one_of_a_kind(stage: Any, group: str, where: str) -> None:
    slugs = [u.uses for u in getattr(stage, group) if u.uses not in BUILTIN_METRICS]
    for kind in ("optimizer", "adapter"):
        same = [slug for slug in slugs if catalog.get(slug).plugs == kind]
        if len(same) > 1:
            raise ConfigError(f"{where}: {' and '.join(same)} are both {kind}s; a stage takes one. Keep one.")


def _check_conflicts(used: Iterable[Card]) -> None:
    slugs = {card.slug for card in used}
    for card in used:
        for other, reason in card.conflicts.items():
            if other in slugs:
                raise ConfigError(f"{card.slug} and {other} cannot share a recipe: {reason} Drop one of them.")


def _check_options(use: MethodUse, stage: str, where: str) -> None:
    calls = _calls(use.uses, stage)
    options: dict[str, tuple[inspect.Parameter, Any]] = {}
    for call in calls:
        hints = _hints(call)
        for name, parameter in _parameters(call).items():
            if name not in OFFERED and not (stage == "train" and name in OFFERED_IN_TRAINING - {"lr"}):
                options.setdefault(name, (parameter, hints.get(name, Any)))
    if use.uses not in BUILTIN_METRICS and catalog.get(use.uses).plugs == "adapter" and stage == "train":
        options.setdefault("lr", (inspect.Parameter("lr", inspect.Parameter.KEYWORD_ONLY), float))
    for name in use.with_:
        if name not in options:
            raise ConfigError(f"{where}: unknown option {name!r}. {nearest(name, options, noun='option')}")
    provided = {*use.with_, "lr"}
    missing = [n for n, (p, _) in options.items() if p.default is p.empty and n not in provided]
    if missing:
        raise ConfigError(
            f"{where}: the option {missing[0]!r} is missing. Add it: with: {{{missing[0]}: ...}}."
            + (f" Also needed: {', '.join(missing[1:])}." if missing[1:] else "")
        )
    for name, value in use.with_.items():
        _check_type(value, options[name][1], f"{where}: option {name!r}")


def _hints(call: Callable[..., Any]) -> dict[str, Any]:
    target = call.__init__ if inspect.isclass(call) else call
    try:
        return typing.get_type_hints(target)
    except Exception:  # an annotation that cannot be evaluated only means that its type is not checked
        return {}


def _check_type(value: Any, hint: Any, where: str) -> None:
    try:
        adapter = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
    except (PydanticSchemaGenerationError, PydanticUserError, TypeError):
        return
    try:
        adapter.validate_python(value)
    except ValidationError as error:
        reasons = "; ".join(dict.fromkeys(e["msg"] for e in error.errors()))
        raise ConfigError(f"{where} = {value!r}: {reasons}.") from error
