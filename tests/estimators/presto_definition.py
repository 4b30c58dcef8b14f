"""PRESTO's objective as its equations stand, a generic convex solver on it, and the real data in matrix form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.optimize import minimize
from torch import Tensor

SOUP_REFERENCE = {
    "PROD": "Ref", "DAY": "1", "SOUPTYPE": "Self-made", "SOUPFREQ": ">1/week", "COLD": "No", "EASY": "1",
    "GENDER": "Male", "AGEGROUP": "18-30", "LOCATION": "Region 1",
}  # fmt: skip


def wine(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    table = pd.read_csv(folder / "wine.csv")
    X = np.column_stack([table.temp == "warm", table.contact == "yes"]).astype(float)
    return X, table.rating.to_numpy() - 1


def soup(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """22 treatment-coded columns; classes 6 < 5 < ... < 1, numbered 0 to 5."""
    table = pd.read_csv(folder / "soup.csv")
    parts = [pd.get_dummies(table[c].astype(str)).drop(columns=level) for c, level in SOUP_REFERENCE.items()]
    return pd.concat(parts, axis=1).to_numpy(float), 6 - table.SURENESS.to_numpy()


def simulated(
    n: int = 300, p: int = 4, thresholds: tuple[float, ...] = (-1.0, 1.0, 2.5), seed: int = 0, spread: float = 0.15
) -> tuple[np.ndarray, np.ndarray]:
    """Ordered classes from slopes that differ a little between boundaries."""
    rng = np.random.default_rng(seed)
    Z, scale = rng.uniform(-1.7, 1.7, (n, p)), rng.uniform(0.5, 3, p)
    slopes = rng.normal(size=(p, 1)) * 0.5 + spread * rng.normal(size=(p, len(thresholds)))
    X = Z * scale + rng.normal(size=p)
    eta = np.asarray(thresholds) + Z @ slopes
    below = np.maximum.accumulate(1 / (1 + np.exp(-eta)), axis=1)
    return X, (rng.random((n, 1)) > below).sum(axis=1)


def negative_log_likelihood(alpha: Tensor, beta: Tensor, X: Tensor, y: Tensor, weights: Tensor | None = None) -> Tensor:
    """``-sum_i w_i log P(y_i | x_i)``; infinite where any class of any row has no positive probability."""
    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(X)):
        F = [torch.zeros(()), *(torch.sigmoid(alpha[k] + X[i] @ beta[:, k]) for k in range(len(alpha))), torch.ones(())]
        P = [F[k + 1] - F[k] for k in range(len(alpha) + 1)]
        if min(P) <= 0:
            return torch.tensor(np.inf)
        total = total - torch.log(P[int(y[i])]) * (1.0 if weights is None else weights[i])
    return total


def value_and_gradient(alpha: Tensor, psi: Tensor, X: Tensor, y: Tensor) -> tuple[float, np.ndarray, np.ndarray]:
    """The mean loss and its derivatives by alpha and psi, from probabilities as differences (all rows at once)."""
    alpha, psi = alpha.clone().requires_grad_(), psi.clone().requires_grad_()
    F = torch.sigmoid(alpha + X @ psi.cumsum(1))
    edge = torch.ones(len(X), 1, dtype=torch.float64)
    P = torch.cat([F, edge], 1) - torch.cat([0 * edge, F], 1)
    if P.min() <= 0:
        return np.inf, np.zeros(len(alpha)), np.zeros(psi.shape)
    loss = -torch.log(P.gather(1, y[:, None])).mean()
    loss.backward()
    return loss.item(), alpha.grad.numpy(), psi.grad.numpy()


def standardised(X: np.ndarray) -> np.ndarray:
    sd = X.std(axis=0)
    return (X - X.mean(axis=0)) / np.where(sd > 0, sd, 1.0)


def penalised_optimum(
    X: np.ndarray, y: np.ndarray, lam: float, alpha: float = 1.0, c: np.ndarray | None = None, walls: bool = False
) -> dict[str, Any]:
    """The optimum on standardised features by L-BFGS-B with psi = u - v, u, v >= 0 (SLSQP with `walls`).

    With `walls` the boundaries of every row are kept in order by explicit linear constraints.
    """
    Z, target = torch.as_tensor(standardised(X)), torch.as_tensor(y)
    p, b = X.shape[1], int(y.max())
    c = np.ones((p, b)) if c is None else c
    shares = np.cumsum(np.bincount(y))[:-1] / len(y)
    start = np.concatenate([np.log(shares / (1 - shares)), np.zeros(2 * p * b)])

    def split(v: np.ndarray) -> tuple[Tensor, np.ndarray]:
        u, w = v[b:].reshape(2, p, b)
        return torch.as_tensor(v[:b]), u - w

    def objective(v: np.ndarray) -> tuple[float, np.ndarray]:
        a, psi = split(v)
        loss, by_alpha, by_psi = value_and_gradient(a, torch.as_tensor(psi), Z, target)
        if not np.isfinite(loss):
            return 1e6, np.zeros_like(v)
        loss += lam * (alpha * (c * v[b:].reshape(2, p, b).sum(0)).sum() + (1 - alpha) / 2 * (c * psi**2).sum())
        ridge = lam * (1 - alpha) * c * psi
        parts = [by_psi + ridge + lam * alpha * c, -by_psi - ridge + lam * alpha * c]
        return loss, np.concatenate([by_alpha, *(part.ravel() for part in parts)])

    bounds = [(None, None)] * b + [(0, None)] * (2 * p * b)
    if walls:
        rows = []
        for k in range(1, b):
            block = np.zeros((len(Z), p, b))
            block[:, :, k] = Z.numpy()
            flat = block.reshape(len(Z), -1)
            heads = np.zeros((len(Z), b))
            heads[:, k], heads[:, k - 1] = 1, -1
            rows.append(np.hstack([heads, flat, -flat]))
        A = np.vstack(rows)
        walled = {"type": "ineq", "fun": lambda v: A @ v - 1e-9, "jac": lambda v: A}
        found = minimize(objective, start, jac=True, bounds=bounds, method="SLSQP", constraints=[walled],
                         options={"maxiter": 2000, "ftol": 1e-13})  # fmt: skip
    else:
        options = {"maxiter": 20000, "maxfun": 40000, "ftol": 1e-16, "gtol": 1e-10, "maxcor": 50}
        found = minimize(objective, start, jac=True, bounds=bounds, method="L-BFGS-B", options=options)
    return {"objective": found.fun, "alpha": found.x[:b], "psi": split(found.x)[1]}
