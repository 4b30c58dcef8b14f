"""Averaging over independent runs: one shared head, one common start."""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gnomon.common.engine import Engine, run_all
from gnomon.common.models import load_model
from gnomon.errors import GnomonWarning, MethodError, ModelError, nearest
from gnomon.merge.checkpoint_averaging.running import RunningAverage, average_states

__all__ = ["HEAD_NAMES", "AccumulatedRuns", "AveragedRuns", "accumulate_runs", "run_average"]

HEAD_NAMES = ("classifier", "qa_outputs", "score")
ShareHead = Literal["frozen", "init", "none"]
Train = Callable[..., Any]
Base = nn.Module | str | Path | Callable[[int], nn.Module]


@dataclass
class AveragedRuns:
    """What came of `run_average`.

    Attributes
    ----------
    last : dict of str to Tensor
        RA(LAST): the mean of the last weights of all runs.
    all : dict of str to Tensor
        RA(CA): the mean of all snapshots of all runs.
    seeds : list of int
        First the run that made the head.
    snapshots : list of int
        Snapshots each run took; a run that took none counts with its last weights.
    scores : dict of str to list of float
        With `evaluate`: ``"LAST"`` and ``"CA"`` (one score a run), ``"RA(LAST)"`` and ``"RA(CA)"`` (one).
    """

    last: dict[str, Tensor]
    all: dict[str, Tensor]
    seeds: list[int]
    snapshots: list[int]
    scores: dict[str, list[float]] = field(default_factory=dict)


@dataclass
class _Run:
    """One finished run: fingerprints of its start, its last weights, the mean of its snapshots."""

    start: dict[str, str]
    first_head: dict[str, Tensor]
    last: dict[str, Tensor]
    mean: dict[str, Tensor]
    count: int
    scores: dict[str, float]


def run_average(
    base: Base,
    train_fn: Train,
    *,
    seeds: Sequence[int],
    share_head: ShareHead = "frozen",
    head_names: Sequence[str] = HEAD_NAMES,
    evaluate: Callable[[nn.Module], float] | None = None,
    engine: Engine = "local",
) -> AveragedRuns:
    """Fine-tune once per seed and average over the runs, with one task head for all.

    Runs end in different basins mainly because their task heads are drawn at random. So the first run trains
    everything; each further one starts from the base again with the first run's final head, frozen.

    Parameters
    ----------
    base : Module, str, Path, or function of a seed
        The pre-trained model. A module is copied for every run; a folder or hub id is loaded; a function builds the
        model of a seed, such as with a head drawn from it. All must start from the same encoder.
    train_fn : callable
        ``train_fn(model, seed, snapshot)`` trains the model in place, on its parameters that require gradients, and
        calls ``snapshot()`` at each snapshot (`CheckpointAveraging` takes it as ``on_snapshot``).
    seeds : sequence of int
        Two or more.
    share_head : {"frozen", "init", "none"}, default "frozen"
        ``"init"`` is the soup variant: all heads start as the first run's started, and are trained. ``"none"`` leaves
        them as `base` gives them.
    head_names : sequence of str, default ("classifier", "qa_outputs", "score")
        Parameters whose name contains one of these are the head.
    evaluate : callable, optional
        Takes a model and returns a score; fills `scores`.
    engine : {"local", "ray"}, default "local"
        Where the runs after the first happen; with ``"ray"`` all arguments must pickle.

    Returns
    -------
    AveragedRuns

    Raises
    ------
    MethodError
        With fewer than two seeds, the same seed twice, or an unknown `share_head`.
    ModelError
        When no parameter has a head's name, or `train_fn` changed a frozen head.

    Warns
    -----
    GnomonWarning
        When runs start from different weights: their average does not work.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.ModuleDict({"encoder": torch.nn.Linear(2, 2), "classifier": torch.nn.Linear(2, 2)})
    >>> def train(model, seed, snapshot):
    ...     with torch.no_grad():
    ...         model["encoder"].bias.fill_(float(seed))
    ...     snapshot()
    >>> run_average(model, train, seeds=[1, 2]).last["encoder.bias"]
    tensor([1.5000, 1.5000])
    """
    seeds = list(seeds)
    if share_head not in ("frozen", "init", "none"):
        hint = nearest(str(share_head), ("frozen", "init", "none"), noun="share_head")
        raise MethodError(f"share_head = {share_head!r} is unknown. {hint}")
    if len(seeds) < 2 or len(set(seeds)) < len(seeds):
        raise MethodError(f"seeds = {seeds}. Give two or more, all different.")
    names = tuple(head_names)
    first = _run((base, train_fn, evaluate, names, None, False), seeds[0])
    head = None
    if share_head == "frozen":
        head = {name: t for name, t in first.last.items() if _is_head(name, names)}
    elif share_head == "init":
        head = first.first_head
    one = partial(_run, (base, train_fn, evaluate, names, head, share_head == "frozen"))
    # here one run after the other, so that only one is held at a time
    rest = map(one, seeds[1:]) if engine == "local" else run_all(one, seeds[1:], engine=engine)
    result = _fold(chain([first], rest), seeds, names, share_head)
    if evaluate is not None:
        for name, state in (("RA(LAST)", result.last), ("RA(CA)", result.all)):
            model = _build(base, seeds[0])
            model.load_state_dict(state)
            result.scores[name] = [float(evaluate(model))]
    return result


def _fold(runs: Iterable[_Run], seeds: list[int], head_names: tuple[str, ...], share_head: str) -> AveragedRuns:
    """Take finished runs into the two averages."""
    last, everything, result = RunningAverage(), RunningAverage(), AveragedRuns({}, {}, seeds, [])
    start: dict[str, str] = {}
    for seed, run in zip(seeds, runs, strict=True):
        start = start or run.start
        _warn_of_starts(start, run.start, seed, head_names, share_head)
        last.update(run.last)
        everything.update(run.mean, weight=run.count)
        result.snapshots.append(run.count)
        for name, score in run.scores.items():
            result.scores.setdefault(name, []).append(score)
    result.last = last.result()
    result.all = {name: t.to(result.last[name].dtype) for name, t in everything.result().items()}
    return result


def _build(base: Base, seed: int) -> nn.Module:
    if isinstance(base, nn.Module):
        return copy.deepcopy(base)
    if isinstance(base, (str, Path)):
        return load_model(base).train()
    return base(seed)


def _is_head(name: str, head_names: Sequence[str]) -> bool:
    return any(part in name for part in head_names)


def _run(common: tuple[Base, Train, Any, tuple[str, ...], dict[str, Tensor] | None, bool], seed: int) -> _Run:
    """One run, from the base to its last weights; a function of plain arguments, so that Ray can send it."""
    base, train_fn, evaluate, head_names, head, frozen = common
    model = _build(base, seed)
    heads = {name: p for name, p in model.named_parameters() if _is_head(name, head_names)}
    if not heads:
        children = ", ".join(name for name, _ in model.named_children())
        raise ModelError(
            f"No parameter's name contains one of head_names = {tuple(head_names)}; the model's parts are: {children}. "
            "Name its task head."
        )
    start = {name: _digest(t) for name, t in model.state_dict().items()}
    first_head = {name: t.clone() for name, t in model.state_dict().items() if _is_head(name, head_names)}
    if head is not None:
        model.load_state_dict(head, strict=False)
    if frozen and head is not None:
        for parameter in heads.values():
            parameter.requires_grad_(False)
    average = RunningAverage()

    def snapshot(*_: object) -> None:
        average.update(model.state_dict())

    train_fn(model, seed, snapshot)
    if frozen and head is not None:
        changed = [name for name in heads if not torch.equal(heads[name].detach().cpu(), head[name].cpu())]
        if changed:
            raise ModelError(
                f"train_fn changed the frozen head ({changed[0]}). Give the optimizer only parameters that require "
                "gradients."
            )
    if not average.count:
        snapshot()
    last = {name: t.detach().cpu().clone() for name, t in model.state_dict().items()}
    scores = {}
    if evaluate is not None:
        scores["LAST"] = float(evaluate(model))
        model.load_state_dict(average.result())
        scores["CA"] = float(evaluate(model))
    mean = {**average.mean, **average.latest}
    return _Run(start, first_head, last, {name: mean[name] for name in last}, average.count, scores)


def _digest(tensor: Tensor) -> str:
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(raw.data, digest_size=16).hexdigest()


def _warn_of_starts(
    first: Mapping[str, str], other: Mapping[str, str], seed: int, head_names: Sequence[str], share_head: str
) -> None:
    differ = [name for name, digest in other.items() if first.get(name) != digest]
    if share_head != "none":
        differ = [name for name in differ if not _is_head(name, head_names)]
    if differ:
        kind = "task heads" if all(_is_head(name, head_names) for name in differ) else "weights"
        warnings.warn(
            f"The run of seed {seed} starts from other {kind} than the first ({', '.join(differ[:5])}"
            f"{f' and {len(differ) - 5} more' if len(differ) > 5 else ''}). Averaging needs one common start: build "
            "every run on the same pre-trained weights, and share the head.",
            GnomonWarning,
            stacklevel=4,
        )


@dataclass
class AccumulatedRuns:
    """What came of `accumulate_runs`.

    Attributes
    ----------
    state : dict of str to Tensor
        The best average found.
    count : int
        Runs in it.
    scores : list of float
        Of the average after each run.
    """

    state: dict[str, Tensor]
    count: int
    scores: list[float]


def accumulate_runs(
    model: nn.Module,
    runs: Iterable[Mapping[str, Tensor] | str | Path],
    evaluate: Callable[[nn.Module], float],
    *,
    patience: int = 1,
    higher_is_better: bool = True,
) -> AccumulatedRuns:
    """Add run after run to one average and stop when that stops helping.

    ``theta <- theta (k - 1) / k + theta_k / k``: after k runs the arithmetic mean of k. Runs may differ in their
    hyperparameters; they need one start and one head.

    Parameters
    ----------
    model : Module
        Takes each average to be scored; holds the best one afterwards.
    runs : iterable of state dict, str or Path
        The runs' weights (of a run, its checkpoint average), or folders of them. Taken one at a time and not beyond
        the stop, so a generator may train them.
    evaluate : callable
        Takes the model, returns its score on development data.
    patience : int, default 1
        Stop after so many runs in a row without a better score.
    higher_is_better : bool, default True

    Returns
    -------
    AccumulatedRuns

    Raises
    ------
    MethodError
        With no runs or a patience under 1.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> runs = [{"weight": torch.tensor([[w]])} for w in (0.0, 2.0, 7.0, 1.0)]
    >>> found = accumulate_runs(model, runs, lambda m: 3 - abs(m.weight.item() - 1))
    >>> found.count, found.scores
    (2, [2.0, 3.0, 1.0])
    """
    if patience < 1:
        raise MethodError(f"patience = {patience}. Allowed: 1 or more.")
    average = RunningAverage()
    best: AccumulatedRuns | None = None
    scores: list[float] = []
    sign = 1.0 if higher_is_better else -1.0
    for run in runs:
        average.update(load_model(run).state_dict() if isinstance(run, (str, Path)) else run)
        state = average.result()
        model.load_state_dict(state)
        scores.append(float(evaluate(model)))
        if best is None or sign * scores[-1] > sign * scores[best.count - 1]:
            best = AccumulatedRuns(state, average.count, scores)
        elif average.count - best.count >= patience:
            break
    if best is None:
        raise MethodError("There are no runs to accumulate: the list is empty.")
    model.load_state_dict(average_states([best.state]))
    return best
