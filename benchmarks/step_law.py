"""Step Law's arithmetic: the bootstrap, predictions for a million rows, planning one run, the loss law.

    python benchmarks/step_law.py [--rounds 9]

The bootstrap of 1000 fits of 129 rows runs beside the same fits as a loop of numpy.linalg.lstsq; the prediction of a
table beside its floor, two logarithms and two exponentials; the loss law's batched BFGS beside scipy's from the same
starts.
"""

from __future__ import annotations

import argparse
import itertools

import numpy as np
import pandas as pd
from scipy.optimize import minimize
from timing import check, compare, finish, measure

from gnomon.planning import StepLawRegressor, fit_loss_law, optimum, read_runs, step_law
from gnomon.planning.step_law.fitting import bootstrap_least_squares, resample_counts
from gnomon.planning.step_law.loss_law import huber_objective, minimise_all


def kept_rows(rows: int = 129) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As many near-optimal runs as the authors kept, with their scatter."""
    rng = np.random.default_rng(0)
    log_n, log_d = np.log(rng.choice([2.1e8, 2.7e8, 4.3e8, 5.4e8, 1.1e9], rows)), np.log(rng.uniform(4e9, 1e11, rows))
    X = np.stack([np.ones(rows), log_n, log_d], axis=1)
    lr = X @ [0.586, -0.713, 0.307] + 0.25 * rng.standard_normal(rows)
    batch = X[:, [0, 2]] @ [-0.544, 0.571] + 0.25 * rng.standard_normal(rows)
    return X, lr, batch


def bootstrap(rounds: int) -> None:
    X, lr, batch = kept_rows()

    def ours() -> np.ndarray:
        counts = resample_counts(len(X), 1000, np.random.default_rng(0))
        return np.concatenate(
            [bootstrap_least_squares(X, lr, counts), bootstrap_least_squares(X[:, [0, 2]], batch, counts)], axis=1
        )

    def loop() -> np.ndarray:
        counts = resample_counts(len(X), 1000, np.random.default_rng(0)).astype(int)
        found = []
        for count in counts:
            rows = np.repeat(np.arange(len(X)), count)
            a = np.linalg.lstsq(X[rows], lr[rows], rcond=None)[0]
            b = np.linalg.lstsq(X[rows][:, [0, 2]], batch[rows], rcond=None)[0]
            found.append(np.r_[a, b])
        return np.array(found)

    pair = {"batched solve": ours, "loop of lstsq": loop}
    compare(
        "1000 bootstrap fits of 129 rows", pair, ours="batched solve", peer="loop of lstsq", at_least=10, rounds=rounds
    )
    check("1000 bootstrap fits, ms", 1e3 * measure({"x": ours}, rounds=rounds)["x"], at_most=20)
    check("largest difference of a coefficient", float(np.abs(ours() - loop()).max()), at_most=1e-8)


def predictions(rounds: int) -> None:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"N": rng.uniform(5e7, 1e10, 1_000_000), "D": rng.uniform(1e9, 1e13, 1_000_000)})
    X, lr, _ = kept_rows()
    law = StepLawRegressor().fit(pd.DataFrame(np.exp(X[:, 1:]), columns=["N", "D"]), np.exp(lr))

    def floor() -> None:
        n, d = np.log(frame["N"].to_numpy()), np.log(frame["D"].to_numpy())
        np.exp(n), np.exp(d)

    candidates = {
        "optimum": lambda: optimum(frame["N"], frame["D"]),
        "StepLawRegressor.predict (rate only)": lambda: law.predict(frame),
        "two logs, two exps": floor,
    }
    compare(
        "a frame of a million rows", candidates, ours="optimum", peer="two logs, two exps", at_most=2.5, rounds=rounds
    )
    medians = measure(candidates, rounds=rounds)
    check("optimum, ms", 1e3 * medians["optimum"], at_most=50)
    check("StepLawRegressor.predict, ms", 1e3 * medians["StepLawRegressor.predict (rate only)"], at_most=50)
    one = measure({"x": lambda: [step_law(1e9, 1e11, micro_batch=8, devices=16) for _ in range(100)]}, rounds=rounds)
    check("step_law for one run, microseconds", 1e4 * one["x"], at_most=500)


def loss_law(rounds: int) -> None:
    rng = np.random.default_rng(0)
    groups = list(itertools.product((2e8, 5e8, 1e9, 2e9), (4e9, 2e10, 5e10, 1e11)))
    n, d = np.log(np.array(groups).T)
    loss = np.log(np.exp(0.5) + np.exp(4 - 0.25 * n) + np.exp(6 - 0.28 * d)) + 0.003 * rng.standard_normal(len(groups))
    data, ones = (n - n.mean(), d - d.mean(), loss), np.ones(len(groups))
    starts = np.array(list(itertools.product((-0.5, 0.5), (-4.0, -0.5), (-4.0, -0.5), (0.1, 0.8), (0.1, 0.8))))

    def ours() -> np.ndarray:
        return minimise_all(lambda t, _: huber_objective(t, *data, ones), starts)[1]

    def objective(theta: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = huber_objective(theta[None], *data, ones)
        return float(value[0]), gradient[0]

    def scipys() -> np.ndarray:
        return np.array([minimize(objective, start, jac=True, method="BFGS").fun for start in starts])

    pair = {"all starts at once": ours, "scipy, one by one": scipys}
    compare("32 starts of the loss law", pair, ours="all starts at once", peer="scipy, one by one", at_least=3,
            rounds=max(3, rounds // 3))  # fmt: skip
    check("lowest value over scipy's lowest", float(ours().min() / scipys().min()), at_most=1 + 1e-6)
    table = pd.DataFrame(
        [
            (g[0], g[1], lr, 64, np.exp(y) + 99 * abs(lr - 1e-3))
            for g, y in zip(groups, loss, strict=True)
            for lr in (1e-3, 2e-3)
        ],
        columns=["N", "D", "lr", "bs", "loss"],
    )
    runs = read_runs(table)
    seconds = measure({"x": lambda: fit_loss_law(runs)}, rounds=3)["x"]
    check("fit_loss_law with 2000 resamples, seconds", seconds, at_most=10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    bootstrap(options.rounds)
    predictions(options.rounds)
    loss_law(options.rounds)
    finish()


if __name__ == "__main__":
    main()
