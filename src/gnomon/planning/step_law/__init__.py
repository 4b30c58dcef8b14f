"""Step Law: the best peak learning rate and batch of a pre-training run, from its parameters and tokens.

**What it does.** A law fitted to 3,700 training runs. With N non-embedding parameters, D training tokens, the batch B
in tokens, and natural logs:

    ln lr = 0.586308 - 0.712922 ln N + 0.307491 ln D          (printed in the paper as lr = 1.79 N^-0.713 D^0.307)
    ln B  = -0.543542 + 0.570944 ln D                         (B = 0.58 D^0.571)

`lr` is the peak of a cosine schedule. Steps are ceil(D / B). The first form holds the means of the authors' 1000
bootstrap fits, which their own command uses (`variant="fitted"`, the default); the rounded formula of the paper
(`variant="paper"`) is 2 % lower at 7B parameters.

**How to use it.**

```python
plan = step_law(7e9, 1.4e12, seq_len=2048)                    # .lr 9.347e-4, .batch_tokens 4,996,911, .steps
plan = from_model("folder-or-hub-id", n_tokens=1e11, micro_batch=8, devices=64)
trainer = Trainer(model, training_arguments(plan, "out"), ...)
fit = fit_step_law("runs.csv"); fit.summary(); step_law(3e8, 2e10, fit=fit)       # your own runs
compare_laws(1e9, 1e11, loss=2.4)                             # OpenAI, DeepSeek, Porian, MiniCPM beside it
```

On the command line: `gnomon plan 7B --tokens 1.4T`.

**What N and D are.** N counts the weight matrices of the blocks: `L (4 h^2 + 3 h ffn)` for SwiGLU, fewer with grouped
key/value heads; no embeddings, head, norms, biases. Mixture of experts: **all** experts, not the active ones.
`from_model` counts them; a number that seems to include the embeddings (10 to 40 % too many for small models) gets a
warning if you pass the model's `config` along. D is tokens, not steps; the batch is tokens, not sequences.

**The intervals** are the spread of the 1000 published refits. Intercept and exponents are strongly anti-correlated
(-0.73 and -0.43; -0.999 for the batch), so varying one alone would be meaningless: the standard deviation of ln lr is
`sqrt(x' S x)` with x = (1, ln N, ln D) and the covariance S of whole rows of coefficients, and the interval is
normal in the log. It agrees with percentiles over the rows themselves to 2 %. It says how well the law is pinned down;
it holds no error of the grid (factor sqrt 2 in lr) and none of a setting that differs from the paper's.

**When it holds.** Pre-training from scratch of decoders (pre-RMSNorm, SwiGLU, 2048 tokens, AdamW 0.9/0.95, weight decay
0.1, clip 1.0, 2000 warm-up steps), cosine decay to the **fixed** final rate 1e-5; a final rate of a tenth of the peak
has its optimum at lower peaks. 0.2 to 1.1 billion parameters and 4 to 100 billion tokens were measured (mixtures: 2.15
billion in all, 2 to 20 billion tokens). A warning says when N > 1e10, D > 1e13, D/N is outside 10 to 500 (mixtures: 0.5
to 500), N < 5e7 or D < 1e9. Mostly-code data has its optimum near half the learning rate. Not for WSD schedules (where
the rise with D is doubtful), Muon, continued pre-training or fine-tuning.

**When hardware imposes the batch.** `batch_tokens`, `micro_batch` and `devices` fix or round it, and the learning rate
is multiplied by sqrt(B / B*). **That rule is not from the paper**, which has none; `rescale="none"` leaves it. In the
published tables the best learning rate at a given batch goes with the batch to a power of 0.17 to 0.65, higher for more
tokens per parameter (`convexity(...)["lr_exponent"]`), so the square root overshoots for short runs.

**Refitting.** `fit_step_law` keeps, in every (N, D) group of a table of runs, those within 0.25 % of the smallest loss,
and regresses ln lr on [1, ln N, ln D] and ln B on [1, ln D] by ordinary least squares, with a bootstrap over the kept
rows. The authors' released tables do not reproduce the published coefficients (their exponent of D for lr is about
0.20, not 0.307, which came from a larger set), so predict with the published ones. `StepLawRegressor` is the
regression as a scikit-learn estimator, `fit_loss_law` the surface exp(E) + exp(A)/N^alpha + exp(B)/D^beta, `convexity`
the quadratic bowl per group, `excess_loss` and `compare_laws_on_runs` the price of a law's choice, `smooth_loss` the
label.

**Other laws** stand as the paper tabulates them, with two corrections: the batch constants of OpenAI and MiniCPM are
those of the sources (2e8 and 1.21e9; the table prints 2e18 for both, which gives 1e16 tokens, `printed=True`).
Microsoft's has no stated units and is refused until you give them. Chinchilla gives no learning rate or batch, only the
split of compute (`chinchilla_allocation`).

**Cost.** A prediction takes microseconds, a table of a million rows about 10 ms, 1000 bootstrap fits of 129 rows 2 ms
(one batched solve), the loss law 0.3 s and up to 3 s more for 2000 resamples.

**Deviations from the authors' code.** The bootstrap is one batched solve, with the resamples of numpy's generator. The
loss law's resamples start at the best fit instead of the whole grid, and its per-coefficient modes are reported, but
predictions use the best fit: modes of strongly correlated coefficients need not fit together.

**Does not compose with** anything in a recipe: it plans one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gnomon.planning.step_law.counting import ParameterCount, count_parameters, dense_parameters, flops_per_token
from gnomon.planning.step_law.fitting import StepLawFit, fit_step_law
from gnomon.planning.step_law.law import (
    FITTED,
    PAPER,
    Coefficients,
    Hyperparameters,
    optimum,
    relative_spread,
    step_law,
)
from gnomon.planning.step_law.laws import (
    LAWS,
    Law,
    chinchilla_allocation,
    compare_laws,
    compare_laws_on_runs,
    law_on_runs,
    predict_with,
)
from gnomon.planning.step_law.loss_law import LossLaw, fit_loss_law
from gnomon.planning.step_law.model import from_model, training_arguments
from gnomon.planning.step_law.runs import convexity, excess_loss, is_complete, near_optimal, read_runs, smooth_loss

if TYPE_CHECKING:
    from gnomon.planning.step_law.regressor import StepLawRegressor

__all__ = [
    "FITTED",
    "LAWS",
    "PAPER",
    "Coefficients",
    "Hyperparameters",
    "Law",
    "LossLaw",
    "ParameterCount",
    "StepLawFit",
    "StepLawRegressor",
    "chinchilla_allocation",
    "compare_laws",
    "compare_laws_on_runs",
    "convexity",
    "count_parameters",
    "dense_parameters",
    "excess_loss",
    "fit_loss_law",
    "fit_step_law",
    "flops_per_token",
    "from_model",
    "is_complete",
    "law_on_runs",
    "near_optimal",
    "optimum",
    "predict_with",
    "read_runs",
    "relative_spread",
    "smooth_loss",
    "step_law",
    "training_arguments",
]


def __getattr__(name: str) -> Any:
    """Import the estimator when it is first named: scikit-learn takes longer to import than everything else here."""
    if name == "StepLawRegressor":
        from gnomon.planning.step_law.regressor import StepLawRegressor

        return StepLawRegressor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
