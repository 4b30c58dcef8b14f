"""Mix-LN: the first blocks of a decoder are Post-LN, the others Pre-LN.

In a Pre-LN model the residual stream grows with depth and gradients fall with it, so that deep blocks do little. In a
Post-LN model every sum is normalised and it is the early blocks whose gradients fade, in large or deep models until
training fails. Mix-LN makes a few early blocks Post-LN, which evens out the gradients, and keeps the deep ones Pre-LN,
which keeps training stable.

With x the input of a block, Attn and MLP its sub-layers, and blocks counted from 0:

    Pre-LN:     h = x + Attn(N1(x)),        y = h + MLP(N2(h))
    Post-LN:    h = N1(x + Attn(x)),        y = N2(h + MLP(h))
    Mix-LN:     Post-LN where l < P, else Pre-LN,  P = floor(post_ratio * L)
    Sandwich:   h = x + N2(Attn(N1(x))),    y = h + N4(MLP(N3(h)))
    DeepNorm:   h = N1(a x + Attn(x)),      y = N2(a h + MLP(h)),   a = (2L)^(1/4)

The norm before the head stays in all of them. DeepNorm comes with its initial weights: Xavier-normal with gain
``(8L)^(-1/4)`` for value, output and MLP projections and gain 1 for query and key.

Use

- ``apply_norm_placement(model, "mix", post_ratio=0.25)`` on a freshly built model, or build a `MixLNLlamaForCausalLM`
  from a `MixLNLlamaConfig`, which the Auto classes know. Then train it as any other. The paper uses a quarter of the
  blocks (2 of 32 at 7B), Adam without weight decay, a linear warm-up over 10 % of the steps and a cosine to 10 % of
  the peak. It is no conversion: trained weights and stock checkpoints are refused.
- ``layer_report(model, batches)`` gives one row a block: gradient norm, variance of the output, angular distance and
  the loss without the block; ``angular_map`` the distances of all pairs of blocks. They work on stock models too.
  `gnomon.common.depth` has the parts, with ``remove_block`` to delete a block for good.
- ``BlockGradientMonitor`` is a Trainer callback that logs the gradient norm of every block before clipping. It warns
  of a warm-up under 2 % and of a run whose loss stays at the entropy of the token frequencies (perplexity about 1400
  with the paper's vocabulary): Post-LN blocks collapse there when the learning rate is too high.

Options that matter: ``post_ratio`` (at 1B the paper finds 16 to 42 % better than Pre-LN, 50 % and more worse);
``embed_std`` (0.02; the authors' released code draws embeddings with standard deviation 0.632, and in the paper's
Table 8 that alone removes nearly all of the gain); ``scaled_init`` (output projections smaller by ``1/sqrt(2L)``).
All other placements are there to compare with: ``"pre_post"`` is the reversed mix.

Names: a Post-LN block has ``post_attention_layernorm`` and ``post_feedforward_layernorm``, both behind the sums, and
no ``input_layernorm``; in a stock Llama ``post_attention_layernorm`` stands in front of the MLP. The number of
parameters is that of the stock model (a sandwich has two norms more a block).

Accepted are decoders whose blocks hold attention, a feed-forward layer, the norm in front of each and perhaps
dropouts, and compute the Pre-LN equations bit for bit on two tokens: Llama, Qwen, Mistral, Mixtral, GPT-2 and
look-alikes, GPT-NeoX with ``use_parallel_residual=False``. Refused with the reason: parallel residuals, blocks with
other norms (Gemma 2, OLMo 2) or residual factors (Granite), BERT. OLMo 2's norms stand inside the residual branch,
which is not Post-LN. The initialisations need dense sub-layers.

Cost: the stock model's, in time, memory and KV cache. Gradient checkpointing, torch.compile, generation, FSDP
(``_no_split_modules`` names the new block classes) and recorded hidden states work; apply before ``fully_shard``.

Save with ``gnomon.save_model`` and load with ``gnomon.load_model``. A `MixLNLlamaForCausalLM` also loads with
``AutoModelForCausalLM`` once ``gnomon.nn.mix_ln`` is imported, or with ``trust_remote_code=True`` where gnomon is
installed.

Does not combine with LayerNorm scaling, which multiplies pre-norms. A follow-up paper of the same group reports that
Mix-LN diverges at 350M and 1B when trained longer; keep an eye on the monitor.

Deviations from the authors' code: the placement is part of the model and not an environment variable; DeepNorm is that
of its paper (the released baseline has the factor 2.828 at every depth and the gain ``(8L)^(+1/4)``; the former is
``residual_scale=2.828``); padding is masked in attention; angles are row-wise cosines, NaN for a zero vector (the code
has 0.5) and taken at the last token that is no padding; losses are averaged over tokens (the code divides by the
number of batches plus one).
"""

from __future__ import annotations

from gnomon.nn.mix_ln.apply import apply_norm_placement
from gnomon.nn.mix_ln.llama import MixLNLlamaConfig, MixLNLlamaForCausalLM, MixLNLlamaModel
from gnomon.nn.mix_ln.monitor import BlockGradientMonitor
from gnomon.nn.mix_ln.plan import block_placements, deepnorm_constants, post_layer_count
from gnomon.nn.mix_ln.report import angular_map, layer_report

__all__ = [
    "BlockGradientMonitor",
    "MixLNLlamaConfig",
    "MixLNLlamaForCausalLM",
    "MixLNLlamaModel",
    "angular_map",
    "apply_norm_placement",
    "block_placements",
    "deepnorm_constants",
    "layer_report",
    "post_layer_count",
]
