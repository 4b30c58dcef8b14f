"""The record of what was done to a model, so that it can be saved and built again.

Every method that changes a model's structure calls `record`; the list stands in ``model.config.gnomon`` and so in
``config.json``. `gnomon.load_model` replays it on the empty model before the weights are read.
"""

from __future__ import annotations

import contextvars
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from gnomon import catalog
from gnomon.common.layers import family, unwrap
from gnomon.errors import ConfigError, ModelError

__all__ = [
    "fold_all",
    "forget",
    "is_recorded",
    "is_replaying",
    "record",
    "recorded",
    "replay",
    "replaying",
    "require_family",
]

_REPLAYING: contextvars.ContextVar[bool] = contextvars.ContextVar("gnomon_replaying", default=False)


def _config(model: nn.Module) -> Any:
    config = getattr(unwrap(model), "config", None)
    if config is None or not hasattr(config, "to_dict"):
        raise ModelError(
            f"{type(model).__name__} has no transformers configuration, so what was done to it cannot be recorded. "
            "Use a transformers.PreTrainedModel."
        )
    return config


def recorded(model: nn.Module) -> list[dict[str, Any]]:
    """Return what was applied to `model`, first thing first: a list of ``{"slug": ..., "options": ...}``."""
    return [dict(entry) for entry in getattr(_config(model), "gnomon", None) or []]


def is_recorded(model: nn.Module, slug: str) -> bool:
    """Return whether the method `slug` was applied to `model`."""
    return any(entry["slug"] == slug for entry in recorded(model))


def record(model: nn.Module, slug: str, options: Mapping[str, Any] | None = None) -> None:
    """Write into the model's configuration that `slug` was applied with `options` (JSON-plain values)."""
    if is_replaying():
        return  # the configuration being replayed holds the entry already
    _config(model).gnomon = [*recorded(model), {"slug": slug, "options": dict(options or {})}]


def forget(model: nn.Module, slug: str) -> None:
    """Remove every entry of `slug` from the record; the attribute goes with the last entry."""
    config = _config(model)
    rest = [entry for entry in recorded(model) if entry["slug"] != slug]
    if rest:
        config.gnomon = rest
    elif hasattr(config, "gnomon"):
        del config.gnomon


@contextmanager
def replaying() -> Iterator[None]:
    """Mark the block as a replay: weights are about to be read, so nothing is recorded or checked twice."""
    token = _REPLAYING.set(True)
    try:
        yield
    finally:
        _REPLAYING.reset(token)


def is_replaying() -> bool:
    """Return whether a recorded surgery is being replayed on an empty model."""
    return _REPLAYING.get()


def replay(model: nn.Module, entries: Sequence[Mapping[str, Any]]) -> None:
    """Apply recorded surgery to a freshly built model, in order.

    Raises
    ------
    ModelError
        When an entry names a method this version does not have.
    """
    with replaying():
        for entry in entries:
            try:
                apply = catalog.load(entry["slug"])
            except ConfigError as error:
                raise ModelError(
                    f"the model was changed by {entry['slug']!r}, which this version of gnomon does not have. {error} "
                    "Install the version that saved it."
                ) from error
            apply(model, **entry["options"])


def fold_all(model: nn.Module) -> nn.Module:
    """Turn recorded surgery back into a stock model, last thing first, by each method's own exact fold.

    Raises
    ------
    ModelError
        When a recorded method has no fold; the message names it.
    """
    for entry in reversed(recorded(model)):
        fold = catalog.get(entry["slug"]).recipe.get("fold")
        if not fold:
            raise ModelError(
                f"{entry['slug']!r} cannot be folded into a stock {family(model)} model. "
                "Save it with gnomon.save_model and load it with gnomon.load_model."
            )
        model = catalog.resolve(fold)(model)
    return model


def require_family(model: nn.Module, supported: Sequence[str], slug: str) -> str:
    """Return the model's family, or refuse it.

    Raises
    ------
    ModelError
        When the family is not in `supported`; the message names it and what is supported.
    """
    name = family(model)
    if name not in supported:
        raise ModelError(
            f"{slug} does not support {name!r} models ({type(unwrap(model)).__name__}). "
            f"Supported families: {', '.join(sorted(supported))}."
        )
    return name
