"""How many parameters the law counts: the weight matrices of the blocks, without embeddings, head, norms, biases."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gnomon.errors import MethodError, ModelError

_ROUTERS = {"gate", "router", "shared_expert_gate"}  # not counted by the paper

__all__ = ["ParameterCount", "count_parameters", "dense_parameters", "flops_per_token"]


@dataclass(frozen=True)
class ParameterCount:
    """What a model consists of.

    Attributes
    ----------
    non_embedding : int
        Weight matrices of the blocks, all experts: the N of the law.
    active : int
        Those that one token passes through; equal to `non_embedding` for a dense model.
    embedding : int
        Everything outside the blocks with two dimensions: token and position tables and the head; a tied one once.
    layers, width, attention_width : int
        Blocks, hidden size, and heads times their size.
    moe : bool
        Whether the blocks hold experts.
    """

    non_embedding: int
    active: int
    embedding: int
    layers: int
    width: int
    attention_width: int
    moe: bool = False

    def flops_per_token(self, seq_len: int) -> float:
        """FLOPs of forward and backward pass per token: ``6 * active + 12 * layers * attention width * seq_len``."""
        return 6.0 * self.active + 12.0 * self.layers * self.attention_width * seq_len


def dense_parameters(
    hidden: int,
    intermediate: int,
    layers: int,
    *,
    heads: int | None = None,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    gated: bool = True,
) -> int:
    """Return N of a dense stack: ``layers * (attention + 3 * hidden * intermediate)``.

    Attention is ``4 * hidden^2``, or with grouped queries ``hidden * (2 * heads + 2 * kv_heads) * head_dim``.

    Parameters
    ----------
    hidden, intermediate, layers : int
        Width, width of the feed-forward layer, blocks.
    heads, kv_heads : int, optional
        Query heads and key/value heads; default multi-head attention.
    head_dim : int, optional
        Default ``hidden / heads``.
    gated : bool, default True
        Three feed-forward matrices (SwiGLU); otherwise two.

    Returns
    -------
    int

    Raises
    ------
    MethodError
        When a size is not positive, or `kv_heads` comes without `heads`.

    Examples
    --------
    >>> dense_parameters(960, 9368, 7)
    214663680
    """
    given = {"hidden": hidden, "intermediate": intermediate, "layers": layers}
    given |= {k: v for k, v in (("heads", heads), ("kv_heads", kv_heads), ("head_dim", head_dim)) if v is not None}
    for name, value in given.items():
        if value < 1:
            raise MethodError(f"{name} = {value}: a size is 1 or more.")
    if heads is None and (kv_heads is not None or head_dim is not None):
        raise MethodError("kv_heads and head_dim go with heads, which is missing.")
    attention = 4 * hidden * hidden
    if heads is not None:
        size = head_dim or hidden // heads
        attention = hidden * size * (2 * heads + 2 * (kv_heads or heads))
    return layers * (attention + (3 if gated else 2) * hidden * intermediate)


def flops_per_token(hidden: int, intermediate: int, layers: int, seq_len: int) -> float:
    """Return the paper's M = 6 * (4 h + 3 ffn + 2 seq) * L * h, FLOPs per token of a dense stack.

    Compute is then C = M * D; the usual C = 6 N D leaves out the attention scores.

    Parameters
    ----------
    hidden, intermediate, layers, seq_len : int

    Returns
    -------
    float

    Examples
    --------
    >>> flops_per_token(960, 9368, 7, 2048) / (6 * dense_parameters(960, 9368, 7))
    1.1282...
    """
    return 6.0 * (4 * hidden + 3 * intermediate + 2 * seq_len) * layers * hidden


def count_parameters(model_or_config: Any) -> ParameterCount:
    """Count what a model or its configuration holds; a configuration is built without memory for the weights.

    Parameters
    ----------
    model_or_config : PreTrainedModel, PeftModel or PreTrainedConfig
        A decoder of transformers. Adapters are not counted.

    Returns
    -------
    ParameterCount

    Raises
    ------
    ModelError
        When it is neither, has no stack of blocks, or is an encoder-decoder.

    Examples
    --------
    >>> from gnomon.common.models import tiny
    >>> count_parameters(tiny("llama", hidden_size=64, num_layers=2, intermediate_size=128)).non_embedding
    81920
    """
    import torch
    from transformers import AutoModelForCausalLM, PreTrainedConfig

    from gnomon.common.layers import decoder_blocks, unwrap

    model = model_or_config
    if isinstance(model, PreTrainedConfig):
        _refuse_two_stacks(model)
        try:
            with torch.device("meta"), torch.random.fork_rng(devices=[]):
                model = AutoModelForCausalLM.from_config(model.get_text_config())
        except (ValueError, KeyError) as error:
            raise ModelError(
                f"{type(model_or_config).__name__} ({model_or_config.model_type!r}) describes no decoder that "
                "transformers can build. Give a decoder's configuration, or the number of non-embedding parameters."
            ) from error
    if not isinstance(model, torch.nn.Module):
        raise ModelError(
            f"{type(model_or_config).__name__} is neither a model nor a configuration. Give one of transformers, or "
            "call step_law with the number of non-embedding parameters."
        )
    whole = unwrap(model)
    config: Any = getattr(whole, "config", None)
    if config is None:
        raise ModelError(f"{type(whole).__name__} has no configuration. Give a model of transformers.")
    _refuse_two_stacks(config)
    config = config.get_text_config()
    blocks = decoder_blocks(whole)
    added = [f"{name}." for name, module in whole.named_modules() if hasattr(module, "base_layer")]
    own = {id(p) for p in blocks.parameters()}
    inside = experts = tables = 0
    for name, parameter in whole.named_parameters():
        adapter = any(name.startswith(prefix) for prefix in added) and ".base_layer." not in name
        if parameter.ndim < 2 or adapter:
            continue
        if not parameter.is_floating_point():
            raise ModelError(
                f"{name} is stored as {parameter.dtype}: the weights are packed, so their number cannot be read off. "
                "Give the model's configuration."
            )
        if id(parameter) not in own:
            tables += parameter.numel()
        elif not _ROUTERS & set(name.split(".")):
            inside += parameter.numel()
            experts += parameter.numel() if ".experts." in name else 0
    width = int(config.hidden_size)
    heads = int(getattr(config, "num_attention_heads", 1))
    size = getattr(config, "head_dim", None) or width // heads
    return ParameterCount(
        non_embedding=inside,
        active=inside - experts + round(experts * _active_share(config)) if experts else inside,
        embedding=tables,
        layers=len(blocks),
        width=width,
        attention_width=heads * int(size),
        moe=experts > 0,
    )


def _refuse_two_stacks(config: Any) -> None:
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{config.model_type!r} is an encoder-decoder. The law was fitted on decoders; allowed: causal language "
            "models. Or call step_law with a number of parameters, at your own risk."
        )


def _active_share(config: Any) -> float:
    """Return the share of the routed experts that one token uses."""
    names = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    count = next((getattr(config, n) for n in names if isinstance(getattr(config, n, None), int)), 0)
    chosen = next(
        (getattr(config, n) for n in ("num_experts_per_tok", "moe_k", "top_k") if getattr(config, n, None)), 0
    )
    return min(1.0, chosen / count) if count and chosen else 1.0
