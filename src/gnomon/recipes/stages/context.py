"""What a stage is given beside the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gnomon.common.corpora import windows
from gnomon.common.engine import Engine
from gnomon.common.pairs import Example, Pair
from gnomon.errors import GnomonError, MethodError, ModelError
from gnomon.progress import Progress
from gnomon.recipes.options import Lazy, bind, call_of, split_options
from gnomon.recipes.schema import MethodUse

__all__ = ["Prepared", "StageContext"]


@dataclass(frozen=True)
class Prepared:
    """The data of a run: token streams, validation texts and the tokenizer; for prompts with completions also those.

    Attributes
    ----------
    train_examples, valid_examples : tuple of Example
        Prompts with completions as token ids; empty for plain text.
    valid_pairs : tuple of Pair
        The validation rows as text.
    """

    tokenizer: Any
    train_tokens: torch.Tensor
    valid_tokens: torch.Tensor
    valid_texts: list[str]
    context: int
    facts: Mapping[str, Any]
    train_examples: tuple[Example, ...] = ()
    valid_examples: tuple[Example, ...] = ()
    valid_pairs: tuple[Pair, ...] = ()

    @property
    def paired(self) -> bool:
        """Whether rows are prompts with completions."""
        return bool(self.train_examples)


@dataclass
class StageContext:
    """One stage of one arm with one seed.

    Attributes
    ----------
    data : Prepared
    seed : int
    kind : str
        Of the stage.
    work : Path
        The stage's own folder, for checkpoints.
    label : str
        For progress: arm, seed and stage.
    progress : Progress
    event : callable
        Takes a dict and appends it to the run's ``metrics.jsonl``.
    reload : callable
        Loads another copy of the model as it was at the start of the stage.
    selected : Path, optional
        File with the row numbers that the last select stage before this one kept.
    engine : {"local", "ray"}
        Where independent work of the stage runs.
    """

    data: Prepared
    seed: int
    kind: str
    work: Path
    label: str
    progress: Progress
    event: Callable[[dict[str, Any]], None]
    reload: Callable[[], Any]
    selected: Path | None = None
    engine: Engine = "local"

    def kept(self) -> torch.Tensor | None:
        """Return the numbers of the training rows that a select stage kept, int64, ascending; None: all."""
        return None if self.selected is None else torch.from_numpy(np.load(self.selected))

    def rows(self) -> torch.Tensor:
        """Return the training rows as int64 (rows, context): all windows of the text, or those that were selected."""
        rows, kept = windows(self.data.train_tokens, self.data.context), self.kept()
        return rows if kept is None else rows[kept]

    def calibration(self, rows: int) -> torch.Tensor:
        """Return `rows` training windows as int64 (rows, context), drawn with the run's seed."""
        all_rows = self.rows()
        generator = torch.Generator().manual_seed(self.seed)
        return all_rows[torch.randperm(len(all_rows), generator=generator)[:rows]]

    def apply(self, use: MethodUse, model: Any, offered: Mapping[str, Any]) -> tuple[Any, list[dict[str, Any]]]:
        """Call a method that changes the model; return the model and the facts per layer."""
        result, layers = self.call(use, model, offered)
        return (model if result is None else result), layers

    def call(self, use: MethodUse, model: Any, offered: Mapping[str, Any]) -> tuple[Any, list[dict[str, Any]]]:
        """Call a method on the model by parameter name; return its result and the facts per layer."""
        layers: list[dict[str, Any]] = []
        with self.progress.task(f"{self.label} {use.uses}", _layer_count(model)) as task:

            def on_layer(name: str, facts: Mapping[str, float]) -> None:
                plain = {k: float(v) for k, v in facts.items()}
                layers.append({"name": name, "method": use.uses, "facts": plain})
                task.advance(note=name)

            everything = {
                "model": model,
                "compressed_model": model,
                "model_or_config": model,
                "original_model": Lazy(self.reload),
                "tokenizer": self.data.tokenizer,
                "seed": self.seed,
                "on_layer": on_layer,
                "engine": self.engine,
                **offered,
            }
            entry = call_of(use.uses, self.kind)
            try:
                options = split_options(use.uses, use.with_)[0] if self.kind == "train" else use.with_
                result = entry(**bind(entry, everything, options))
            except GnomonError as error:
                if isinstance(error, (MethodError, ModelError)):
                    raise type(error)(f"{use.uses}: {error}") from error
                raise
            task.update(task.total)
        return result, layers


def _layer_count(model: Any) -> int:
    from gnomon.common.layers import decoder_blocks, linear_layers

    try:
        return sum(len(linear_layers(block)) for block in decoder_blocks(model)) or 1
    except ModelError:
        return 1
