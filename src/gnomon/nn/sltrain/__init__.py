"""SLTrain: pre-train with every weight a low-rank product plus a sparse matrix on a fixed random support.

A layer with n inputs and m outputs has, in place of its m x n weight, two factors and a few single entries:

    W = s * B A + S,   y = x W^T + bias,   s = alpha / r

A is (r, n), B is (m, r), and S has k = floor(delta * m * n) entries (delta = 0.03) whose positions are drawn once,
uniformly, and never change. Trained are A, B and the values of S: r (m + n) + k numbers. The low-rank part learns
the head of a weight's spectrum, the sparse part its tail, which low rank alone cannot reach (`spectra` shows both).

At the start A and the values come from U(-1/sqrt n, 1/sqrt n) and B is zero, so that a layer begins as S alone. The
bias comes from U(-1/sqrt m, 1/sqrt m), as in the authors' code; `torch.nn.Linear` has 1/sqrt n.

Use

- ``apply_sltrain(model, rank=256)`` on an untrained model, before the optimizer is made and before ``fully_shard``.
  It replaces the linear layers whose name contains "attn", "mlp" or "attention"; embeddings, head and norms are
  trained in full. `converted_layers` tells which. The paper's settings:

      model   width / MLP / blocks   rank   delta   alpha   Adam, batch of 512 x 256 tokens
      60M     512 / 1376 / 8         128    0.03    32      11k steps
      130M    768 / 2048 / 12        256    0.03    16      22k
      350M    1024 / 2736 / 24       256    0.03    16      65k
      1B      2048 / 5461 / 24       512    0.03    8       140k
      7B      4096 / 11008 / 32      1024   0.05    8       8-bit Adam, clipped at 1

  with learning rate 3e-3, warm-up over 10 % of the steps and a cosine to 10 %, weights and moments in bfloat16, no
  weight decay: decaying A and B is not decaying W. Small ranks want a larger s: at rank 4, s = 1 beats s = 1/4.
- `check_gradients` after the first backward pass: training goes on without an error when a part is cut off.
- ``fold_sltrain(model)`` sums each weight and gives a stock checkpoint for any engine. Fold for inference, and before
  adapters, pruning or quantisation, which look for linear layers.
- ``memory_report(model, optim_bits=8, per_layer=True)`` counts weights, moments, indices and gradients in the paper's
  way, beside the dense, the low-rank and GaLore's model. A model built under ``torch.device("meta")`` is enough.
- ``per_layer_optimizer(model, cls, ...)`` steps each parameter inside the backward pass and frees its gradient at
  once; with 8-bit moments this is the paper's leanest setting. See `gnomon.common.per_layer` for what it excludes
  (gradient accumulation, clipping, DDP) and for its use with the Trainer.
- Trained weights would be lost and are refused. ``unfold_sltrain(model, rank)`` approximates them: a truncated SVD,
  and on the support what it leaves. For fine-tuning use an adapter instead.

Save with ``gnomon.save_model`` (or the Trainer) and load with ``gnomon.load_model``; the support is saved with the
weights. Plain ``from_pretrained`` reads folded models only.

Cost: the dense weight exists while a pass of its layer uses it and is built again in the backward pass; only x and
the factors are kept in between. That adds products of 2 m n r operations, one forward and three backward, and one
write of W: a share of about r / T for T tokens. Below T = m n / (m + n) tokens the layer multiplies by B, A and S
in turn instead, which is cheaper; both sides of the switch are measured in ``benchmarks/sltrain.py``. Indices take 4
bytes an entry (8 from 2^31 positions on); every rank of FSDP2 holds them whole, and DDP sends them in every step
unless ``broadcast_buffers=False`` (``ddp_broadcast_buffers`` of the Trainer), which is safe as they never change.

Runs under autocast, bfloat16 weights, gradient checkpointing, ``torch.compile``, DDP and FSDP2. Combines with norm
placements and LayerNorm scaling, in either order, and with any optimizer. Quantised layers and other subclasses of
`nn.Linear` are refused, experts kept in one tensor stay dense and a warning says so.

Deviations from the authors' code: supports are drawn without a permutation of all positions, each layer's from the
seed and its name; indices are 32 bits wide; the factored path; on the CPU a 16-bit weight is summed in float32;
per-layer schedulers advance once a step (theirs are given twice the steps); trained models are refused where theirs
drops the weights; ``lora_dropout``, which theirs reads and ignores, does not exist.
"""

from __future__ import annotations

from gnomon.common.per_layer import per_layer_optimizer
from gnomon.nn.sltrain.apply import (
    apply_sltrain,
    check_gradients,
    converted_layers,
    unfold_sltrain,
)
from gnomon.nn.sltrain.fold import fold_sltrain, spectra
from gnomon.nn.sltrain.functional import dense_weight, draw_support, sparse_low_rank_linear
from gnomon.nn.sltrain.layer import SparseLowRankLinear
from gnomon.nn.sltrain.memory import MemoryReport, MemoryUse, memory_report

__all__ = [
    "MemoryReport",
    "MemoryUse",
    "SparseLowRankLinear",
    "apply_sltrain",
    "check_gradients",
    "converted_layers",
    "dense_weight",
    "draw_support",
    "fold_sltrain",
    "memory_report",
    "per_layer_optimizer",
    "sparse_low_rank_linear",
    "spectra",
    "unfold_sltrain",
]
