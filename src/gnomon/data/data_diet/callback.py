"""Scores taken while a `transformers.Trainer` trains: forgetting events and EL2N of the batches it sees anyway."""

from __future__ import annotations

import io
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gnomon.common.ranks import ranks
from gnomon.data.data_diet.forgetting import ForgettingTable
from gnomon.data.data_diet.rows import Rows, fingerprint, is_causal
from gnomon.data.data_diet.scores import IGNORED, logit_scores
from gnomon.data.data_diet.table import ScoreTable
from gnomon.errors import ConfigError, DataError, GnomonWarning, MethodError

__all__ = ["DataDietCallback", "IndexCollator", "with_row_ids"]

_FILE = "data_diet.npz"


def with_row_ids(dataset: Any, column: str = "row_id") -> Any:
    """Return a `datasets.Dataset` with a column that numbers its rows from 0.

    Examples
    --------
    >>> from datasets import Dataset
    >>> with_row_ids(Dataset.from_dict({"label": [1, 0]}))["row_id"][:]
    [0, 1]
    """
    return dataset.add_column(column, list(range(len(dataset))))


class IndexCollator:
    """Carries the row ids past a collator that does not know them.

    Parameters
    ----------
    collator : callable
        List of rows -> batch, such as `DataCollatorWithPadding`.
    column : str, default "row_id"

    Examples
    --------
    >>> from transformers import default_data_collator
    >>> IndexCollator(default_data_collator)([{"row_id": 7, "label": 1}])
    {'labels': tensor([1]), 'row_id': tensor([7])}
    """

    def __init__(self, collator: Callable[[list[Any]], Any], column: str = "row_id") -> None:
        self.collator, self.column = collator, column

    def __call__(self, features: list[dict[str, Any]]) -> Any:
        """Collate the rest and put the ids back."""
        missing = [i for i, row in enumerate(features) if self.column not in row]
        if len(missing) == len(features):  # a set without ids, such as the one for evaluation
            return self.collator(features)
        if missing:
            raise DataError(f"{len(missing)} rows of a batch have no {self.column!r}. Number all rows: with_row_ids.")
        ids = torch.tensor([int(row[self.column]) for row in features])
        batch = self.collator([{k: v for k, v in row.items() if k != self.column} for row in features])
        batch[self.column] = ids
        return batch


class DataDietCallback(TrainerCallback):
    """Counts forgetting events and averages EL2N while a `Trainer` trains, at the cost of a softmax a batch.

    Both come from the train-mode logits of the forward pass that makes the loss, before the step: dropout and
    augmentation are in them, and a row counts when it is in a batch. (`ExampleScorer` takes EL2N in evaluation mode.)

    Parameters
    ----------
    rows : int
        Rows of the training set; the ids are 0 to rows - 1.
    id_column : str, default "row_id"
        The column with the ids: see `with_row_ids` and `IndexCollator`. The `Trainer` must keep it:
        ``remove_unused_columns=False``.
    from_step, until_step : int, optional
        Average EL2N over these steps only; default: all. Early steps are the paper's; forgetting takes all.

    Attributes
    ----------
    table : ForgettingTable

    Notes
    -----
    State is written into each checkpoint and read when training resumes. On several ranks the batches are put
    together at the end of an epoch, in the order of the steps.

    Examples
    --------
    >>> DataDietCallback(rows=100).table.events.sum()
    np.int64(0)
    """

    def __init__(
        self, rows: int, *, id_column: str = "row_id", from_step: int = 0, until_step: int | None = None
    ) -> None:
        if from_step < 0 or (until_step is not None and until_step <= from_step):
            raise MethodError(f"from_step = {from_step}, until_step = {until_step}: these are no steps at all.")
        self.table = ForgettingTable(rows)
        self.id_column = id_column
        self.from_step, self.until_step = from_step, until_step
        self.sums, self.counts = np.zeros(rows), np.zeros(rows, dtype=np.int64)
        self._log: list[tuple[int, np.ndarray, np.ndarray | None, np.ndarray | None]] = []
        self._handles: list[Any] = []
        self._ids: Tensor | None = None
        self._step = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Watch the model's forward passes; go on from the checkpoint when training resumes."""
        if args.remove_unused_columns:
            raise ConfigError(
                f"remove_unused_columns=True drops the column {self.id_column!r}, and without it rows cannot be told "
                "apart. Set TrainingArguments(remove_unused_columns=False)."
            )
        model: nn.Module = kwargs["model"]
        self._step = state.global_step
        if state.global_step > 0:
            self._resume(Path(args.output_dir) / f"checkpoint-{state.global_step}" / _FILE)
        self._remove()
        self._handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, with_kwargs=True),
        ]

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the step."""
        self._step = state.global_step

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        self._ids = kwargs.pop(self.id_column, None)
        if model.training and self._ids is None:
            raise DataError(
                f"A training batch has no {self.id_column!r}, so its rows cannot be told apart. Add the column "
                "(with_row_ids) and carry it through the collator (IndexCollator)."
            )
        return args, kwargs

    @torch.no_grad()
    def _after(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        ids, self._ids = self._ids, None
        labels = kwargs.get("labels")
        logits = getattr(output, "logits", None)
        if ids is None or not model.training or labels is None or logits is None:
            return
        logits = logits.detach()
        if is_causal(model):
            logits, labels = logits[:, :-1], labels[:, 1:]
        numbers = ids.reshape(-1).cpu().numpy()
        _, first = np.unique(numbers, return_index=True)  # samplers that fill the last batch repeat rows
        keep = torch.from_numpy(np.sort(first)).to(logits.device)
        numbers, logits, labels = numbers[np.sort(first)], logits[keep], labels[keep]
        correct = (logits.argmax(1) == labels).cpu().numpy() if labels.dim() == 1 else None
        scores = None
        if self.from_step <= self._step and (self.until_step is None or self._step < self.until_step):
            usable = (labels != IGNORED).reshape(len(labels), -1).any(1)
            scores = np.full(len(labels), np.nan)
            if bool(usable.any()):
                found = logit_scores(logits[usable], labels[usable], "el2n")
                scores[usable.cpu().numpy()] = found.double().cpu().numpy()
        self._log.append((self._step, numbers, correct, scores))

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Enter what was seen since the last time."""
        self._flush()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the counts into the checkpoint."""
        self._flush()
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            table = self.table
            fields = {"events": table.events, "seen": table.seen, "learnt": table.learnt, "correct": table.correct}
            self._write(folder / _FILE, {**fields, "sums": self.sums, "counts": self.counts})

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Enter the rest and let go of the model."""
        self._flush()
        self._remove()

    def _flush(self) -> None:
        log = gather_object(self._log) if ranks().num_processes > 1 else self._log
        for _, numbers, correct, scores in sorted(log, key=lambda entry: entry[0]):
            if len(numbers) and (numbers.min() < 0 or numbers.max() >= len(self.counts)):
                raise DataError(
                    f"row id {int(numbers.max())} is outside 0 to {len(self.counts) - 1}. Give rows= the size of the "
                    "training set, and ids that number it from 0."
                )
            if correct is not None:
                self.table.update(numbers, correct)
            if scores is not None:
                known = ~np.isnan(scores)
                self.sums[numbers[known]] += scores[known]
                self.counts[numbers[known]] += 1
        self._log = []

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def scores(self, method: Literal["forgetting", "el2n"] = "forgetting", dataset: Any = None) -> ScoreTable:
        """Return the scores so far; nan for rows that were not seen.

        Parameters
        ----------
        method : {"forgetting", "el2n"}
        dataset : data set, optional
            The rows, for their fingerprint.

        Raises
        ------
        MethodError
            When there is no such method.
        """
        if method not in ("forgetting", "el2n"):
            raise MethodError(f"method = {method!r}. Allowed: 'forgetting', 'el2n'.")
        self._check_flushed()
        if method == "forgetting":
            values = np.where(self.table.seen > 0, self.table.scores(), np.nan)
        else:
            values = np.divide(self.sums, self.counts, out=np.full(len(self.sums), np.nan), where=self.counts > 0)
        mark = "" if dataset is None else fingerprint(Rows(dataset))
        return ScoreTable(values[None], method, np.arange(len(values)), mark)

    def _check_flushed(self) -> None:
        if self._log and ranks().num_processes == 1:
            self._flush()

    def _write(self, path: Path, fields: dict[str, np.ndarray]) -> None:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            np.savez_compressed(file, **fields)  # type: ignore[arg-type]
        os.replace(name, path)

    def _resume(self, path: Path) -> None:
        if not path.is_file():
            warnings.warn(
                f"There is no {path}, so the counts start at the step from which training resumes.",
                GnomonWarning,
                stacklevel=3,
            )
            return
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as found:
            if len(found["sums"]) != len(self.sums):
                raise DataError(f"it holds {len(found['sums'])} rows, the callback {len(self.sums)}.", file=path)
            for name in ("events", "seen", "learnt", "correct"):
                setattr(self.table, name, found[name].copy())
            self.sums, self.counts = found["sums"].copy(), found["counts"].copy()
