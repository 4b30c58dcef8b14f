"""GradNormLoRP: weight-normalised training from low-rank optimizer state, in 32 or 8 bits.

A weight matrix is split, row by row, into a magnitude and a direction, W = g * v / ||v||, and Adam works on the two
apart: on the magnitudes as they are, on the directions in a low-rank projection of their gradient, as GaLore does
with the gradient of the weight. The trained weights are ordinary dense weights; inference costs nothing more.

Three things go by this name. All are here:

| what | how | state of an m x n matrix |
|---|---|---|
| the fusion, with the true weight-norm gradient | `GradNormLoRP(groups)`, ``mode="weightnorm"`` | a r + 2 b r + 2 m |
| the authors' released optimizer | `GradNormLoRP(groups, mode="authors")` | the same + m n |
| the paper's text: DoRA with projected factors | a PEFT model with `use_dora=True` | that of its factors |

(a = min(m, n), b = max(m, n), r the rank.)

## Method

G is the gradient of W, s = lr sqrt(1 - b2^t) / (1 - b1^t), N(.) Adam's direction M / (sqrt(V) + eps), P the projector
(every `update_proj_gap` steps from the SVD of what is projected), alpha GaLore's scale. Norms run over the inputs.

**weightnorm.** u = W / ||W|| and g = ||W|| are read off the weight at each step. The gradients are gg = sum(G u) and
gv = g (G - gg u), which is orthogonal to the row. Then g' = g - s N(gg), u' = u - s alpha back(N(project(gv))),
W <- g' u' / ||u'||. Groups without a rank get AdamW.

**authors.** A copy v of each weight is kept. g = ||v||, gg = sum(G v / g), and G itself is projected; v <- v - s alpha
back(N(project(G))), W <- (g - s N(gg)) v / ||v||. The next step begins with g = ||v|| again, so a step of the magnitude
lasts for one step, and v goes exactly GaLore's way. Groups without a rank are treated alike at full rank. There to
reproduce published runs.

**adapter.** DoRA's layers normalise; `gradnorm_lorp_groups` puts their factors into a group whose steps are projected
Adam (``weight_norm=False``) and the magnitudes and the rest under Adam. The projection's rank must be below the
adapter's r. Saving, merging and loading are PEFT's own; quantised base layers need nothing more. PEFT detaches the norm
from the gradient, which the mode "weightnorm" does not.

## Use

```python
from gnomon.optim import GradNormLoRP, gradnorm_lorp_groups

optimizer = GradNormLoRP(gradnorm_lorp_groups(model, rank=128, alpha=0.25), lr=0.03, bits=8)
Trainer(model, args, train_dataset=data, optimizers=(optimizer, None))

adapted = peft.get_peft_model(model, peft.LoraConfig(r=16, use_dora=True, target_modules="all-linear"))
optimizer = GradNormLoRP(gradnorm_lorp_groups(adapted, rank=8), lr=1e-3)
```

The authors fine-tune with rank 4 or 8, scale 4, gap 500, lr 3e-5, batch 16, 30 epochs, and pre-train with rank 128 or
256, scale 0.25, gap 250, lr 0.01. **The learning rate of "weightnorm" is not GaLore's**: the rows it steps have norm 1
where GaLore steps rows of the weight's own norm. Search it anew and compare at the best rate of each: trained from
scratch on a small scale the best were 0.05 here and 0.1 for GaLore, and their losses were then equal.

`optimizer.step_in_backward()` steps each weight as its gradient arrives and frees the gradient.
`training_memory(model, rank, bits=8, step_in_backward=True)` counts what a training takes before it is begun, also for
a model on the meta device: LLaMA-7B in bfloat16 at rank 1024 takes 20 GB and its activations, 5.7 of it state (AdamW
in float32 keeps 53.9).

## Cost

A step is GaLore's two products of 2 m n r operations and four passes over the weight: row norms, inner products with
the gradient, the tangent, the new norms. Two temporary matrices in the weight's size, three in float32 for half
precision; the weight is rounded once. `bits=8` keeps the low-rank moments of 4096 entries and more in 8 bits (blocks of
256, dynamic map; by bitsandbytes' kernels where that is installed); projector and magnitudes stay in full precision.
Codes that something has cast to another dtype are refused.

**DDP**: ranks share the first rank's projector. **FSDP2**: row sums are reduced, the direction's gradient is gathered
one matrix at a time, each rank updates its shard; the low-rank state is replicated and stays in 8 bits, while the
moments of sharded weights without a rank stay in full precision, with a warning. FSDP1 flattens weights and is refused.
**Mixed precision**: unscale gradients before the step (GradScaler does).

## Rows without direction

Rows of norm 1e-12 or less (padding, pruned neurons) are stepped by the projected Adam without normalisation, with a
warning. A magnitude that a step would take to zero or below is set to 1e-6, with a warning, instead of flipping the
row. Gradients with NaN or infinite entries are refused by the parameter's name and the step, before anything changes.

## Does not compose with

`step_in_backward` with gradient accumulation, clipping over the model, a GradScaler or several ranks. "authors" with
anything that changes weights from outside (pruning masks, loading a checkpoint of the weights alone): its copy brings
the old values back. Weight decay shrinks the magnitudes in "weightnorm"; in "authors" it acts on v and g both. The
two-sided projection ``proj_type="full"`` is ill-conditioned just after a refresh: the coordinates off the diagonal are
rounding noise then, which Adam brings to size.

## Where it differs from the authors' code

- The default is the fusion with the tangent gradient and without the copy of the weight. Of the authors' six
  optimizers only the one reproduced here as "authors" is coherent; their 8-bit class cannot run; `bits=8` is our own.
- Signs are kept, zero rows handled and NaN refused, as above; theirs flip, divide by zero and write 1e-9.
- Layers that store weights as (in, out) are normalised over their inputs.
- Tensors of three and more dimensions are refused by name where they would be normalised. Single numbers get Adam.
"""

from gnomon.optim.gradnorm_lorp.groups import gradnorm_lorp_groups
from gnomon.optim.gradnorm_lorp.memory import TrainingMemory, training_memory
from gnomon.optim.gradnorm_lorp.optimizer import GradNormLoRP
from gnomon.optim.gradnorm_lorp.weight_norm import WeightNormGradients, weight_norm_gradients

__all__ = [
    "GradNormLoRP",
    "TrainingMemory",
    "WeightNormGradients",
    "gradnorm_lorp_groups",
    "training_memory",
    "weight_norm_gradients",
]
