"""Scores that follow from the logits and the labels: EL2N, EL1 and the two margins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gnomon.errors import DataError, MethodError, nearest

__all__ = [
    "IGNORED",
    "LOGIT_SCORES",
    "check_labels",
    "el1",
    "el2n",
    "logit_scores",
    "margin",
    "name_rows",
    "per_row",
    "sum_margin",
]

IGNORED = -100
LOGIT_SCORES = ("el2n", "el1", "margin", "sum_margin")
LogitScore = Literal["el2n", "el1", "margin", "sum_margin"]
_CHUNK = {"cpu": 1 << 18}  # logits worked on at a time: no second array of all logits is ever held, and caches serve
_CHUNK_ELSEWHERE = 1 << 24


class _Parts(NamedTuple):
    """Logarithms that all scores are made of; each (n,) in float32, or float64 for float64 logits."""

    label: Tensor  # log p_y
    rest: Tensor  # log sum_{c != y} p_c, free of the cancellation in 1 - p_y
    rest_squares: Tensor  # log sum_{c != y} p_c^2
    rest_max: Tensor  # log max_{c != y} p_c
    classes: int


def el2n(logits: Float[Tensor, "... classes"], targets: Int[Tensor, ...]) -> Float[Tensor, " rows"]:
    """Return EL2N, ``||softmax(logits) - onehot(target)||_2``, of every row.

    Computed as ``sqrt((sum_{c != y} p_c)^2 + sum_{c != y} p_c^2)`` from log-sums over the other classes: equal to
    ``sqrt(sum_c p_c^2 - 2 p_y + 1)`` without its cancellation near 0, and without an array of probabilities.

    Parameters
    ----------
    logits : Tensor (rows, classes) or (rows, tokens, classes)
        Any floating dtype; half precision is raised to float32.
    targets : Tensor (rows,) or (rows, tokens)
        Class numbers, aligned with `logits` (no shift happens here); -100 leaves a token out.

    Returns
    -------
    Tensor (rows,)
        In [0, sqrt(2)]. Rows of tokens: the mean over the tokens that are not left out.

    Raises
    ------
    DataError
        A label outside 0 .. classes - 1, or a row in which every token is left out.
    MethodError
        Shapes that do not belong together, or a single logit.

    Examples
    --------
    >>> el2n(torch.zeros(1, 2), torch.tensor([0]))
    tensor([0.7071])
    """
    return logit_scores(logits, targets, "el2n")


def el1(logits: Float[Tensor, "... classes"], targets: Int[Tensor, ...]) -> Float[Tensor, " rows"]:
    """Return EL1, ``sum_c |p_c - y_c| = 2 (1 - p_y)``, of every row; arguments and errors as for `el2n`.

    Examples
    --------
    >>> el1(torch.zeros(1, 4), torch.tensor([0]))
    tensor([1.5000])
    """
    return logit_scores(logits, targets, "el1")


def margin(logits: Float[Tensor, "... classes"], targets: Int[Tensor, ...]) -> Float[Tensor, " rows"]:
    """Return the margin ``max_{c != y} p_c - p_y`` in [-1, 1] of every row; arguments and errors as for `el2n`.

    Examples
    --------
    >>> margin(torch.zeros(1, 4), torch.tensor([0]))
    tensor([0.])
    """
    return logit_scores(logits, targets, "margin")


def sum_margin(logits: Float[Tensor, "... classes"], targets: Int[Tensor, ...]) -> Float[Tensor, " rows"]:
    """Return ``sum_{c != y} (p_c - p_y) = 1 - C p_y`` of every row; arguments and errors as for `el2n`.

    Examples
    --------
    >>> sum_margin(torch.zeros(1, 4), torch.tensor([0]))
    tensor([0.])
    """
    return logit_scores(logits, targets, "sum_margin")


_FORMULAS: dict[str, Callable[[_Parts], Tensor]] = {
    "el2n": lambda p: (torch.exp(2 * p.rest) + torch.exp(p.rest_squares)).sqrt(),
    "el1": lambda p: 2 * torch.exp(p.rest),
    "margin": lambda p: torch.exp(p.rest_max) - torch.exp(p.label),
    "sum_margin": lambda p: 1 - p.classes * torch.exp(p.label),
}


@torch.no_grad()
def logit_scores(
    logits: Float[Tensor, "... classes"],
    targets: Int[Tensor, ...],
    score: LogitScore,
    *,
    places: Sequence[int] | None = None,
) -> Float[Tensor, " rows"]:
    """Return one of the scores of this module by its name; see `el2n` for arguments and errors.

    `places` are the numbers of the rows in their data set, for the messages.
    """
    if score not in _FORMULAS:
        raise MethodError(f"score = {score!r} is unknown. {nearest(str(score), LOGIT_SCORES, noun='score')}")
    check_labels(logits, targets, places)
    used = targets != IGNORED
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    values = torch.empty(targets.shape, dtype=dtype, device=logits.device)
    width = logits[:1].numel()
    step = max(1, _CHUNK.get(logits.device.type, _CHUNK_ELSEWHERE) // max(1, width))
    work = torch.empty((min(step, len(logits)), *logits.shape[1:]), dtype=dtype, device=logits.device)
    for start in range(0, len(logits), step):
        part = slice(start, start + step)
        z = work[: len(logits[part])].copy_(logits[part]).reshape(-1, logits.shape[-1])
        parts = _parts(z, targets[part].reshape(-1).clamp(min=0))
        values[part] = _FORMULAS[score](parts).reshape(targets[part].shape)
    return per_row(values, used, places)


def _parts(z: Tensor, labels: Tensor) -> _Parts:
    """Take logits apart; they are overwritten."""
    label = z.gather(1, labels[:, None])[:, 0]
    z.scatter_(1, labels[:, None], -torch.inf)
    top = z.amax(1).clamp(min=torch.finfo(z.dtype).min)  # finite also when no other class is possible
    weights = z.sub_(top[:, None]).exp_()
    rest, squares = top + weights.sum(1).log(), 2 * top + torch.linalg.vecdot(weights, weights).log()
    whole = torch.logaddexp(rest, label)
    return _Parts(label - whole, rest - whole, squares - 2 * whole, top - whole, z.shape[1])


def per_row(values: Tensor, used: Tensor, places: Sequence[int] | None = None) -> Float[Tensor, " rows"]:
    """Average the tokens in use of each row; rows without tokens pass as they are.

    Raises
    ------
    DataError
        When a row has no token in use; the message gives its number.
    """
    counts = used.reshape(len(used), -1).sum(1)
    if bool((counts == 0).any()):
        raise DataError(
            f"no label is in use in {name_rows(counts == 0, places)} (all are {IGNORED}): there is nothing to score. "
            "Leave such rows out, or keep at least one label in each."
        )
    return (values * used).reshape(len(values), -1).sum(1) / counts


def check_labels(logits: Tensor, targets: Tensor, places: Sequence[int] | None = None) -> None:
    """Refuse logits and labels that do not make a classification; `places` are the rows' numbers, for the message."""
    if logits.dim() not in (2, 3) or logits.shape[:-1] != targets.shape or not logits.is_floating_point():
        raise MethodError(
            f"logits have shape {tuple(logits.shape)} ({logits.dtype}), targets {tuple(targets.shape)}. Allowed: "
            "(rows, classes) with (rows,), or (rows, tokens, classes) with (rows, tokens)."
        )
    if targets.is_floating_point() or targets.dtype == torch.bool:
        raise MethodError(
            f"targets are {targets.dtype}: these scores need class numbers. A regression has no softmax; score it "
            "with method='grand'."
        )
    classes = logits.shape[-1]
    if classes < 2:
        raise MethodError(
            "The model has a single logit: a regression or a sigmoid has no softmax, so there is no EL2N. Use "
            "method='grand', or a head of two classes."
        )
    wrong = ((targets < 0) | (targets >= classes)) & (targets != IGNORED)
    if bool(wrong.any()):
        where = name_rows(wrong.reshape(len(targets), -1).any(1), places)
        raise DataError(
            f"label {int(targets[wrong][0])} in {where}. Allowed: 0 to {classes - 1} for {classes} classes, or "
            f"{IGNORED} for a label that does not count."
        )


def name_rows(chosen: Bool[Tensor, " rows"], places: Sequence[int] | None = None, most: int = 10) -> str:
    """Write which rows are chosen: ``"rows 3, 8 and 2 more"``, counted from 0."""
    rows = [i if places is None else int(places[i]) for i in chosen.nonzero()[:, 0].tolist()]
    more = f" and {len(rows) - most} more" if len(rows) > most else ""
    return f"row{'s' if len(rows) > 1 else ''} {', '.join(map(str, rows[:most]))}{more}"
