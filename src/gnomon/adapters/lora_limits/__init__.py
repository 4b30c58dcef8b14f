"""Computational limits of LoRA: the norm of every attention head, and attention gradients in almost linear time.

The gradient of a LoRA factor at an attention layer passes through the softmax matrix, which takes L^2 time for L
tokens. The paper shows that it can be approximated in almost linear time while the largest entries of the adapted
queries, keys and values, Gamma, are of lower order than sqrt(log L), and that under the strong exponential time
hypothesis it cannot in general be once they are of higher order. That is a statement about the worst case and about
growing L. What a program can do is measure: the norms of a model's heads, the error of an approximation on its own
activations, and the time on a machine. This method does these three, and contains the approximation.

## The measurement

`lora_norm_bound(model, batches)` gives one row per layer and head (`to_csv`, `sort_values` and the rest are pandas'):

    Gamma_Q, Gamma_K, Gamma_V   largest entries; the scale 1 / sqrt(d) is divided evenly over Q and K
    Gamma_QK                    sqrt(max |q . k| / d), over the pairs a query sees
    threshold, tau              sqrt(log L); Gamma_QK / sqrt(log L)
    z_star                      max |q . k| after the mean of the keys was taken away (softmax does not change by it)
    g_bound                     smallest even g with 2 z^(g+1) / (g+1)! e^z <= eps for z = z_star
    g, error_output, error_gradient    smallest even g whose measured errors are at most eps, and these errors
    k1, L_cross                 C(d + g, g) features; c k1 d tokens, above which the polynomial is faster
    share_Q, share_K, share_V, adapter_share    largest entry of what adapters add over the largest entry

`verdict` is ``"approximate"`` where the measured error at g is at most eps and L is above L_cross, else ``"exact"``
(use exact attention), or ``"not applicable"`` where scores are not plain dot products: softcapping, ALiBi and other
biases, attention sinks, masks that are neither causal nor padding, and sliding windows shorter than the sequence.
`reason` says why in words. tau below 1 by itself says nothing about a given L, since the theorem hides constants: look
at the error, at k1 and at L_cross. Heads of today's models have d = 64 to 128, for which k1 is 2,145 to 8,385 at
degree 2 already, so the verdict on them is ``"exact"`` below 10^5 tokens. The regime of the theorem is d = O(log L).

Queries and keys are taken as attention gets them (after rotary embedding, projections split, queries normalised where
a family does so) from the attention function of transformers, so Llama, Qwen, Mistral, GPT-NeoX, GPT-2, BERT and all
others that use it are covered, with any attention implementation. What adapters add is the difference to the same
layer without them on the same input, so that any adapter of PEFT counts. On a model without adapters the share is 0.

```python
from gnomon.adapters.lora_limits import LimitsCallback, lora_norm_bound

table = lora_norm_bound(model, batches)                  # or limits_report(model, tokenizer, texts).summary()
trainer.add_callback(LimitsCallback(every=100))          # logs limits/tau_max, limits/adapter_share_max, ...
```

## The approximation

exp is replaced by its Taylor polynomial T_g of even degree g, which is positive everywhere, and
T_g(q . k) = <Phi(q), Phi(k)> with Phi all k1 monomials up to degree g, divided by sqrt(a!). With
P = D^-1 Phi_Q Phi_K^T, the parts of the gradient are chained so that no L x L matrix is made:

    dS_ij = P_ij (<dO_i, V_j> - <dO_i, O_i>)      dQ = dS K      dK = dS^T Q      dV = P^T dO
    dQ_i  = D_i^-1 Phi(Q_i) . T . [dO_i, -<dO_i, O_i>]       T = sum_j Phi(K_j) (x) [V_j, 1] (x) K_j

dK and dV likewise from sums over queries. Time O(L k1 d^2), memory O(k1 d^2) beside the inputs, since features are
made again chunk by chunk. Causal: exp inside a chunk, the polynomial between chunks. Padded keys are left out of all
sums. The gradients of the factors are then dB = s dQ^T X A^T and dA = s B^T dQ^T X.

- `poly_attention(q, k, v, degree)` and the module `PolyAttention(degree, center=True)`: attention with that backward.
- `approximate_lora_gradient(x, weights, factors, d_out, degree=...)`: dA and dB of one layer, with measured errors.
- `lora_gradient_errors(model, batch, degree)`: the error of every LoRA gradient with all layers approximated.
- `scaling_report(width, degree)`: error and time over L on this machine, the two exponents, the crossover, and the
  constant c for `lora_norm_bound(crossover=c)`.

The backward pass approximates the exact gradient; it is not the derivative of the polynomial forward pass (that one
has T_(g-1) in the place of T_g). Centring under a causal mask uses the mean of all keys, so the approximation's error
at a token depends on later ones; `center=False` avoids it. Half precision is brought to float32: a monomial of degree
8 does not fit float16. `span` takes Chebyshev interpolation instead of Taylor: a lower degree for one error, but the
normaliser may become negative, which is refused.

## Cost

A measurement is one forward pass, the q, k and v projections once more in layers with adapters, and the errors, which
are computed with dense weights: a few L x L products per degree and head, in groups of heads that bound the memory.
On one core the approximation is faster than `scaled_dot_product_attention`, forward and backward, from 500 to 1,000
tokens on for d = 8 and g = 2 and from about 2,000 for d = 16; with a causal mask, which halves exact attention, from
about 3,000 for d = 8, and not before 4,000 for d = 16.

## Does not compose with

Prompt-learning adapters and encoder-decoders as a whole (both refused; give `model.get_encoder()`). Adapters that are
merged are part of the weights, and their share counts as 0 with a warning. Double backward. Attention dropout.

## Where it differs from the paper

There is no public code of the authors. The paper bounds X (W + s B A) before positions are applied; here the entries
are those that enter the dot products. The theorems speak of entry-wise errors; tables give relative Frobenius errors,
and `approximate_lora_gradient` both.
"""

from gnomon.adapters.lora_limits.attention import MAX_FEATURES, PolyAttention, poly_attention
from gnomon.adapters.lora_limits.bound import lora_norm_bound
from gnomon.adapters.lora_limits.callback import LimitsCallback
from gnomon.adapters.lora_limits.features import (
    error_bound,
    exp_coefficients,
    feature_count,
    needed_degree,
    poly_features,
)
from gnomon.adapters.lora_limits.gradient import LoraGradient, approximate_lora_gradient
from gnomon.adapters.lora_limits.measure import (
    HeadScores,
    attention_gradients,
    head_scores,
    polynomial_gradients,
    relative_errors,
)
from gnomon.adapters.lora_limits.report import LimitsReport, limits_report
from gnomon.adapters.lora_limits.scaling import ScalingReport, scaling_report
from gnomon.adapters.lora_limits.training import lora_gradient_errors

__all__ = [
    "MAX_FEATURES",
    "HeadScores",
    "LimitsCallback",
    "LimitsReport",
    "LoraGradient",
    "PolyAttention",
    "ScalingReport",
    "approximate_lora_gradient",
    "attention_gradients",
    "error_bound",
    "exp_coefficients",
    "feature_count",
    "head_scores",
    "limits_report",
    "lora_gradient_errors",
    "lora_norm_bound",
    "needed_degree",
    "poly_attention",
    "poly_features",
    "polynomial_gradients",
    "relative_errors",
    "scaling_report",
]
