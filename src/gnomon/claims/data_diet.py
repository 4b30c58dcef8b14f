"""Data Diet's claims re-measured: half of the rows suffices, wrong labels score highest, and where both end.

The paper trains ResNets on CIFAR for 200 epochs. At scale "small" scikit-learn's digits, a task labelled by three
random directions, and paragraphs of the Python documentation take a minute; "medium" prunes CIFAR-10 itself, 14,000
images of it, with a small convolutional network. As in the paper every subset is trained for the number of steps that
the whole set would get.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from gnomon.claims.experiment import experiment
from gnomon.common import corpora
from gnomon.data.data_diet import (
    ExampleScorer,
    ScoreTable,
    SubsetTrial,
    TrainingPlan,
    noise_auc,
    permute_labels,
    select,
)
from gnomon.errors import DataError

__all__ = ["drops_wrong_labels", "finds_wrong_labels", "needs_redundancy", "prunes_half", "task_of"]

_NOISE = 0.1
Factory = Callable[[int], nn.Module]


class Task(NamedTuple):
    """Rows to choose from, rows to judge by, the model, its training and when scores are taken."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    model: Factory
    plan: TrainingPlan
    at_epoch: float
    runs: int = 10
    trials: int = 3


class Perceptron:
    """Builds a network of one hidden layer for a seed."""

    def __init__(self, features: int, hidden: int, classes: int) -> None:
        self.sizes = features, hidden, classes

    def __call__(self, seed: int) -> nn.Module:
        features, hidden, classes = self.sizes
        return nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, classes))


def small_convnet(seed: int) -> nn.Module:
    """Three stages of two convolutions, 16 to 64 channels: 0.07M parameters."""
    layers: list[nn.Module] = []
    before = 3
    for width in (16, 32, 64):
        for stride in (1, 2):
            layers += [nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            before = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10))


def _divided(x: Tensor, y: Tensor, train: int, seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    first, rest = order[:train], order[train:]
    return (x[first], y[first]), (x[rest], y[rest])


def _digits(seed: int) -> Task:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    train, test = _divided(torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y), 1300, seed)
    return Task(train, test, Perceptron(64, 64, 10), TrainingPlan(epochs=30, batch_size=32), 4)


def _teacher(seed: int) -> Task:
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(3, 20, generator=generator)
    x = torch.randn(10_000, 20, generator=generator)
    train, test = _divided(x, (x @ directions.T).argmax(1), 6000, seed)
    return Task(train, test, Perceptron(20, 64, 3), TrainingPlan(epochs=10, batch_size=64), 2, runs=5, trials=2)


@lru_cache(maxsize=1)
def _paragraphs() -> tuple[list[str], np.ndarray]:
    """Paragraphs of the documentation, labelled by which of the 20 longest documents they stand in."""
    corpus = corpora.load("python-docs")
    documents = sorted([*corpus.train, *corpus.valid], key=len)[-20:]
    texts, labels = [], []
    for label, document in enumerate(documents):
        found = [part for part in document.split("\n\n") if len(part.split()) >= 8]
        texts += found
        labels += [label] * len(found)
    return texts, np.array(labels)


def _text(seed: int) -> Task:
    """25 paragraphs of each document to train on and up to 60 others to test on, as TF-IDF features."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    texts, labels = _paragraphs()
    generator = np.random.default_rng(seed)
    drawn = [generator.permutation(np.flatnonzero(labels == label)) for label in range(20)]
    parts = [np.concatenate([rows[:25] for rows in drawn]), np.concatenate([rows[25:85] for rows in drawn])]
    vectorizer = TfidfVectorizer(min_df=2, max_features=2000, sublinear_tf=True).fit([texts[i] for i in parts[0]])
    train, test = (
        (
            torch.tensor(vectorizer.transform([texts[i] for i in rows]).toarray(), dtype=torch.float32),
            torch.tensor(labels[rows]),
        )
        for rows in parts
    )
    model = Perceptron(train[0].shape[1], 64, 20)
    return Task(train, test, model, TrainingPlan(epochs=20, batch_size=32), 4, runs=5, trials=3)


@lru_cache(maxsize=1)
def _images() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Decode CIFAR-10 rows from two parquet files with the columns `label` and `jpeg`."""
    import pandas as pd
    from PIL import Image

    root = os.environ.get("GNOMON_SHARED_DATA")
    folder = Path(root or "") / "data-diet"
    if not root or not folder.is_dir():
        raise DataError(
            "the medium scale of this claim prunes CIFAR-10, which is not here. Set GNOMON_SHARED_DATA to a folder "
            "that holds data-diet/cifar10_train.parquet and cifar10_test.parquet (columns label, jpeg), or use "
            "--scale small."
        )
    found = []
    for part in ("train", "test"):
        table = pd.read_parquet(folder / f"cifar10_{part}.parquet")
        pixels = np.stack([np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB")) for jpeg in table["jpeg"]])
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
        mean, deviation = torch.tensor([0.491, 0.482, 0.447]), torch.tensor([0.247, 0.243, 0.262])
        found.append(
            ((images - mean[:, None, None]) / deviation[:, None, None], torch.tensor(table["label"].to_numpy()))
        )
    return found[0], found[1]


def flip_and_shift(inputs: tuple[Tensor, ...], generator: torch.Generator) -> tuple[Tensor, ...]:
    """Flip every other image and shift the batch by up to four pixels, as the paper does image by image."""
    (images,) = inputs
    flip = torch.rand(len(images), generator=generator) < 0.5
    images = torch.where(flip[:, None, None, None].to(images.device), images.flip(3), images)
    down, right = torch.randint(0, 9, (2,), generator=generator).tolist()
    return (nn.functional.pad(images, (4, 4, 4, 4), mode="reflect")[:, :, down : down + 32, right : right + 32],)


def _cifar(seed: int) -> Task:
    train, test = _images()
    plan = TrainingPlan(epochs=12, batch_size=128, optimizer="sgd", lr=0.1, weight_decay=5e-4, augment=flip_and_shift)
    return Task(train, test, small_convnet, plan, 3, runs=3, trials=1)


def task_of(name: str, seed: int) -> Task:
    """Return the task "digits", "teacher", "text" or "cifar", its rows drawn and divided by a seed."""
    tasks: dict[str, Callable[[int], Task]] = {"digits": _digits, "teacher": _teacher, "text": _text, "cifar": _cifar}
    return tasks[name](seed)


@lru_cache(maxsize=8)
def _noisy(name: str, seed: int) -> tuple[Task, np.ndarray]:
    task = task_of(name, seed)
    x, y = task.train
    noisy = permute_labels(y.numpy(), _NOISE, seed=seed)
    return task._replace(train=(x, torch.from_numpy(noisy.labels))), noisy.changed


@lru_cache(maxsize=8)
def _scores(name: str, seed: int, noise: bool = False) -> ScoreTable:
    task = _noisy(name, seed)[0] if noise else task_of(name, seed)
    scorer = ExampleScorer("el2n", runs=task.runs, at_epoch=task.at_epoch, plan=task.plan, seed=seed)
    return scorer.fit(task.model, task.train)


def _accuracy(task: Task, subsets: list[Any], seed: int) -> float:
    """Train one model on each subset, with a seed of its own; return the mean accuracy in percent."""
    found = []
    for trial, places in enumerate(subsets):
        judge = SubsetTrial(task.model, task.train, task.test, task.plan, seeds=[1000 * seed + trial])
        found.append(100 * judge(places))
    return float(np.mean(found))


def _subsets(
    task: Task, arm: str, scores: np.ndarray | None, keep: float, seed: int, balance: Literal["class"] | None = None
) -> list[Any]:
    """Name the rows of each training; random ones are drawn anew, since what was drawn is noise, too."""
    labels = task.train[1].numpy()
    if arm == "full":
        return [range(len(labels))] * task.trials
    given = np.zeros(len(labels)) if scores is None else scores
    order: Any = arm
    draws = [1000 * seed + trial for trial in range(task.trials)]
    # without balance no labels are given: the paper does not look at classes
    options: dict[str, Any] = {} if balance is None else {"balance": balance, "labels": labels}
    return [select(given, keep, order=order, seed=draw, **options) for draw in draws]


def _pruned(name: str, arm: str, seed: int, balance: Literal["class"] | None = None) -> float:
    task = task_of(name, seed)
    scores = _scores(name, seed).values if arm in ("hard", "easy") else None
    return _accuracy(task, _subsets(task, arm, scores, 0.5, seed, balance), seed)


@experiment(
    arms=("full", "hard", "random", "easy"),
    relation=("hard > random by 0.7", "random > easy"),
    unit="test accuracy with half of the rows, %",
    seeds=tuple(range(8)),
    scales=("small", "medium"),
)
def prunes_half(arm: str, seed: int, scale: str) -> float:
    """The hardest half by early EL2N trains a better model than a random half (digits; CIFAR-10 at medium)."""
    return _pruned("digits" if scale == "small" else "cifar", arm, seed)


@experiment(
    arms=("el2n", "constant"),
    relation="el2n > constant by 0.47",
    unit="area under the ROC curve for the rows with a wrong label",
    seeds=(0, 1, 2, 3, 4),
    scales=("small",),
)
def finds_wrong_labels(arm: str, seed: int, scale: str) -> float:
    """Early EL2N ranks the wrong labels highest: an area of 0.97, where scores that know nothing have 0.5."""
    wrong = _noisy("digits", seed)[1]
    return noise_auc(np.zeros(len(wrong)) if arm == "constant" else _scores("digits", seed, noise=True), wrong)


@experiment(
    arms=("full", "offset", "random"),
    relation=("offset > full by 1.0", "offset > random by 1.0"),
    unit="test accuracy when a tenth of the labels was permuted, %",
    seeds=(0, 1, 2, 3, 4),
    scales=("small",),
)
def drops_wrong_labels(arm: str, seed: int, scale: str) -> float:
    """With wrong labels among the rows, dropping the hardest tenth beats all rows and dropping a random tenth."""
    task, _ = _noisy("teacher", seed)
    if arm == "offset":
        scores = _scores("teacher", seed, noise=True).values
        return _accuracy(task, _subsets(task, "easy", scores, 1 - _NOISE, seed), seed)
    return _accuracy(task, _subsets(task, arm, None, 1 - _NOISE, seed), seed)


@experiment(
    arms=("full", "hard", "random", "easy"),
    relation="random > hard by 3",
    unit="test accuracy with half of the rows of every class, %",
    seeds=(0, 1, 2, 3, 4),
    scales=("small",),
)
def needs_redundancy(arm: str, seed: int, scale: str) -> float:
    """The limit: of a few hundred texts the hardest half of every class is worse than a random half."""
    return _pruned("text", arm, seed, balance="class")
