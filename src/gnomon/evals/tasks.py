"""All tasks of the catalog, for Inspect: importing this module registers them, so ``gnomon/<task>`` is known to it.

Inspect imports it through the entry point group ``inspect_ai``. No task is listed here; a method joins by its card.
"""

from __future__ import annotations

from typing import Any

from gnomon import catalog

TASKS: dict[str, Any] = {
    card.entry.rpartition(":")[2]: catalog.load(card.slug) for card in catalog.methods(plugs="task")
}
"""Name of the function -> the task."""

globals().update(TASKS)
__all__ = ["TASKS", *TASKS]
