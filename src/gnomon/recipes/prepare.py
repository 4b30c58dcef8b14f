"""From a recipe to its data, tokenizer and first model."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import Any

import torch

from gnomon import catalog
from gnomon.common import corpora, models
from gnomon.common.files import content_hash
from gnomon.common.text import train_tokenizer
from gnomon.errors import ConfigError, DataError, MethodError, ModelError
from gnomon.recipes.options import BUILTIN_METRICS
from gnomon.recipes.schema import SIZES, DataSpec, ModelSpec, Recipe, TrainStage
from gnomon.recipes.stages.context import Prepared
from gnomon.recipes.stages.train import build_optimizer

__all__ = ["build_model", "check_methods", "prepare_data", "source_hash"]

_ENOUGH = 2_000_000  # tokens that are read in any case, so that a small job sees more than the first documents


def prepare_data(recipe: Recipe, folder: Path | None = None) -> Prepared:
    """Load and tokenize the recipe's corpus.

    Parameters
    ----------
    recipe : Recipe
    folder : Path, optional
        Where rows that were set aside are written (``quarantine.jsonl``).

    Raises
    ------
    DataError
        When a part is shorter than one context, or the file cannot be used.
    """
    spec: DataSpec = recipe.data
    corpus = corpora.load(
        spec.corpus,
        text_field=spec.text_field,
        split=spec.split,
        validation=spec.validation,
        strict=spec.strict,
    )
    if recipe.model.path is not None:
        tokenizer: Any = models.load_tokenizer(recipe.model.path)
    else:
        tokenizer = train_tokenizer(corpus.train, recipe.model.vocab_size)
    needed = max((s.tokens for _, s in recipe.steps if isinstance(s, TrainStage)), default=0)
    train = corpus.tokens(tokenizer, "train", limit=max(_ENOUGH, 2 * needed))
    valid = corpus.tokens(tokenizer, "valid")
    for name, tokens in (("training", train), ("validation", valid)):
        if tokens.numel() < spec.context:
            raise DataError(
                f"the {name} part has {tokens.numel()} tokens, fewer than one context of {spec.context}. "
                "Give more text, or set data.context to a smaller number.",
                file=corpus.file or spec.corpus,
            )
    quarantine = corpus.write_quarantine(folder / "quarantine.jsonl") if folder is not None else None
    facts = {
        "source": spec.corpus,
        "sha256": corpus.sha256,
        "rows": corpus.rows,
        "train_tokens": train.numel(),
        "valid_tokens": valid.numel(),
        "quarantined": len(corpus.quarantined),
        "quarantine_file": quarantine.name if quarantine else None,
    }
    return Prepared(tokenizer, train, valid, corpus.valid, spec.context, facts)


def build_model(spec: ModelSpec, *, vocab_size: int, context: int, seed: int, meta: bool = False) -> Any:
    """Build or load the recipe's model.

    Parameters
    ----------
    spec : ModelSpec
    vocab_size : int
        Size of the tokenizer trained on the data; used by models built on the spot.
    context : int
        Tokens in one row; the model must have as many positions.
    seed : int
        Seeds fresh weights.
    meta : bool, default False
        Build without memory for the weights, to count them.

    Raises
    ------
    ModelError
        When there is no model at the given place.
    ConfigError
        When the model has fewer positions than the context, or an option does not exist.
    """
    device = torch.device("meta" if meta else "cpu")
    if spec.path is None:
        sizes = {**SIZES[spec.size or "tiny"], **spec.options}
        positions = sizes.pop("max_positions", max(256, context))
        try:
            with device:
                model = models.tiny(
                    spec.architecture or "llama", vocab_size=vocab_size, max_positions=positions, seed=seed, **sizes
                )
        except TypeError as error:
            raise ConfigError(f"model.options: {error}. Allowed: configuration values of the architecture.") from error
    elif spec.weights == "random" or meta:
        try:
            config = models.load_config(spec.path, **spec.options)
        except ModelError as error:
            raise ModelError(f"model.path: {error}") from error
        config._name_or_path = ""  # methods take a name for the sign of trained weights
        cls = models.model_class(config)
        with device, torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = cls(config)
    else:
        model = models.load_model(spec.path, **spec.options)
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and context > limit:
        raise ConfigError(f"data.context = {context}: this model has {limit} positions. Allowed: up to {limit}.")
    rows = model.get_input_embeddings().weight.shape[0]
    if vocab_size > rows:
        raise ModelError(
            f"the tokenizer has {vocab_size} entries, the model's embedding {rows}. Use the tokenizer that belongs to "
            "the model (its own files in the same folder)."
        )
    return model


def source_hash(spec: ModelSpec) -> str:
    """Return a hash of what the model starts from: its description, and the files of a local folder."""
    parts: list[Any] = [spec.model_dump(mode="json")]
    folder = Path(spec.path).expanduser() if spec.path else None
    if folder is not None and folder.is_dir():
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                digest = hashlib.sha256()
                with file.open("rb") as handle:
                    while block := handle.read(1 << 20):
                        digest.update(block)
                parts.append([str(file.relative_to(folder)), digest.hexdigest()])
    return content_hash(parts)


def check_methods(recipe: Recipe, model: Any) -> None:
    """Let each method that can check its options against the model do so before anything runs.

    Raises
    ------
    ConfigError
        With the place in the recipe and what the method says.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a method says it again when it runs, and then it is noted
        for index, (kind, stage) in enumerate(recipe.steps):
            for use in getattr(stage, "methods", []) or getattr(stage, "metrics", []):
                card = None if use.uses in BUILTIN_METRICS else catalog.get(use.uses)
                try:
                    if card is not None and "check" in card.recipe:
                        catalog.resolve(card.recipe["check"])(model, **use.with_)
                    elif card is not None and card.plugs == "optimizer" and isinstance(stage, TrainStage):
                        build_optimizer(stage, model)  # its state is made at the first step, so this costs nothing
                except (MethodError, ModelError) as error:
                    raise ConfigError(f"stages.{index}.{kind} ({use.uses}): {error}") from error
