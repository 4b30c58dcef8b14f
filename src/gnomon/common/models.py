"""Models: tiny ones of many families, the small trained workbench, and saving and loading what gnomon changed."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from filelock import FileLock
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from gnomon import catalog
from gnomon.common import corpora, surgery, text
from gnomon.common.files import atomic_folder, cache_dir, content_hash
from gnomon.common.layers import unwrap
from gnomon.common.peft_state import base_state, register_adapter
from gnomon.errors import ConfigError, ModelError, nearest

__all__ = [
    "ARCHITECTURES",
    "Workbench",
    "export_model",
    "load_config",
    "load_model",
    "load_tokenizer",
    "save_model",
    "tiny",
    "workbench",
    "workbench_folder",
]

log = logging.getLogger("gnomon")

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mistral": "MistralForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "gpt_neox": "GPTNeoXForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "bert": "BertForMaskedLM",
    "marian": "MarianMTModel",
}
_ADAPTER = "adapter"


def tiny(
    architecture: str = "llama",
    *,
    vocab_size: int = 256,
    hidden_size: int = 64,
    num_layers: int = 4,
    num_heads: int = 4,
    num_kv_heads: int | None = None,
    intermediate_size: int | None = None,
    max_positions: int = 256,
    tie: bool | None = None,
    seed: int = 0,
    **overrides: Any,
) -> PreTrainedModel:
    """Build a small randomly initialised Hugging Face model of a family, without a download.

    Parameters
    ----------
    architecture : str, default "llama"
        One of `ARCHITECTURES`.
    vocab_size, hidden_size, num_layers, num_heads, max_positions : int
        Sizes; the defaults give about 0.3M parameters.
    num_kv_heads : int, optional
        Key/value heads; default as many as `num_heads`, half of them for the Qwen family.
    intermediate_size : int, optional
        Width of the feed-forward layer; default 8/3 of `hidden_size` rounded up to a multiple of 8 for gated
        ones, 4 times otherwise.
    tie : bool, optional
        Tie input and output embeddings; default as the family does it (Qwen and GPT-2 tie).
    seed : int, default 0
        Seeds the initial weights; the global random state is left as it was.
    **overrides
        Further configuration values.

    Returns
    -------
    PreTrainedModel
        In float32, in training mode.

    Raises
    ------
    ConfigError
        When the family is unknown.

    Examples
    --------
    >>> tiny("gpt2").config.model_type
    'gpt2'
    """
    if architecture not in ARCHITECTURES:
        raise ConfigError(
            f"There is no architecture {architecture!r}. {nearest(architecture, ARCHITECTURES, noun='architecture')}"
        )
    if hidden_size % num_heads:
        raise ConfigError(f"hidden_size = {hidden_size} is not divisible by num_heads = {num_heads}.")
    cls = getattr(transformers, ARCHITECTURES[architecture])
    gated = intermediate_size or -(-hidden_size * 8 // 3 // 8) * 8
    plain = intermediate_size or 4 * hidden_size
    kv = num_kv_heads or (max(1, num_heads // 2) if architecture in ("qwen", "qwen3", "mixtral") else num_heads)
    tied = architecture in ("qwen", "gpt2", "gemma2", "bert", "marian") if tie is None else tie
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    common = {"vocab_size": vocab_size, "tie_word_embeddings": tied, **ids}
    options: dict[str, Any]
    if architecture == "gpt2":
        options = {"n_embd": hidden_size, "n_layer": num_layers, "n_head": num_heads, "n_inner": plain}
        options |= {"n_positions": max_positions, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    elif architecture == "marian":
        options = {"d_model": hidden_size, "encoder_layers": num_layers, "decoder_layers": num_layers}
        options |= {"encoder_attention_heads": num_heads, "decoder_attention_heads": num_heads}
        options |= {"encoder_ffn_dim": plain, "decoder_ffn_dim": plain, "max_position_embeddings": max_positions}
        options |= {"dropout": 0.0, "decoder_start_token_id": 0, "decoder_vocab_size": vocab_size}
    else:
        options = {"hidden_size": hidden_size, "num_hidden_layers": num_layers, "num_attention_heads": num_heads}
        options |= {"max_position_embeddings": max_positions}
        if architecture in ("gpt_neox", "bert"):
            options |= {"intermediate_size": plain}
        else:
            options |= {"intermediate_size": gated, "num_key_value_heads": kv, "head_dim": hidden_size // num_heads}
        if architecture == "bert":
            options |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        if architecture == "mixtral":
            options |= {"num_local_experts": 4, "num_experts_per_tok": 2}
    config = cls.config_class(**{**common, **options, **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return cls(config).train()


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return the transformers class a configuration belongs to; ModelError where there is none."""
    for name in getattr(config, "architectures", None) or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    mapping = transformers.AutoModelForCausalLM._model_mapping
    if type(config) in mapping:
        return mapping[type(config)]
    raise ModelError(
        f"no model class known for {config.model_type!r} (architectures: {getattr(config, 'architectures', None)}). "
        "Allowed: any architecture of transformers with a language-model head."
    )


def _register_type(where: str) -> None:
    """Import the method whose own model class stands at this place, so that transformers knows it."""
    model_type = PreTrainedConfig.get_config_dict(where)[0].get("model_type")
    for card in catalog.methods():
        if model_type in card.model_types:
            catalog.load(card.slug)


def _rebuilding(cls: type[PreTrainedModel], entries: list[dict[str, Any]]) -> type[PreTrainedModel]:
    """Return `cls` with the recorded surgery done at the end of its constructor, before weights are read."""

    def __init__(self: Any, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:  # noqa: N807 (it becomes the class's constructor)
        cls.__init__(self, config, *args, **kwargs)
        surgery.replay(self, entries)

    return type(cls.__name__, (cls,), {"__init__": __init__, "__module__": cls.__module__})


def load_config(path_or_hub_id: str | Path, **options: Any) -> PreTrainedConfig:
    """Load a model's configuration, also of the model classes that gnomon's methods bring.

    Parameters
    ----------
    path_or_hub_id : str or Path
    **options
        Configuration values to change.

    Raises
    ------
    ModelError
        When there is no model at that place.
    """
    where = str(path_or_hub_id)
    try:
        _register_type(where)
        return AutoConfig.from_pretrained(where, **options)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"{where!r} is no model: {_first_line(error)}. Give a folder with config.json and weights, or a hub id."
        ) from error


def load_model(path_or_hub_id: str | Path, **from_pretrained_kwargs: Any) -> PreTrainedModel:
    """Load a model with the surgery gnomon recorded in it, and its adapter if one was saved beside it.

    Parameters
    ----------
    path_or_hub_id : str or Path
        A folder written by `save_model`, any Hugging Face model folder, or a hub id.
    **from_pretrained_kwargs
        Passed on to ``from_pretrained`` (``dtype``, ``device_map``, ...).

    Returns
    -------
    PreTrainedModel or PeftModel
        In evaluation mode, as ``from_pretrained`` gives it.

    Raises
    ------
    ModelError
        When there is no model at that place, or its recorded surgery is not known to this version.
    """
    where = str(path_or_hub_id)
    config = load_config(where)
    cls = model_class(config)
    entries = list(getattr(config, "gnomon", None) or [])
    loader = _rebuilding(cls, entries) if entries else cls
    try:
        model = loader.from_pretrained(where, **from_pretrained_kwargs)
    except OSError as error:
        raise ModelError(
            f"{where!r} has a configuration but no readable weights: {_first_line(error)}. "
            "Give a folder that also holds model.safetensors."
        ) from error
    model.__class__ = cls
    adapter = Path(where) / _ADAPTER
    if (adapter / "adapter_config.json").is_file():
        import peft

        register_adapter(adapter)
        return peft.PeftModel.from_pretrained(model, str(adapter))
    return model


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def load_tokenizer(path_or_hub_id: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder or hub id.

    Raises
    ------
    ModelError
        When there is none.
    """
    try:
        return transformers.AutoTokenizer.from_pretrained(str(path_or_hub_id))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{str(path_or_hub_id)!r} has no usable tokenizer: {_first_line(error)}. "
            "Save the model's tokenizer into the same folder (tokenizer.save_pretrained)."
        ) from error


def save_model(model: nn.Module, folder: str | Path, tokenizer: PreTrainedTokenizerBase | None = None) -> Path:
    """Save a model so that `load_model` gives it back, whole or not at all.

    A PEFT model is saved as its base model with the adapter in the sub-folder ``adapter``; the base alone then
    loads with plain transformers, the adapter with plain PEFT.

    Parameters
    ----------
    model : PreTrainedModel or PeftModel
    folder : str or Path
        Replaced if it exists.
    tokenizer : optional
        Saved into the same folder.

    Returns
    -------
    Path
        The folder.
    """
    folder = Path(folder)
    base = unwrap(model)
    if not isinstance(base, PreTrainedModel):
        raise ModelError(f"{type(model).__name__} is no transformers model. Give a PreTrainedModel or a PeftModel.")
    with atomic_folder(folder) as part:
        if base is model or not hasattr(model, "peft_config"):
            base.save_pretrained(part)
        else:
            tie = getattr(base, "_tied_weights_keys", None) or {}
            state = {k: v for k, v in base_state(base).items() if not (base.config.tie_word_embeddings and k in tie)}
            base.save_pretrained(part, state_dict=state)
            # Embeddings are saved with the base; asking for them would look the base up on the hub.
            model.save_pretrained(part / _ADAPTER, save_embedding_layers=False)  # type: ignore[operator]
        if tokenizer is not None:
            tokenizer.save_pretrained(part)
    return folder


def export_model(model: nn.Module, folder: str | Path, tokenizer: PreTrainedTokenizerBase | None = None) -> Path:
    """Save a stock checkpoint that plain ``from_pretrained`` loads: adapters merged, recorded surgery folded.

    The given model is not changed.

    Raises
    ------
    ModelError
        When a recorded method cannot be folded.
    """
    import copy

    stock: Any = copy.deepcopy(model)
    if hasattr(stock, "merge_and_unload"):
        stock = stock.merge_and_unload()
    return save_model(surgery.fold_all(stock), folder, tokenizer)


class Workbench(NamedTuple):
    """A small trained model with its tokenizer and texts (1-D int64 token ids)."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    train_tokens: torch.Tensor
    valid_tokens: torch.Tensor


_WORKBENCH: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 192,
    "num_layers": 6,
    "num_heads": 6,
    "intermediate_size": 512,
    "max_positions": 256,
    "tie": True,
    "seed": 0,
}
_WORKBENCH_TRAINING: dict[str, Any] = {"context": 128, "batch": 8, "steps": 800, "lr": 3e-3}


def workbench() -> Workbench:
    """Return a 3M-parameter Llama trained on `python-docs`; trained at the first call (about 90 s), then cached.

    Returns
    -------
    Workbench
        Each call gives a fresh copy of the model, in evaluation mode.
    """
    folder = workbench_folder()
    corpus, tokenizer = corpora.load("python-docs"), load_tokenizer(folder)
    train, valid = corpus.tokens(tokenizer, "train"), corpus.tokens(tokenizer, "valid")
    return Workbench(load_model(folder).eval(), tokenizer, train, valid)


def workbench_folder() -> Path:
    """Return the folder with the workbench's model and tokenizer; trained at the first call (about 90 s)."""
    corpus = corpora.load("python-docs")
    key = content_hash([_WORKBENCH, _WORKBENCH_TRAINING, corpus.sha256, torch.__version__])
    folder = cache_dir() / f"workbench-{key}"
    cache_dir().mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / "config.json").is_file():
            log.info("training the workbench model once (about 90 s on two cores)")
            tokenizer = text.train_tokenizer(corpus.train, _WORKBENCH["vocab_size"])
            save_model(_train_workbench(corpus.tokens(tokenizer, "train")), folder, tokenizer)
    return folder


def _train_workbench(tokens: torch.Tensor) -> PreTrainedModel:
    plan = _WORKBENCH_TRAINING
    model = tiny("llama", **_WORKBENCH)
    rows = corpora.windows(tokens, plan["context"])
    dataset = [{"input_ids": row, "labels": row} for row in rows]
    with tempfile.TemporaryDirectory() as scratch, torch.random.fork_rng(devices=[]):
        arguments = transformers.TrainingArguments(
            output_dir=os.path.join(scratch, "out"),
            max_steps=plan["steps"],
            per_device_train_batch_size=plan["batch"],
            learning_rate=plan["lr"],
            lr_scheduler_type="cosine",
            warmup_steps=plan["steps"] // 10,
            weight_decay=0.0,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            seed=0,
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        )
        transformers.Trainer(model=model, args=arguments, train_dataset=dataset).train()
    return model.cpu().eval()
