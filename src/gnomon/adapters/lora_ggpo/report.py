"""Whether a training curve shows double descent, and how flat the place is where training ended."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import nn

from gnomon.adapters.lora_ggpo.backends import Noise, Undo, add_noise
from gnomon.adapters.lora_ggpo.layers import checked_pairs, is_trained, layer_noise, layer_seed
from gnomon.adapters.lora_ggpo.momentum import full
from gnomon.common.lora import LoraPair
from gnomon.errors import DataError, MethodError

__all__ = ["DoubleDescent", "Sharpness", "double_descent_report", "sharpness"]


@dataclass(frozen=True)
class DoubleDescent:
    """The largest bump of a training curve.

    Attributes
    ----------
    found : bool
        Whether drop, rise and fall are all above the noise band.
    trough, peak : int
        Steps of the local minimum and of the top after it (of the smoothed curve).
    drop, rise, fall : float
        How far the smoothed loss came down to the trough, went up to the peak, and came down after it.
    band : float
        What counts as noise of the smoothed curve.
    window : int
        Steps over which the curve was averaged.
    """

    found: bool
    trough: int
    peak: int
    drop: float
    rise: float
    fall: float
    band: float
    window: int

    def summary(self) -> dict[str, float]:
        """Return the figures by name."""
        return {"double_descent": float(self.found), "rise": self.rise, "band": self.band}


def double_descent_report(losses: Sequence[float], window: int | None = None, width: float = 4.0) -> DoubleDescent:
    """Look for double descent: a fall to a local minimum, a rise above the noise after it, and a second fall.

    The curve is averaged over a sliding window. The noise of a point of it is the robust standard deviation of the
    losses about the averaged curve, over the square root of the window; the band is `width` times sqrt(2) of that,
    for the difference of two points.

    Parameters
    ----------
    losses : sequence of float
        The training loss of every step (or at equal distances), in nats.
    window : int, optional
        Default a twentieth of the curve, at least 5.
    width : float, default 4
        With 4, curves without a bump are taken for one less than once in a thousand.

    Returns
    -------
    DoubleDescent

    Raises
    ------
    DataError
        When a loss is not finite, or there are fewer than three windows of them.
    MethodError
        When the window or the width makes no sense.

    Examples
    --------
    >>> losses = [3.0] * 20 + [2.0] * 20 + [2.5] * 20 + [1.5] * 40
    >>> double_descent_report(losses, window=5).found
    True
    >>> double_descent_report(sorted(losses, reverse=True), window=5).found
    False
    """
    values = np.asarray(losses, dtype=np.float64)
    if values.ndim != 1:
        raise DataError(f"the losses have the shape {values.shape}. Give one training loss a step.")
    if not np.isfinite(values).all():
        bad = int(np.flatnonzero(~np.isfinite(values))[0])
        raise DataError(f"the loss of step {bad} is {values[bad]}. Give the curve up to there.")
    size = max(5, len(values) // 20) if window is None else window
    if size < 1 or width <= 0:
        raise MethodError(f"window = {window}, width = {width}; both must be above 0.")
    if len(values) < 3 * size:
        raise DataError(f"{len(values)} losses; three windows of {size} need {3 * size}. Log more often.")
    smooth = np.convolve(values, np.full(size, 1 / size), mode="valid")
    residual = values[size // 2 : size // 2 + len(smooth)] - smooth
    noise = 1.4826 * float(np.median(np.abs(residual - np.median(residual))))
    band = width * math.sqrt(2.0) * noise / math.sqrt(size)
    trough, peak, drop, rise, fall = _largest_bump(smooth)
    found = min(drop, rise, fall) > band
    return DoubleDescent(found, trough + size // 2, peak + size // 2, drop, rise, fall, band, size)


def _largest_bump(smooth: np.ndarray) -> tuple[int, int, float, float, float]:
    """Return trough and peak, drop, rise and fall of the bump of which the least of the three is largest."""
    before = np.maximum.accumulate(smooth)
    best, trough = (-math.inf, 0, 0), 0
    later = np.minimum.accumulate(smooth[::-1])[::-1]
    for peak in range(1, len(smooth)):
        if smooth[peak] < smooth[trough]:
            trough = peak
        rise, fall, drop = smooth[peak] - smooth[trough], smooth[peak] - later[peak], before[trough] - smooth[trough]
        score = min(rise, fall, drop)
        if score > best[0]:
            best = (score, trough, peak)
    _, trough, peak = best
    drop, rise = float(before[trough] - smooth[trough]), float(smooth[peak] - smooth[trough])
    fall = float(smooth[peak] - later[peak])
    return trough, peak, drop, rise, fall


@dataclass(frozen=True)
class Sharpness:
    """The loss at the trained weights and around them.

    Attributes
    ----------
    loss : float
        Unperturbed.
    perturbed : float
        Mean over the draws.
    increase : float
        The difference.
    standard_error : float
        Of the increase, over the draws; nan with one draw.
    """

    loss: float
    perturbed: float
    increase: float
    standard_error: float

    def summary(self) -> dict[str, float]:
        """Return the figures by name."""
        return {"loss": self.loss, "perturbed_loss": self.perturbed, "sharpness": self.increase}


def sharpness(
    model: nn.Module,
    loss: Callable[[], float],
    sigma: float = 0.1,
    draws: int = 4,
    seed: int = 0,
    adapter: str | None = None,
) -> Sharpness:
    """Return by how much the loss rises when the merged weights are moved at random.

    Every entry of row i of the merged weight W' of a LoRA layer gets noise of variance ``sigma^2 ||W'_i||^2 / n``.
    To second order the rise is half the trace of the Hessian against these variances. The model is in evaluation mode
    meanwhile, and its weights are not touched.

    Parameters
    ----------
    model : nn.Module
        With a plain PEFT LoRA.
    loss : callable
        Returns the loss of the model, of the same data at every call.
    sigma : float, default 0.1
    draws : int, default 4
    seed : int, default 0
    adapter : str, optional
        Default the active one.

    Returns
    -------
    Sharpness

    Raises
    ------
    MethodError
        When sigma is not above 0 or there is no draw.

    Examples
    --------
    >>> import peft
    >>> from gnomon.common.models import tiny
    >>> model = peft.get_peft_model(tiny("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    >>> ids = torch.arange(8)[None]
    >>> sharpness(model, lambda: float(model(input_ids=ids, labels=ids).loss), draws=2).loss > 0
    True
    """
    if not (math.isfinite(sigma) and sigma > 0) or draws < 1:
        raise MethodError(f"sigma = {sigma}, draws = {draws}; sigma must be above 0 and draws at least 1.")
    pairs = checked_pairs(model, adapter)
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            plain = float(loss())
            moved = [_moved_loss(pairs, loss, sigma, f"{seed}/{draw}") for draw in range(draws)]
    finally:
        for module, mode in training.items():
            module.training = mode
    mean = math.fsum(moved) / draws
    error = float(np.std(moved, ddof=1)) / math.sqrt(draws) if draws > 1 else math.nan
    return Sharpness(plain, mean, mean - plain, error)


def _moved_loss(pairs: list[LoraPair], loss: Callable[[], float], sigma: float, draw: str) -> float:
    undo: list[Undo] = []
    made: dict[str, Noise] = {}

    def noise(pair: LoraPair) -> Noise:
        if pair.name not in made:
            factors = (full(pair.b), full(pair.a))
            made[pair.name] = layer_noise(pair, factors, None, sigma, 0.0, layer_seed(draw, pair.name))
        return made[pair.name]

    try:
        for pair in pairs:
            gate = partial(is_trained, pair, always=True)
            undo += [add_noise(pair, partial(noise, pair), gate)]
        return float(loss())
    finally:
        for take_off in undo:
            take_off()
