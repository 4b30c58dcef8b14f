"""What a recipe may say. YAML and ``--set key=value`` both end in these models; an unknown key is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    GetJsonSchemaHandler,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from gnomon.errors import ConfigError, nearest

__all__ = [
    "STAGE_KINDS",
    "CompressStage",
    "DataSpec",
    "EvaluateStage",
    "ExtendStage",
    "MergeStage",
    "MethodUse",
    "ModelSpec",
    "Recipe",
    "SelectStage",
    "Stage",
    "TrainStage",
    "builtin_recipes",
    "json_schema",
    "load_recipe",
]

BUILTIN_PAIRS = ("unicode-categories",)  # corpora that are prompts with completions

STAGE_KINDS = ("select", "train", "compress", "extend", "merge", "evaluate")

SIZES: dict[str, dict[str, int]] = {
    "nano": {"hidden_size": 64, "num_layers": 4, "num_heads": 4},
    "tiny": {"hidden_size": 128, "num_layers": 8, "num_heads": 4},
    "small": {"hidden_size": 256, "num_layers": 12, "num_heads": 8},
    "60m": {"hidden_size": 512, "num_layers": 8, "num_heads": 8, "intermediate_size": 1376},
    "130m": {"hidden_size": 768, "num_layers": 12, "num_heads": 12, "intermediate_size": 2048},
    "350m": {"hidden_size": 1024, "num_layers": 24, "num_heads": 16, "intermediate_size": 2736},
    "1b": {"hidden_size": 2048, "num_layers": 24, "num_heads": 32, "intermediate_size": 5461},
}


class Strict(BaseModel):
    """Refuses unknown keys, naming the nearest known one."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    @model_validator(mode="before")
    @classmethod
    def _only_known_keys(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            known = {field.alias or name for name, field in cls.model_fields.items()}
            for key in value:
                if key not in known and key not in cls.model_fields:
                    raise ValueError(f"unknown key {key!r}. {nearest(str(key), known, noun='key')}")
        return value


class OrText(Strict):
    """A mapping that may also be written as one text, its most important key."""

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"anyOf": [{"type": "string"}, handler(core)]}


class ModelSpec(OrText):
    """Which model: a family built on the spot (`architecture`, `size`), or one that exists (`path`)."""

    architecture: str | None = Field(None, description="Family of a model built on the spot: llama, gpt2, qwen, ...")
    size: str | None = Field(None, description=f"Size of it: {', '.join(SIZES)}. Default tiny.")
    vocab_size: int = Field(2048, ge=257, description="Entries of the tokenizer trained on the data (built models).")
    path: str | None = Field(
        None, description="A model folder or hub id, or workbench: a small Llama trained on python-docs on the spot."
    )
    weights: Literal["pretrained", "random"] = Field(
        "pretrained", description="With `path`: use its weights, or its configuration alone with fresh weights."
    )
    options: dict[str, Any] = Field(default_factory=dict, description="Further configuration values.")

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_source(self) -> ModelSpec:
        if (self.architecture is None) == (self.path is None):
            raise ValueError("give either 'architecture' (a model built on the spot) or 'path' (one that exists)")
        if self.size is not None:
            if self.path is not None:
                raise ValueError("'size' goes with 'architecture'; a model at 'path' has its own size")
            if self.size not in SIZES:
                raise ValueError(f"there is no size {self.size!r}. {nearest(self.size, SIZES, noun='size')}")
        return self

    @property
    def from_scratch(self) -> bool:
        """Whether training starts at random weights."""
        return self.path is None or self.weights == "random"


class DataSpec(OrText):
    """Which text, and how it is cut."""

    corpus: str = Field(
        description="python-docs, a .txt/.jsonl/.parquet file, or a hub dataset id; with prompts and completions also "
        "a .csv/.tsv/.json file, or unicode-categories (built in)."
    )
    text_field: str | None = Field(None, description="Column that holds the text.")
    prompt_field: str | None = Field(None, description="Column with prompts; only their completions are learned.")
    completion_field: str | None = Field(None, description="Column with the completions that go with the prompts.")
    split: str = Field("train", description="Split of a hub dataset.")
    validation: float = Field(0.1, gt=0, lt=1, description="Share kept apart for evaluation.")
    strict: bool = Field(False, description="Refuse the data at the first row that cannot be used.")
    context: int = Field(128, ge=2, description="Tokens in one training row.")

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        return {"corpus": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _two_fields(self) -> DataSpec:
        if (self.prompt_field is None) != (self.completion_field is None):
            raise ValueError("'prompt_field' and 'completion_field' go together; give both or neither")
        if self.prompt_field is not None and self.text_field is not None:
            raise ValueError("'text_field' is for plain text, 'prompt_field' for prompts with completions; give one")
        return self

    @property
    def paired(self) -> bool:
        """Whether rows are prompts with completions."""
        return self.prompt_field is not None or self.corpus in BUILTIN_PAIRS


class MethodUse(OrText):
    """One method and its options."""

    uses: str = Field(description="Slug of the method, as `gnomon methods` lists it.")
    with_: dict[str, Any] = Field(default_factory=dict, alias="with", description="Its options.")

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        return {"uses": value} if isinstance(value, str) else value


class _MethodStage(Strict):
    methods: list[MethodUse] = Field(default_factory=list, description="Methods, in the order they are applied.")


class SelectStage(_MethodStage):
    """Choose which training rows the stages after it see; the model stays as it is."""


class TrainStage(_MethodStage):
    """Train (or go on training) with `transformers.Trainer`."""

    tokens: int | None = Field(None, ge=1, description="Training tokens; text is repeated when there is less.")
    epochs: float | None = Field(None, gt=0, description="Passes over the training rows, instead of `tokens`.")
    batch_size: int = Field(16, ge=1, description="Rows in one step, over all devices.")
    accumulate: int = Field(1, ge=1, description="Split each step's batch into this many passes.")
    lr: float = Field(
        1e-3, ge=0, description="Peak learning rate; optimizers and adapters may bring their own (with: {lr: ...})."
    )
    schedule: str = Field("cosine", description="Learning-rate schedule, by its transformers name.")
    warmup: float = Field(0.1, ge=0, lt=1, description="Share of the steps with rising learning rate.")
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, ge=0, description="Clip the gradient norm; 0 does not.")
    precision: Literal["float32", "bfloat16"] = Field("float32", description="bfloat16: autocast, float32 weights.")
    gradient_checkpointing: bool = False
    keep_zeros: bool = Field(True, description="Weights pruned by an earlier stage stay zero.")
    checkpoint_every: int = Field(0, ge=0, description="Steps between checkpoints; 0: a tenth of the stage.")
    report_to: list[str] = Field(default_factory=list, description="Trainer integrations: wandb, tensorboard, trackio.")

    @model_validator(mode="after")
    def _one_length(self) -> TrainStage:
        if (self.tokens is None) == (self.epochs is None):
            raise ValueError("give either 'tokens' or 'epochs'")
        return self


class CompressStage(_MethodStage):
    """Make the model smaller and repair it, with a few calibration rows."""

    calibration: int = Field(32, ge=1, description="Calibration rows, of `data.context` tokens.")


class ExtendStage(_MethodStage):
    """Change the trained model's structure for inference (longer context, cheaper attention)."""


class MergeStage(_MethodStage):
    """Merge models or checkpoints into one."""

    models: list[str] = Field(default_factory=list, description="Folders or hub ids to merge with the present model.")


class EvaluateStage(Strict):
    """Measure the model."""

    metrics: list[MethodUse] = Field(min_length=1, description="perplexity, or slugs of metrics.")
    tokens: int = Field(32_768, ge=2, description="At most this many validation tokens.")
    texts: int = Field(32, ge=1, description="At most this many validation texts, for metrics that take texts.")
    each_stage: bool = Field(True, description="Also measure after every stage before this one.")


Stage = SelectStage | TrainStage | CompressStage | ExtendStage | MergeStage | EvaluateStage


class _Select(Strict):
    select: SelectStage


class _Train(Strict):
    train: TrainStage


class _Compress(Strict):
    compress: CompressStage


class _Extend(Strict):
    extend: ExtendStage


class _Merge(Strict):
    merge: MergeStage


class _Evaluate(Strict):
    evaluate: EvaluateStage


def _stage_kind(value: Any) -> str:
    if isinstance(value, Mapping):
        return next(iter(value)) if len(value) == 1 else ", ".join(map(str, value)) or "nothing"
    return type(value).__name__.strip("_").lower() if isinstance(value, BaseModel) else str(value)


_AnyStage = Annotated[
    Annotated[_Select, Tag("select")]
    | Annotated[_Train, Tag("train")]
    | Annotated[_Compress, Tag("compress")]
    | Annotated[_Extend, Tag("extend")]
    | Annotated[_Merge, Tag("merge")]
    | Annotated[_Evaluate, Tag("evaluate")],
    Discriminator(_stage_kind),
]


class Recipe(Strict):
    """A whole job: a model, data, stages.

    Examples
    --------
    >>> recipe = Recipe.model_validate({
    ...     "name": "mine", "model": {"architecture": "llama"}, "data": "python-docs",
    ...     "stages": [{"train": {"tokens": 100_000}}]})
    >>> recipe.steps[0][0]
    'train'
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="Names the run folder.")
    model: ModelSpec
    data: DataSpec
    seed: int = Field(0, ge=0)
    seeds: int = Field(1, ge=1, description="Repeat everything with this many seeds, from `seed` on.")
    ablate: bool = Field(False, description="Also run every method's arm without it.")
    arm: str = Field("all", min_length=1, description="Name of the recipe as written, among its arms.")
    arms: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="Further arms: name -> what differs there, with keys as in --set (train.lr, nola.r, stages).",
    )
    stages: list[_AnyStage] = Field(min_length=1)

    @property
    def steps(self) -> list[tuple[str, Stage]]:
        """The stages as (kind, stage)."""
        return [(kind, getattr(entry, kind)) for entry in self.stages for kind in type(entry).model_fields]

    @model_validator(mode="after")
    def _arms_can_be_made(self) -> Recipe:
        if self.arm in self.arms:
            raise ValueError(f"arms.{self.arm}: this is the name of the recipe as written; give the arm another one")
        for name in self.arms:
            self.with_arm(name)
        return self

    def with_arm(self, name: str) -> Recipe:
        """Return the recipe with the changes of one of its arms, and without further arms.

        Raises
        ------
        ConfigError
            When a change leads nowhere or is not allowed.
        """
        from gnomon.recipes.overrides import apply_overrides

        whole = {**self.plain(), "arms": {}}
        try:
            changed = apply_overrides(whole, self.arms[name])
        except ConfigError as error:
            raise ConfigError(f"arms.{name}: {str(error).removeprefix('--set ')}") from error
        for key, value in changed.items():
            if key != "stages" and value != whole.get(key):
                raise ConfigError(f"arms.{name}: an arm changes stages, not {key!r}. Make that a recipe of its own.")
        return Recipe.parse({**changed, "arm": name}, f"arms.{name}")

    def plain(self) -> dict[str, Any]:
        """The recipe as resolved, every default filled in, JSON-plain."""
        return self.model_dump(mode="json", by_alias=True)

    @classmethod
    def parse(cls, value: Mapping[str, Any], where: str = "recipe") -> Recipe:
        """Check a mapping.

        Raises
        ------
        ConfigError
            Naming every place that is wrong, the value seen and what is allowed.
        """
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            raise ConfigError(_explain(error, where)) from error


_HOW_TO_GIVE = {
    "model": "; write it into the recipe, or give --set model=FOLDER_OR_HUB_ID",
    "data": "; write it into the recipe, or give --set data=TEXT_FILE",
}


def _explain(error: ValidationError, where: str) -> str:
    lines = []
    for item in error.errors():
        # The tag of a stage stands twice in the path: once for the union, once for the field.
        parts = [str(p) for i, p in enumerate(item["loc"]) if i == 0 or p != item["loc"][i - 1]]
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "union_tag_invalid":
            tag = item["ctx"]["tag"]
            message = f"there is no stage {tag!r}. {nearest(tag, STAGE_KINDS, noun='stage')}"
        elif item["type"] == "missing":
            message = "this key is missing" + _HOW_TO_GIVE.get(parts[0] if len(parts) == 1 else "", "")
        elif item["type"] not in ("value_error",):
            message = f"{message} (value seen: {item['input']!r})"
        lines.append(f"{'.'.join(parts)}: {message}" if parts else message)
    return f"{where}: " + "; ".join(dict.fromkeys(lines))


def builtin_recipes() -> dict[str, Path]:
    """Return the built-in recipes by name."""
    return {path.stem: path for path in sorted(Path(__file__).parent.glob("*.yaml"))}


def load_recipe(recipe: str | Path | Mapping[str, Any] | Recipe, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Load a recipe and put overrides into it.

    Parameters
    ----------
    recipe : str, Path, mapping or Recipe
        Name of a built-in recipe, a YAML file, or the content itself.
    overrides : mapping of str to value, optional
        Dotted key -> value: ``{"stages.0.train.tokens": 1000}``; a stage is also found by its kind
        (``train.tokens``), a method by its slug (``fira.rank``). ``model`` and ``data`` take a folder, hub id or file.

    Returns
    -------
    Recipe

    Raises
    ------
    ConfigError
        When there is no such recipe, it is no YAML, or a key or value is not allowed.
    """
    from gnomon.recipes.overrides import apply_overrides

    where = "recipe"
    if isinstance(recipe, Recipe):
        raw: Any = recipe.plain()
    elif isinstance(recipe, Mapping):
        raw = recipe
    else:
        builtin = builtin_recipes()
        path = builtin.get(str(recipe), Path(recipe))
        where = path.name
        if not path.is_file():
            hint = nearest(str(recipe), builtin, noun="built-in recipe")
            raise ConfigError(f"There is no recipe {str(recipe)!r}: no built-in of that name, no such file. {hint}")
        try:
            raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: not valid YAML ({error}). Mend the file.") from error
    if not isinstance(raw, Mapping):
        raise ConfigError(
            f"{where}: a recipe is a mapping with name, model, data, stages; this is {type(raw).__name__}."
        )
    return Recipe.parse(apply_overrides(raw, overrides or {}), where)


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of recipes, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema(by_alias=True)}
