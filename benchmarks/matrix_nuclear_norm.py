"""Matrix nuclear-norm of 512 x 2048 states: against matrix entropy, the plain equations and one read of the states.

    python benchmarks/matrix_nuclear_norm.py

Entropy is timed as published (SVD of the d x d covariance) and as it should be computed (smaller Gram matrix), since
most of the published gain is over the former. Runs on one core, so that a busy machine does not decide.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from timing import compare, finish

from gnomon.evals.matrix_nuclear_norm import matrix_entropy, matrix_nuclear_norm

TOKENS, FEATURES = 512, 2048


def states(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(*shape, generator=generator)
    return noise * torch.linspace(0.1, 3, shape[-1]) + 0.5 * torch.randn(shape[-1], generator=generator)


def normalised(hidden: torch.Tensor) -> torch.Tensor:
    centred = hidden - hidden.mean(0)
    return centred / centred.norm(dim=1, keepdim=True)


def entropy_of_covariance(hidden: torch.Tensor) -> torch.Tensor:
    """Definition as published: every singular value of the d x d covariance."""
    rows = normalised(hidden)
    values = torch.linalg.svdvals(rows.T @ rows / len(rows))
    return -(values * values.log()).nansum() / torch.log(torch.tensor(float(hidden.shape[-1])))


def score_written_plainly(hidden: torch.Tensor) -> torch.Tensor:
    norms = normalised(hidden).norm(dim=0)
    return norms.sort(descending=True).values[: min(hidden.shape)].sum() / len(hidden)


def main() -> None:
    torch.set_num_threads(1)
    hidden = states(TOKENS, FEATURES)
    size = f"{TOKENS} x {FEATURES}, float32"
    check_speed_against_entropy(hidden, size)
    check_speed_against_reading(hidden, size)
    finish()


def check_speed_against_entropy(hidden: torch.Tensor, size: str) -> None:
    compare(
        f"Against matrix entropy, {size}",
        {
            "matrix nuclear-norm": lambda: matrix_nuclear_norm(hidden),
            "entropy, SVD of the d x d covariance": lambda: entropy_of_covariance(hidden),
        },
        ours="matrix nuclear-norm", peer="entropy, SVD of the d x d covariance", at_least=24, rounds=3,
    )  # fmt: skip
    compare(
        f"Against the same entropy from the L x L Gram matrix, {size}",
        {
            "matrix nuclear-norm": lambda: matrix_nuclear_norm(hidden),
            "entropy, small Gram (gnomon)": lambda: matrix_entropy(hidden),
        },
        ours="matrix nuclear-norm", peer="entropy, small Gram (gnomon)", at_least=10, rounds=9,
    )  # fmt: skip


def check_speed_against_reading(hidden: torch.Tensor, size: str) -> None:
    """The floor with library kernels is the mean, a square, a row sum and a weighted column sum: about four reads."""
    compare(
        f"Against the equations written plainly, {size}",
        {
            "matrix nuclear-norm": lambda: matrix_nuclear_norm(hidden),
            "the equations, one torch call each": lambda: score_written_plainly(hidden),
            "one read: hidden.norm()": lambda: hidden.norm(),
            "one read: hidden.sum()": lambda: hidden.sum(),
        },
        ours="matrix nuclear-norm", peer="the equations, one torch call each", at_least=2, rounds=51, warmup=5,
    )  # fmt: skip
    batch = states(16, *hidden.shape)  # 64 MiB: each call finds its states in main memory, as after a forward pass

    def each_in_turn(work: Callable[[torch.Tensor], object], first: int) -> Callable[[], object]:
        turns = itertools.cycle(
            range(first, first + len(batch))
        )  # candidates far apart do not warm each other's states
        return lambda: work(batch[next(turns) % len(batch)])

    compare(
        f"Against one read, states in main memory, {size}",
        {
            "matrix nuclear-norm": each_in_turn(matrix_nuclear_norm, 0),
            "one read: hidden.norm()": each_in_turn(torch.Tensor.norm, 5),
            "one read: hidden.sum()": each_in_turn(torch.Tensor.sum, 10),
        },
        ours="matrix nuclear-norm", peer="one read: hidden.norm()", at_most=3, rounds=161, warmup=16,
    )  # fmt: skip


if __name__ == "__main__":
    main()
