"""PRESTO on data of the soup experiment's size: a path of eight penalties, and its scaling with classes and columns.

    python benchmarks/presto.py [--rounds 7]

The peers run beside it in the same process, on numpy as it does: the authors' algorithm (Fisher information row by row
from dense blocks of size (K-1) x p(K-1), coordinate descent on the quadratic, step halving), and that information
alone. The bound on the path is in CPU seconds, which other work on the machine does not stretch. Set
GNOMON_SHARED_DATA to run on the soup data themselves.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from timing import check, compare, finish, measure

from gnomon.errors import GnomonWarning
from gnomon.estimators import PRESTO, PRESTOCV
from gnomon.estimators.presto.likelihood import class_probabilities, curvature, negative_log_likelihood, score
from gnomon.estimators.presto.newton import _hessian, null_point
from gnomon.estimators.presto.path import standardise

LAMBDAS = 8
REFERENCE = ["Ref", "1", "Self-made", ">1/week", "No", "1", "Male", "18-30", "Region 1"]
COLUMNS = ["PROD", "DAY", "SOUPTYPE", "SOUPFREQ", "COLD", "EASY", "GENDER", "AGEGROUP", "LOCATION"]


def soup() -> tuple[np.ndarray, np.ndarray, str]:
    """The soup data, or dummies and classes of their sizes and shares."""
    folder = os.environ.get("GNOMON_SHARED_DATA")
    if folder:
        table = pd.read_csv(Path(folder) / "presto" / "soup.csv")
        pairs = zip(COLUMNS, REFERENCE, strict=True)
        parts = [pd.get_dummies(table[c].astype(str)).drop(columns=level) for c, level in pairs]
        return pd.concat(parts, axis=1).to_numpy(float), 6 - table.SURENESS.to_numpy(), "soup"
    rng = np.random.default_rng(0)
    X = (rng.random((1293, 22)) < rng.uniform(0.05, 0.6, 22)).astype(float)
    latent = X @ np.where(rng.random(22) < 0.4, rng.normal(size=22) * 0.5, 0) + rng.logistic(size=1293)
    edges = np.quantile(latent, np.cumsum([620, 197, 67, 86, 168]) / 1293)
    return X, np.digitize(latent, edges), "synthetic of soup's size"


def soft(z: float, threshold: float) -> float:
    return np.sign(z) * max(abs(z) - threshold, 0.0)


def authors_way(X: np.ndarray, y: np.ndarray, lambdas: np.ndarray) -> list[float]:
    """Fisher scoring with coordinate descent on the dense quadratic, as published; the objective of each penalty."""
    n, K = len(X), int(y.max()) + 1
    Z, *_ = standardise(X, np.full(n, 1 / n))
    q, b = Z.shape[1], K - 1
    weights = np.eye(K)[y]
    theta = null_point(weights, q)
    at = tuple(np.argwhere(np.ones((b, q), dtype=bool))[:, ::-1].T)  # boundary by boundary
    l1 = np.ones((q, b))
    l1[0] = 0
    found = []
    for lam in lambdas:
        penalty = n * lam * l1[at]

        def objective(t: np.ndarray, lam: float = lam) -> float:
            return negative_log_likelihood(Z @ t, weights) / n + lam * float((l1 * np.abs(t)).sum())

        value = objective(theta)
        for _ in range(100):
            T = Z @ theta
            U = -(Z.T @ score(T, weights))[at]
            H = rowwise_information(Z, T)
            v = theta[at].copy()
            linear, product, diagonal = H @ v + U, H @ v, np.diag(H)
            for _ in range(100):
                largest = 0.0
                for j in range(len(v)):
                    new = soft(linear[j] - product[j] + diagonal[j] * v[j], penalty[j]) / diagonal[j]
                    if new != v[j]:
                        product += H[j] * (new - v[j])
                        largest = max(largest, abs(new - v[j]))
                        v[j] = new
                if largest < 1e-8:
                    break
            step = np.zeros_like(theta)
            step[at] = v
            step -= theta
            share, new_value = 1.0, objective(theta + step)
            for _ in range(10):
                if new_value <= value:
                    break
                share /= 2
                new_value = objective(theta + share * step)
            if not new_value <= value:
                break
            theta, fell, value = theta + share * step, value - new_value, new_value
            if fell < 1e-8 * abs(value):
                break
        found.append(value)
    return found


def rowwise_information(X: np.ndarray, T: np.ndarray) -> np.ndarray:
    """The Fisher information from dense (K-1) x q(K-1) blocks, row by row."""
    W = curvature(T, class_probabilities(T)).tridiagonal()
    b = T.shape[1]
    C = np.tril(np.ones((b, b)))
    total = np.zeros((b * X.shape[1],) * 2)
    for i in range(len(X)):
        block = np.kron(C, X[i])
        total += block.T @ W[i] @ block
    return total


def path_of_soup(rounds: int) -> None:
    X, y, name = soup()
    print(f"\n{name}: {X.shape[0]} rows, {X.shape[1]} columns, {int(y.max()) + 1} classes")
    path = PRESTO().path(X, y, n_lambda=LAMBDAS)
    spent = []
    for _ in range(rounds):
        started = time.process_time()
        PRESTO().path(X, y, n_lambda=LAMBDAS)
        spent.append(time.process_time() - started)
    check("CPU seconds for eight penalties, those on the boundary too", statistics.median(spent), at_most=0.5)
    inside = path.lambdas[~path.boundary]
    pair = {
        "PRESTO path": lambda: PRESTO().path(X, y, inside),
        "the authors' way": lambda: authors_way(X, y, inside),
    }
    title = f"the {len(inside)} penalties with an optimum inside"
    compare(title, pair, ours="PRESTO path", peer="the authors' way", at_least=10, rounds=3)
    ours, theirs = path.objective[~path.boundary], np.array(authors_way(X, y, inside))
    check("largest objective over the authors' way, difference", float((ours - theirs).max()), at_most=1e-9)


def information(rounds: int) -> None:
    """One curvature: by boundary against by row, and its growth with the number of classes."""
    rng = np.random.default_rng(0)

    def setting(b: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        X = np.asfortranarray(rng.normal(size=(1000, 40)))
        T = np.column_stack([rng.normal(size=1000), rng.exponential(size=(1000, b - 1)) + 0.1])
        return X, T, np.argwhere(np.ones((b, 40), dtype=bool))[:, ::-1]

    X, T, index = setting(5)
    bend = curvature(T, class_probabilities(T))
    difference = np.abs(_hessian(X, bend, index) - rowwise_information(X, T)).max()
    check("curvature by boundary against by row, difference", float(difference), at_most=1e-8)
    pair = {
        "one product a boundary": lambda: _hessian(X, curvature(T, class_probabilities(T)), index),
        "dense blocks row by row": lambda: rowwise_information(X, T),
    }
    compare("curvature, 1,000 rows, 40 columns, 6 classes", pair, ours="one product a boundary",
            peer="dense blocks row by row", at_least=5, rounds=max(3, rounds // 2))  # fmt: skip
    work: dict[str, Callable[[], object]] = {}
    for b in (4, 16):
        X, T, index = setting(b)
        bend = curvature(T, class_probabilities(T))
        work[f"{b} boundaries"] = lambda X=X, bend=bend, index=index: _hessian(X, bend, index)
    medians = measure(work, rounds=3 * rounds)
    ratio = medians["16 boundaries"] / medians["4 boundaries"]
    # filling the matrix itself grows with the square, the products with the number
    check("curvature with 16 boundaries over 4 (linear 4, quadratic 16)", ratio, at_most=12)


def embeddings() -> None:
    """A cross-validated fit on columns as wide as frozen embeddings."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(2000, 1000))
    y = np.digitize(X[:, :20].sum(1) * 0.5 + rng.logistic(size=2000), [0.0, 3.0, 6.0])
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GnomonWarning)
        model = PRESTOCV(n_lambda=10, lambda_min_ratio=0.15).fit(X, y)
    print(f"\n2,000 rows of 1,000 columns, 10 penalties, 5 folds: {time.perf_counter() - started:.1f} s")
    kept = set(np.flatnonzero(model.psi_.any(axis=1)).tolist())
    check("of the 20 columns that matter, found", len(kept & set(range(20))), at_least=20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    path_of_soup(options.rounds)
    information(options.rounds)
    embeddings()
    finish()


if __name__ == "__main__":
    main()
