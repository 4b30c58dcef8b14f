"""From a recipe to its data, tokenizer and first model."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import Any

import torch

from gnomon import catalog
from gnomon.common import corpora, models, pairs
from gnomon.common.files import content_hash
from gnomon.common.text import train_tokenizer
from gnomon.errors import ConfigError, DataError, MethodError, ModelError
from gnomon.recipes.options import BUILTIN_METRICS
from gnomon.recipes.schema import SIZES, DataSpec, ModelSpec, Recipe, TrainStage
from gnomon.recipes.stages.context import Prepared
from gnomon.recipes.stages.train import build_optimizer

__all__ = ["build_model", "check_methods", "prepare_data", "source_hash"]

WORKBENCH = "workbench"
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
    if recipe.data.paired:
        return _prepare_pairs(recipe, folder)
    spec: DataSpec = recipe.data
    corpus = corpora.load(
        spec.corpus,
        text_field=spec.text_field,
        split=spec.split,
        validation=spec.validation,
        strict=spec.strict,
    )
    tokenizer = _tokenizer(recipe.model, corpus.train)
    stages = [s for each in _with_arms(recipe) for _, s in each.steps if isinstance(s, TrainStage)]
    needed = max((s.tokens or 0 for s in stages), default=0)
    whole = any(s.epochs is not None for s in stages)
    train = corpus.tokens(tokenizer, "train", limit=None if whole else max(_ENOUGH, 2 * needed))
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


def _with_arms(recipe: Recipe) -> list[Recipe]:
    return [recipe, *(recipe.with_arm(name) for name in recipe.arms)]


def _tokenizer(spec: ModelSpec, texts: list[str]) -> Any:
    if spec.path is not None:
        return models.load_tokenizer(_place(spec.path))
    return train_tokenizer(texts, spec.vocab_size)


def _place(path: str) -> str:
    """Return where the model lies; the workbench is trained when it is first asked for."""
    if path == WORKBENCH and not Path(path).exists():
        return str(models.workbench_folder())
    return path


def _prepare_pairs(recipe: Recipe, folder: Path | None) -> Prepared:
    """Load prompts with completions; rows longer than the context are set aside."""
    spec = recipe.data
    fields = {"prompt_field": spec.prompt_field, "completion_field": spec.completion_field}
    found = pairs.load_pairs(
        spec.corpus,
        **{name: value for name, value in fields.items() if value is not None},
        split=spec.split,
        validation=spec.validation,
        strict=spec.strict,
    )
    tokenizer = _tokenizer(recipe.model, [f"{pair.prompt}{pair.completion}" for pair in found.train])
    kept: dict[str, tuple[tuple[pairs.Example, ...], tuple[pairs.Pair, ...]]] = {}
    long: list[corpora.Quarantined] = []
    for name, part in (("training", found.train), ("validation", found.valid)):
        coded = [(pairs.encode(pair, tokenizer), pair) for pair in part]
        fitting = [(example, pair) for example, pair in coded if len(example.ids) <= spec.context]
        for example, pair in coded:
            if len(example.ids) > spec.context:
                reason = f"{len(example.ids)} tokens, more than data.context = {spec.context}"
                long.append(corpora.Quarantined(pair.row, f"{name} row of {reason}", pair.prompt[:80]))
        if not fitting:
            raise DataError(
                f"all {len(part)} {name} rows are longer than data.context = {spec.context} tokens. Set it higher.",
                file=found.file or spec.corpus,
            )
        kept[name] = (tuple(e for e, _ in fitting), tuple(p for _, p in fitting))
    aside = [*found.quarantined, *long]
    if folder is not None and aside:
        corpora.write_quarantine(aside, folder / "quarantine.jsonl")
    streams = {name: torch.cat([example.ids for example in examples]) for name, (examples, _) in kept.items()}
    facts = {
        "source": spec.corpus,
        "sha256": found.sha256,
        "rows": len(found.train) + len(found.valid) - len(long),
        "train_tokens": streams["training"].numel(),
        "valid_tokens": streams["validation"].numel(),
        "quarantined": len(aside),
        "quarantine_file": "quarantine.jsonl" if folder is not None and aside else None,
    }
    texts = [f"{pair.prompt}{pair.completion}" for pair in kept["validation"][1]]
    return Prepared(
        tokenizer,
        streams["training"],
        streams["validation"],
        texts,
        spec.context,
        facts,
        train_examples=kept["training"][0],
        valid_examples=kept["validation"][0],
        valid_pairs=kept["validation"][1],
    )


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
            config = models.load_config(_place(spec.path), **spec.options)
        except ModelError as error:
            raise ModelError(f"model.path: {error}") from error
        config._name_or_path = ""  # methods take a name for the sign of trained weights
        cls = models.model_class(config)
        with device, torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = cls(config)
    else:
        model = models.load_model(_place(spec.path), **spec.options)
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
    folder = Path(_place(spec.path)).expanduser() if spec.path else None
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
        steps = [(each, i, *step) for each in _with_arms(recipe) for i, step in enumerate(each.steps)]
        for each, index, kind, stage in steps:
            arm = "" if each is recipe else f"arms.{each.arm}: "
            for use in getattr(stage, "methods", []) or getattr(stage, "metrics", []):
                card = None if use.uses in BUILTIN_METRICS else catalog.get(use.uses)
                try:
                    if card is not None and "check" in card.recipe:
                        catalog.resolve(card.recipe["check"])(model, **use.with_)
                    elif card is not None and card.plugs == "optimizer" and isinstance(stage, TrainStage):
                        build_optimizer(stage, model)  # its state is made at the first step, so this costs nothing
                except (MethodError, ModelError) as error:
                    raise ConfigError(f"{arm}stages.{index}.{kind} ({use.uses}): {error}") from error
