"""Runs something once another package has been imported, now or later, without importing it."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from gnomon import catalog
from gnomon.errors import GnomonWarning

__all__ = ["register_adapters", "when_imported"]


_BASE = "gnomon.adapters._peft"


def when_imported(package: str, action: Callable[[], None]) -> None:
    """Call `action` after `package` has been imported: at once if it has been, else at the end of its import.

    Parameters
    ----------
    package : str
        Name of a top-level package.
    action : callable
        Takes nothing. It runs while the import lock of `package` is held, so it must not wait for other threads.
    """
    if package in sys.modules:
        action()
    else:
        sys.meta_path.insert(0, _Watch(package, action))


class _Watch(importlib.abc.MetaPathFinder):
    """Finds one package by the ordinary finders and runs the action at the end of its import."""

    def __init__(self, package: str, action: Callable[[], None]) -> None:
        self.package = package
        self.action = action
        self.searching = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.package or self.searching:
            return None
        self.searching = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.searching = False
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                    self.action()

            loader.exec_module = exec_module
        return spec


def register_adapters() -> None:
    """Import every adapter method, whereby each makes itself known to PEFT.

    A method whose own optional dependency is missing is left out with a warning.
    """
    base = sys.modules.get(_BASE)
    if base is not None and not hasattr(base, "LinearTuner"):
        return  # it imports PEFT itself, and calls this when what the methods need of it is there
    for card in catalog.methods(pillar="adapters", plugs="adapter"):
        module = card.entry.partition(":")[0]
        try:
            importlib.import_module(module)
        except ImportError as error:
            warnings.warn(f"{card.slug} is not available to PEFT: {error}", GnomonWarning, stacklevel=2)
