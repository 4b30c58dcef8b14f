"""Rows of any data set brought into batches a model can take, and the logits and losses that come back."""

from __future__ import annotations

import hashlib
import inspect
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import PreTrainedModel

from gnomon.common.layers import unwrap
from gnomon.data.data_diet.scores import IGNORED, check_labels, per_row
from gnomon.errors import DataError, MethodError, ModelError

__all__ = ["Batch", "Loss", "Rows", "aligned_logits", "as_batch", "device_of", "fingerprint", "is_causal", "row_losses"]

Loss = Callable[[Tensor, Tensor], Tensor]
_LABELS = ("labels", "label")
_PROBES = 64  # rows that go into a fingerprint


@dataclass(frozen=True)
class Batch:
    """What a model is called with, and the labels it is judged by.

    Attributes
    ----------
    inputs : tuple of Tensor, or dict of str to Tensor
        Positional or keyword arguments of the model; the first axis counts the rows.
    targets : Tensor (rows,) or (rows, tokens)
    shift : bool
        The logits at token t predict the label at t + 1.
    """

    inputs: tuple[Tensor, ...] | dict[str, Tensor]
    targets: Tensor
    shift: bool = False

    def __len__(self) -> int:
        return len(self.targets)

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device."""
        return Batch(self._each(lambda x: x.to(device)), self.targets.to(device), self.shift)

    def row(self, index: int) -> Batch:
        """Return one row as a batch of its own."""
        return Batch(self._each(lambda x: x[index : index + 1]), self.targets[index : index + 1], self.shift)

    def _each(self, change: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...] | dict[str, Tensor]:
        if isinstance(self.inputs, dict):
            return {name: change(value) for name, value in self.inputs.items()}
        return tuple(change(value) for value in self.inputs)


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the first parameter."""
    try:
        return next(model.parameters()).device
    except StopIteration:
        raise ModelError(f"{type(model).__name__} has no parameters, so there is nothing to score.") from None


def _is_hub_model(model: nn.Module) -> bool:
    return isinstance(unwrap(model), PreTrainedModel)


def is_causal(model: nn.Module) -> bool:
    """Tell whether the labels of a batch are those of a causal language model: equal to its inputs."""
    inner: Any = unwrap(model)
    return _is_hub_model(model) and inner.can_generate() and not inner.config.is_encoder_decoder


def as_batch(model: nn.Module, item: Any, *, shift: bool | None = None) -> Batch:
    """Bring one batch into form.

    Parameters
    ----------
    model : nn.Module
    item : Batch, LongTensor, pair or mapping
        ``(rows, tokens)`` token ids, which are their own labels; ``(inputs, targets)``; or a mapping with
        ``"labels"`` (or ``"label"``) beside the keyword arguments of the model. A causal language model takes its
        ``input_ids`` as labels where there are none, with padding left out.
    shift : bool, optional
        The logits at t predict the label at t + 1. Default: yes for causal language models of transformers and for
        bare token ids, else no.

    Returns
    -------
    Batch

    Raises
    ------
    DataError
        When there are no labels, or the item has another form.
    """
    if isinstance(item, Batch):
        return item
    if isinstance(item, Tensor):
        if item.dim() != 2 or item.is_floating_point():
            raise DataError(
                f"a tensor of shape {tuple(item.shape)} and dtype {item.dtype} has no labels. Give token ids of shape "
                "(rows, tokens), a pair (inputs, targets), or a mapping with 'labels'."
            )
        if _is_hub_model(model):
            return as_batch(model, {"input_ids": item}, shift=shift)
        return Batch((item,), item, True if shift is None else shift)
    if isinstance(item, Mapping):
        return _from_mapping(model, item, shift)
    if isinstance(item, (tuple, list)) and len(item) >= 2:
        *inputs, targets = (torch.as_tensor(part) for part in item)
        return Batch(tuple(inputs), targets, bool(shift))
    raise DataError(
        f"a {type(item).__name__} is no labelled batch. Give a pair (inputs, targets), a mapping with 'labels', or "
        "token ids of shape (rows, tokens)."
    )


def _from_mapping(model: nn.Module, item: Mapping[str, Any], shift: bool | None) -> Batch:
    inputs = {str(name): torch.as_tensor(value) for name, value in item.items()}
    found = [name for name in _LABELS if name in inputs]
    if len(found) > 1:
        raise DataError("a row has both 'labels' and 'label'. Keep one of them.")
    if found:
        targets = inputs.pop(found[0])
    elif "input_ids" in inputs and is_causal(model):
        targets = inputs["input_ids"]
        if "attention_mask" in inputs:
            targets = targets.masked_fill(inputs["attention_mask"] == 0, IGNORED)
    else:
        raise DataError(
            f"a row has no 'labels' (or 'label'), only {', '.join(inputs) or 'nothing'}. Scores compare what the model "
            "says with the label: add the column."
        )
    if _is_hub_model(model):  # the features of a data set often hold more than the model takes
        inner: Any = unwrap(model)
        taken = inspect.signature(inner.forward).parameters
        if not any(p.kind is p.VAR_KEYWORD and name == "inputs" for name, p in taken.items()):
            inputs = {name: value for name, value in inputs.items() if name in taken}
        if inner.config.is_encoder_decoder:
            inputs["labels"] = targets
    return Batch(inputs, targets, is_causal(model) if shift is None else shift)


def aligned_logits(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Run the model; return its logits and the targets they predict, brought into line.

    Returns
    -------
    (Tensor, Tensor)
        (rows, classes) and (rows,), or (rows, tokens, classes) and (rows, tokens).

    Raises
    ------
    ModelError
        When the model returns no logits.
    """
    if isinstance(batch.inputs, dict):
        cache = {"use_cache": False} if is_causal(model) else {}
        output = model(**batch.inputs, **cache)
    else:
        output = model(*batch.inputs)
    logits = getattr(output, "logits", output)
    if isinstance(logits, (tuple, list)):
        logits = logits[0]
    if not isinstance(logits, Tensor) or len(logits) != len(batch):
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ModelError(
            f"{type(unwrap(model)).__name__} returned {shape} for {len(batch)} rows. It must return logits (or an "
            "output with .logits) whose first axis counts the rows."
        )
    if batch.shift:
        if logits.dim() != 3 or batch.targets.dim() != 2 or batch.targets.shape[1] < 2:
            raise DataError(
                f"logits {tuple(logits.shape)} with labels {tuple(batch.targets.shape)} are no next-token prediction. "
                "Give rows of at least two tokens, or shift=False."
            )
        return logits[:, :-1], batch.targets[:, 1:]
    return logits, batch.targets


def row_losses(
    logits: Tensor,
    targets: Tensor,
    loss: Loss | None = None,
    *,
    check: bool = True,
    places: Sequence[int] | None = None,
) -> Tensor:
    """Return the loss of each row on its own: cross-entropy (of tokens: their mean), or the squared error.

    Parameters
    ----------
    logits, targets : Tensor
        As `aligned_logits` returns them. Floating targets are a regression: the mean squared error of the row.
    loss : callable, optional
        ``(logits, targets) -> (rows,)`` in place of these.
    check : bool, default True
        Refuse labels there are no classes for, and rows without any; False under `vmap`, where values cannot be seen.
    places : sequence of int, optional
        The numbers of the rows in their data set, for the messages.

    Returns
    -------
    Tensor (rows,)
    """
    if loss is not None:
        values = loss(logits, targets)
        if values.shape != targets.shape[:1]:
            raise MethodError(
                f"loss returned shape {tuple(values.shape)} for {len(targets)} rows. It must return one loss a row, "
                "without averaging over rows."
            )
        return values
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if targets.is_floating_point() or (logits.dim() == 2 and logits.shape[1] == 1):
        error = (logits.reshape(len(targets), -1) - targets.reshape(len(targets), -1)).square()
        return error.mean(1)
    if check:
        check_labels(logits, targets, places)
    flat = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), reduction="none")
    used = targets != IGNORED
    if check:
        return per_row(flat.reshape(targets.shape), used, places)
    return flat.reshape(len(targets), -1).sum(1) / used.reshape(len(targets), -1).sum(1)


class Rows:
    """A data set whose rows can be taken by their numbers.

    Parameters
    ----------
    dataset : LongTensor (n, tokens), pair of arrays (inputs, labels), Dataset, or sequence of rows
        Rows are pairs ``(input, label)`` or mappings. A `datasets.Dataset` is read by column.
    collate : callable, optional
        List of rows -> batch (such as a `DataCollatorWithPadding`); default: stack, and pad token ids on the right.

    Raises
    ------
    DataError
        When it has no length, or none of these forms.
    """

    def __init__(self, dataset: Any, collate: Callable[[list[Any]], Any] | None = None) -> None:
        self.dataset = dataset
        self.collate = collate
        arrays = isinstance(dataset, tuple) and len(dataset) == 2 and all(map(_is_array, dataset))
        self.columns: tuple[Tensor, ...] | None = None
        if isinstance(dataset, Tensor) or arrays:
            columns = (dataset,) if isinstance(dataset, Tensor) else tuple(map(torch.as_tensor, dataset))
            if len({len(column) for column in columns}) > 1:
                raise DataError(f"inputs have {len(columns[0])} rows, labels {len(columns[1])}. They must be equal.")
            self.columns = columns
        elif isinstance(dataset, torch.utils.data.TensorDataset) and collate is None:
            self.columns = dataset.tensors
        elif not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")) or isinstance(
            dataset, (str, Mapping)
        ):
            raise DataError(
                f"a {type(dataset).__name__} is no data set that can be scored. Give one with a length and rows by "
                "number: a datasets.Dataset, a torch Dataset, a list of rows, (inputs, labels), or token ids (n, T). "
                "An iterable data set must be read into a list first."
            )
        if len(self) == 0:
            raise DataError("the data set has no rows. Give at least one.")

    def __len__(self) -> int:
        return len(self.columns[0]) if self.columns is not None else len(self.dataset)

    def raw(self, places: Sequence[int]) -> Any:
        """Return rows as the data set gives them: tensors of a tensor data set, else a list of rows."""
        if self.columns is not None:
            index = torch.as_tensor(places, dtype=torch.long)
            taken = tuple(column[index.to(column.device)] for column in self.columns)
            return taken[0] if len(taken) == 1 else taken
        return [self.dataset[int(place)] for place in places]

    def take(self, model: nn.Module, places: Sequence[int], *, shift: bool | None = None) -> Batch:
        """Return rows as a `Batch` on the model's device."""
        rows = self.raw(places)
        if self.collate is not None:
            rows = self.collate(list(rows) if self.columns is None else [self._single(int(i)) for i in places])
        elif self.columns is None:
            rows = _stack(rows, places)
        return as_batch(model, rows, shift=shift).to(device_of(model))

    def _single(self, place: int) -> Any:
        assert self.columns is not None
        return self.columns[0][place] if len(self.columns) == 1 else tuple(column[place] for column in self.columns)

    def column(self, name: str) -> np.ndarray:
        """Return an integer column of a data set of mappings, such as the row ids.

        Raises
        ------
        DataError
            When a row has no such column, or a number occurs twice in it.
        """
        if hasattr(self.dataset, "column_names") and name in self.dataset.column_names:
            values = np.asarray(self.dataset[name][:])
        else:
            try:
                values = np.asarray([self.dataset[i][name] for i in range(len(self))])
            except (KeyError, TypeError, IndexError) as error:
                raise DataError(f"the rows have no column {name!r}. Name the column that holds the row ids.") from error
        if not np.issubdtype(values.dtype, np.integer):
            raise DataError(f"the column {name!r} holds {values.dtype}, not whole numbers. Row ids are integers.")
        unique, counts = np.unique(values, return_counts=True)
        if len(unique) < len(values):
            twice = ", ".join(map(str, unique[counts > 1][:10]))
            raise DataError(f"row ids occur more than once in {name!r}: {twice}. Every row needs an id of its own.")
        return values.astype(np.int64)


def _is_array(value: Any) -> bool:
    return isinstance(value, (Tensor, np.ndarray))


def _stack(rows: list[Any], places: Sequence[int]) -> Any:
    first = rows[0]
    if isinstance(first, Mapping):
        return _stack_mappings(rows, places)
    if isinstance(first, (tuple, list)) and len(first) >= 2:
        return tuple(_column([row[i] for row in rows], f"part {i}", places) for i in range(len(first)))
    if isinstance(first, Tensor):
        return _column(rows, "the token ids", places)
    raise DataError(
        f"row {places[0]} is a {type(first).__name__}. Rows are pairs (input, label) or mappings with 'labels'; give "
        "collate= for anything else."
    )


def _stack_mappings(rows: list[Any], places: Sequence[int]) -> dict[str, Tensor]:
    """Stack the columns that are numbers; token columns of unequal length are padded, and masked by what pads them."""
    columns = {name: [row[name] for row in rows] for name in rows[0] if not isinstance(rows[0][name], (str, bytes))}
    ids = columns.get("input_ids")
    if ids is None or len({len(row) for row in ids}) == 1:
        return {name: _column(values, repr(name), places) for name, values in columns.items()}
    lengths = [len(row) for row in ids]
    columns.setdefault("attention_mask", [torch.ones(n, dtype=torch.long) for n in lengths])
    padded = {}
    for name, values in columns.items():
        tensors = [torch.as_tensor(value) for value in values]
        if [tensor.shape[0] if tensor.dim() else 0 for tensor in tensors] == lengths:
            fill = IGNORED if name in _LABELS else 0
            padded[name] = nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=fill)
        else:
            padded[name] = _column(values, repr(name), places)
    return padded


def _column(values: list[Any], name: str, places: Sequence[int]) -> Tensor:
    try:
        return torch.stack([torch.as_tensor(value) for value in values])
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{name} of rows {places[0]} to {places[-1]} does not make one tensor ({error}). Give collate=, or leave "
            "columns out that are no numbers of one shape."
        ) from error


def fingerprint(rows: Rows) -> str:
    """Return a hash of the number of rows and of up to 64 of them, evenly spread: it changes when rows move."""
    digest = hashlib.sha256(str(len(rows)).encode())
    for place in np.unique(np.linspace(0, len(rows) - 1, _PROBES).round().astype(int)):
        _feed(digest, rows.raw([int(place)]))
    return digest.hexdigest()


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        value = value.detach().cpu().float().numpy() if value.dtype == torch.bfloat16 else value.detach().cpu().numpy()
    if isinstance(value, np.ndarray):
        digest.update(str((value.dtype, value.shape)).encode() + np.ascontiguousarray(value).tobytes())
    elif isinstance(value, Mapping):
        for key in sorted(value):
            digest.update(str(key).encode())
            _feed(digest, value[key])
    elif isinstance(value, (list, tuple)):
        for item in value:
            _feed(digest, item)
    elif hasattr(value, "tobytes"):
        digest.update(value.tobytes())
    elif value is None or isinstance(value, (str, int, float, bool, bytes)):
        digest.update(repr(value).encode())
    else:
        digest.update(pickle.dumps(value))
