"""The arithmetic: a running mean of states in float32, whatever their dtype."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.optim.swa_utils import get_swa_multi_avg_fn

from gnomon.errors import MethodError

__all__ = ["RunningAverage", "accumulator_dtype", "average_states", "check_weights", "first_difference", "update_mean"]

_BUCKET = 1 << 24  # elements converted at once when the dtype or the device differs
update_mean = get_swa_multi_avg_fn()  # mean <- mean + (value - mean) / (n + 1)


def accumulator_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """Return the dtype sums are kept in: float64 where an input is, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def check_weights(weights: Sequence[float] | None, count: int, *, normalise: bool = False) -> list[float]:
    """Return one weight per checkpoint, summing to 1; equal ones by default.

    Raises
    ------
    MethodError
        When their number differs, one is negative or not finite, or they do not sum to 1 and `normalise` is False.
    """
    if weights is None:
        return [1.0 / count] * count
    values = [float(w) for w in weights]
    if len(values) != count:
        raise MethodError(f"{len(values)} weights were given for {count} checkpoints. Give one for each.")
    for value in values:
        if not (math.isfinite(value) and value >= 0):
            raise MethodError(f"weights = {values}: {value} is not allowed; each must be finite and 0 or more.")
    total = math.fsum(values)
    if total == 0:
        raise MethodError(f"weights = {values} sum to 0. At least one must be above 0.")
    if not normalise and abs(total - 1) > 1e-6:
        raise MethodError(
            f"weights = {values} sum to {total:g}, not to 1. Set normalise=True to divide them by their sum."
        )
    return [value / total for value in values]


def first_difference(expected: Mapping[str, object], found: Mapping[str, object]) -> str:
    """Say how two sets of names differ, five of each at most; empty when they do not."""
    parts = []
    for word, names in (
        ("missing", [n for n in expected if n not in found]),
        ("unexpected", [n for n in found if n not in expected]),
    ):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            parts.append(f"{word}: {', '.join(names[:5])}{more}")
    return "; ".join(parts)


class RunningAverage:
    """The mean of a stream of states, kept in float32 (float64 for float64 tensors) in main memory.

    ``mean <- mean + (state - mean) w / W`` with W the sum of the weights so far. With equal weights that is the
    arithmetic mean of all states seen, and states that are all equal stay exactly what they are. Tensors that are
    not floating-point are taken from the latest state. The update is `torch.optim.swa_utils`' own; unlike
    `AveragedModel` there is no copy of the model, and bfloat16 weights are not averaged in bfloat16.

    Attributes
    ----------
    mean : dict of str to Tensor
        On the CPU.
    latest : dict of str to Tensor
        The tensors that are not floating-point.
    count : int
        States seen.
    total : float
        Sum of their weights.

    Examples
    --------
    >>> import torch
    >>> average = RunningAverage()
    >>> for value in (1.0, 2.0, 6.0):
    ...     average.update({"w": torch.tensor([value])})
    >>> average.result()["w"]
    tensor([3.])
    """

    def __init__(self) -> None:
        self.mean: dict[str, Tensor] = {}
        self.latest: dict[str, Tensor] = {}
        self.count = 0
        self.total = 0.0
        self._dtypes: dict[str, torch.dtype] = {}

    @torch.no_grad()
    def update(self, state: Mapping[str, Tensor], weight: float = 1.0, *, name: str = "") -> None:
        """Take one more state into the mean.

        Parameters
        ----------
        state : mapping of str to Tensor
            On any device; not kept and not changed.
        weight : float, default 1
            Above 0.
        name : str, optional
            What the state is called in messages; default "state k".

        Raises
        ------
        MethodError
            When names or shapes differ from the states before, a value is not finite (the mean is then as it was),
            a tensor is complex, or the weight is not above 0.
        """
        name = name or f"state {self.count + 1}"
        if not (math.isfinite(weight) and weight > 0):
            raise MethodError(f"weight = {weight} of {name}. It must be finite and above 0.")
        floats = {key: t.detach() for key, t in state.items() if t.is_floating_point()}
        self._check(state, name)
        _check_finite(floats, name)
        self.latest = {key: t.detach().cpu().clone() for key, t in state.items() if key not in floats}
        if not self.count:
            self._dtypes = {key: t.dtype for key, t in state.items()}
            self.mean = {key: t.to("cpu", accumulator_dtype(t.dtype), copy=True) for key, t in floats.items()}
        self.total += weight
        if self.count:
            for names in self._buckets():
                means = [self.mean[key] for key in names]
                values = [floats[key].to("cpu", mean.dtype) for key, mean in zip(names, means, strict=True)]
                update_mean(means, values, self.total / weight - 1)
        self.count += 1

    def _buckets(self) -> Iterable[list[str]]:
        for dtype in {t.dtype for t in self.mean.values()}:
            bucket: list[str] = []
            size = 0
            for key, tensor in self.mean.items():
                if tensor.dtype == dtype:
                    bucket.append(key)
                    size += tensor.numel()
                if size >= _BUCKET:
                    yield bucket
                    bucket, size = [], 0
            if bucket:
                yield bucket

    def _check(self, state: Mapping[str, Tensor], name: str) -> None:
        if not state:
            raise MethodError(f"{name} holds no tensors, so there is nothing to average.")
        for key, tensor in state.items():
            if tensor.is_complex():
                raise MethodError(f"{name}: {key!r} is {tensor.dtype}. Complex tensors are not averaged.")
        if not self.count:
            return
        known = {**self.mean, **self.latest}
        difference = first_difference(known, state)
        if difference:
            raise MethodError(f"{name} has other tensors than the states before it ({difference}).")
        for key, tensor in state.items():
            if tensor.shape != known[key].shape:
                raise MethodError(
                    f"{name}: {key!r} has the shape {tuple(tensor.shape)}, before it was {tuple(known[key].shape)}. "
                    "Was the vocabulary resized? Average states of one shape."
                )

    def result(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Return the average, each tensor in the dtype it had in the first state (or all in `dtype`).

        Raises
        ------
        MethodError
            When no state was seen.
        """
        if not self.count:
            raise MethodError("There is no state to average: call update at least once.")
        floats = {key: t.to(dtype or self._dtypes[key], copy=True) for key, t in self.mean.items()}
        return {key: floats[key] if key in floats else self.latest[key].clone() for key in self._dtypes}

    def restore(self, tensors: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype], count: int) -> None:
        """Take back a mean that was saved: all its tensors, the states' dtypes, and how many states it stands for."""
        self.mean = {key: t for key, t in tensors.items() if dtypes[key].is_floating_point}
        self.latest = {key: t for key, t in tensors.items() if key not in self.mean}
        self.count, self.total, self._dtypes = count, float(count), dict(dtypes)


def _check_finite(floats: Mapping[str, Tensor], name: str) -> None:
    floats = {key: t for key, t in floats.items() if t.numel()}
    if not floats:
        return
    largest = torch._foreach_norm([t.reshape(-1) for t in floats.values()], math.inf)
    peaks = torch.stack([norm.double().cpu() for norm in largest])
    if not bool(peaks.isfinite().all()):
        bad = next(key for key, peak in zip(floats, peaks, strict=True) if not bool(peak.isfinite()))
        raise MethodError(
            f"{name}: {bad!r} holds values that are not finite, which would spoil the whole average. "
            "Leave this snapshot out and look at the run's loss."
        )


def average_states(
    states: Iterable[Mapping[str, Tensor]], weights: Sequence[float] | None = None, *, normalise: bool = False
) -> dict[str, Tensor]:
    """Average state dicts: ``sum_i w_i theta_i``, computed in float32 and cast back at the end.

    Parameters
    ----------
    states : iterable of mapping of str to Tensor
        With equal names and shapes. With `weights` left out they are consumed one at a time.
    weights : sequence of float, optional
        One per state, each 0 or more, summing to 1; default 1/N.
    normalise : bool, default False
        Divide the weights by their sum first.

    Returns
    -------
    dict of str to Tensor
        In the dtypes of the first state; tensors that are not floating-point come from the last one.

    Raises
    ------
    MethodError
        When there are no states, they do not match, a value is not finite, or the weights do not fit.

    Examples
    --------
    >>> import torch
    >>> average_states([{"w": torch.zeros(2)}, {"w": torch.ones(2)}], weights=[0.25, 0.75])["w"]
    tensor([0.7500, 0.7500])
    """
    average = RunningAverage()
    if weights is None:
        for state in states:
            average.update(state)
        return average.result()
    listed = list(states)
    if not listed:
        raise MethodError("There is no state to average: the list is empty.")
    for number, (state, weight) in enumerate(
        zip(listed, check_weights(weights, len(listed), normalise=normalise), strict=True), 1
    ):
        if weight > 0:
            average.update(state, weight, name=f"state {number}")
        else:
            average._check(state, f"state {number}")
    if average.count:
        average.latest = {k: t.detach().cpu().clone() for k, t in listed[-1].items() if not t.is_floating_point()}
    return average.result()
