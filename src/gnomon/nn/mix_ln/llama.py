"""A Llama whose configuration carries the norm placement, for the Auto classes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar, cast

from huggingface_hub.dataclasses import strict
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedModel,
)

from gnomon.errors import ModelError
from gnomon.nn.mix_ln.apply import place_blocks
from gnomon.nn.mix_ln.blocks import FROM_SCRATCH
from gnomon.nn.mix_ln.initial import check_initial, initialise
from gnomon.nn.mix_ln.plan import MODEL_TYPE, BlockPlacement, Placement, block_placements, check_choice
from gnomon.nn.mix_ln.structure import read_blocks

__all__ = ["MixLNLlamaConfig", "MixLNLlamaForCausalLM", "MixLNLlamaModel"]

_REMOTE = "modeling_mix_ln"
_STUB = '''"""Lets the Auto classes load this folder with trust_remote_code=True wherever gnomon is installed."""

from gnomon.nn.mix_ln import MixLNLlamaConfig, MixLNLlamaForCausalLM, MixLNLlamaModel  # noqa: F401
'''


@strict
class MixLNLlamaConfig(LlamaConfig):
    """Configuration of a Llama with a norm placement; the other fields are those of `LlamaConfig`.

    Parameters
    ----------
    norm_placement : str, default "mix"
        See `apply_norm_placement`, also for the fields below.
    post_ratio : float, default 0.25
    num_post_layers : int, optional
    embed_std : float, optional
        Default ``initializer_range``, 0.02.
    scaled_init : bool, default False
    residual_scale : float, optional
    layer_placements : list of str, optional
        The placement of every block; filled in from the fields above.

    Raises
    ------
    MethodError
        A field that is unknown, out of range or contradicts another.
    ModelError
        When `layer_placements` has not one entry a block.

    Examples
    --------
    >>> MixLNLlamaConfig(num_hidden_layers=12).layer_placements[:4]
    ['post', 'post', 'post', 'pre']
    """

    model_type = MODEL_TYPE

    norm_placement: str = "mix"
    post_ratio: float | int = 0.25
    num_post_layers: int | None = None
    embed_std: float | int | None = None
    scaled_init: bool = False
    residual_scale: float | int | None = None
    layer_placements: list[str] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        placement = cast(Placement, self.norm_placement)
        check_choice(placement, self.post_ratio, self.num_post_layers, self.layer_placements, self.residual_scale)
        if self.layer_placements is None:
            count = self.num_hidden_layers
            planned = block_placements(count, placement, self.post_ratio, self.num_post_layers)
            self.layer_placements = list(planned)
        check_initial(self.embed_std, self.scaled_init, self.layer_placements)
        self.auto_map = {
            "AutoConfig": f"{_REMOTE}.MixLNLlamaConfig",
            "AutoModel": f"{_REMOTE}.MixLNLlamaModel",
            "AutoModelForCausalLM": f"{_REMOTE}.MixLNLlamaForCausalLM",
        }
        super().__post_init__(**kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Do nothing: ``auto_map`` names the installed package, so no code is copied."""

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """Save the configuration, and beside it the file that ``auto_map`` names."""
        saved = super().save_pretrained(save_directory, *args, **kwargs)
        (Path(save_directory) / f"{_REMOTE}.py").write_text(_STUB, encoding="utf-8")
        return saved


class _FromScratch:
    """What both classes share: their norms are in the weights they load, or the weights are a stock Llama's."""

    _auto_class: ClassVar[str | None] = None

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Do nothing: ``auto_map`` names the installed package, so no code is copied."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a model saved with its placement; weights of a stock Llama are refused.

        Raises
        ------
        ModelError
            When norms of the placement are missing in the weights.
        """
        wanted = kwargs.pop("output_loading_info", False)
        parent = cast(Any, super())
        model, info = parent.from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        missing = sorted(name for name in info["missing_keys"] if "layernorm" in name)
        if missing:
            raise ModelError(
                f"{str(pretrained_model_name_or_path)!r} has no {missing[0]!r} ({len(missing)} norms are missing): it "
                f"is a stock Llama, or has another placement. {FROM_SCRATCH}. Build the model with "
                f"{cls.__name__}(config) and train it."
            )
        return (model, info) if wanted else model


class MixLNLlamaModel(_FromScratch, LlamaModel):
    """`LlamaModel` with the norm placement of its configuration."""

    config_class = MixLNLlamaConfig

    def __init__(self, config: MixLNLlamaConfig) -> None:
        super().__init__(config)
        _build(self)


class MixLNLlamaForCausalLM(_FromScratch, LlamaForCausalLM):
    """`LlamaForCausalLM` with the norm placement of its configuration.

    Importing this module registers it, so ``AutoConfig``, ``AutoModel`` and ``AutoModelForCausalLM`` know
    ``model_type: mix_ln_llama``; a saved folder also loads with ``trust_remote_code=True`` in a program that has
    gnomon installed without importing it.

    Examples
    --------
    >>> sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_attention_heads=2, num_hidden_layers=4)
    >>> model = AutoModelForCausalLM.from_config(MixLNLlamaConfig(**sizes, num_post_layers=2))
    >>> [hasattr(block, "input_layernorm") for block in model.model.layers]
    [False, False, True, True]
    """

    config_class = MixLNLlamaConfig

    def __init__(self, config: MixLNLlamaConfig) -> None:
        super().__init__(config)
        _build(self)


def _build(model: PreTrainedModel) -> None:
    config = cast(MixLNLlamaConfig, model.config)
    kinds = cast("list[BlockPlacement]", config.layer_placements)
    if len(kinds) != config.num_hidden_layers:
        raise ModelError(
            f"layer_placements of this {MODEL_TYPE!r} configuration names {len(kinds)} blocks, num_hidden_layers is "
            f"{config.num_hidden_layers}. Set layer_placements to one placement a block, or build a new configuration."
        )
    parts = read_blocks(model)
    if not any(p.is_meta for p in model.parameters()):  # else weights are about to be read
        initialise(
            model, parts, kinds, embed_std=config.embed_std, scaled_init=config.scaled_init, generator=None
        )  # the global generator, as in every constructor of transformers
    scale = place_blocks(model, parts, kinds, config.residual_scale)
    if "deepnorm" in kinds:
        config.residual_scale = scale  # a removed block must not change it


AutoConfig.register(MODEL_TYPE, MixLNLlamaConfig, exist_ok=True)
AutoModel.register(MixLNLlamaConfig, MixLNLlamaModel, exist_ok=True)
AutoModelForCausalLM.register(MixLNLlamaConfig, MixLNLlamaForCausalLM, exist_ok=True)
