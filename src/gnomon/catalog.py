"""The catalog: finds every method by looking for the cards (TOML) that stand beside the modules.

Reading cards imports neither the methods nor torch, so listing them is instant; `load` imports one entry.
"""

from __future__ import annotations

import importlib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from gnomon.errors import ConfigError, nearest

__all__ = ["KINDS", "PILLARS", "Card", "ClaimCard", "Paper", "get", "load", "methods", "read_card", "resolve", "search"]

PILLARS = (
    "data", "nn", "optim", "adapters", "compress", "merge", "context", "align", "multilingual", "evals",
    "estimators", "planning",
)  # fmt: skip

KINDS = (
    "architecture", "adapter", "optimizer", "schedule", "loss", "dataset", "sampler", "comm-hook", "callback",
    "compressor", "merger", "decoder", "metric", "task", "estimator", "planner",
)  # fmt: skip


@dataclass(frozen=True)
class Paper:
    """Where a method was published."""

    title: str
    arxiv: str = ""
    venue: str = ""
    code: str = ""


@dataclass(frozen=True)
class ClaimCard:
    """One claim of a paper and the experiment (`module:function`) that re-measures it."""

    id: str
    says: str
    paper: str
    run: str


@dataclass(frozen=True)
class Card:
    """What the library knows of one method without importing it.

    Attributes
    ----------
    slug, title, lets_you, pillar, plugs : str
        Name, display name, the one-line promise, the pillar folder, the kind of plug (one of `KINDS`).
    entry : str
        `module:attribute` of the call or class behind the method.
    paper : Paper
    claims : tuple of ClaimCard
    conflicts : dict of str to str
        Slug of a method that cannot share a recipe with this one -> the reason.
    recipe : mapping
        How recipes use it: `stages` it can join, `from_scratch` (needs random weights), `groups` (an
        optimizer's function of the model), `without` (options of the ablation arm), `fold` (exact conversion to a
        stock model), `check` (a function that checks options against a model before anything runs), `call` (what a
        recipe calls in place of the entry: `module:function`, or a table of stage -> `module:function`), `callback`
        (a function of the model and options that returns a `TrainerCallback`, for an adapter that needs one).
    baselines : mapping of str to str
        Name -> `module:function`: what the method is compared with, of the same kind; recipes use it by that name.
    verbs : mapping of str to str
        Verb of the command line (`plan`, `score`, ...) -> the `module:function` behind it.
    model_types : tuple of str
        ``config.model_type`` of model classes that importing the method registers with transformers.
    """

    slug: str
    title: str
    lets_you: str
    pillar: str
    plugs: str
    entry: str
    paper: Paper
    claims: tuple[ClaimCard, ...] = ()
    conflicts: Mapping[str, str] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    baselines: Mapping[str, str] = field(default_factory=dict)
    verbs: Mapping[str, str] = field(default_factory=dict)
    model_types: tuple[str, ...] = ()


_NEEDED = ("slug", "title", "lets_you", "pillar", "plugs", "entry", "paper")
_TOP_KEYS = {*_NEEDED, "claims", "conflicts", "recipe", "baselines", "verbs", "model_types"}
_RECIPE_KEYS = {"stages", "from_scratch", "groups", "without", "fold", "check", "call", "callback"}
_VERBS = {"plan", "compare", "fit", "score"}


def _package_root() -> Path:
    return Path(__file__).resolve().parent


def read_card(path: Path) -> Card:
    """Read and check one card.

    Parameters
    ----------
    path : Path
        The TOML file.

    Returns
    -------
    Card

    Raises
    ------
    ConfigError
        When the file is no TOML, a key is missing or unknown, or its kind or pillar does not exist.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path.name}: this card is not valid TOML ({error}). Mend the file.") from error
    for keys, allowed, where in (
        (raw, _TOP_KEYS, ""),
        (raw.get("recipe", {}), _RECIPE_KEYS, "recipe."),
        (raw.get("verbs", {}), _VERBS, "verbs."),
    ):
        for key in sorted(set(keys) - allowed):
            raise ConfigError(f"{path.name}: unknown key '{where}{key}'. {nearest(key, allowed, noun='key')}")
    for key in _NEEDED:
        if key not in raw:
            raise ConfigError(f"{path.name}: the key '{key}' is missing. Every card needs it.")
    if raw["plugs"] not in KINDS:
        raise ConfigError(f"{path.name}: plugs = {raw['plugs']!r}. {nearest(raw['plugs'], KINDS, noun='kind')}")
    if raw["pillar"] not in PILLARS:
        raise ConfigError(f"{path.name}: pillar = {raw['pillar']!r}. {nearest(raw['pillar'], PILLARS, noun='pillar')}")
    try:
        paper = Paper(**raw["paper"])
        claims = tuple(ClaimCard(**claim) for claim in raw.get("claims", ()))
    except TypeError as error:
        raise ConfigError(f"{path.name}: [paper] or [[claims]] has a missing or unknown key ({error}).") from error
    plain = {k: raw[k] for k in ("slug", "title", "lets_you", "pillar", "plugs", "entry")}
    return Card(
        **plain,
        paper=paper,
        claims=claims,
        conflicts=raw.get("conflicts", {}),
        recipe=raw.get("recipe", {}),
        baselines=raw.get("baselines", {}),
        verbs=raw.get("verbs", {}),
        model_types=tuple(raw.get("model_types", ())),
    )


@lru_cache(maxsize=1)
def _all() -> dict[str, Card]:
    cards: dict[str, Card] = {}
    for pillar in PILLARS:
        for path in sorted((_package_root() / pillar).glob("*.toml")):
            card = read_card(path)
            if card.slug in cards:
                raise ConfigError(f"{path.name}: the slug {card.slug!r} has a card already. Slugs are unique.")
            cards[card.slug] = card
    return dict(sorted(cards.items()))


@lru_cache(maxsize=1)
def _baselines() -> dict[str, Card]:
    """The baselines of all cards, each as a card of the method's kind that joins recipes as the method does."""
    found: dict[str, Card] = {}
    for card in _all().values():
        for name, target in card.baselines.items():
            if name in found or name in _all():
                raise ConfigError(f"{card.slug}: the baseline {name!r} has the name of a method or baseline already.")
            recipe = {key: value for key, value in card.recipe.items() if key in ("stages", "groups", "from_scratch")}
            found[name] = replace(
                card,
                slug=name,
                title=name,
                lets_you=f"compare {card.title} ({card.slug}) with it; a baseline, which recipes use by this name",
                entry=target,
                paper=Paper(""),
                claims=(),
                conflicts={},
                recipe=recipe,
                baselines={},
                verbs={},
            )
    return found


def methods(*, pillar: str | None = None, plugs: str | None = None) -> list[Card]:
    """Return all cards, sorted by slug.

    Parameters
    ----------
    pillar, plugs : str, optional
        Keep only the methods of this pillar, of this kind.

    Returns
    -------
    list of Card

    Raises
    ------
    ConfigError
        When the pillar or the kind does not exist.

    Examples
    --------
    >>> [card.slug for card in methods(plugs="optimizer")]
    ['fira']
    """
    for value, allowed, noun in ((pillar, PILLARS, "pillar"), (plugs, KINDS, "kind")):
        if value is not None and value not in allowed:
            raise ConfigError(f"There is no {noun} {value!r}. {nearest(value, allowed, noun=noun)}")
    return [
        card
        for card in _all().values()
        if (pillar is None or card.pillar == pillar) and (plugs is None or card.plugs == plugs)
    ]


def get(slug: str) -> Card:
    """Return one card; a baseline's name gives a card made from that of its method.

    Parameters
    ----------
    slug : str
        The method's slug, such as ``"fira"``.

    Returns
    -------
    Card

    Raises
    ------
    ConfigError
        When there is no such method; the message gives the nearest names.
    """
    cards = {**_all(), **_baselines()}
    if slug not in cards:
        raise ConfigError(f"There is no method {slug!r}. {nearest(slug, cards, noun='method')}")
    return cards[slug]


def search(text: str) -> list[Card]:
    """Return the cards in which every word of `text` occurs (slug, title, promise, paper), best match first.

    Parameters
    ----------
    text : str
        Words, in any order and case.

    Returns
    -------
    list of Card
    """
    words = text.lower().split()

    def haystack(card: Card) -> str:
        return " ".join(
            (card.slug, card.title, card.lets_you, card.pillar, card.plugs, card.paper.title, card.paper.arxiv)
        ).lower()

    def rank(card: Card) -> tuple[int, str]:
        name = f"{card.slug} {card.title}".lower()
        return (-sum(word in name for word in words), card.slug)

    return sorted((c for c in _all().values() if all(w in haystack(c) for w in words)), key=rank)


def resolve(target: str) -> Any:
    """Import ``"package.module:attribute"`` and return the attribute.

    Raises
    ------
    ConfigError
        When the target has no such form or the attribute does not exist.
    """
    module, _, attribute = target.partition(":")
    if not module or not attribute:
        raise ConfigError(f"{target!r} is no entry point. Write 'package.module:attribute'.")
    found: Any = importlib.import_module(module)
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ConfigError(f"{target!r}: {module} has no {attribute!r}.")
        found = getattr(found, part)
    return found


def load(slug: str) -> Any:
    """Import and return the entry of a method: the function or class anyone could call.

    Parameters
    ----------
    slug : str

    Returns
    -------
    callable

    Raises
    ------
    ConfigError
        When there is no such method.
    """
    return resolve(get(slug).entry)
