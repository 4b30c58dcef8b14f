"""LayerNorm scaling (LNS): multiply what every pre-norm of block l returns by ``1/sqrt(l)``.

In a Pre-LN model the variance of the residual stream grows with every block, up to exponentially. A block that adds
a branch of fixed size to a large stream changes it less and less: its Jacobian nears the identity, and deep blocks can
be removed almost for free ("the curse of depth"). Scaling the branch inputs by depth keeps the growth polynomial.

With the blocks counted from l = 1, both norms N1, N2 of block l and nothing else are scaled:

    h = x + Attn(s_l * N1(x)),   y = h + MLP(s_l * N2(h)),   s_l = 1 / sqrt(l)

The factor stands behind gain and bias; the norm before the head is not scaled. It is a constant: no parameter, no
hyper-parameter, no state-dict key. Under the paper's assumptions (weights independent, normal, mean zero) Pre-LN has
``Var(x_L)`` between order L and order exp(L), LNS between order L and order L^(2-e) with 1/2 <= e < 1.

Use

- Before training from scratch: ``apply_layernorm_scaling(model)``, or build an `LNSLlamaForCausalLM` from
  ``apply_layernorm_scaling(llama_config)``. Keep the plain N(0, 0.02^2) initialisation: shrinking the output
  projections by depth (GPT-2, Megatron, OLMo) together with LNS costs part of the gain, and a warning says so
  (``scale_init(model, "plain")`` undoes it). Exclude gains from weight decay: with decay, stock and scaled models
  regularise different quantities.
- After training: ``fold_layernorm_scaling(model)`` multiplies the gains by s_l (in float32, rounded once) and gives
  a stock checkpoint with equal logits for any engine. Fold BEFORE removing or inserting blocks: s_l follows the
  original depth.
- Continued training of a Pre-LN checkpoint: ``unfold_layernorm_scaling(model)`` (gains times sqrt(l), same function).
  Training differs from then on: the gains' effective learning rate is s_l times that of the stock model.
- It is a pre-training method; fine-tuning alone gains nothing from it. LoRA on a scaled model keeps the scale, the
  adapters see scaled inputs. It combines with QK-norm and muP.

Any Pre-LN model of transformers is accepted (Llama, Qwen, Mistral, GPT-2, GPT-NeoX, Phi, OPT, T5, ViT, mixtures of
experts, ...): the norms are found by what consumes their output, in one pass over fake tensors. Encoder and decoder
stacks are counted separately. In a mixture of experts the norm before the router is scaled too, so the router sees
scaled input. A block that is shared between depths takes the depth of the call. Post-LN models (BERT, Marian) and
models whose norms stand behind the sub-layers (OLMo 2) are refused. Gemma-style blocks are accepted with a warning:
their second norms are not scaled and undo most of the effect.

Cost: one multiplication a norm, under 1 % of a training step at 12 layers of width 768 and fused away by
torch.compile. Memory, checkpointing, DDP, FSDP2 and the KV cache are unaffected; apply before ``fully_shard``.

Save with ``gnomon.save_model`` and load with ``gnomon.load_model``: plain ``from_pretrained`` would load the weights
without the scales. The class `LNSLlamaForCausalLM` and folded models load anywhere.

The ablations of the paper (``position=``), LayerScale and SkipInit (`apply_layer_scale`, `apply_skip_init`) and the
initialisation baselines (`scale_init`) are here to compare with; `ResidualStreamMonitor` logs the variance per block.

Does not combine with other norm placements (mix-ln other than "pre").

Deviation from the authors' code: their release builds blocks without norms when asked for LNS (the name is compared
in the wrong case), so that its network is the embedding alone; what is here follows the paper's equation.
"""

from __future__ import annotations

from gnomon.nn.layernorm_scaling.apply import (
    apply_layer_scale,
    apply_layernorm_scaling,
    apply_skip_init,
    scale_init,
    unfold_layernorm_scaling,
)
from gnomon.nn.layernorm_scaling.fold import fold_layernorm_scaling
from gnomon.nn.layernorm_scaling.llama import LNSLlamaConfig, LNSLlamaForCausalLM, LNSLlamaModel
from gnomon.nn.layernorm_scaling.monitor import ResidualStreamMonitor
from gnomon.nn.layernorm_scaling.placement import depth_scale, depth_scales

__all__ = [
    "LNSLlamaConfig",
    "LNSLlamaForCausalLM",
    "LNSLlamaModel",
    "ResidualStreamMonitor",
    "apply_layer_scale",
    "apply_layernorm_scaling",
    "apply_skip_init",
    "depth_scale",
    "depth_scales",
    "fold_layernorm_scaling",
    "scale_init",
    "unfold_layernorm_scaling",
]
