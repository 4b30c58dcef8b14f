"""``--set key=value``: values are YAML, keys are dotted paths into the recipe."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from gnomon.errors import ConfigError, nearest

__all__ = ["apply_overrides", "parse_assignments"]


def parse_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """Read ``["fira.rank=16", "data=my.txt"]`` into a mapping; values are read as YAML.

    Raises
    ------
    ConfigError
        When one has no ``=`` or its value is no YAML.
    """
    found: dict[str, Any] = {}
    for text in assignments:
        key, sign, value = text.partition("=")
        if not sign or not key.strip():
            raise ConfigError(f"--set {text!r}: write it as key=value, such as --set train.tokens=100000.")
        if key.strip() in ("model", "data") and not value.lstrip().startswith("{"):
            found[key.strip()] = value  # a path stays text, whatever YAML would make of it
            continue
        try:
            found[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {text!r}: the value is no YAML ({error}).") from error
    return found


def apply_overrides(raw: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a recipe with overrides put in.

    Raises
    ------
    ConfigError
        When a key leads nowhere.
    """
    recipe: dict[str, Any] = copy.deepcopy(dict(raw))
    for key, value in overrides.items():
        parts = key.split(".")
        if key in ("model", "data") and isinstance(value, str):
            _replace_source(recipe, key, value)
            continue
        if parts[0] not in recipe and len(parts) > 1:
            parts = _find(recipe, parts, key)
        _put(recipe, parts, value, key)
    return recipe


def _replace_source(recipe: dict[str, Any], key: str, value: str) -> None:
    """`model=...` names another model, `data=...` another text; the rest of the data settings stays."""
    old = recipe.get(key)
    if key == "data" and isinstance(old, dict):
        recipe[key] = {**{k: v for k, v in old.items() if k not in ("text_field", "split")}, "corpus": value}
    elif key == "model" and isinstance(old, dict) and old.get("weights") == "random":
        recipe[key] = {"path": value, "weights": "random"}
    else:
        recipe[key] = {"path" if key == "model" else "corpus": value}


def _find(recipe: dict[str, Any], parts: list[str], key: str) -> list[str]:
    """Turn ``train.tokens`` or ``fira.rank`` into the path from the root."""
    names: list[str] = list(recipe)
    for index, stage in enumerate(recipe.get("stages") or []):
        if not isinstance(stage, dict):
            continue
        for kind, body in stage.items():
            names.append(kind)
            if kind == parts[0]:
                return ["stages", str(index), *parts]
            body = body if isinstance(body, dict) else {}
            for group in ("methods", "metrics"):
                for place, method in enumerate(body.get(group) or []):
                    slug = method if isinstance(method, str) else method.get("uses")
                    names.append(str(slug))
                    if slug == parts[0]:
                        if isinstance(method, str):
                            body[group][place] = {"uses": method}
                        return ["stages", str(index), kind, group, str(place), "with", *parts[1:]]
    raise ConfigError(f"--set {key}: this recipe has no {parts[0]!r}. {nearest(parts[0], set(names), noun='key')}")


def _put(recipe: dict[str, Any], parts: list[str], value: Any, key: str) -> None:
    place: Any = recipe
    for part in parts[:-1]:
        if isinstance(place, list):
            if not part.isdigit() or int(part) >= len(place):
                raise ConfigError(f"--set {key}: there is no item {part!r}; allowed: 0 to {len(place) - 1}.")
            place = place[int(part)]
            continue
        if isinstance(place.get(part), str) and part in ("model", "data"):
            place[part] = {"path" if part == "model" else "corpus": place[part]}
        place = place.setdefault(part, {})
        if not isinstance(place, dict | list):
            raise ConfigError(f"--set {key}: {part!r} is {place!r}, which has no keys below it.")
    if isinstance(place, list):
        if not parts[-1].isdigit() or int(parts[-1]) >= len(place):
            raise ConfigError(f"--set {key}: there is no item {parts[-1]!r}; allowed: 0 to {len(place) - 1}.")
        place[int(parts[-1])] = value
    else:
        place[parts[-1]] = value
