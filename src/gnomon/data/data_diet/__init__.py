"""Data Diet: score training rows after a few epochs, keep the part that matters, find wrong labels.

Some rows of a training set teach a model little, and a network shows after a few epochs which. Each row gets a score
from several lightly trained models; the easy rows can then be left out, and rows with a wrong label stand at the top.

## Scores

p = softmax(logits) of one row, y its label as a one-hot vector, theta all trainable parameters.

- **EL2N** = ||p - y||_2, in [0, sqrt(2)]. One forward pass. It is the norm of the gradient when the gradients of the
  logits are orthonormal across classes.
- **GraNd** = ||grad_theta loss(row)||_2 over all parameters together: weights, biases, scales of norms. The loss of
  one row, no weight decay.
- **Forgetting** = how often a row that was right in its mini-batch is wrong in its next one; +inf if it never was
  right. Train-mode logits of the pass that makes the loss; needs nearly the whole training.
- EL1 = 2 (1 - p_y), `margin` = max_{c != y} p_c - p_y, `sum_margin` = 1 - C p_y, from the authors' code.

EL2N and GraNd are taken in evaluation mode (dropout off, running statistics constant), on rows without augmentation,
and averaged over runs: 10 in the paper. A mean of norms is not the norm of a mean gradient.

Language models (an extension; the paper is about classification): EL2N of a row is the mean over its tokens of
||p_t - y_t||_2, GraNd the norm of the gradient of its mean token loss; labels of -100 do not count. Forgetting needs
one label a row.

## Use

```python
from gnomon.data import ExampleScorer, noise_report, prune_by_score, select

scorer = ExampleScorer("el2n", runs=10, at_epoch=5)
scores = scorer.fit(lambda seed: make_model(), dataset)     # dataset: datasets.Dataset, torch, (inputs, labels), ...
half = prune_by_score(dataset, scores, keep=0.5)            # or dataset.select(select(scores, keep=0.5))
suspects = noise_report(scores, top=0.01, texts=dataset["text"])
```

- `score_examples(model, dataset, "grand")` scores with a model, or several, that you have trained yourself. `train=`
  gives the scorer a training function of yours, such as one with a `transformers.Trainer`.
- The recipe for scoring need not be the one for training: scores transfer between settings and architectures.
- `keep_models=True` and `scorer.score(new_rows)` score rows that come later.
- `DataDietCallback` counts forgetting events and averages EL2N while a `Trainer` trains; rows need an id column
  (`with_row_ids`, `IndexCollator`, ``remove_unused_columns=False``).
- `select_windows(model, rows)` chooses token rows for a language model: the `select` stage of a recipe.
- Compare subsets at equal numbers of STEPS, as the paper does, not at equal epochs: `SubsetTrial` does.

## Which end to keep

``order="hard"`` is the paper's. It needs redundancy, a data set that the model can nearly fit:

- Half of scikit-learn's digits (1,300 rows): hardest 97.4 %, random 96.0 %, easiest 87.9 %, all rows 97.2 %.
- Few rows for many parameters: 500 paragraphs in 20 classes by TF-IDF: hardest 49.8 %, random 57.1 %, easiest 57.1 %.
  TREC questions (3,816 rows, TF-IDF): hardest 67 %, random 82 %. 14,000 CIFAR images with a small convolutional
  network that reaches 69.7 %: hardest 52.3 %, random 68.5 %, easiest 60.8 %.
- Below about a third of the rows the hardest collapse; use an offset.

With wrong labels among the rows, skip the hardest: `offset` counts at the end that is kept (``order="easy"`` counts
from the easiest, as the authors' code). Hard rows are not spread evenly over classes; a warning shows what was lost and
``balance="class"`` keeps the share of each. ``order="auto"`` asks a judge (`SubsetTrial`) and takes the best of hard,
easy and random.

Do not take GraNd at initialisation: it follows the norm of the input, and the paper's good results for it came from
trained weights (a checkpoint was restored by mistake; replicated in arXiv 2303.14753). A warning says so.

## How GraNd is computed

No row gets a backward pass of its own. One forward and one backward pass of the batch give each layer's input h and
output gradient d, from which the norm of each row's weight gradient follows exactly:

- `Linear`, and `Conv1D` of transformers: h^2 d^2 without positions; over positions
  sum_{t,t'} (h_t . h_t') (d_t . d_t') when T (in + out) <= in out, else ||sum_t d_t h_t^T||^2, a few columns at a time.
- `Conv1d`, `Conv2d` (any stride, dilation, groups, padding mode): the same over patches.
- `Embedding` (also scaled, as Gemma's): d summed per token id, then the norm; the padding id is left out.
- `LayerNorm`, `RMSNorm` (also those of transformers), `GroupNorm`, `BatchNorm` with running statistics: the norm of
  sum_t d_t * normalised h_t.
- Biases: the norm of sum_t d_t.
- Input and output matrix tied: both, and twice their inner product sum_{s,t} d_t[id_s] (h_t . e_s), e the gradient of
  what the embedding returned.
- One layer called several times: one sum over the positions of all calls.
- Parameters of any other module, or used by hand (`MultiheadAttention`, experts, `Conv3d`): row by row, by `torch.func`
  in chunks, or by one backward pass a row where the code depends on the data (a warning says so).

Layers are recognised by the function they run, RMS norms of other classes by comparing what they return. Whether a
parameter is used in no other way is read off the graph of every batch, and on the first batch the norms of one row are
held against plain autograd: what differs is counted row by row. `GradientNorms(model).formulas` tells which
parameter went which way. A layer may see positions as rows (B T, features), and a position embedding may be shared by
all rows with an axis of one, (1, T, features); without that axis it is counted row by row.

Adapters work; frozen parameters do not count. Norms are summed in float32 (float64 for float64 models), autocast is
off for GraNd. EL2N may run under autocast (errors about 1e-3).

## Cost

EL2N: a forward pass of the rows a run; no second array of logits. GraNd: weight gradients are not formed, so it takes
1.0 to 1.1 times as long as a plain forward and backward pass of a Llama of 1.3M parameters (a loop over rows 1.6 to
1.8 times, torch.func 1.5 to 1.9), 1.3 to 1.8 times for a small convolutional network, where torch.func is as fast.
Memory is that of a training step and does not grow with rows times parameters (a norm or bias has a vector a row).

``engine="ray"`` spreads runs and shards of rows over a Ray cluster with the same numbers. ``distributed=True`` shares
the rows among ranks (DDP, FSDP2) and gathers by row; GraNd of sharded (FSDP) parameters is refused.
``fit(folder=...)`` keeps finished runs, so that an interrupted call goes on.

## Does not combine with

Batch norms without running statistics (rows then depend on each other), multi-label heads without a `loss`, EL2N of
regressions (GraNd takes them, with the squared error), random augmentation inside the data set.

## Where it differs from the authors' code

- The remainder of rows that fill no batch is scored, too; their code needs N to be a multiple of the batch.
- Rows are not sorted by class; scores stand in the order of the data set, with ids of their own, and a fingerprint
  refuses rows that were shuffled in between.
- EL2N is summed over the other classes, which equals sqrt(sum_c p_c^2 - 2 p_y + 1) without its cancellation.
- The default training is AdamW with a cosine over 30 epochs, scored at epoch 5; `TrainingPlan` shows the paper's.
- `permute_labels` makes label noise as they do: the labels of a share of the rows permuted among these, so that
  with ten classes 9 % of labels are wrong after 10 %.
"""

from __future__ import annotations

from gnomon.data.data_diet.callback import DataDietCallback, IndexCollator, with_row_ids
from gnomon.data.data_diet.forgetting import ForgettingTable, forgetting_scores
from gnomon.data.data_diet.ghost import GradientNorms, grand
from gnomon.data.data_diet.noise import noise_auc, noise_report, permute_labels
from gnomon.data.data_diet.scorer import ExampleScorer
from gnomon.data.data_diet.scores import el1, el2n, margin, sum_margin
from gnomon.data.data_diet.scoring import score_examples
from gnomon.data.data_diet.selection import prune_by_score, select
from gnomon.data.data_diet.table import ScoreTable
from gnomon.data.data_diet.training import Reading, SubsetTrial, TrainingPlan
from gnomon.data.data_diet.windows import select_windows

__all__ = [
    "DataDietCallback",
    "ExampleScorer",
    "ForgettingTable",
    "GradientNorms",
    "IndexCollator",
    "Reading",
    "ScoreTable",
    "SubsetTrial",
    "TrainingPlan",
    "el1",
    "el2n",
    "forgetting_scores",
    "grand",
    "margin",
    "noise_auc",
    "noise_report",
    "permute_labels",
    "prune_by_score",
    "score_examples",
    "select",
    "select_windows",
    "sum_margin",
    "with_row_ids",
]
