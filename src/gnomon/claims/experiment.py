"""How a claim is written down: arms, seeds, a measurement and the relation that must hold between arms."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from gnomon.errors import ConfigError

__all__ = ["VERDICTS", "Experiment", "Outcome", "Relation", "experiment", "judge", "worst"]

VERDICTS = ("reproduced", "same direction", "not visible at this scale", "contradicted")
_NUMBER = r"[0-9]*\.?[0-9]+(?:e-?[0-9]+)?"
_RELATION = re.compile(
    rf"^\s*(?P<left>[\w.+-]+)\s*(?P<sign>[<>])\s*(?:(?P<factor>{_NUMBER})\s*\*\s*)?(?P<right>[\w.+-]+)"
    rf"(?:\s+by\s+(?P<margin>{_NUMBER}))?\s*$"
)


@dataclass(frozen=True)
class Relation:
    """``left < factor * right by margin`` (or ``>``), as the claim declares it."""

    text: str
    left: str
    right: str
    sign: int
    factor: float = 1.0
    margin: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Relation:
        """Read ``"a < b"``, ``"a > b by 0.1"``, ``"a < 0.75 * b"``.

        Raises
        ------
        ConfigError
            When the text has another form.
        """
        found = _RELATION.match(text)
        if found is None:
            raise ConfigError(f"{text!r} is no relation. Write '<arm> < [factor *] <arm> [by margin]', or with '>'.")
        return cls(
            text=" ".join(text.split()),
            left=found["left"],
            right=found["right"],
            sign=1 if found["sign"] == "<" else -1,
            factor=float(found["factor"] or 1.0),
            margin=float(found["margin"] or 0.0),
        )

    def gaps(self, values: Mapping[str, Mapping[int, float]], *, plain: bool = False) -> np.ndarray:
        """Return, per seed, by how much the relation holds (positive: it holds).

        `plain` leaves factor and margin out: only the direction counts.
        """
        factor = 1.0 if plain else self.factor
        margin = 0.0 if plain else self.margin
        seeds = sorted(set(values[self.left]) & set(values[self.right]))
        pairs = [self.sign * (factor * values[self.right][s] - values[self.left][s]) - margin for s in seeds]
        return np.asarray(pairs, dtype=np.float64)


@dataclass(frozen=True)
class Outcome:
    """What became of one relation: the mean gap over seeds, its bootstrap interval, and the verdict.

    The gap is in the direction of the relation, without factor and margin; `margin` is what it had to clear
    (the declared margin, or what the factor asks for on average).
    """

    text: str
    gap: float
    low: float
    high: float
    margin: float
    verdict: str


def _interval(gaps: np.ndarray, confidence: float, resamples: int = 10_000) -> tuple[float, float]:
    """Percentile bootstrap of the mean over seeds, with a private fixed generator."""
    draws = np.random.default_rng(0).integers(0, len(gaps), size=(resamples, len(gaps)))
    tail = (1 - confidence) / 2
    low, high = np.quantile(gaps[draws].mean(axis=1), [tail, 1 - tail])
    return float(low), float(high)


def judge(relation: Relation, values: Mapping[str, Mapping[int, float]], confidence: float = 0.95) -> Outcome:
    """Compute the verdict on one relation from the measured values.

    *reproduced*: the interval of the gap clears factor and margin; *same direction*: it clears zero only;
    *contradicted*: it lies wholly on the other side; *not visible at this scale*: it contains zero.

    Parameters
    ----------
    relation : Relation
    values : mapping of arm to mapping of seed to value
    confidence : float, default 0.95

    Returns
    -------
    Outcome

    Raises
    ------
    ConfigError
        With fewer than three seeds measured in both arms, or a value that is not finite.
    """
    for arm in (relation.left, relation.right):
        if arm not in values:
            raise ConfigError(f"relation {relation.text!r} names the arm {arm!r}; measured: {', '.join(values)}.")
    full, plain = relation.gaps(values), relation.gaps(values, plain=True)
    if len(plain) < 3:
        raise ConfigError(
            f"relation {relation.text!r} was measured with {len(plain)} seeds; a verdict needs at least 3."
        )
    if not np.isfinite(plain).all():
        raise ConfigError(f"relation {relation.text!r}: a measured value is not finite: {dict(values)}.")
    low, high = _interval(plain, confidence)
    if _interval(full, confidence)[0] > 0:
        verdict = "reproduced"
    elif low > 0:
        verdict = "same direction"
    elif high < 0:
        verdict = "contradicted"
    else:
        verdict = "not visible at this scale"
    return Outcome(relation.text, float(plain.mean()), low, high, float((plain - full).mean()), verdict)


def worst(verdicts: Sequence[str]) -> str:
    """Return the verdict that stands furthest from *reproduced*."""
    return max(verdicts, key=VERDICTS.index)


@dataclass(frozen=True)
class Experiment:
    """A claim that can be run: call it with an arm, a seed and a scale to get one number."""

    measure: Callable[[str, int, str], float]
    arms: tuple[str, ...]
    relations: tuple[Relation, ...]
    unit: str
    seeds: tuple[int, ...] = (0, 1, 2)
    scales: tuple[str, ...] = ("small",)
    paper: Mapping[str, float] = field(default_factory=dict)

    def __call__(self, arm: str, seed: int, scale: str = "small") -> float:
        """Measure one arm with one seed."""
        if arm not in self.arms:
            raise ConfigError(f"there is no arm {arm!r}; arms: {', '.join(self.arms)}.")
        if scale not in self.scales:
            raise ConfigError(f"there is no scale {scale!r} for this claim; scales: {', '.join(self.scales)}.")
        return float(self.measure(arm, seed, scale))


def experiment(
    *,
    arms: Sequence[str],
    relation: str | Sequence[str],
    unit: str,
    seeds: Sequence[int] = (0, 1, 2),
    scales: Sequence[str] = ("small", "medium", "large"),
    paper: Mapping[str, float] | None = None,
) -> Callable[[Callable[[str, int, str], float]], Experiment]:
    """Declare a function ``(arm, seed, scale) -> float`` to be a claim.

    Parameters
    ----------
    arms : sequence of str
        What is compared.
    relation : str or sequence of str
        Such as ``"fira < galore by 0.12"`` or ``"eora < 0.75 * svd"``; with several, the weakest decides.
    unit : str
        What the number is.
    seeds : sequence of int, default (0, 1, 2)
        At least three.
    scales : sequence of str, default ("small", "medium", "large")
        ``small`` takes at most three minutes on two cores for all arms and seeds together.
    paper : mapping of str to float, optional
        The paper's figures by arm.

    Raises
    ------
    ConfigError
        With fewer than three seeds, or a relation that names an arm there is none of.

    Examples
    --------
    >>> @experiment(arms=("a", "b"), relation="a < b", unit="loss")
    ... def claim(arm, seed, scale):
    ...     return {"a": 1.0, "b": 2.0}[arm] + seed
    >>> claim("b", 1)
    3.0
    """
    parsed = tuple(Relation.parse(r) for r in ((relation,) if isinstance(relation, str) else relation))
    for r in parsed:
        for arm in (r.left, r.right):
            if arm not in arms:
                raise ConfigError(f"relation {r.text!r} names {arm!r}, which is no arm; arms: {', '.join(arms)}.")
    if len(set(seeds)) < 3:
        raise ConfigError(f"seeds = {tuple(seeds)}: a claim needs at least three different seeds.")

    def wrap(measure: Callable[[str, int, str], float]) -> Experiment:
        made = Experiment(measure, tuple(arms), parsed, unit, tuple(seeds), tuple(scales), dict(paper or {}))
        object.__setattr__(made, "__doc__", measure.__doc__)
        return made

    return wrap
