"""SoRA: a LoRA whose ranks carry trained gates; a proximal step sets gates to zero, and what is left is a plain LoRA.

LoRA needs its rank in advance, the same for every module or searched for. SoRA starts every module from one generous
rank r_max and lets training decide: a gate for each rank is pulled to zero and set to zero when it is small. After
training the ranks whose gate is zero are cut off. The result is PEFT's own LoRA with a rank for each module, often
uneven, that loads without this library.

## Method

For a weight W (m x n), A (r x n), B (m x r) and a gate g (r):

    y = W x + lora_alpha / r_max  B (g * (A drop(x)))
    loss = task loss + lambda1 / p  sum over all p gates of |g|

A starts as in PEFT's LoRA (Kaiming uniform), B at 0, g from N(0, 1). A, B and a head are trained by any optimizer. The
gates have an Adam of their own, without weight decay, followed at once by a proximal map with the threshold xi:

    u = g - lr sqrt(1 - b2^t) / (1 - b1^t)  m / (sqrt(v) + eps)
    prox="soft":     g = sign(u) max(|u| - xi, 0)
    prox="authors":  z = u - xi sign(u) where |u| > xi, else u;  g = 0 where |z| < xi, else z

The first is the paper's. The second is that of the authors' code; it also sets to 0 what lies between xi and 2 xi, so
it prunes as much as the first does at about twice the threshold: **results quoted at xi = 3e-4 belong to it.** Both the
L1 term and the threshold are active at once. A gate at zero can come back; only pruning is final.

The sparsifying schedule (`SparsifyingSchedule`) trains with a first threshold and then with higher and higher ones,
each stage from where the last one ended, and records after each how much of the training set is still known
(memorisation), how well the held-out set is done (generalisation), and how many parameters are left.

## Use

```python
import peft
from gnomon.adapters import SoRACallback, SoRAConfig, prune_sora

model = peft.get_peft_model(model, SoRAConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
Trainer(model, ..., callbacks=[SoRACallback(xi=1e-3)]).train()    # or TRL's trainers; any optimizer
prune_sora(model).save_pretrained("adapter")                      # a LoRA that stock PEFT loads
```

In a loop of one's own, or as ``Trainer(optimizers=(..., None))``:

```python
optimizer = SoRAProximal(torch.optim.AdamW(trained_parameters, lr=1e-3), model, xi=1e-3)
```

There is no number of steps to know in advance and nothing to call in the loop. `merge_and_unload`, `load_adapter`,
`modules_to_save`, `disable_adapter` and the rest are PEFT's, before pruning and after. In a recipe's train stage the
adapter brings its callback along; its options (`xi`, `lambda1`, `prox`, `xi_end`, ...) stand beside `r`.

## Options that matter

- `xi`: the main one. With g ~ N(0, 1) a gate that the task does not need is at zero after about |g| / xi steps, so the
  number of steps and xi belong together: a run of a few hundred steps needs 1e-3 to 1e-2, the authors' runs of many
  thousands 1e-4 to 7e-4. ``xi_times_lr=True`` multiplies it by the learning rate. More than 95 % of gates at zero
  warns.
- `lambda1`: 1e-3 (authors' script with a schedule; 10 without one, on 576 gates). The Adam of the gates normalises
  gradients, so a large lambda1 pulls all gates alike.
- `gate_init="ones"`: start as a LoRA of rank r. With the default a gate close to zero at the start goes first,
  whatever its rank could have learnt.
- `gate_lr`: a rate for the gates alone. A step at rate 0 leaves the gates as they are.
- Clipping: the L1 term belongs into the clipped norm. `SoRACallback` adds it before the backward pass; in a loop of
  one's own call ``optimizer.penalise()`` before clipping, or it is added after it.
- The best checkpoint by a metric ignores sparsity. The logs carry the number of gates and parameters beside the loss;
  `sora_summary` and `sora_ranks` give them for a model.

## Cost

Over a LoRA of rank r_max: a multiplication of r numbers a token (LoRA's scale is folded into it, which saves one of m
numbers) and one pass over all gates joined into a vector a step. `repack_sora`, or ``SoRACallback(repack_after=N)``,
drops ranks that have been zero for N steps from A, B and the optimizer's state during training. After pruning the
cost is that of a LoRA of the ranks that are left.

**GradScaler**: gradients are unscaled before the gates see them, and a step that overflows moves no gate.
**Accumulation**: one proximal step an optimizer step. **DDP** and **FSDP2**: gates may be replicated or sharded; all
that is done to them is elementwise. Re-packing needs one process. **Quantised** base layers (bitsandbytes and the
other backends of PEFT) can be adapted.

## Does not compose with

Embeddings, convolutions and `nn.MultiheadAttention` (refused), DeepSpeed and layer-wise optimizers (refused by the
callback). What works on `LoraLayer` factors (A and B) does not see the gate between them: prune first.
`lora_plus`-style groups put the gates where A is.

## Where it differs from the authors' code

- The default proximal map is the paper's; theirs is ``prox="authors"``, equal to the bit on their optimizer.
- A and B are trained by any optimizer, theirs by an AdamW whose eps stands before bias correction. The gates' Adam has
  their form.
- The number of parameters counts m + n for a zero gate, not twice the hidden size, which is wrong for layers that are
  not square.
- A list of thresholds is taken (`SparsifyingSchedule([...])`); theirs raises an error.
- Pruning keeps the scale lora_alpha / r_max by `alpha_pattern`, and leaves modules without a rank out.
- Randomness comes from `seed` and the module's path.
"""

from typing import TYPE_CHECKING as _TYPE_CHECKING

from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING as _PREFIXES

from gnomon._lazy import lazy_names as _lazy_names
from gnomon.adapters._peft import register as _register
from gnomon.adapters.sora.apply import apply_sora
from gnomon.adapters.sora.config import SoRAConfig
from gnomon.adapters.sora.optimizer import SoRAProximal
from gnomon.adapters.sora.proximal import prox_authors, prox_soft
from gnomon.adapters.sora.pruning import SoRASummary, prune_sora, repack_sora, sora_ranks, sora_summary
from gnomon.adapters.sora.schedule import SparsifyingSchedule
from gnomon.adapters.sora.tuner import SoRALinear, SoRAModel

if _TYPE_CHECKING:
    from gnomon.adapters.sora.callback import SoRACallback, sora_callback

# The Trainer is not imported with the package: transformers imports PEFT, and PEFT this, while it makes its Trainer.
__getattr__ = _lazy_names({name: f"gnomon.adapters.sora.callback:{name}" for name in ("SoRACallback", "sora_callback")})

# A, B and the gate are named as PEFT's LoRA names its own, as AdaLoRA's are; transformers' load_adapter goes by this.
_PREFIXES[_register("sora", SoRAConfig, SoRAModel)] = "lora_"

__all__ = [
    "SoRACallback",
    "SoRAConfig",
    "SoRALinear",
    "SoRAModel",
    "SoRAProximal",
    "SoRASummary",
    "SparsifyingSchedule",
    "apply_sora",
    "prox_authors",
    "prox_soft",
    "prune_sora",
    "repack_sora",
    "sora_callback",
    "sora_ranks",
    "sora_summary",
]
