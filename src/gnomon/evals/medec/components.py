"""The parts of the aggregate that need a model: BERTScore and BLEURT, as callables that can be put in.

Both are large (DeBERTa-xlarge has 900M parameters, about two seconds a pair on a CPU), so neither is loaded unless
asked for by name, and any function from two lists of texts to a list of numbers can take their place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from gnomon import catalog
from gnomon.errors import ConfigError, nearest

__all__ = ["AGGREGATE", "COMPONENTS", "Component", "bert_score_component", "bleurt_component", "unique_scores"]

Component = Callable[[list[str], list[str]], Sequence[float]]

AGGREGATE = ("rouge1", "bertscore", "bleurt")
"""What the shared task averages."""

ROUGE_PARTS = ("rouge1", "rouge2", "rougeL")


class Chosen(NamedTuple):
    """Callables by name, the parts of the aggregate (empty: none), the parts that were not given."""

    callables: dict[str, Component]
    parts: tuple[str, ...]
    missing: tuple[str, ...]


def bert_score_component(
    model_type: str = "microsoft/deberta-xlarge-mnli", batch_size: int = 16, device: str | None = None
) -> Component:
    """Return BERTScore F1 as the shared task takes it: DeBERTa-xlarge-MNLI, English, rescaled with the baseline.

    Parameters
    ----------
    model_type : str
    batch_size : int, default 16
    device : str, optional

    Raises
    ------
    ConfigError
        When the package bert-score is not installed.
    """
    try:
        from bert_score import BERTScorer  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise ConfigError(
            "bertscore needs the package bert-score, which is not installed. Install it with: pip install bert-score."
        ) from error
    scorer = BERTScorer(
        model_type=model_type, lang="en", rescale_with_baseline=True, batch_size=batch_size, device=device
    )

    def score(predictions: list[str], references: list[str]) -> list[float]:
        return [float(x) for x in scorer.score(predictions, references)[2]]

    return score


def bleurt_component(checkpoint: str = "BLEURT-20", batch_size: int = 16) -> Component:
    """Return BLEURT with the checkpoint of the shared task, a folder that its authors distribute.

    Parameters
    ----------
    checkpoint : str
        Path of the unpacked checkpoint.
    batch_size : int, default 16
        1 in the official script; the values agree up to float noise.

    Raises
    ------
    ConfigError
        When the package bleurt is not installed.
    """
    try:
        from bleurt import score as package  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise ConfigError(
            "bleurt needs the package bleurt, which is not installed. Install it with: pip install "
            "'bleurt @ git+https://github.com/google-research/bleurt' and unpack the checkpoint BLEURT-20."
        ) from error
    scorer = package.BleurtScorer(checkpoint)

    def score(predictions: list[str], references: list[str]) -> list[float]:
        return list(scorer.score(references=references, candidates=predictions, batch_size=batch_size))

    return score


COMPONENTS: dict[str, Callable[[], Component]] = {
    "bert-score": bert_score_component,
    "bleurt": bleurt_component,
}
"""Names that the options `bertscore` and `bleurt` take."""


@lru_cache(maxsize=4)
def _named(name: str) -> Component:
    if name in COMPONENTS:
        return COMPONENTS[name]()
    if ":" in name:
        try:
            found: Any = catalog.resolve(name)
        except ImportError as error:
            raise ConfigError(f"{name!r} cannot be imported ({error}). Write 'module:function'.") from error
        if callable(found):
            return found
    raise ConfigError(
        f"{name!r} is no scorer of texts. {nearest(name, COMPONENTS, noun='scorer')} Or write 'module:function' of "
        "a function (predictions, references) -> list of float."
    )


def chosen_components(given: Mapping[str, Component | str | None], components: Sequence[str] | None) -> Chosen:
    """Resolve what was given and say what the aggregate is made of.

    Raises
    ------
    ConfigError
        When `components` names something unknown, or something that was not given.
    """
    callables = {k: _named(v) if isinstance(v, str) else v for k, v in given.items() if v not in (None, "")}
    ready: dict[str, Component] = {k: v for k, v in callables.items() if v is not None}
    names = (components,) if isinstance(components, str) else tuple(components or ())
    allowed = (*ROUGE_PARTS, *given)
    for name in names:
        if name not in allowed:
            raise ConfigError(f"components: {name!r} is no part. {nearest(name, allowed, noun='part')}")
        if name in given and name not in ready:
            raise ConfigError(f"components names {name!r}, which was not given. Set the option {name}.")
    missing = () if names else tuple(name for name in AGGREGATE if name in given and name not in ready)
    return Chosen(ready, names or (() if missing else AGGREGATE), missing)


def unique_scores(component: Component, pairs: Sequence[tuple[str, str]], name: str = "component") -> list[float]:
    """Call a component once on the distinct pairs, longest first, and return a value per pair, clipped to [0, 1].

    Raises
    ------
    ConfigError
        When it returns another number of values, or one that is no number.
    """
    distinct = sorted(set(pairs), key=lambda pair: (-len(pair[0]) - len(pair[1]), pair))
    if not distinct:
        return []
    values = [float(v) for v in component([p for p, _ in distinct], [r for _, r in distinct])]
    if len(values) != len(distinct) or any(math.isnan(v) for v in values):
        raise ConfigError(
            f"{name} returned {len(values)} values for {len(distinct)} pairs"
            f"{', some of them NaN' if any(math.isnan(v) for v in values) else ''}. It must return a number for each."
        )
    table = dict(zip(distinct, (min(1.0, max(0.0, v)) for v in values), strict=True))
    return [table[pair] for pair in pairs]


def component_scores(
    rows: Sequence[Mapping[str, float]], pairs: Sequence[tuple[str, str] | None], chosen: Chosen
) -> list[dict[str, float]]:
    """Add ``bertscore``, ``bleurt``, ``aggregate`` and their composites to the scores of notes.

    Parameters
    ----------
    rows : sequence of mapping
        Of `note_scores`.
    pairs : sequence of (prediction, reference) or None
        Where both sides have a corrected sentence.
    chosen : Chosen

    Returns
    -------
    list of dict
    """
    full = [dict(row) for row in rows]
    real = [pair for pair in pairs if pair is not None]

    def add(name: str, values: Sequence[float]) -> None:
        left = iter(values)
        for row, pair in zip(full, pairs, strict=True):
            value = math.nan if pair is None else next(left)
            row[name] = value
            row[f"composite_{name}"] = row["composite_rouge1"] if pair is None else value

    for name, component in chosen.callables.items():
        add(name, unique_scores(component, real, name))
    if chosen.parts:
        where = [row for row, pair in zip(full, pairs, strict=True) if pair is not None]
        add("aggregate", [sum(row[part] for part in chosen.parts) / len(chosen.parts) for row in where])
    return full
