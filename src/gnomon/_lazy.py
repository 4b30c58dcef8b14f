"""Lazy attribute access for packages, so that importing one costs nothing until a name is used (PEP 562)."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

from gnomon import catalog


class _Package(ModuleType):
    """A package in which a module that carries the name of its function stands for that function.

    `from gnomon.compress import eora` is then the function, whether or not the module `gnomon.compress.eora` has
    been imported before; `from gnomon.compress.eora import eora_layer` works as ever.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and value.__name__ == f"{self.__name__}.{name}":
            value = vars(value).get(name, value)
        super().__setattr__(name, value)


def lazy_names(names: Mapping[str, str]) -> Callable[[str], Any]:
    """Return `__getattr__` for a module some of whose names are imported when they are first asked for.

    Parameters
    ----------
    names : mapping of str to str
        Attribute -> ``"module:attribute"``.
    """

    def getattribute(name: str) -> Any:
        if name not in names:
            raise AttributeError(name)
        return catalog.resolve(names[name])

    return getattribute


def lazy_attributes(
    package: str, extra: Mapping[str, str] | None = None, submodules: Sequence[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return `__getattr__` and `__dir__` for a package.

    Parameters
    ----------
    package : str
        The package's ``__name__``. A public name is looked up in `extra` first, then in the modules of the
        methods whose cards stand in the package's folder (every name in a module's ``__all__``).
    extra : mapping of str to str, optional
        Names from elsewhere: attribute -> ``"module:attribute"``.
    submodules : sequence of str, optional
        Modules of the package that are imported when first named.

    Returns
    -------
    tuple of two callables
        To be bound to ``__getattr__`` and ``__dir__`` of the package.
    """
    sys.modules[package].__class__ = _Package
    pillar = package.rpartition(".")[2]
    extra = dict(extra or {})

    def modules() -> list[str]:
        cards = [c for c in catalog.methods() if c.pillar == pillar]
        return sorted({c.entry.partition(":")[0] for c in cards})

    def getattribute(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in extra:
            return catalog.resolve(extra[name])
        if name in submodules:
            return importlib.import_module(f"{package}.{name}")
        for module_name in modules():
            if not module_name.startswith(package + "."):
                continue
            module = importlib.import_module(module_name)
            if name in getattr(module, "__all__", ()):
                return getattr(module, name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def directory() -> list[str]:
        return sorted({*extra, *submodules})

    return getattribute, directory
