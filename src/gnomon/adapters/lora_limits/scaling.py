"""Error and time over the number of tokens, exact attention against the polynomial, on this machine."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from gnomon.adapters.lora_limits.attention import MAX_FEATURES, poly_attention
from gnomon.adapters.lora_limits.features import feature_count
from gnomon.adapters.lora_limits.measure import relative_errors
from gnomon.errors import MethodError

__all__ = ["ScalingReport", "scaling_report"]


@dataclass(frozen=True)
class ScalingReport:
    """Measured error and time over the number of tokens.

    Attributes
    ----------
    table : DataFrame
        One row per length: ``L``, ``exact_s`` and ``approximate_s`` (seconds, forward and backward, medians),
        ``error_output`` and ``error_gradient`` (relative, Frobenius; the largest of dQ, dK, dV).
    exact_exponent, approximate_exponent : float
        Slopes of log time over log L (least squares).
    crossover : float
        L from which on the polynomial is faster, between two measured lengths by log-log interpolation; NaN when it
        lies outside of them.
    constant : float
        crossover / (k1 width): `crossover` of `lora_norm_bound` on this machine.
    width, degree, features : int
    """

    table: pd.DataFrame = field(repr=False)
    exact_exponent: float
    approximate_exponent: float
    crossover: float
    constant: float
    width: int
    degree: int
    features: int

    def summary(self) -> dict[str, float]:
        """Return the fitted numbers; what could not be measured is left out."""
        names = ("exact_exponent", "approximate_exponent", "crossover", "constant")
        return {name: getattr(self, name) for name in names if math.isfinite(getattr(self, name))}


def scaling_report(
    width: int = 8,
    degree: int = 2,
    *,
    gamma: float = 1.0,
    lengths: Sequence[int] = (512, 1024, 2048, 4096),
    heads: int = 1,
    causal: bool = False,
    rounds: int = 5,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> ScalingReport:
    """Time both routes and measure the error of the polynomial, for one size of head.

    Parameters
    ----------
    width : int, default 8
        d.
    degree : int, default 2
        g, even.
    gamma : float, default 1.0
        Largest entry of q, k and v, which are normal numbers brought to it; scores are q . k without a further scale.
    lengths : sequence of int
        At least two, different.
    heads : int, default 1
    causal : bool, default False
    rounds : int, default 5
        Timed runs of each route and length, in turn; one more comes before them.
    device, dtype
        Where and in which precision; exact attention is `scaled_dot_product_attention`.
    seed : int, default 0

    Returns
    -------
    ScalingReport

    Raises
    ------
    MethodError
        When a number is out of its range, or the features are too many.

    Examples
    --------
    >>> report = scaling_report(4, 2, lengths=(64, 128), rounds=1)
    >>> report.features, report.table["L"].tolist()
    (15, [64, 128])
    """
    lengths = sorted(set(lengths))
    if len(lengths) < 2 or lengths[0] < 2:
        raise MethodError(f"lengths = {lengths}: give two different numbers of tokens or more, each at least 2.")
    if rounds < 1 or heads < 1 or width < 1 or not gamma > 0:
        raise MethodError(f"rounds = {rounds}, heads = {heads}, width = {width}, gamma = {gamma}: all are positive.")
    rows = []
    for tokens in lengths:
        inputs = _inputs((1, heads, tokens, width), gamma, seed, torch.device(device), dtype)
        routes: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
            "exact_s": lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=causal, scale=1.0),
            "approximate_s": lambda q, k, v: poly_attention(
                q, k, v, degree, causal=causal, scale=1.0, max_features=MAX_FEATURES
            ),
        }
        times: dict[str, list[float]] = {name: [] for name in routes}
        found: dict[str, list[Tensor]] = {}
        for turn in range(rounds + 1):
            for name, route in routes.items():
                seconds, found[name] = _timed(route, inputs)
                if turn:
                    times[name].append(seconds)
        errors = relative_errors([x.float().flatten(0, 1) for x in found["approximate_s"]],
                                 [x.float().flatten(0, 1) for x in found["exact_s"]]).amax(1)  # fmt: skip
        rows.append({"L": tokens, **{name: statistics.median(t) for name, t in times.items()},
                     "error_output": float(errors[0]), "error_gradient": float(errors[1:].max())})  # fmt: skip
    return _fitted(pd.DataFrame(rows), width, degree)


def _inputs(shape: tuple[int, ...], gamma: float, seed: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Return q, k, v with gamma as their largest entry, and an upstream gradient."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(shape, generator=generator) for _ in range(4)]
    scaled = [x / x.abs().max() * gamma for x in drawn[:3]]
    return [x.to(device, dtype) for x in (*scaled, drawn[3])]


def _timed(route: Callable[..., Tensor], inputs: list[Tensor]) -> tuple[float, list[Tensor]]:
    """Return the seconds of one forward and backward pass, and O, dQ, dK, dV."""
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    wait: Any = torch.cuda.synchronize if inputs[0].is_cuda else (lambda: None)
    wait()
    started = time.perf_counter()
    with torch.enable_grad():
        out = route(*leaves)
        grads = torch.autograd.grad(out, leaves, inputs[3])
    wait()
    return time.perf_counter() - started, [out.detach(), *grads]


def _fitted(table: pd.DataFrame, width: int, degree: int) -> ScalingReport:
    logs = np.log(table["L"].to_numpy(dtype=np.float64))
    slopes = {n: float(np.polyfit(logs, np.log(table[n].to_numpy()), 1)[0]) for n in ("exact_s", "approximate_s")}
    gaps = np.log((table["approximate_s"] / table["exact_s"]).to_numpy())
    crossover = math.nan
    for i in range(len(gaps) - 1):
        if gaps[i] > 0 >= gaps[i + 1]:
            crossover = math.exp(logs[i] + (logs[i + 1] - logs[i]) * gaps[i] / (gaps[i] - gaps[i + 1]))
    count = feature_count(width, degree)
    return ScalingReport(
        table, slopes["exact_s"], slopes["approximate_s"], crossover, crossover / (count * width), width, degree, count
    )
