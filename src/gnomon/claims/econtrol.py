"""The claims of EControl: heterogeneous workers, noise against the number of workers, a compressed classifier."""

from __future__ import annotations

import gzip
import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from gnomon.claims.experiment import experiment
from gnomon.claims.real_data import real_file
from gnomon.optim.econtrol import simulate

__all__ = ["compressed_classifier", "heterogeneous", "linear_speed_up"]

GAMMAS = (1.0, 0.3, 0.1, 0.03, 0.01)
ETAS = (0.3, 0.1, 0.03, 0.01)


@lru_cache(maxsize=4)
def _least_squares(seed: int, zeta: float, n: int = 8, d: int = 20) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``f_i(x) = ||a_i x - b_i||^2 / 2``: scales, targets, the solution, gradients there."""
    generator = torch.Generator().manual_seed(1000 + seed)
    index = torch.arange(1, n + 1, dtype=torch.float64)
    a = index / math.sqrt(n)
    b = torch.randn(n, d, generator=generator, dtype=torch.float64) * zeta / index[:, None]
    best = (a[:, None] * b).sum(0) / (a**2).sum()
    return a, b, best, a[:, None] * (a[:, None] * best - b)


def _best_distance(arm: str, seed: int, zeta: float, noise: float, steps: int, ratio: float = 0.1) -> float:
    """Squared distance to the solution after the last step, with the best step size (and eta) of the grid."""
    a, b, best, ideal = _least_squares(seed, zeta)
    n, d = b.shape
    etas = ETAS if arm == "econtrol" else (0.0,)
    grid = torch.tensor([(g, e) for g in GAMMAS for e in etas], dtype=torch.float64)

    def gradients(x: Tensor, generator: torch.Generator) -> Tensor:
        # the same noise for every setting of the grid
        drawn = torch.randn(n, d, generator=generator, dtype=torch.float64) * noise / math.sqrt(d)
        return a[:, None] * (a[:, None] * x[..., None, :] - b) + drawn

    run = simulate(
        gradients,
        torch.full((len(grid), d), 5.0, dtype=torch.float64),
        workers=n,
        steps=steps,
        step_size=grid[:, :1] / float((a**2).max()),
        algorithm=arm,
        ratio=ratio,
        eta=grid[:, 1:],
        ideal=ideal,
        seed=seed,
    )
    distances = ((run.x - best) ** 2).sum(-1)
    return float(distances[torch.isfinite(distances)].min())


@experiment(
    arms=("econtrol", "ec", "ef21", "ideal", "sgd", "none"),
    relation=("econtrol < 0.5 * ec", "econtrol < 0.7 * ef21", "econtrol < 3 * ideal"),
    unit="squared distance to the solution (8 workers, heterogeneity 100, noise 5; best step size and eta)",
    seeds=tuple(range(8)),
    scales=("small",),
)
def heterogeneous(arm: str, seed: int, scale: str) -> float:
    """Least squares on workers with very different targets; 2 of 20 entries are sent."""
    return _best_distance(arm, seed, zeta=100.0, noise=5.0, steps=1500)


WORKERS = (2, 4, 8, 16, 32)


@lru_cache(maxsize=512)
def _last_error(algorithm: str, n: int, seed: int) -> float:
    d, steps = 20, 1500
    generator = torch.Generator().manual_seed(2000 + seed)
    b = 5 * torch.randn(n, d, generator=generator, dtype=torch.float64)
    best = b.mean(0)

    def gradients(x: Tensor, g: torch.Generator) -> Tensor:
        return x[..., None, :] - b + torch.randn(n, d, generator=g, dtype=torch.float64) * 5.0 / math.sqrt(d)

    run = simulate(
        gradients, torch.full((d,), 5.0, dtype=torch.float64), workers=n, steps=steps, step_size=0.01,
        algorithm=algorithm, ratio=0.1, eta=0.1, seed=seed, every=10, record=lambda x: ((x - best) ** 2).sum(-1),
    )  # fmt: skip
    return float(run.trace[-30:].mean())  # the last fifth of the run


@experiment(
    arms=tuple(f"{name}-{n}" for n in WORKERS for name in ("sgd", "econtrol", "ef21")),
    relation=(
        *(f"econtrol-{n} < 2.5 * sgd-{n}" for n in WORKERS),
        *(f"ef21-{n} > 3 * econtrol-{n}" for n in WORKERS),
        "econtrol-32 < 0.125 * econtrol-2",
    ),
    unit="squared distance to the solution, mean over the end of the run, for n workers",
    seeds=tuple(range(8)),
    scales=("small",),
)
def linear_speed_up(arm: str, seed: int, scale: str) -> float:
    """The same curvature everywhere, noise 5, step size .01, eta .1, from 2 to 32 workers."""
    name, _, n = arm.rpartition("-")
    return _last_error(name, int(n), seed)


@lru_cache(maxsize=1)
def _mushrooms() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_svmlight_file

    file = real_file("econtrol/mushrooms.libsvm.gz", "the LIBSVM collection's set mushrooms, gzipped")
    with gzip.open(file) as handle:
        rows, labels = load_svmlight_file(handle, n_features=112)
    return torch.tensor(rows.toarray()), torch.tensor(labels == labels.max(), dtype=torch.float64) * 2 - 1


def _classifier(seed: int, workers: int) -> tuple[Any, float, float]:
    """Logistic regression on rows sorted by label: the gradient function, the smoothness, the least objective."""
    from scipy.optimize import minimize

    rows, labels = _mushrooms()
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[: 8 * (4000 // 8)]
    chosen = chosen[labels[chosen].argsort(stable=True)]
    x, y, ridge = rows[chosen], labels[chosen], 1e-3
    of_worker = (x * y[:, None]).view(workers, -1, x.shape[1])

    def gradients(w: Tensor, generator: torch.Generator) -> Tensor:
        margin = (of_worker @ w[None, :, None]).squeeze(-1)
        return -(torch.sigmoid(-margin)[:, :, None] * of_worker).mean(1) + ridge * w

    def objective(w: Tensor) -> Tensor:
        return torch.nn.functional.softplus(-(x * y[:, None]) @ w).mean() + 0.5 * ridge * (w**2).sum()

    def both(w: Any) -> tuple[float, Any]:
        at = torch.tensor(w)
        return float(objective(at)), gradients(at, torch.Generator()).mean(0).numpy()

    least = minimize(both, [0.0] * x.shape[1], jac=True, method="L-BFGS-B", options={"maxiter": 5000, "ftol": 1e-15})
    smooth = float(torch.linalg.matrix_norm(x, 2) ** 2) / (4 * len(x)) + ridge
    gradients.objective = objective  # type: ignore[attr-defined]
    return gradients, smooth, float(least.fun)


@experiment(
    arms=("sgd", "econtrol", "ec", "ef21", "none"),
    relation=("econtrol < 1.1 * sgd", "econtrol < 0.5 * none"),
    unit="objective above its least value after 200 steps (logistic regression, 8 workers by label, 5 of 112 entries)",
    seeds=(0, 1, 2),
    scales=("small",),
)
def compressed_classifier(arm: str, seed: int, scale: str) -> float:
    """Mushrooms, rows sorted by label so that workers hold one class; a seed draws 4000 of the rows."""
    gradients, smooth, least = _classifier(seed, 8)
    run = simulate(
        gradients, torch.zeros(112, dtype=torch.float64), workers=8, steps=200, step_size=1 / smooth, algorithm=arm,
        ratio=5 / 112, seed=seed,
    )  # fmt: skip
    return float(gradients.objective(run.x)) - least
