"""Fira: full-rank training from an optimizer that keeps only low-rank Adam moments.

GaLore saves memory by keeping Adam's moments in a rank-r projection of each weight's gradient, and pays for it by
throwing the rest of the gradient away. Fira puts the rest back. What Adam does to a gradient is mostly a change of
length, column by column, and that change is nearly the same inside the subspace and outside it: so the residual,
for which there are no moments, is scaled by the factors measured inside.

## Method

For a weight W (m x n) with gradient G, t finished steps, rank r, scale alpha, learning rate lr:

1. **Projector.** Every `update_proj_gap` steps, from the SVD G = U S V^T of the current gradient. Tall or square:
   Q = first r rows of V^T, R = G Q^T, back(X) = X Q. Wide: P = first r columns of U, R = P^T G, back(X) = P X.
2. **Adam on R.** M = b1 M + (1 - b1) R, V = b2 V + (1 - b2) R^2, N = M / (sqrt(V) + eps),
   eta = lr sqrt(1 - b2^t) / (1 - b1^t) with t counted from 1.
3. **Norm-based scaling.** phi = ||N|| / (||R|| + 1e-8) for each column of a wide, each row of a tall matrix;
   S = (G - alpha back(R)) phi.
4. **Norm-growth limiter.** L = max(||S|| / (q + 1e-8), 1.01) / 1.01, S <- S / L, q <- ||S||. On the first step
   S stays and q = ||S||.
5. **Update.** W <- W - eta (alpha back(N) + S), then W <- W - lr weight_decay W.

`GaLoreAdamW` is steps 1 and 2 and W <- W - eta alpha back(N). `FiraRMSProp` takes RMSProp in step 2.

## Use

```python
from gnomon.optim import Fira, low_rank_groups

optimizer = Fira(low_rank_groups(model, rank=128, alpha=0.25), lr=0.01)
Trainer(model, args, train_dataset=data, optimizers=(optimizer, None))
Trainer(model, args, train_dataset=data,
        optimizer_cls_and_kwargs=(Fira, {"params": low_rank_groups(model, 128, alpha=0.25), "lr": 0.01}))
```

Pre-training, as the authors did: lr 0.01, cosine to a tenth, 10 % warm-up, batch 512 x 256 tokens, no clipping;
rank / alpha 128 / 0.25 at 60M parameters, 256 / 0.25 at 130M and 350M, 512 / 0.0625 at 1B, gap 200; at 7B lr 0.005,
rank 64, gap 500, alpha 0.0625 and clipping at 1.0. Fine-tuning: lr 1e-4, alpha 1, rank 16, on the LoRA factors.
When a run stalls, `optimizer.diagnostics()` gives phi, q and L of every matrix; the limiter is the usual suspect.
`optimizer.step_in_backward()` steps each weight as its gradient arrives and frees the gradient.

## Cost

State of a matrix with a = min(m, n), b = max(m, n): projector a r, moments 2 b r, one scalar. A step is two
products of 2 m n r operations, one pass that reads G and one that reads G and updates W: the residual is never
formed, because its norm follows from those of G and R (see `gnomon.optim.fira.scaling`). Up to a smaller dimension
of 512 the projector is the exact SVD; above, block power iteration warm-started from the old projector, ten times
as fast. `bits=8` stores the moments in 8 bits (blocks of 256, dynamic map); bitsandbytes is not needed, its kernels
are used where it is installed.

**DDP**: ranks share the first rank's projector (one broadcast of a r numbers at a refresh). **FSDP2**: the gradient
of a sharded weight is gathered on every rank (m n numbers of traffic and of temporary memory, one matrix at a
time), the low-rank state is replicated, and each rank updates its own shard; shard the rest as usual. FSDP1
flattens weights and is refused. **Mixed precision**: unscale gradients before the step (GradScaler does); the SVD
runs in float32 whatever the dtype. **Clipping** acts before the projection. **Gradient accumulation** projects the
accumulated gradient. Gradient checkpointing does not matter.

## Does not compose with

`step_in_backward` with gradient accumulation, global clipping, a GradScaler or several ranks (refused where it can
be seen). `proj_type="full"` with Fira: phi has nothing to broadcast along. Convolution weights and other tensors
that are no matrices must stay out of the projected groups.

## Where it differs from the authors' code

- The residual: the paper writes G - P P^T G, the code subtracts alpha P P^T G, so that with alpha = 0.25 three
  quarters of the in-subspace gradient stay in it. All published pre-training numbers come from the code, which is
  the default; `residual="orthogonal"` is the paper's text.
- A gradient of exact zeros used to set q = 0, after which the residual could only grow by 1 % a step from 1e-8:
  Fira silently became GaLore. A zero residual is not remembered here, and q below 1e-6 does not limit.
- Moments stay in the old basis when the projector changes, as with the authors; `align="rotate"` carries the first
  moment over. Either way results after a refresh depend on the signs of singular vectors: the exact SVD takes
  LAPACK's, the randomised one keeps the signs of the projector it started from.
- A refresh on a gradient of zeros keeps the old projector.
- The projector is stored as a tensor and the side as an integer, so checkpoints load with `weights_only=True`, and
  they resume bit for bit.
- With `reverse_std`, `left` or `right` and a rank equal to the projected dimension the authors' factors do not
  broadcast; here there is one factor per column on the left side and per row on the right side, always.
- In bfloat16 the factors and norms are taken in float32 and the update is summed before it is added.
"""

from gnomon.optim.fira.galore import GaLoreAdamW
from gnomon.optim.fira.optimizer import Fira, FiraRMSProp, low_rank_groups
from gnomon.optim.fira.scaling import limit_growth, norm_based_scaling, scaling_factor

__all__ = [
    "Fira",
    "FiraRMSProp",
    "GaLoreAdamW",
    "limit_growth",
    "low_rank_groups",
    "norm_based_scaling",
    "scaling_factor",
]
