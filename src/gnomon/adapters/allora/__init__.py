"""ALLoRA: LoRA without dropout and without alpha / r, in which each row's step shrinks as its part of B A grows.

For a fine-tuning of a few hundred steps on little data, in which neither lora_alpha nor lora_dropout is to be tuned.
The paper's reasons: dropout regularises in the mean, and a short run does not average its noise out; B = 0 makes the
gradient of A zero at the first step and the start slow; and a forward scale alpha / r multiplies through the depth of
the model. ALLoRA takes dropout and scale away and puts one number, eta, into the gradients. The trained adapter is a
plain LoRA.

## Method

For a linear layer W (m x n) with A (r x n), B (m x r):

    y = W x + B A x                                          no scale, no dropout
    s_i = 1 / sqrt(||(B A)_i|| + 1 / eta^2)                  row i of m; the norm itself under the root
    G = sum over the tokens of (gradient of y) x^T           the gradient of B A
    dA = B^T diag(s) G      dB = diag(s) G A^T               in place of B^T G and G A^T
    dx = A^T B^T (gradient of y)                             as in LoRA

s follows from A and B as they are at every backward pass and is a constant in it. At B = 0, s_i = eta: the first step
of SGD has the gradients of a LoRA with lora_alpha = eta r. As a row grows its steps shrink, in the end like
1 / sqrt(norm). A starts Kaiming uniform (a = sqrt 5), B at 0, as in LoRA. What A and B receive is not the gradient of
the loss, so numerical checks of gradients fail for them by design, and the rule is differentiated once only.

## Two modes

Adam divides a gradient by the root of its own mean square, so a factor that changes slowly cancels. At the start all
rows have the factor eta, and with AdamW the rule at the gradient does next to nothing: the first step is that of LoRA
with the scale 1, and in the library's claim it is slightly behind LoRA at every eta.

- ``apply="gradient"`` (default) is the paper's rule. It is meant for SGD, momentum and other optimizers whose step
  grows with the gradient. A fixed threshold of gradient clipping meets the rescaled gradients: clipping comes after the
  rule, over all parameters as usual.
- ``apply="update"`` leaves the gradients alone and multiplies what the optimizer does to row i of B by s_i; A is the
  optimizer's. Row i has the learning rate lr s_i, for weight decay too. This is the mode for AdamW and its kin. It
  needs one more line, `scale_allora_updates(optimizer, model)` or `ALLoRACallback()`, without which the model trains
  as plain LoRA and warns.

## Use

```python
import peft
from gnomon.adapters import ALLoRACallback, ALLoRAConfig, scale_allora_updates

model = peft.get_peft_model(model, ALLoRAConfig(r=8, eta=2.0, target_modules="all-linear"))     # and SGD, or

model = peft.get_peft_model(model, ALLoRAConfig(r=8, eta=2.0, apply="update", target_modules="all-linear"))
scale_allora_updates(optimizer, model)                              # any torch optimizer, in a loop of your own
Trainer(model, ..., callbacks=[ALLoRACallback()]).train()           # or in the Trainer, in TRL

model.save_pretrained("adapter")                                    # a LoRA with lora_alpha = r
peft.PeftModel.from_pretrained(base, "adapter")                     # without this library
```

The folder holds neither `eta` nor `apply`, because a plain LoRA has none: stock PEFT reads it without a warning and
gives the same logits to the bit. To **train a saved adapter further**, name them again, in either way:

```python
config = ALLoRAConfig.from_pretrained("adapter", eta=2.0)
model = peft.PeftModel.from_pretrained(base, "adapter", config=config, is_trainable=True)

model = peft.PeftModel.from_pretrained(base, "adapter", is_trainable=True)
train_as_allora(model, eta=2.0)                                     # any LoRA with scale 1 and no dropout
```

A run of the Trainer that goes on from a checkpoint is built as it was at first, and needs neither.

`merge_and_unload`, `disable_adapter`, `load_adapter`, `add_weighted_adapter`, `modules_to_save` and the rest are
PEFT's. Several adapters, each with its own eta and mode, stand beside plain LoRA ones. Rank patterns are allowed; the
scale is 1 in every layer. Base layers: nn.Linear, Conv1D (GPT-2), and bitsandbytes' in 8 and 4 bits.

`eta`: the value used in the paper is not known to us. 2.0 is what lora_alpha = 2 r gives; a LoRA that is replaced gives
its lora_alpha / r. A larger eta acts as a larger learning rate until the rows have grown.

## Cost

For the norms, ||(B A)_i||^2 = B_i (A A^T) B_i^T: (n + m) r^2 products a layer and pass, in float32; B A is not formed.
The backward pass scales the small factor B and not the gradient of the output, and one product over the tokens serves
both x and A. What is kept for it is what LoRA keeps. A step takes no longer than that of PEFT's LoRA, which multiplies
the branch's output by its scale (``benchmarks/allora.py``). ``apply="update"`` copies B for the time of the step.

**bfloat16, autocast**: the branch computes as LoRA does; norms and scales are taken from A and B in float32. **DDP,
FSDP2**: both modes; shard whole blocks, so that A and B are whole when their layer runs, and make the optimizer after
sharding. Optimizers with copies of their own (DeepSpeed, FSDP1) cannot be followed by the update mode. **Gradient
checkpointing, torch.compile**: both modes. With ``torch.autograd.set_detect_anomaly`` the forward pass names the
layer whose A or B is not finite.

## Does not compose with

Dropout, rsLoRA, DoRA and the other variants of LoRA, a bias in B, `target_parameters`, embeddings, convolutions and
`nn.MultiheadAttention` (refused); layers quantised by others than bitsandbytes (refused); tensor parallelism of adapted
layers in gradient mode (refused). A model that carries LoRA layers of stock PEFT already, such as a folder loaded by
`from_pretrained`, takes further adapters as `peft.LoraConfig(r=r, lora_alpha=r)` followed by `train_as_allora`; on such
layers PEFT refuses `ALLoRAConfig` with "unsupported variant combination", and on its bitsandbytes layers ignores what
it does not know.

## Where it differs

There is no code by the authors, and the paper's text leaves the optimizer's part open: the update mode is ours. What
some ports do is another method: to take s once at the start, to rescale the gradient of the branch's output (which
changes dx), to take the square of the norm, or to scale by the rows of each factor.
"""

from typing import TYPE_CHECKING as _TYPE_CHECKING

from gnomon._lazy import lazy_names as _lazy_names
from gnomon.adapters.allora.apply import apply_allora, train_as_allora
from gnomon.adapters.allora.config import ALLoRAConfig
from gnomon.adapters.allora.layer import ALLoRALinear, ALLoRAVariant
from gnomon.adapters.allora.rule import allora_linear, row_scales
from gnomon.adapters.allora.updates import ScaledUpdates, scale_allora_updates, scaled_update

if _TYPE_CHECKING:
    from gnomon.adapters.allora.callback import ALLoRACallback, allora_callback

# The Trainer is not imported with the package: transformers imports PEFT, and PEFT this, while it makes its Trainer.
__getattr__ = _lazy_names(
    {name: f"gnomon.adapters.allora.callback:{name}" for name in ("ALLoRACallback", "allora_callback")}
)

__all__ = [
    "ALLoRACallback",
    "ALLoRAConfig",
    "ALLoRALinear",
    "ALLoRAVariant",
    "ScaledUpdates",
    "allora_callback",
    "allora_linear",
    "apply_allora",
    "row_scales",
    "scale_allora_updates",
    "scaled_update",
    "train_as_allora",
]
