"""LM-Infinite: run a model with relative positions far beyond its training length, without training, in linear time.

Past the length they were trained for, models with RoPE or ALiBi break down: distances, and numbers of attended tokens,
appear that they have never seen, and the first tokens, which attend to almost nothing before them and carry most of
the attention, move out of reach. The method bounds all three. With L the training length, G the number of sinks,
d = i - j the distance of query i and key j:

    mask      key j is visible to query i  iff  0 <= d  and  (d < L or j < G)
    ceiling   the logit is computed at distance min(d, D), D = L: only the sinks are touched
    RoPE      near: <R(i) q, R(j) k> / sqrt(h)      sinks: <R(D) q, k> / sqrt(h)
    ALiBi     bias -m min(d, D)
    softmax   one, over window and sinks together

A text of at most L tokens gives exactly what the model gave before. Beyond that, the loss stays near its value inside
the training length and the cost per token stays constant.

Use

    apply_lm_infinite(model)                  # L from the configuration, G = 10
    model.generate(**inputs, max_new_tokens=100_000)
    remove_lm_infinite(model)                 # the model is what it was, bit for bit

or ``with using_lm_infinite(model, local=2048): ...``. `generate` makes a `LambdaCache` by itself: sinks and a ring of
the last L tokens, ``2 * layers * B * K * (G + L) * h`` numbers whatever the length. Keep the cache that the result
carries (``return_dict_in_generate=True``) and pass it on as ``past_key_values`` for the next turn. Forward passes with
any number of tokens go on from a `LambdaCache` or a `DynamicCache`; so a long prompt can be read in pieces.
`evaluate_nll_by_position` shows the loss along long texts.

Options that matter

- ``local``: the training length; more is new territory for the model, less is a smaller window.
- ``sinks``: 5 to 100 are equally good in the paper, 10 for generation, 100 for perplexity in the authors' code.
- ``top_k``: a text's middle is out of sight, which perplexity hardly notices and retrieval does. With k = 5 the last
  query of each forward pass, in layers from `top_k_from_layer` on, also attends to the k best keys of the middle per
  head, all scored at distance L/2. All keys are then kept (`DynamicCache`; a `LambdaCache` is refused), and earlier
  queries of the same pass do not see the middle.
- ``sink_distance``: "cache" is StreamingLLM's scheme (sink j at distance G + L - 1 - j), "true" the mask without the
  ceiling; both to compare with. ``sinks=0`` is a plain window.

Cost. Prefill takes O(T (L + G)) time instead of O(T^2), with no T x T table: on a CPU up to three flash-attention calls
per block of queries, merged by their log-sum-exp; elsewhere, and where gradients, dropout, ALiBi or unequal paddings
are needed, one masked `scaled_dot_product_attention` a block. A decoded token costs O(L + G) with no copy. Positions
beyond 65,536 are set back from time to time, since float32 angles of later ones lose digits; only differences count.

Padding goes on the left, with an attention mask: sinks are the first G real tokens of each row. Padding on the right
is fine for training. Refused: padding inside a row, packed sequences, masks of four dimensions, static caches,
models with learned or bucketed positions, with a sliding window of their own, or with rotation frequencies that change
with the length (dynamic, longrope). Linear, llama3 and yarn scaling are read from the model. Attention matrices are not
returned. Assisted decoding goes back in its cache, so `generate` keeps all keys for it.

It is plain softmax attention, so models can be trained under it; gradient checkpointing, PEFT adapters, half types and
grouped key heads work. Sequences of at most L tokens train as without it. Save with ``gnomon.save_model`` and load
with ``gnomon.load_model``: plain ``from_pretrained`` loads the model without the method.

Deviations from the authors' code: keys stay rotated at their positions and the sinks are turned back, where theirs
keeps keys unrotated and rotates the cache at each step; key heads are grouped, which theirs does not handle; D may be
larger than L, and then lies at min(d, D) exactly; ALiBi models generate with a cache. GPT-J's and CodeGen's tables of
angles, which end at the training length, are continued. `triangle_offset`, 0 everywhere in their experiments, is left
out.
"""

from __future__ import annotations

from gnomon.context.lm_infinite.apply import apply_lm_infinite, remove_lm_infinite, using_lm_infinite
from gnomon.context.lm_infinite.attention import Sinks, lambda_attention
from gnomon.context.lm_infinite.cache import LambdaCache
from gnomon.context.lm_infinite.nll import PositionNLL, evaluate_nll_by_position
from gnomon.context.lm_infinite.step import lambda_step, lambda_top_k

__all__ = [
    "LambdaCache",
    "PositionNLL",
    "Sinks",
    "apply_lm_infinite",
    "evaluate_nll_by_position",
    "lambda_attention",
    "lambda_step",
    "lambda_top_k",
    "remove_lm_infinite",
    "using_lm_infinite",
]
