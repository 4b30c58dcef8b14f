"""GGPO, MGPO and Flat-LoRA: train an ordinary LoRA at perturbed merged weights, towards flatter minima.

A LoRA of large rank on little data overfits, and its training loss can show a bump (double descent). These methods
compute every loss and gradient not at the merged weight W' = W + s B A but at W' + eps, in one forward and one backward
pass. Nothing else changes: what is trained, saved and loaded is a plain PEFT LoRA, and evaluation sees W'.

## Method

For a layer W (m x n), factors B (m x r) and A (r x n), scale s, gradients g_A and g_B of the last step:

- **GGPO** (version 1 of the paper): eps_ij ~ N(0, v_i) with v_i = sigma^2 / n (||W'_i||^2 + beta ||G_i||^2), where G
  = s (B g_A + g_B A) stands for the gradient of W'. One draw an optimizer step; the gradient flows to the input
  through eps, and eps itself is a constant.
- **Flat-LoRA**: GGPO with beta = 0 and sigma_t = sigma (1 - cos(pi t / T)) / 2.
- **MGPO** (versions 2 and 3): with the optimizer's momenta m_A and m_B, v = s (m_B A + B m_A) and eps = -rho c v /
  (||v|| + 1e-12), c = min(1 / (gbar + 1e-12), 10), where gbar is the moving average (beta) of ||G||; c = 1 before
  there is an average, eps = 0 before there are momenta. The sign is the authors': a look along the descent direction,
  where SAM would ascend; ``sign=1`` turns it round.

## Use

```python
from gnomon.adapters import MGPOCallback

trainer = Trainer(model=peft_model, ..., callbacks=[MGPOCallback(rho=0.01, beta=0.8, mu=0.8)])
```

or in a loop of your own, forward pass and backward pass inside, clipping outside:

```python
from gnomon.adapters import GGPO, perturbed

with perturbed(model, optimizer, GGPO(sigma=0.03)):
    model(**batch).loss.backward()
torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
optimizer.step()
```

Published values: GGPO sigma 0.03, beta 0.01; Flat-LoRA sigma 0.05; MGPO rho 0.05, beta 0.9, beta1 of AdamW 0.9
(T5-base on GLUE) and rho 0.01, beta 0.8, beta1 0.8 (LLaMA-2-7B). rho acts after a division by the gradient norm, up
to ten times larger, so it depends on the scale of the gradients; start at 0.01. All of them regularise: where a LoRA
does not overfit, large values make it worse.

`double_descent_report(losses)` says whether a training curve has the bump. `sharpness(model, loss)` says by how much a
loss rises under noise on the merged weights.

## Back-ends

Neither ever writes to W, so W is the same to the bit afterwards, also after an error, and in 16 bits.

- ``"weight"``: W + eps is made once a step and held beside W (memory of the adapted weights).
- ``"functional"``: MGPO multiplies by its two thin factors, without a matrix of W's size. GGPO draws eps from a seed
  inside a layer's forward pass, once more in its backward pass and in recomputation; one such matrix at a time. Works
  on quantised bases, where eps gets a product of its own, and on weights sharded by FSDP2.
- ``"auto"`` (default): "functional" for quantised, sharded and 16-bit bases, else "weight".

In bfloat16 the functional GGPO rounds W + eps as the layer rounds W: with sigma below about 0.005 the noise is lost.

## Cost

GGPO draws m n normal numbers a layer and step ("functional": twice a micro-batch) and needs the row norms of W'. MGPO
costs two products of rank 2 r in each direction, or one of that rank a step ("weight"). All norms come from the factors
in O((m + n) r^2).

## Training

- Accumulation: one perturbation an optimizer step; norms come from the accumulated gradient, once a step.
- Clipping: norms come from gradients before clipping. The callbacks read them at the end of the backward pass.
- GradScaler: norms are unscaled (the Trainer's scaler is found; in a loop give ``scaler=``); skipped steps do not
  count.
- Gradient checkpointing recomputes with the same eps.
- DDP and FSDP2: the same eps on all ranks; ``per_rank=True`` draws GGPO's noise for each rank.
- Optimizers for MGPO: any with `exp_avg` or `momentum_buffer` in the parameter's shape, and bitsandbytes in 8 or 32
  bits. Without momentum, or with a projected one (GaLore and the like), MGPO is refused.
- Checkpoints of the Trainer hold the averaged norms, and a resumed run ends where an uninterrupted one does. Resume
  from the run's own output folder.
- Layers whose momentum is not finite are left as they are, counted, and reported once.

## Does not compose with

DoRA and other variants of LoRA; several active adapters; merged adapters; DeepSpeed; FSDP 1; tensor parallelism;
weights offloaded by accelerate (GGPO); a second perturbation at the same time. Embeddings and convolutions are not
perturbed. Double backward.

## Where it differs from the authors' code

- W is not changed in place: adding and subtracting eps does not restore it, and in 16 bits it drifts.
- The average takes the gradient of a whole step once; the authors' takes the partial sums of accumulation.
- Seeds are derived from one seed, the step and the layer's name. The global generator is never touched.
- The paper's version 1 came without code; GGPO is as its equations give it, variances added and divided by n as in
  Flat-LoRA. A known implementation for image models takes the sum of sigma ||W'_i|| and beta ||G_i||^2 as the standard
  deviation, divided by sqrt(m), and lets no gradient through eps.
"""

from gnomon.adapters.lora_ggpo.callback import FlatLoRACallback, GGPOCallback, MGPOCallback
from gnomon.adapters.lora_ggpo.perturbation import Perturbation, perturbed
from gnomon.adapters.lora_ggpo.report import DoubleDescent, Sharpness, double_descent_report, sharpness
from gnomon.adapters.lora_ggpo.rules import (
    GGPO,
    MGPO,
    ggpo_deviations,
    gradient_norm,
    gradient_row_norms,
    merged_row_norms,
    mgpo_factors,
)

__all__ = [
    "GGPO",
    "MGPO",
    "DoubleDescent",
    "FlatLoRACallback",
    "GGPOCallback",
    "MGPOCallback",
    "Perturbation",
    "Sharpness",
    "double_descent_report",
    "ggpo_deviations",
    "gradient_norm",
    "gradient_row_norms",
    "merged_row_norms",
    "mgpo_factors",
    "perturbed",
    "sharpness",
]
