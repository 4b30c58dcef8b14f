"""The arms of a recipe: as written, as changed by its `arms`, without each method; what each method made different."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gnomon import catalog
from gnomon.recipes.schema import MethodUse, Recipe, Stage

__all__ = ["Arm", "arms_of", "differences"]


@dataclass(frozen=True)
class Arm:
    """A version of the recipe: the stages as written, with the changes of a named arm, or with one method off."""

    name: str
    steps: tuple[tuple[str, Stage], ...]
    stage: int | None = None
    method: str | None = None

    @property
    def without(self) -> dict[str, Any] | None:
        """What was switched off, as the report names it."""
        return None if self.method is None else {"stage": self.stage, "method": self.method}


def arms_of(recipe: Recipe) -> list[Arm]:
    """Return the recipe as written, its named arms and, with ``ablate``, one arm without each method.

    "Without" leaves the method out, or sets the options its card names for that (a refinement that needs its base).
    """
    steps = tuple(recipe.steps)
    found = [Arm(recipe.arm, steps)]
    found += [Arm(name, tuple(recipe.with_arm(name).steps)) for name in recipe.arms]
    if not recipe.ablate:
        return found
    slugs = [u.uses for _, s in steps for u in getattr(s, "methods", [])]
    for index, (kind, stage) in enumerate(steps):
        for place, use in enumerate(getattr(stage, "methods", [])):
            changed = (*steps[:index], (kind, _without(stage, place)), *steps[index + 1 :])
            name = f"without {use.uses}" + (f" (stage {index + 1})" if slugs.count(use.uses) > 1 else "")
            found.append(Arm(name, changed, index, use.uses))
    return found


def _without(stage: Any, place: int) -> Any:
    methods: list[MethodUse] = list(stage.methods)
    off = catalog.get(methods[place].uses).recipe.get("without")
    if off is None:
        del methods[place]
    else:
        methods[place] = methods[place].model_copy(update={"with_": {**methods[place].with_, **off}})
    return stage.model_copy(update={"methods": methods})


def differences(arms: Sequence[dict[str, Any]], windows: dict[tuple[str, int], dict[str, Any]]) -> list[dict[str, Any]]:
    """Compare every arm without a method with the first arm, at the end of the recipe, metric by metric.

    Parameters
    ----------
    arms : sequence of dict
        The arms of ``run.json``.
    windows : dict
        (arm name, seed) -> per-window sums of negative log-likelihood and token counts at the end.

    Returns
    -------
    list of dict
        ``difference`` is with minus without. Its spread: the range over seeds where there are several, else the
        95 % interval of a paired bootstrap over evaluation windows (perplexity only).
    """
    last = {(a["name"], a["seed"]): a["stages"][-1]["metrics"] for a in arms if a["stages"]}
    rows = []
    main = arms[0]["name"] if arms else ""
    for name, without in {a["name"]: a["without"] for a in arms if a["without"]}.items():
        seeds = sorted(seed for arm, seed in last if arm == name and (main, seed) in last)
        for metric in last[(name, seeds[0])] if seeds else ():
            pairs = [
                (last[(main, s)].get(metric, {}).get("value"), last[(name, s)].get(metric, {}).get("value"))
                for s in seeds
            ]
            usable = [(a, b) for a, b in pairs if a is not None and b is not None]
            if not usable:
                continue
            deltas = [a - b for a, b in usable]
            low: float | None = None
            high: float | None = None
            if len(deltas) > 1:
                low, high = min(deltas), max(deltas)
            elif metric == "perplexity":
                low, high = _paired(windows.get((main, seeds[0])), windows.get((name, seeds[0])))
            rows.append(
                {
                    "method": without["method"],
                    "stage": without["stage"],
                    "metric": metric,
                    "with": float(np.mean([a for a, _ in usable])),
                    "without": float(np.mean([b for _, b in usable])),
                    "difference": float(np.mean(deltas)),
                    "low": low,
                    "high": high,
                    "spread": "seeds" if len(deltas) > 1 else "windows",
                    "seeds": len(deltas),
                }
            )
    return rows


def _paired(a: dict[str, Any] | None, b: dict[str, Any] | None) -> tuple[float | None, float | None]:
    """95 % interval of the difference of two perplexities measured on the same windows."""
    if not a or not b or len(a["nll"]) != len(b["nll"]) or len(a["nll"]) < 2:
        return None, None
    left, right, tokens = (np.asarray(x, dtype=np.float64) for x in (a["nll"], b["nll"], a["tokens"]))
    draws = np.random.default_rng(0).integers(0, len(tokens), size=(2000, len(tokens)))
    count = tokens[draws].sum(axis=1)
    gap = np.exp(left[draws].sum(axis=1) / count) - np.exp(right[draws].sum(axis=1) / count)
    low, high = np.quantile(gap, [0.025, 0.975])
    return float(low), float(high)
