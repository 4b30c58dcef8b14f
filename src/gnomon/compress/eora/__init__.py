"""EoRA: repair a compressed model, without training, by low-rank adapters that are optimal for each layer's inputs.

A compressed layer computes x W_c^T where the dense one computed x W^T. EoRA adds an adapter B A of rank r so that
W_c + B A is as near to W as that rank allows *on the inputs the layer really gets*. With D = W - W_c and C = X^T X
over the calibration tokens it solves

    minimise over rank(B A) <= r:   ||(D - B A) X^T||_F^2  =  tr((D - B A) C (D - B A)^T)

in closed form: take any M with M M^T = C, decompose D M = U S V^T, and set

    B = U_r S_r^(1/2)  (out, r),       A = S_r^(1/2) V_r^T M^+  (r, in).

The optimum is global; the error that remains is the sum of S_i^2 over i > r. Plain SVD (M = 1) minimises the error of
the weight instead and "ACT-S" (M = diag of the mean |x_j|) sees inputs one by one; both are here as baselines, with a
fit of A and B by gradient descent.

The result is an ordinary PEFT LoRA (lora_alpha = r, no dropout, no bias), so it is saved, loaded, served and trained
further by whatever knows LoRA: `peft_model.save_pretrained(folder)`, then `PeftModel.from_pretrained(base, folder)` on
the compressed checkpoint.

    dense = AutoModelForCausalLM.from_pretrained(...)
    compressed = ...                                   # pruned or quantised from it
    peft_model = eora(compressed, dense, calibration, rank=32)

Order of work, block by block: the calibration set runs through the dense block, where the inputs of all its linear
layers are collected at once; adapters are computed; the block runs again with its compressed weights and the adapters,
and what comes out is what the next block sees. So each block also answers for the errors left before it.

When to use it
  After quantisation to 4 bits or fewer, or after pruning, when a little text and no training budget is at hand. The
  more was lost, the larger the gain. Calibrate on text of the task if there is one, mixed with general text; 64
  sequences of 2048 tokens are ample, rank 32 is a good start and 128 the paper's default. Judge the result on other
  text than that.
  To train on from there (EoRA as LoRA initialisation), train the returned adapter, or fill an existing PEFT adapter by
  `initialize_eora`.

Cost
  Per distinct input: tokens * in^2 for C and one Cholesky factorisation; per layer a randomised range finder (up to
  512 inputs or outputs, and with `exact=True`: eigendecomposition and full SVD). Layers that read the same tensor
  (query, key and value; gate and up) share C and its factor. Memory: both models, the hidden states of the calibration
  set, the statistics of one block. The adapter adds r (in + out) numbers and products per layer.

What it does not do
  - Merge: W_c + B A lies off the grid and fills pruned places. `requantise_after_merge` compresses the sums again and
    tells what that costs; `peft_model.merge_and_unload()` on plain weights gives a dense model back.
  - Layers pruned structurally or dropped, scales folded into norms (AWQ, SmoothQuant), reordered columns: W and W_c
    must have the same shape, order and inputs. Such pairs are refused.
  - Experts fused into one tensor are told and left alone; experts no token reached get no adapter.
  - Evaluation through pipelines that drop PEFT wrappers silently measures the compressed model alone.
  With torch.distributed initialised, each process brings its own part of the calibration set; statistics are summed.

Deviations from the authors' code
  - C is the plain sum over tokens. The authors' running average forgets: the first of 64 samples weighs 0.38 of the
    last. It is offered as `accumulation="decay"`.
  - The authors divide by every positive eigenvalue of C, so inputs that never occur give infinite factors. Here
    V_r^T M^+ is computed as S_r^-1 U_r^T D, which divides by no eigenvalue of C, and directions that never occur are
    projected out: they get no correction (`unseen="correct"` leaves them in, which can only bring the layer nearer to
    the dense one; with very few calibration tokens the divergence from the dense model was up to 15 % smaller).
  - What counts as "never seen" is what rounding can leave in a sum of that precision, not in * eps of the largest
    eigenvalue: with outlier features that rule drops most directions of a wide layer.
  - A and B are scaled for the mean over tokens, so their size does not depend on the amount of calibration text; the
    product is the same.
  - Adapters in 4 or 3 bits (`adapter_bits`) hold values on the grid in floating point: PEFT's files know no packed
    adapters, and the fused kernel of the authors is not part of this.
"""

from __future__ import annotations

from gnomon.compress.eora.gradient import gradient_fit
from gnomon.compress.eora.layer import InputSpace, eora_layer, input_space, output_error
from gnomon.compress.eora.merging import requantise_after_merge
from gnomon.compress.eora.model import eora, initialize_eora
from gnomon.compress.eora.rounding import quantise_adapter

__all__ = [
    "InputSpace",
    "eora",
    "eora_layer",
    "gradient_fit",
    "initialize_eora",
    "input_space",
    "output_error",
    "quantise_adapter",
    "requantise_after_merge",
]
