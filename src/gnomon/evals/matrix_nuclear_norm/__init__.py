"""Matrix nuclear-norm: how much a language model compresses a text, from its hidden states, without an SVD.

**What it does.** For one text let H (L tokens x d features) be the last hidden state, after the final norm. Centre it
over the tokens and bring each row to length 1; take the norms of the columns; add the D = min(L, d) largest:

    R_i = (H_i - mu) / ||H_i - mu||,   c_j = sqrt(sum_i R_ij^2),   mnn = (sum of the D largest c_j) / L

This estimates the nuclear norm of R per token without singular values. Lower means that the states lie in fewer
directions. The score of a corpus is the mean over its texts. With it come the measures of the spectrum of R: the
exact nuclear norm per token, the matrix entropy ME = -sum(lam log lam) / log d over the eigenvalues of R^T R / L, the
effective rank exp(ME log d), RankMe, and Diff-eRank (effective rank untrained minus trained).

**How to use it.**

```python
from gnomon.evals.matrix_nuclear_norm import matrix_nuclear_norm, representation_report

scores = matrix_nuclear_norm(hidden_states, attention_mask)          # tensors: one score per sequence
report = representation_report(model, tokenizer, texts, layers=-1)   # texts: .summary(), .to_frame()
trainer.add_callback(RepresentationCallback(tokenizer, probe_texts, log=trainer.log))
answers = score_responses(model, tokenizer, instructions)            # the model's own answers
```

**What the number means, and what it does not.** The score depends on L / d before it depends on anything learned:
states without any preferred direction have ``mnn_iso = sqrt(min(L, d) / max(L, d))``, which is 1 at L = d.
So compare models of one width on texts of one length (`min_length = max_length`). Where that cannot be, compare
`mnn_over_iso`, which takes out most of it but not all (for L < d it may exceed 1, and more so the shorter the text);
reports warn where lengths or widths differ.

For L >= d the score lies between 1/sqrt(L) and sqrt(d/L) and is at least the exact nuclear norm per token; for
L < d it lies between 1/sqrt(d) and 1 and bounds nothing. It does not change when H is scaled, shifted by one vector
for all tokens, or permuted in tokens or features. It does change when the feature axes are rotated; entropy,
effective rank and the exact norm do not. That it falls as models get better holds within some published families
only: on OpenWebText2 it falls for Cerebras-GPT, but rises from 14M to 160M parameters of Pythia, where matrix entropy
falls throughout. On small models trained here it rises with width and quality, as L / d alone would have it.

**Cost.** One pass for the mean and one for everything else, in blocks that stay in the cache: 4 to 6 times one read of
H (0.4 ms for 512 x 2048 in float32 on one core). Entropy, effective rank and the exact norm need the eigenvalues of
an L x L or d x d matrix, about a hundred times as much (`spectra=False` leaves them out). Half-precision states are
brought to float32 first; float32 is within 1e-6 of float64, relative (1e-5 where the mean is a thousand times larger
than what varies).

**Edge cases.** A text whose tokens all have one state has no score: it is NaN, counted and named. A row that equals
the mean becomes a row of zeros, is counted in `zero_rows`, and stays in L (the entropies leave it out). An attention
sink moves the mean of all tokens; `skip_first=1` leaves it out of the measure.

**Deviations from the authors' code.** Texts are batched, and padding is masked before the mean. Texts without a score
are reported instead of dropped in silence. The score is per token, as in the published tables (a sum in the authors'
README). Entropy uses the smaller Gram matrix instead of an SVD of the d x d covariance; the values agree.

**Does not compose with** encoder-decoders as a whole (score `model.get_encoder()`) and prompt-learning adapters.
"""

from gnomon.evals.matrix_nuclear_norm.callback import RepresentationCallback
from gnomon.evals.matrix_nuclear_norm.measures import (
    ColumnNorms,
    column_norms,
    isotropic_mnn,
    matrix_nuclear_norm,
    mnn_bounds,
    without_first,
)
from gnomon.evals.matrix_nuclear_norm.report import (
    RepresentationReport,
    RepresentationWarning,
    compare_reports,
    diff_erank,
    representation_report,
)
from gnomon.evals.matrix_nuclear_norm.responses import ScoredResponses, generate_responses, score_responses
from gnomon.evals.matrix_nuclear_norm.spectra import (
    combine_entropies,
    effective_rank,
    matrix_entropy,
    measure,
    nuclear_norm,
    rankme,
    spectrum,
)
from gnomon.evals.matrix_nuclear_norm.texts import evaluation_texts

__all__ = [
    "ColumnNorms",
    "RepresentationCallback",
    "RepresentationReport",
    "RepresentationWarning",
    "ScoredResponses",
    "column_norms",
    "combine_entropies",
    "compare_reports",
    "diff_erank",
    "effective_rank",
    "evaluation_texts",
    "generate_responses",
    "isotropic_mnn",
    "matrix_entropy",
    "matrix_nuclear_norm",
    "measure",
    "mnn_bounds",
    "nuclear_norm",
    "rankme",
    "representation_report",
    "score_responses",
    "spectrum",
    "without_first",
]
