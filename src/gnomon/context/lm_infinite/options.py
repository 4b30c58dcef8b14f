"""The options of the method, checked once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from gnomon.errors import MethodError, nearest

__all__ = ["Options", "SinkDistance"]

SLUG = "lm-infinite"
IMPLEMENTATION = "lm_infinite"
"""The name of the attention function in transformers."""

SinkDistance = Literal["ceiling", "cache", "true"]


@dataclass(frozen=True)
class Options:
    """What `apply_lm_infinite` was given, with defaults filled in."""

    local: int
    sinks: int = 10
    top_k: int | None = None
    ceiling: int | None = None
    sink_distance: SinkDistance = "ceiling"
    top_k_from_layer: int = 4
    top_k_distance: int | None = None

    def __post_init__(self) -> None:
        """Refuse what has no meaning.

        Raises
        ------
        MethodError
        """
        for name, least, needed in (
            ("local", 1, True),
            ("sinks", 0, True),
            ("top_k", 1, False),
            ("ceiling", 1, False),
            ("top_k_from_layer", 0, True),
            ("top_k_distance", 0, False),
        ):
            _whole(name, getattr(self, name), least, needed)
        if self.sink_distance not in get_args(SinkDistance):
            raise MethodError(
                f"sink_distance = {self.sink_distance!r}. "
                f"{nearest(str(self.sink_distance), get_args(SinkDistance), noun='sink distance')}"
            )
        if self.ceiling is not None and self.ceiling < self.local:
            raise MethodError(
                f"ceiling = {self.ceiling} is below local = {self.local}: keys within the window keep their true "
                "distance. Allowed: local or more; leave it out for local, the paper's choice."
            )
        if self.ceiling is not None and self.sink_distance != "ceiling":
            raise MethodError(
                f"ceiling = {self.ceiling} with sink_distance = {self.sink_distance!r}: that variant has no ceiling. "
                "Leave one of them out."
            )

        if self.top_k is not None and self.sink_distance != "ceiling":
            raise MethodError(
                f"top_k = {self.top_k} with sink_distance = {self.sink_distance!r}: the middle is attended again "
                "only beside sinks at the ceiling. Leave one of them out."
            )

    @property
    def threshold(self) -> int | None:
        """The distance from which sinks stand at `far_at`; None when they never do."""
        if self.sink_distance == "true":
            return None
        return self.local if self.ceiling is None else self.ceiling

    @property
    def far_at(self) -> int:
        """The distance between a far query and position 0."""
        if self.sink_distance == "cache":
            return self.sinks + self.local - 1
        return self.local if self.ceiling is None else self.ceiling

    @property
    def middle_at(self) -> int:
        """The distance at which the middle is scored for the top-k."""
        return self.local // 2 if self.top_k_distance is None else self.top_k_distance


def _whole(name: str, value: Any, least: int, needed: bool) -> None:
    if value is None and not needed:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        also = "" if needed else " or None"
        raise MethodError(f"{name} = {value!r}: allowed is a whole number from {least}{also}.")
