"""PRESTO: ordered regression that shrinks the boundary of a rare class towards the boundaries of common ones.

With classes 1 < ... < K and the rare one last, a logistic regression for "y = K" sees few positive rows, and its
estimate is noisy. The proportional odds model lends it the rows of all boundaries, but insists that they have the
same slopes. PRESTO lets each boundary have its own slopes and charges for their differences.

## Method

    P(y <= k | x) = sigma(alpha_k + x.beta_k),  k = 1 .. K-1;   psi_1 = beta_1,  psi_k = beta_k - beta_{k-1}

    minimise  -(1/N) sum_i log P(y_i | x_i)  +  lam sum_kj c_kj [ alpha |psi_kj| + (1 - alpha)/2 psi_kj^2 ]

on standardised features (mean 0, variance 1 with 1/N; a constant column keeps the coefficient 0), intercepts free.
``alpha=1`` is the L1 penalty of the paper, ``alpha=0`` its ridge variant. Differences that are exactly 0 are boundaries
that share a slope. The first block is penalised like the others, as in the final paper and the code;
``penalize_first=False`` is the earlier version, whose limit for a large penalty is proportional odds.

## Use

```python
from gnomon.estimators import PRESTO, PRESTOCV

model = PRESTOCV(classes_order=["no reaction", "click", "purchase"]).fit(X, y)
model.rare_proba(X_new)          # P(y = purchase)
model.psi_                       # which features act differently on which boundary
```

- `PRESTOCV` chooses the penalty by stratified 5-fold cross-validation of the Brier score, the largest penalty that
  attains the minimum, and refits; `PRESTO(lam=...)` takes one penalty and tunes in a GridSearchCV; `PRESTO().path`
  returns all fits of a sequence.
- Numbers are ordered by size, ordered pandas categoricals by their categories; other labels need `classes_order`.
  ``reverse=True`` is for a rare class that comes first. Columns of `predict_proba` follow the sorted ``classes_``
  (scikit-learn's scorers assume so); `rare_proba` and `cumulative_proba` follow the order of the model.
- Boundaries with slopes of their own may cross on new rows, where a middle class would be negative: it is set to 0,
  the row renormalised, and a warning counts such rows. `rare_proba` is a probability everywhere.
- With two classes there is one boundary: the fit is logistic regression with an L1 penalty, and a warning says so.
- `parallel_lines_test` tests proportional odds without penalties, together and by feature.
  `rare_calibration_error` measures predictions of the rare class.
- `PrestoHead` is the model as a torch module, for a network trained end to end.
- Settings of the paper: 20 penalties down to 0.01 lambda_max in its simulations, 100 down to 1e-4 on real data.
- A penalty on raw instead of standardised features: ``penalty_weights = 1 / X.std(axis=0)``.

## The boundary of the domain

The likelihood is convex where every class of every row has a positive probability, and the optimum for a small
penalty may lie on the edge of that set, held there by rows of other classes. Plain descent stalls there. With
``boundary="barrier"`` the optimum on the edge is found by adding ``-mu sum_k log P_k`` to every row and letting mu fall
to 1e-8, which costs about mu K in the objective; ``boundary="stop"`` keeps the last fit inside. Either way
``boundary_reached_`` is set and a warning says it. A fit that is not converged, and classes that are separated, warn
too (`PrestoConvergenceWarning`).

## Cost

Proximal Newton: since sigma(a) - sigma(b) = sigma(a) sigma(-b) (1 - exp(b - a)), the likelihood is K - 1 weighted
logistic losses and one term a spacing; its curvature in eta is tridiagonal, and in psi it takes one weighted product
of the features a boundary: O(N p^2 K) a step, on a working set of the non-zero and violating entries. The quadratic
model is minimised exactly by an active set; a penalty takes about four steps from the one before, forty on the
boundary. With a ridge alone and many columns, steps come from conjugate gradients. Everything is float64.

## Does not combine with

Sparse matrices (standardising would fill them). Nominal classes: the order is the model.

## Where it differs from the authors' code

- Its cross-validation and `predict` take psi_k for beta_k, leaving out the running sum, so the Brier scores that
  choose its penalty belong to another model and may come from negative probabilities. Here the sum is taken.
- Its way back from standardised features corrects alpha_k for block k alone; all blocks up to k belong to it.
- Near the boundary its step halving fails, it reports convergence, and smaller penalties copy that fit.
- Its folds are not stratified, and its calibration measure bins predictions in the wrong order.
- ``solver="fisher"`` steps with the Fisher information as it does; the default uses the exact Hessian, which
  converges quadratically. Both end at the same optimum.
- polr and statsmodels write theta_k - x.beta: `intercept_` are their thresholds, `coef_` has the opposite sign.
"""

from __future__ import annotations

from gnomon.estimators.presto.base import PrestoConvergenceWarning
from gnomon.estimators.presto.crossvalidated import PRESTOCV
from gnomon.estimators.presto.diagnostics import (
    ChiSquare,
    ParallelLinesTest,
    parallel_lines_test,
    rare_calibration_error,
)
from gnomon.estimators.presto.estimator import PRESTO
from gnomon.estimators.presto.head import PrestoHead, ordered_log_proba
from gnomon.estimators.presto.newton import SolverOptions
from gnomon.estimators.presto.path import PrestoPath

__all__ = [
    "PRESTO",
    "PRESTOCV",
    "ChiSquare",
    "ParallelLinesTest",
    "PrestoConvergenceWarning",
    "PrestoHead",
    "PrestoPath",
    "SolverOptions",
    "ordered_log_proba",
    "parallel_lines_test",
    "rare_calibration_error",
]
