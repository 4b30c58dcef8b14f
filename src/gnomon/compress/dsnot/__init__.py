"""DSnoT: re-choose the mask of a sparse model without training, by pruning and growing that cancels the expected error.

A pruned layer computes (W * M) x where the dense one computes W x. Over a calibration set, input j sums to S_j per
sequence on average, so a pruned weight withholds c_ij = W_ij S_j from output i, and the row's expected error is

    err_i = sum over pruned j of W_ij S_j.

Each row swaps weights until |err_i| is below a threshold: it grows the pruned weight with the largest c_ij / V_j^p
of the sign of err_i (V_j: variance of input j inside a sequence; steady inputs first), and prunes a kept weight whose
contribution has the other sign, the one with the smallest Wanda score |W_ij| sqrt(q_j) first (q_j: squared norm of
input j). With an n:m pattern it prunes the smallest base score inside the grown weight's block, and stops before
err_i would change its sign. No weight is updated, no gradient is taken, and each row (block) keeps its number of zeros.

    prune(model, calibration, "wanda", 0.5)                     # a base alone: magnitude, Wanda or SparseGPT
    dsnot(model, calibration, base="wanda", sparsity=0.6)       # a base and its refinement, one pass of statistics
    dsnot(model, calibration, sparsity="2:4", refine="all")
    dsnot(sparse, calibration, base="current", original_model=dense)      # start from any sparse checkpoint

One layer: `wanda_mask`, `magnitude_mask`, `sparsegpt_mask`, `sparsegpt_layer`, then `dsnot_layer(weight, inputs, keep)`
from whichever mask. A pattern "n:m" prunes n of every m consecutive inputs. `compare_bases` puts all bases with and
without refinement side by side, `layer_errors` compares two models layer by layer.

What to expect
  The output error of a layer splits into the part of the inputs' mean and the part of their covariance,
  E[(D x)^2] = (D mu)^2 + D C D^T; DSnoT lowers the first, at a small price in the second. Gains are largest where
  inputs have means far from zero and many weights are gone (the paper: LLaMA at 60 to 70 %). 50 swaps are 1.2 % of a
  row of 4096; on narrow layers 50 swaps turn over half the row and do harm, so `max_cycles="scaled"` allows at most
  1.25 % of a row, and `threshold="scaled"` fits the paper's 0.1, meant for 2048 tokens, to the length of your
  sequences. SparseGPT, which also updates weights, is usually the best base on small models.

Masks
  The model stays a stock model with zeros: save it as ever. `save_masks(model, "masks.safetensors")` writes one bit per
  weight, `load_masks` and `apply_masks` bring them back, `masks_of` reads them off any sparse checkpoint.
  `freeze_masks(model)` holds pruned weights at zero during fine-tuning by a parametrisation whose state dict keeps the
  stock names: checkpoints written meanwhile are plain, and `remove()` leaves plain weights with exact zeros.
  Unstructured zeros save disk space only after compression and no time by themselves. 2:4 zeros run faster on NVIDIA
  GPUs through `torch.sparse.to_sparse_semi_structured` (float16 or bfloat16, shapes in multiples of 64). Serving
  engines have dropped sparse formats: export the dense safetensors, with the mask file beside it.

Cost
  A forward pass of the calibration set per block and one more for the pruned block; a few partitions per row and at
  most `max_cycles` vectorised swaps; rows in chunks of bounded size. 4096 x 4096 in float32 on one CPU core takes a
  third of a second. Gram matrices are collected for SparseGPT and for reports (`on_layer`) only.

What it does not do
  Embeddings and the head are never pruned; attention layers alone are refined unless `refine="all"` (the authors'
  default). Quantised weights are refused: prune first. Several experts fused into one tensor stay dense, with a
  warning, and so do experts no token reached.

With llm-compressor
  Its `WandaPruningModifier`, `SparseGPTModifier` and `MagnitudePruningModifier` prune with sequential offloading and
  OWL sparsity profiles. What they leave is a model with zeros, so it is a start for the refinement here:
  `oneshot(model=model, dataset=..., recipe=WandaPruningModifier(sparsity=0.6))`, then
  `dsnot(model, calibration, base="current", original_model=dense)`. `torch.nn.utils.prune` masks (after `prune.remove`)
  are taken in the same way.

Deviations from the authors' code
  - A row stops when no weight of the needed sign is left. In their code the pointers of finished rows run on and prune
    kept weights, which changes the rows' sparsity, or run off the end of narrow rows.
  - Their SparseGPT base never accumulates the Hessian and prunes the first columns of every row. Here the score is
    W^2 / diag(U)^2 with a real Hessian and dense values.
  - Variances of zero are taken as 1e-12 where theirs divide by zero; inputs that are always zero are never grown.
  - Magnitude and SparseGPT prune exactly the budget; the original codes prune at least one weight more per layer or
    block (`inclusive=True` does so in `magnitude_mask` and `sparsegpt_layer`).
  - Equal scores are pruned in order of their index; sums are kept in float64, padding is left out.
"""

from __future__ import annotations

from gnomon.compress.dsnot.bases import inverse_factor, magnitude_mask, sparsegpt_layer, sparsegpt_mask, wanda_mask
from gnomon.compress.dsnot.checks import check_options
from gnomon.compress.dsnot.compare import compare_bases
from gnomon.compress.dsnot.masks import FrozenMasks, apply_masks, freeze_masks, load_masks, masks_of, save_masks
from gnomon.compress.dsnot.models import dsnot, prune
from gnomon.compress.dsnot.refine import dsnot_layer, scaled_cycles, scaled_threshold
from gnomon.compress.dsnot.report import layer_error, layer_errors

__all__ = [
    "FrozenMasks",
    "apply_masks",
    "check_options",
    "compare_bases",
    "dsnot",
    "dsnot_layer",
    "freeze_masks",
    "inverse_factor",
    "layer_error",
    "layer_errors",
    "load_masks",
    "magnitude_mask",
    "masks_of",
    "prune",
    "save_masks",
    "scaled_cycles",
    "scaled_threshold",
    "sparsegpt_layer",
    "sparsegpt_mask",
    "wanda_mask",
]
