"""Attention modules of families whose positions are biases and that take no attention function: MPT and Bloom.

Each makes queries, keys and values with the family's own layers and leaves the rest to `attend`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import dropout
from transformers.models.bloom.modeling_bloom import BloomAttention
from transformers.models.mpt.modeling_mpt import MptAttention

from gnomon.context.lm_infinite.layout import Layout, attend

__all__ = ["ALIBI", "LambdaBloomAttention", "LambdaMptAttention"]


class LambdaMptAttention(MptAttention):
    """MPT's attention under the Lambda mask."""

    def forward(
        self,
        hidden_states: Tensor,
        position_bias: Tensor,
        cache: Any = None,
        attention_mask: Layout | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Return the output (B, T, hidden) and no weights."""
        assert isinstance(attention_mask, Layout)
        mixed = self.Wqkv(hidden_states)
        if self.clip_qkv:
            mixed = mixed.clamp(min=-self.clip_qkv, max=self.clip_qkv)
        shape = (*hidden_states.shape[:2], self.n_heads, self.head_dim)
        query, key, value = (t.reshape(shape).transpose(1, 2) for t in mixed.chunk(3, dim=2))
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        drop = self.attn_dropout_p if self.training else 0.0
        out = attend(attention_mask, query, key, value, self.softmax_scale, drop, self.layer_idx or 0)
        return self.out_proj(out.transpose(1, 2).flatten(2)), None


class LambdaBloomAttention(BloomAttention):
    """Bloom's attention under the Lambda mask."""

    def forward(
        self,
        hidden_states: Tensor,
        residual: Tensor,
        alibi: Tensor,
        attention_mask: Layout | None,
        layer_past: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Return the output (B, T, hidden), the residual added, and no weights."""
        assert isinstance(attention_mask, Layout)
        query, key, value = self._reshape(self.query_key_value(hidden_states))
        if layer_past is not None:
            key, value = layer_past.update(key, value, self.layer_idx)
        drop = self.attention_dropout.p if self.training else 0.0
        out = attend(attention_mask, query, key, value, self.inv_norm_factor, drop, self.layer_idx or 0)
        out = self.dense(out.transpose(1, 2).flatten(2))
        return residual + dropout(out, p=self.hidden_dropout, training=self.training), None


ALIBI: dict[type[nn.Module], type[nn.Module]] = {
    MptAttention: LambdaMptAttention,
    BloomAttention: LambdaBloomAttention,
}
