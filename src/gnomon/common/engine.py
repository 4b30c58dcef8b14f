"""Where independent work runs: in this process, or on a Ray cluster through Ray's own tasks."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

from gnomon.errors import ConfigError, nearest

__all__ = ["ENGINES", "Engine", "check_engine", "run_all"]

Engine = Literal["local", "ray"]
ENGINES = ("local", "ray")

Item = TypeVar("Item")
Result = TypeVar("Result")


def check_engine(name: str) -> Engine:
    """Return the name of an engine.

    Raises
    ------
    ConfigError
        When there is no such engine.
    """
    if name not in ENGINES:
        raise ConfigError(f"engine = {name!r}. {nearest(name, ENGINES, noun='engine')}")
    return "ray" if name == "ray" else "local"


def run_all(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    *,
    engine: Engine = "local",
    on_result: Callable[[int, Result], None] | None = None,
) -> list[Result]:
    """Call `function` on every item and return the results in the order of the items.

    Parameters
    ----------
    function : callable
        Takes one item. With ``engine="ray"`` it must pickle: a module's function, or `functools.partial` of one.
    items : sequence
        Independent of each other.
    engine : {"local", "ray"}, default "local"
        ``"local"`` goes through the items here, in order. ``"ray"`` makes each item a Ray task of one CPU, on the
        cluster that Ray is connected to already, else on the one ``RAY_ADDRESS`` names, else on one started on this
        machine and stopped afterwards.
    on_result : callable, optional
        Called with the item's position and its result as each one comes (with ``"ray"`` in the order of completion).

    Returns
    -------
    list

    Raises
    ------
    ConfigError
        When there is no such engine, or Ray is not installed.

    Examples
    --------
    >>> run_all(abs, [-1, 2, -3])
    [1, 2, 3]
    """
    engine = check_engine(engine)
    tell = on_result or (lambda position, result: None)
    if engine == "ray":
        return _on_ray(function, items, tell)
    results = []
    for position, item in enumerate(items):
        results.append(function(item))
        tell(position, results[-1])
    return results


def _on_ray(
    function: Callable[[Item], Result], items: Sequence[Item], tell: Callable[[int, Result], None]
) -> list[Result]:
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            "engine = 'ray' needs the package ray, which is not installed. Install it with: pip install 'gnomon[ray]'."
        ) from error
    own = not ray.is_initialized()
    if own:
        # Ray itself reads RAY_ADDRESS; without it, it would join any cluster that happens to run on this machine
        local: dict[str, Any] = (
            {} if os.environ.get("RAY_ADDRESS") else {"address": "local", "include_dashboard": False}
        )
        ray.init(log_to_driver=False, **local)
    try:
        remote: Any = ray.remote(num_cpus=1)(_call)
        shared = ray.put(function)  # once, however many items there are
        waiting = {remote.remote(shared, item): position for position, item in enumerate(items)}
        results: dict[int, Result] = {}
        while waiting:
            (done,), _ = ray.wait(list(waiting), num_returns=1)
            position = waiting.pop(done)
            results[position] = _result_of(ray, done)
            tell(position, results[position])
        return [results[position] for position in range(len(items))]
    finally:
        if own:
            ray.shutdown()


def _call(function: Callable[[Item], Result], item: Item) -> Result:
    return function(item)


def _result_of(ray: Any, reference: Any) -> Any:
    """Fetch a result; an error in the task is raised here as what it was."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise (error.cause if isinstance(error.cause, Exception) else error) from error
