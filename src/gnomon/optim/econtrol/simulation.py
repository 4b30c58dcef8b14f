"""All workers in one process: the algorithms as sequences of equations, for research and as the hooks' reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from gnomon.errors import MethodError, nearest
from gnomon.optim.econtrol.compressors import Compressor, TopK, make
from gnomon.optim.econtrol.feedback import KINDS, default_eta

__all__ = ["ALGORITHMS", "Simulation", "simulate"]

ALGORITHMS = (*KINDS, "ideal", "sgd")


@dataclass(frozen=True)
class Simulation:
    """The end of a simulated run.

    Attributes
    ----------
    x : Tensor, shape (..., d)
        The last iterate.
    update : Tensor, shape (..., d)
        The last averaged estimate.
    errors : Tensor, shape (..., n, d)
        What each worker has not sent yet; zero where the algorithm keeps none.
    estimates : Tensor, shape (..., n, d)
        Each worker's gradient estimate.
    sent_bytes : int
        By one worker over all steps.
    trace : Tensor, shape (records, ...)
        What `record` returned, every `every` steps.
    """

    x: Tensor
    update: Tensor
    errors: Tensor
    estimates: Tensor
    sent_bytes: int
    trace: Tensor


def simulate(
    gradients: Callable[[Tensor, torch.Generator], Tensor],
    x0: Float[Tensor, "*grid d"],
    *,
    workers: int,
    steps: int,
    step_size: float | Tensor,
    algorithm: str = "econtrol",
    compressor: str | Compressor = "topk",
    ratio: float = 0.01,
    eta: float | Tensor | None = None,
    beta: float = 0.1,
    ideal: Float[Tensor, "n d"] | None = None,
    dense_start: bool = True,
    record: Callable[[Tensor], Tensor] | None = None,
    every: int = 1,
    seed: int = 0,
) -> Simulation:
    """Run distributed gradient descent with compressed messages, ``x <- x - step_size * u``.

    Parameters
    ----------
    gradients : callable
        ``(x, generator) -> (..., n, d)``: every worker's gradient at x (..., d), noise drawn from the generator.
    x0 : Tensor, shape (..., d), floating
        The start; leading dimensions run side by side, for instance a grid of step sizes.
    workers, steps : int
    step_size : float or Tensor broadcasting to (..., 1)
    algorithm : {"econtrol", "ec", "ef21", "ef21-sgdm", "none", "ideal", "sgd"}, default "econtrol"
        ``"ideal"`` is error feedback around known gradients at the solution (`ideal`), which analyses compare with;
        ``"sgd"`` sends everything.
    compressor, ratio
        As for `EControlState`.
    eta : float or Tensor broadcasting to (..., 1), optional
        Default: the compressor's contraction within [0.01, 0.3].
    beta : float, default 0.1
        Weight of the new gradient in the momentum of ``"ef21-sgdm"``.
    ideal : Tensor, shape (n, d), optional
        Each worker's gradient at the solution, for ``"ideal"``.
    dense_start : bool, default True
        ``h = g`` at the first step (one uncompressed round), as the paper has it; else h = 0.
    record : callable, optional
        ``x -> Tensor``, called every `every` steps with the iterate before the step.
    seed : int, default 0
        Of the generator that `gradients` gets, and of random compressors.

    Returns
    -------
    Simulation

    Raises
    ------
    MethodError
        On an unknown algorithm or compressor, ``"ideal"`` without `ideal`, or gradients of another shape.

    Examples
    --------
    >>> target = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    >>> run = simulate(lambda x, g: x[None] - target, torch.zeros(2, dtype=torch.float64), workers=2, steps=200,
    ...                step_size=0.2, ratio=0.5, eta=0.3)
    >>> [round(v, 3) for v in run.x.tolist()]
    [2.0, 3.0]
    """
    _check(algorithm, ideal)
    squash = make("identity" if algorithm == "sgd" else compressor, ratio)
    generator = torch.Generator().manual_seed(seed)
    x = x0.clone()
    shape = (*x.shape[:-1], workers, x.shape[-1])
    strength = default_eta(squash.delta(x.shape[-1:])) if eta is None else eta
    if isinstance(strength, Tensor):
        strength = strength[..., None]
    e, h, v, shared = (torch.zeros(shape, dtype=x.dtype) for _ in range(4))
    mean = torch.zeros_like(x)
    trace = []
    for t in range(steps):
        if record is not None and t % every == 0:
            trace.append(record(x))
        g = gradients(x, generator)
        if g.shape != shape:
            raise MethodError(f"gradients returned shape {tuple(g.shape)}; {shape} is needed (..., workers, d).")
        if t == 0:
            v = g.clone()
            if dense_start and algorithm in ("ef21", "ef21-sgdm", "econtrol"):
                h, mean = g.clone(), g.mean(-2)
        if algorithm == "ideal":
            shared = torch.as_tensor(ideal, dtype=x.dtype).expand(shape)
        if algorithm == "ef21-sgdm":
            v = v + beta * (g - v)
        inputs = {"none": g, "sgd": g, "ec": e + g, "ef21": g - h, "ef21-sgdm": v - h}
        c = inputs.get(algorithm)
        if c is None:
            c = strength * e + g - h if algorithm == "econtrol" else e + g - shared
        sent = _compress(squash, c, seed + t * workers)
        if algorithm in ("ec", "ideal"):
            e = c - sent
        elif algorithm == "econtrol":
            e = e + g - h - sent
        if algorithm in ("ef21", "ef21-sgdm", "econtrol"):
            h = h + sent
            mean = mean + sent.mean(-2)
        else:
            mean = (shared + sent).mean(-2)
        x = x - step_size * mean
    size = squash.message_bytes(tuple(x.shape[-1:]), x.dtype) * steps
    return Simulation(x, mean, e, h, size, torch.stack(trace) if trace else torch.empty(0))


def _check(algorithm: str, ideal: Tensor | None) -> None:
    if algorithm not in ALGORITHMS:
        raise MethodError(f"algorithm = {algorithm!r}. {nearest(str(algorithm), ALGORITHMS, noun='algorithm')}")
    if algorithm == "ideal" and ideal is None:
        raise MethodError("algorithm = 'ideal' needs every worker's gradient at the solution: ideal, of shape (n, d).")


def _compress(squash: Compressor, x: Tensor, seed: int) -> Tensor:
    """Compress every row of (..., n, d); Top-K of short rows in one sort."""
    if type(squash) is TopK and squash.values is None:
        order = x.abs().argsort(dim=-1, descending=True, stable=True)[..., : squash.count(tuple(x.shape[-1:]))]
        return torch.zeros_like(x).scatter_(-1, order, x.gather(-1, order))
    rows = x.reshape(-1, x.shape[-1])
    workers = x.shape[-2]
    return torch.stack([squash(row, seed + i % workers) for i, row in enumerate(rows)]).view_as(x)
