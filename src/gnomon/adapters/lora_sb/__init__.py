"""LoRA-SB: an adapter of r x r numbers per matrix, between fixed factors that hold the first full fine-tuning step.

LoRA trains B (m x r) and A (r x n). LoRA-XS fixes both and trains a small R between them, so that an adapter of rank
96 of a 7B model has 2 million numbers. What it can reach is then decided by the fixed factors. LoRA-XS takes them
from the weight; LoRA-SB takes them from the first step that full fine-tuning would make, which also is where training
starts. Both are here.

## Method

W = W0 + s B R A, s = lora_alpha / r, and only R is trained; W0 is never changed.

LoRA-XS (`LoRAXSConfig`): with the singular value decomposition W0 = U S V^T, B = U_r S_r, A = V_r^T, and R is drawn
from N(0, 1e-5^2).

LoRA-SB (`LoRASBConfig` and `initialize_lora_sb`):

1. Gradient G of the base weights, summed over the first batches: of the mean loss / rows for each batch.
2. The first step of AdamW: dW = - eta sign(G), sign(0) = 0, with eta = lr / (warmup_ratio x steps), the learning rate
   of the first warm-up step.
3. dW ~ U diag(sigma) V^T, the r leading triplets: B = U, A = V^T, R = diag(sigma) / s.

With orthonormal A and B the gradient of R is s B^T G A^T, and s B R A moves along the orthogonal projection of G: the
best step of this form is the ordinary one. So nothing depends on s but the learning rate, which for SGD goes as 1 /
s^2; leave s at 1.

## Use

```python
import peft
from gnomon.adapters import LoRASBConfig, initialize_lora_sb

model = peft.get_peft_model(model, LoRASBConfig(r=96, target_modules="all-linear"))
initialize_lora_sb(model, dataloader, lr=1e-4, num_training_steps=1560, num_samples=50)
Trainer(model, ...).train()                              # or TRL, accelerate, a loop of your own
model.save_pretrained("adapter")                         # R, and the factors
model = peft.PeftModel.from_pretrained(base, "adapter")  # no data needed; import gnomon.adapters first
```

TRL's trainers attach the adapter themselves: call ``initialize_lora_sb(trainer.model, ...)`` before
``trainer.train()``. An adapter that was not initialised raises when it is used; nothing is made up in its place.

Settings of the paper, AdamW in all: MetaMathQA (50k rows) with Mistral-7B and Gemma-2 9B: r 96, 50 rows, lr 1e-4,
cosine, warm-up 0.02, one epoch of batches of 32. Commonsense170K with Llama-3.2 3B: r 96, 170 rows, lr 2e-3, linear,
warm-up 0.02, two epochs of batches of 192. GLUE with RoBERTa-large: r 24, 2 rows, lr 1e-4 to 5e-3, linear, warm-up
0.06, 30 epochs of batches of 128. A thousandth of the training rows is enough to probe with. The authors' runs have
AdamW's default weight decay of 0.01; 0 is the better default, since a decay of R pulls the weights to W0.

`loss=` takes a loss of your own, and a callable in place of the loader runs forward and backward itself.
`set_lora_sb_factors` sets factors by hand (``init="given"``), or gives several adapters the same ones; the mean of
their R is then exactly the mean of their changes, as federated averaging wants. `save_lora_sb_as_lora` writes a plain
LoRA (lora_A = A, lora_B = B R) without loss, which loads where gnomon is not installed.

**Saving.** LoRA-SB's factors cannot be computed again without the data, so they are saved: r (m + n) numbers a matrix
beside the r^2 of R. `save_factors`:

- ``"bf16"``: half of that. The factors are rounded when they are set, not when they are saved, so loading is exact.
- ``"seeded-sketch"``: the factors are sought in a space of `sketch_size` (4 r) dimensions on either side that follows
  from the seed, and stored by 2 sketch_size r numbers. They hold less of the step: of a 64 x 64 layer with r = 8,
  16 % in place of 81 %.
- ``False``: R alone. Set the factors again before use, with ``keep_latent=True``. LoRA-XS computes its own again from
  the weight and refuses when they come out otherwise than where the adapter was saved, as on a base in another dtype.

## Cost

The probe is N forward and backward passes. The device holds the weights and one layer's gradient; buffers on the CPU
hold the sum in float32, of all layers or, with ``passes=p``, of a p-th of them at p times the passes. The
decomposition is exact up to a smaller side of 512 and randomised above: seconds for 4096 x 11008.

A training step costs what LoRA of rank r costs, less the gradients of A and B: T (n r + r^2 + m r) multiplications
forward for T tokens, and x A^T is kept for the backward pass in place of x.

**Ranks.** The probe sums the gradients over the ranks before the sign; every rank gives its share of the rows, and
all get the first rank's factors. Initialise before DDP or FSDP. A and B are frozen parameters, so FSDP2 shards them
and DDP does not send them. **bfloat16**: A, B and R stay in float32, as PEFT keeps adapters.

## Does not compose with

A quantised base cannot be probed (its weights have no gradient): initialise on the model in bfloat16, save, and load
onto the quantised one. LoRA-XS works on it at once. A layer that shares its weight, as a tied lm_head, is refused,
and so is what is no linear layer. transformers' own ``model.load_adapter`` does not read ``"seeded-sketch"`` files.

## Where it differs from the authors' code

- They rebuild LoRA's modules in place and need a script of their own to merge; here PEFT's saving and merging work.
- They dequantise and probe before wrapping; here the wrapped model is probed with its adapters off, which is the
  same.
- The decomposition is exact, or has extra vectors, and factors are float32. ``parity=True`` takes their
  `torch.svd_lowrank` without extra vectors, their seed and their rounding to bfloat16, which leaves factors
  orthonormal to about 1e-2 only.
- They count the steps with the batch size of the probe; `num_training_steps` is what you say. It sets the size of R's
  start, not the factors.
- A layer that no gradient reaches (an expert without rows) gets the singular vectors of its weight and R = 0, with a
  warning."""

from gnomon.adapters._peft import register as _register
from gnomon.adapters.lora_sb.apply import apply_lora_sb, apply_lora_xs
from gnomon.adapters.lora_sb.config import LoRASBConfig, LoRAXSConfig
from gnomon.adapters.lora_sb.export import lora_sb_as_lora, save_lora_sb_as_lora
from gnomon.adapters.lora_sb.factors import (
    authors_factors,
    first_update,
    update_factors,
    weight_factors,
)
from gnomon.adapters.lora_sb.initialize import LoRASBStart, initialize_lora_sb, lora_sb_factors, set_lora_sb_factors
from gnomon.adapters.lora_sb.tuner import LoRASBLinear, LoRASBModel, LoRAXSLinear, LoRAXSModel

_register("lora_sb", LoRASBConfig, LoRASBModel)
_register("lora_xs", LoRAXSConfig, LoRAXSModel)

__all__ = [
    "LoRASBConfig",
    "LoRASBLinear",
    "LoRASBModel",
    "LoRASBStart",
    "LoRAXSConfig",
    "LoRAXSLinear",
    "LoRAXSModel",
    "apply_lora_sb",
    "apply_lora_xs",
    "authors_factors",
    "first_update",
    "initialize_lora_sb",
    "lora_sb_as_lora",
    "lora_sb_factors",
    "save_lora_sb_as_lora",
    "set_lora_sb_factors",
    "update_factors",
    "weight_factors",
]
