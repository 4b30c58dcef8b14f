"""The law itself: coefficients, their uncertainty, and the hyper-parameters of one training run."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gnomon.errors import GnomonWarning, MethodError, nearest

__all__ = ["FITTED", "PAPER", "Coefficients", "Hyperparameters", "Variant", "optimum", "relative_spread", "step_law"]

Variant = Literal["fitted", "paper"]
Rescale = Literal["sqrt", "none"]


@dataclass(frozen=True)
class Coefficients:
    """Natural-log coefficients: ``ln lr = lr . [1, ln N, ln D]`` and ``ln B = batch . [1, ln D]`` (B in tokens).

    `batch` may hold a third number, the exponent of D, with that of N second: ``[1, ln N, ln D]``.
    """

    lr: tuple[float, float, float]
    batch: tuple[float, ...]

    def __call__(self, n_params: ArrayLike, n_tokens: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return peak learning rate and batch in tokens, elementwise and broadcast."""
        log_n, log_d = np.log(positive("n_params", n_params)), np.log(positive("n_tokens", n_tokens))
        lr = np.exp(self.lr[0] + self.lr[1] * log_n + self.lr[2] * log_d)
        of_n = self.batch[1] if len(self.batch) == 3 else 0.0
        return lr, np.exp(self.batch[0] + of_n * log_n + self.batch[-1] * log_d)


# Means of the authors' 1000 bootstrap fits, which their own command uses; and the formula as printed in the paper.
FITTED = Coefficients(lr=(0.586308, -0.712922, 0.307491), batch=(-0.543542, 0.570944))
PAPER = Coefficients(lr=(math.log(1.79), -0.713, 0.307), batch=(math.log(0.58), 0.571))
_VARIANTS: dict[str, Coefficients] = {"fitted": FITTED, "paper": PAPER}

# The covariance of those 1000 fits. Intercept and exponents are strongly anti-correlated (-0.73, -0.43; -0.999 for the
# batch), so it is kept around the point at which the fitted height and the exponents are uncorrelated.
_LR_PIVOT = (math.log(3.93730e8), math.log(1.49818e10))  # ln N, ln D
_LR_STD_AT_PIVOT, _LR_STD_N, _LR_STD_D, _LR_CORRELATION = 0.0214455, 0.0298578, 0.0191393, -0.305066
_BATCH_PIVOT = math.log(1.43821e10)  # ln D
_BATCH_STD_AT_PIVOT, _BATCH_STD_D = 0.0228144, 0.0186686

_SETTING = (
    "the law holds for pre-training from scratch with AdamW, warm-up and cosine decay to a final learning rate of "
    "1e-5; not for WSD schedules, Muon, continued pre-training or fine-tuning"
)


def positive(name: str, value: ArrayLike) -> NDArray[np.float64]:
    """Return the value as float64; MethodError where something is no positive finite number."""
    try:
        found = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        found = np.asarray(np.nan)
    good = np.isfinite(found) & (found > 0)
    if not good.all():
        seen = value if found.ndim == 0 else found[~good].flat[0]
        raise MethodError(f"{name} = {seen!r}: a count of this kind is a positive finite number, such as 7e9.")
    return found


def whole(name: str, value: float) -> int:
    """Return a positive whole number given as int or as float (``4e6``)."""
    number = float(positive(name, value))
    if number != int(number):
        raise MethodError(f"{name} = {value!r}: this is counted in whole numbers, from 1 up.")
    return int(number)


def variant_coefficients(variant: str) -> Coefficients:
    """Return the coefficients of a variant."""
    if variant not in _VARIANTS:
        raise MethodError(f"variant = {variant!r}. {nearest(str(variant), _VARIANTS, noun='variant')}")
    return _VARIANTS[variant]


def optimum(
    n_params: ArrayLike, n_tokens: ArrayLike, variant: Variant = "fitted"
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the law's peak learning rate and batch, for numbers or whole columns.

    Parameters
    ----------
    n_params : array_like
        Non-embedding parameters N (mixture of experts: all experts).
    n_tokens : array_like
        Training tokens D; broadcast against `n_params`.
    variant : {"fitted", "paper"}, default "fitted"
        The means of the authors' bootstrap fits, or the rounded formula of the paper (2 % lower at 7B parameters).

    Returns
    -------
    lr : float64 array
        Peak learning rate.
    batch : float64 array
        Batch in tokens.

    Raises
    ------
    MethodError
        When a value is not positive and finite, or the variant does not exist.

    Examples
    --------
    >>> lr, batch = optimum([1e9, 7e9], 1e11, variant="paper")
    >>> float(lr[0].round(6)), round(float(batch[0]))
    (0.001632, 1107715)
    """
    return variant_coefficients(variant)(n_params, n_tokens)


def relative_spread(n_params: ArrayLike, n_tokens: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the standard deviations of ln lr and ln B over the authors' bootstrap fits.

    It is the square root of ``x' S x`` with the covariance S of whole rows of coefficients, so the
    anti-correlation of intercept and exponents is in it: 2 % at 0.4B parameters and 15B tokens, growing with the
    distance from there.

    Parameters
    ----------
    n_params, n_tokens : array_like
        As for `optimum`.

    Returns
    -------
    tuple of two float64 arrays
        For the learning rate, for the batch.

    Examples
    --------
    >>> [round(float(s), 3) for s in relative_spread(7e9, 1.4e12)]
    [0.104, 0.088]
    """
    log_d = np.log(positive("n_tokens", n_tokens))
    dn, dd = np.log(positive("n_params", n_params)) - _LR_PIVOT[0], log_d - _LR_PIVOT[1]
    a, b = dn * _LR_STD_N, dd * _LR_STD_D
    lr = np.sqrt(_LR_STD_AT_PIVOT**2 + a * a + b * b + 2 * _LR_CORRELATION * a * b)
    batch = np.sqrt(_BATCH_STD_AT_PIVOT**2 + (_BATCH_STD_D * (log_d - _BATCH_PIVOT)) ** 2)
    return lr, batch


@dataclass(frozen=True)
class Hyperparameters:
    """What to train with.

    Attributes
    ----------
    lr : float
        Peak learning rate, for `batch_tokens`.
    batch_tokens : int
        Tokens in one optimizer step, over all devices.
    batch_sequences : float
        The same in sequences of `seq_len` tokens; whole when the batch was rounded or chosen.
    steps : int
        Optimizer steps: ``ceil(n_tokens / batch_tokens)``.
    intervals : dict of str to (float, float)
        ``lr``, ``batch_tokens`` and ``steps`` over the refits of the law, at `confidence`: how well the law is
        pinned down, not how much the loss would change. They belong to the optimum (that of the learning rate is
        rescaled with it), so a batch that hardware imposes may lie outside.
    n_params, n_tokens, seq_len : float, float, int
        What was asked.
    optimal_lr, optimal_batch_tokens : float, float
        The law's own pair, before rounding or choosing a batch.
    accumulate : int or None
        Passes of `micro_batch` sequences on each of `devices` that make one step; None without these two.
    micro_batch, devices : int or None
        As asked.
    confidence : float
    notes : tuple of str
        What to know about these numbers.
    """

    lr: float
    batch_tokens: int
    batch_sequences: float
    steps: int
    intervals: Mapping[str, tuple[float, float]]
    n_params: float
    n_tokens: float
    seq_len: int
    optimal_lr: float
    optimal_batch_tokens: float
    accumulate: int | None = None
    micro_batch: int | None = None
    devices: int | None = None
    confidence: float = 0.95
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return everything JSON-plain."""
        found = asdict(self)
        found["intervals"] = {name: list(ends) for name, ends in self.intervals.items()}
        return {**found, "notes": list(self.notes)}


def step_law(
    n_params: float,
    n_tokens: float,
    seq_len: int = 2048,
    *,
    variant: Variant = "fitted",
    batch_tokens: float | None = None,
    micro_batch: int | None = None,
    devices: int | None = None,
    rescale: Rescale = "sqrt",
    confidence: float = 0.95,
    moe: bool = False,
    config: Any = None,
    fit: Any = None,
) -> Hyperparameters:
    """Predict peak learning rate, batch and steps of a pre-training run.

    Parameters
    ----------
    n_params : float
        Non-embedding parameters N: the weight matrices of the blocks, without embeddings, head and norms. Mixture of
        experts: all experts, not the active ones. `from_model` counts them.
    n_tokens : float
        Training tokens D (not steps, not samples).
    seq_len : int, default 2048
        Tokens in one sequence; turns tokens into sequences and nothing else (the law was fitted at 2048).
    variant : {"fitted", "paper"}, default "fitted"
        Means of the authors' bootstrap fits, or the rounded formula.
    batch_tokens : float, optional
        A batch you choose, in tokens, in place of the law's.
    micro_batch, devices : int, optional
        Sequences in one pass of one device, and devices: the batch becomes the nearest multiple of
        ``seq_len * micro_batch * devices``. One given alone leaves the other at 1. Without both the law's batch stays
        as it is, also when it is no whole number of sequences; a chosen one is rounded to whole sequences.
    rescale : {"sqrt", "none"}, default "sqrt"
        The learning rate for a batch that is not the law's: ``lr * sqrt(batch / optimal batch)``, or unchanged. The
        paper gives no rule. In its tables the best learning rate goes with the batch to the power 0.2 to 0.65.
    confidence : float, default 0.95
        Level of the intervals.
    moe : bool, default False
        The model is a mixture of experts (its runs cover another range of tokens).
    config : transformers configuration, optional
        Of the model `n_params` is about: warns when the number seems to include the embeddings.
    fit : StepLawFit, optional
        Your refit of the law, in place of the published coefficients and their spread.

    Returns
    -------
    Hyperparameters

    Raises
    ------
    MethodError
        When a number is not positive and finite, or the batch is smaller than one sequence.

    Examples
    --------
    >>> plan = step_law(7e9, 1.4e12, seq_len=2048)
    >>> f"{plan.lr:.3e}", plan.batch_tokens, round(plan.batch_sequences, 1), plan.steps
    ('9.347e-04', 4996911, 2439.9, 280174)
    >>> step_law(1e9, 1e11, micro_batch=8, devices=16).accumulate
    4
    """
    N, D = float(positive("n_params", n_params)), float(positive("n_tokens", n_tokens))
    seq_len = whole("seq_len", seq_len)
    if not 0 < confidence < 1:
        raise MethodError(f"confidence = {confidence!r}: a level lies between 0 and 1, such as 0.95.")
    if rescale not in get_args(Rescale):
        raise MethodError(f"rescale = {rescale!r}. {nearest(str(rescale), get_args(Rescale), noun='rule')}")
    law = variant_coefficients(variant) if fit is None else fit.coefficients
    lr, batch = (float(value) for value in law(N, D))
    fitted = micro_batch is not None or devices is not None
    exact = batch_tokens is None and not fitted
    micro = 1 if micro_batch is None else whole("micro_batch", micro_batch)
    world = 1 if devices is None else whole("devices", devices)
    unit = seq_len * micro * world
    tokens = max(1, round(batch)) if exact else _rounded(batch if batch_tokens is None else batch_tokens, seq_len, unit)
    ratio = 1.0 if exact else tokens / batch
    factor = math.sqrt(ratio) if rescale == "sqrt" else 1.0
    notes = _range_notes(N, D, moe) if fit is None else [f"refitted on {fit.kept} runs of {fit.groups} groups"]
    notes += [*_embedding_notes(N, config), *_batch_notes(ratio, batch, rescale)]
    return Hyperparameters(
        lr=lr * factor,
        batch_tokens=tokens,
        batch_sequences=(batch if exact else tokens) / seq_len,
        steps=math.ceil(D / tokens),
        intervals=_intervals(N, D, (lr, batch), factor, confidence)
        if fit is None
        else _refitted(fit, N, D, factor, confidence),
        n_params=N,
        n_tokens=D,
        seq_len=seq_len,
        optimal_lr=lr,
        optimal_batch_tokens=batch,
        accumulate=tokens // unit if fitted else None,
        micro_batch=micro if fitted else None,
        devices=world if fitted else None,
        confidence=confidence,
        notes=(*notes, _SETTING),
    )


def _rounded(batch: float, seq_len: int, unit: int) -> int:
    """Return the multiple of `unit` nearest to a batch in tokens, at least one of it."""
    batch = float(positive("batch_tokens", batch))
    if batch < seq_len:
        raise MethodError(
            f"batch_tokens = {batch:g} is less than one sequence of {seq_len} tokens. The batch is counted in tokens: "
            f"{batch:g} sequences are {batch * seq_len:.0f}."
        )
    return max(1, math.floor(batch / unit + 0.5)) * unit


def _batch_notes(ratio: float, batch: float, rescale: str) -> list[str]:
    if abs(ratio - 1) <= 0.01:
        return []
    rule = f"rescaled by {math.sqrt(ratio):.3g}, the square root of that (a rule that is not from the paper)"
    kept = "the one for the optimal batch"
    return [
        f"the batch is {ratio:.3g} times the optimum of {batch:.4g} tokens; the learning rate is "
        + (rule if rescale == "sqrt" else kept)
    ]


def _intervals(
    N: float, D: float, optimum: tuple[float, float], factor: float, confidence: float
) -> dict[str, tuple[float, float]]:
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    lr, batch = (
        (value / math.exp(z * float(s)), value * math.exp(z * float(s)))
        for value, s in zip(optimum, relative_spread(N, D), strict=True)
    )
    return _with_steps(D, lr, batch, factor)


def _refitted(fit: Any, N: float, D: float, factor: float, confidence: float) -> dict[str, tuple[float, float]]:
    if not len(fit.lr_rows):
        return {}
    found = fit.interval(N, D, confidence)
    return _with_steps(D, found["lr"], found["batch_tokens"], factor)


def _with_steps(
    D: float, lr: tuple[float, float], batch: tuple[float, float], factor: float
) -> dict[str, tuple[float, float]]:
    steps = (float(math.ceil(D / batch[1])), float(math.ceil(D / batch[0])))
    return {"lr": (lr[0] * factor, lr[1] * factor), "batch_tokens": batch, "steps": steps}


def _range_notes(N: float, D: float, moe: bool) -> list[str]:
    """Warn of extrapolation; return as notes what is beyond the runs but near them."""
    outside = []
    if N < 5e7:
        outside.append(f"n_params = {N:.3g} is below 5e7, where the law runs into unstable learning rates")
    if N > 1e10:
        outside.append(f"n_params = {N:.3g} is above 1e10")
    if D < 1e9:
        outside.append(f"n_tokens = {D:.3g} is below 1e9 (tokens are meant: not steps, not samples)")
    if D > 1e13:
        outside.append(f"n_tokens = {D:.3g} is above 1e13")
    ratio = D / N
    if ratio > 500 or ratio < (0.5 if moe else 10):
        outside.append(f"{ratio:.3g} tokens per parameter; the runs had {'0.9 to 9' if moe else '10 to 466'}")
    if outside:
        note = "extrapolation: " + "; ".join(outside)
        warnings.warn(note, GnomonWarning, stacklevel=3)
        return [note]
    runs = (2.1e9, 2.2e9, 2e9, 2e10) if moe else (2.14e8, 1.08e9, 4e9, 1e11)
    if not (runs[0] <= N <= runs[1] and runs[2] <= D <= runs[3]):
        measured = (
            "2.15e9 parameters in all, 2e9 to 2e10 tokens" if moe else "2.1e8 to 1.1e9 parameters, 4e9 to 1e11 tokens"
        )
        return [f"the runs behind the law had {measured}; this run lies outside that"]
    return []


def _embedding_notes(N: float, config: Any) -> list[str]:
    """Warn when a raw number seems to count the embeddings of the model it is about."""
    if config is None:
        return []
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocabulary, width = getattr(config, "vocab_size", None), getattr(config, "hidden_size", None)
    if not vocabulary or not width or vocabulary * width <= 0.05 * N:
        return []
    from gnomon.planning.step_law.counting import count_parameters

    counted = count_parameters(config)
    if abs(N / counted.non_embedding - 1) <= 0.01:
        return []
    note = (
        f"n_params = {N:.4g}, but this model has {counted.non_embedding:.4g} parameters without embeddings and head "
        f"({counted.embedding:.4g}). The law counts non-embedding parameters; from_model takes the right number."
    )
    warnings.warn(note, GnomonWarning, stacklevel=3)
    return [note]
