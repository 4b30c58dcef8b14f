"""NOLA: an adapter of a few thousand numbers; the random matrices that they mix come from a seed.

LoRA adds B A of rank r to a weight and trains A and B, so it cannot train fewer than m + n numbers a matrix. NOLA
draws k random matrices for A and l for B from a seed, freezes them, and trains only how they are mixed. The rank is
chosen apart from the number of trained numbers, and what is stored is the coefficients and the seed: 57 thousand
numbers for LLaMA-2 7B, 573 thousand for 70B, where a LoRA of rank 1 has 2.5 and 12.9 million.

## Method

For a weight W (m x n), rank r, bases A_i (r x n) and B_j (m x r), coefficients alpha (k) and beta (l):

    A = A_0 + sum_i alpha_i A_i          B = sum_j beta_j B_j
    y = W x + lora_alpha / r  B A x

- ``variant="lm"`` (default): entries of A_i uniform on (-1, 1) / sqrt(k), of B_j uniform on (-1, 1) / sqrt(l), of A_0
  uniform on (-1, 1) / sqrt(n). alpha = beta = 0, so training starts at the base model.
- ``variant="vision"``: entries uniform on (-1, 1) / sqrt(r n) and / sqrt(r m), no A_0, alpha_i = 1 / k,
  beta_j = 1 / l; the start is near the base model, not at it. `lora_alpha` 1.

Backward, with the gradients dA and dB of the factors: d alpha_i = <dA, A_i>, d beta_j = <dB, B_j>.

The seed of one set of bases is the top 63 bits of SHA-256 of ``"seed/module path/a"`` (``/b``, ``/a0``), or, with
``share_basis="shape"``, of the shape in place of the path. Two generators, both of fixed definition
(`gnomon.adapters.nola.bases`): ``"mt19937"`` runs on the CPU; ``"philox"`` runs where the coefficients are, with the
same bits on every device, and is the choice on a GPU.

## Use

```python
import peft
from gnomon.adapters import NOLAConfig

model = peft.get_peft_model(model, NOLAConfig(r=8, num_basis_a=256, target_modules="all-linear"))
Trainer(model, ...).train()                              # or TRL, accelerate, a loop of your own
model.eval().save_pretrained("adapter")                  # coefficients and a header
model = peft.PeftModel.from_pretrained(base, "adapter")  # needs `import gnomon.adapters`, nothing else
```

`merge_and_unload`, `load_adapter`, `set_adapter`, `disable_adapter`, `modules_to_save` and `peft.save_as_lora` (exact,
rank r) are PEFT's. Layers of a base in 8 or 4 bits (bitsandbytes and the other backends of PEFT) can be adapted.

The learning rate is 5 to 50 times LoRA's and weight decay must be 0: it pulls A to A_0. The authors took Adam with
lr 0.005 (GPT-2 M: r 8, k 512, lora_alpha 8) and 0.01 (GPT-2 L: r 8, k 256, lora_alpha 2), a linear schedule with 500
steps of warm-up; and a constant lr 0.001 (LLaMA-2 on Alpaca: r 16, k 512, lora_alpha 4, all linear layers, base in
8 bits). There is no dropout. k + l at or above r (m + n) trains more than LoRA would, and warns.

**Few bits.** `coeff_bits` (or `quantize_nola(model, bits)` after training) stores a coefficient in 16 bits (float16)
or in 2 to 8 (codes q: c = lo + q (hi - lo) / (2^bits - 1), lo and hi of each vector). In evaluation mode the model
computes with what will be stored. With 2 and 3 bits the training does so as well, with straight-through gradients.
A model in training mode is saved in float32, so that a run can be resumed exactly: call ``model.eval()`` before the
last save.

## The file

`adapter_model.safetensors` has alpha and beta of every module and one tensor of bytes, a JSON header: format,
generator, seed, r, k, l, lora_alpha, variant, share_basis, bits, and the first ten entries of A_1 of the first module.
Loading computes those entries again. If they differ, or the configuration is another one, loading fails and prints
both headers. The header is not in the file's metadata because PEFT writes that itself; `adapter_config.json` repeats
the options for people. Size: modules x (k + l) x bits / 8 bytes, 8 more for a vector of codes, about 140 for the name
and shape of a tensor.

## Cost

A pass over the bases draws k r n + l m r numbers and adds or contracts them in chunks that fit the cache (1 MB on the
CPU, 64 MB elsewhere); the bases are never held. Drawing dominates: 2 to 4 ns a number with mt19937 on one core, four
times as much with philox. Against it:

- A and B are kept until the coefficients change, which is found by comparing values. Gradient accumulation,
  checkpointing, generation and evaluation draw nothing for them. A step is one pass forward, one pass backward.
- ``share_basis="shape"``: all modules of a shape mix the same bases in one pass, forward and backward.
- `accumulated(model)`: all micro-batches of a step share one backward pass over the bases (one rank only).
- Serving: merge, or leave the adapter active; dropping to another adapter forgets A and B.

Memory in training: A and B of every module with their gradients, as in LoRA of the same rank, less its optimizer
state.

**DDP**: every rank draws the same bases, nothing is sent but the gradients of the coefficients. **FSDP2**: shard the
coefficients with everything else (a few bytes); they must not be in `ignored_params`, whose gradients are not
averaged. With ``share_basis="shape"`` modules share a pass inside one sharded group. **bfloat16**: the coefficients
stay in float32. **torch.compile**: the graph breaks where A and B are made.

## Does not compose with

Embeddings, convolutions and `nn.MultiheadAttention` (refused). transformers' own ``model.load_adapter`` takes tensors
as they stand in the file: it reads float32 and float16, not codes, and does not check the header; use
`PeftModel.from_pretrained`. Double backward.

## Where it differs from the authors' code

- A_0 follows from the seed and is not stored; their checkpoints hold it and B_0 densely.
- Seeds of modules are derived from one seed and the module's path, not drawn and stored. With a given seed the
  mt19937 entries are theirs to the bit.
- Their chunked generator does not run and their merge adds B_0 A_0, which loses the adapter. Here chunks give the
  same numbers as one call, and merging adds B A.
- Their forward pass seeds the global generator. Here it is never touched.
- In the vision variant the bases have the shapes of the language variant; theirs are transposed.
- The paper has no quantiser for coefficients in detail; min-max uniform codes are ours.
"""

from gnomon.adapters._peft import register as _register
from gnomon.adapters.nola.apply import apply_nola
from gnomon.adapters.nola.bases import Bases, contract, mix
from gnomon.adapters.nola.codes import dequantize, quantize
from gnomon.adapters.nola.config import NOLAConfig
from gnomon.adapters.nola.tuner import NOLALinear, NOLAModel, accumulated, quantize_nola

_register("nola", NOLAConfig, NOLAModel)

__all__ = [
    "Bases",
    "NOLAConfig",
    "NOLALinear",
    "NOLAModel",
    "accumulated",
    "apply_nola",
    "contract",
    "dequantize",
    "mix",
    "quantize",
    "quantize_nola",
]
