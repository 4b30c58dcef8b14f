"""The claims' tasks, and the method on real images and texts."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset

from gnomon.claims import data_diet as claims
from gnomon.common.text import byte_tokenizer
from gnomon.data.data_diet import ExampleScorer, Reading, TrainingPlan, noise_auc, permute_labels, score_examples
from gnomon.errors import DataError


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_one_seed_of_each_claim_holds() -> None:
    assert claims.finds_wrong_labels("el2n", 0) > 0.97
    assert claims.finds_wrong_labels("constant", 0) == 0.5
    assert claims.drops_wrong_labels("offset", 0) > claims.drops_wrong_labels("full", 0)
    assert claims.needs_redundancy("random", 0) > claims.needs_redundancy("hard", 0)


@pytest.mark.parametrize("name", ["digits", "teacher", "text"])
def test_tasks_are_drawn_by_their_seed_and_share_no_rows(name: str) -> None:
    task, again, other = claims.task_of(name, 0), claims.task_of(name, 0), claims.task_of(name, 1)
    assert torch.equal(task.train[0], again.train[0])
    assert task.train[0].shape != other.train[0].shape or not torch.equal(task.train[0], other.train[0])
    assert len(torch.unique(task.train[1])) == len(torch.unique(task.test[1]))
    if name != "text":  # short paragraphs may stand in the documentation twice
        rows = {tuple(row.tolist()) for row in task.train[0]}
        assert not any(tuple(row.tolist()) in rows for row in task.test[0][:50])


def test_the_images_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GNOMON_SHARED_DATA", raising=False)
    claims._images.cache_clear()
    with pytest.raises(DataError, match="Set GNOMON_SHARED_DATA to a folder that holds data-diet/cifar10_train"):
        claims.prunes_half("full", 0, "medium")


def test_real_images(shared_data: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GNOMON_SHARED_DATA", str(shared_data("data-diet").parent))
    claims._images.cache_clear()
    task = claims.task_of("cifar", 0)
    assert task.train[0].shape == (14_000, 3, 32, 32)
    assert task.test[1].bincount().tolist() == [350] * 10
    x, y = task.train[0][::700], task.train[1][::700]
    models = [task.model(0), task.model(1)]
    found = score_examples(models, (x, y), "grand", batch_size=6)
    with torch.no_grad():
        assert score_examples(models, (x, y), "el2n").shape == (20,)
    one = float(score_examples(models, (x[7:8], y[7:8]), "grand")[0])
    assert found[7] == pytest.approx(one, rel=1e-4)
    moved = claims.flip_and_shift((x,), torch.Generator().manual_seed(0))[0]
    assert moved.shape == x.shape
    assert not torch.equal(moved, x)
    claims._images.cache_clear()


def test_real_texts_with_wrong_labels(shared_data: Callable[[str], Path]) -> None:
    """SNIPS: short requests of seven intents, by the mean embedding of their bytes in threes."""
    with gzip.open(shared_data("llm2llm") / "snips_train.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines][::8]
    names = sorted({row["intent"] for row in rows})
    noisy = permute_labels(np.array([names.index(row["intent"]) for row in rows]), 0.1)
    tokenizer = byte_tokenizer()
    data = Dataset.from_dict({"text": [row["text"] for row in rows], "label": noisy.labels.tolist()})

    def collate(batch: list[dict[str, object]]) -> tuple[torch.Tensor, torch.Tensor]:
        features = torch.zeros(len(batch), 4096)
        for i, row in enumerate(batch):
            ids = tokenizer(str(row["text"]).lower())["input_ids"]
            for a, b, c in zip(ids, ids[1:], ids[2:], strict=False):
                features[i, (a * 961 + b * 31 + c) % 4096] = 1.0
        return features, torch.tensor([int(str(row["label"])) for row in batch])

    plan = TrainingPlan(epochs=6, batch_size=32)
    scorer = ExampleScorer(runs=2, plan=plan, at_epoch=3, reading=Reading(collate=collate))
    table = scorer.fit(claims.Perceptron(4096, 32, len(names)), data)
    assert noise_auc(table, noisy.changed) > 0.9
