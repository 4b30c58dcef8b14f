"""MEDEC: what can be shown of it without a large model - which part of the task lies on the surface of the text.

The paper's own results compare large models with two doctors, who stay ahead of them. None of that can be measured on
a small machine, and no number here stands for it.
What is measured is what a bag of words learns from the validation notes: it names the error sentence of a note that is
known to have one far more often than chance, since errors stand in sentences that state a diagnosis or a treatment;
whether a note has an error it cannot tell, since notes come in pairs that differ in that sentence alone. So a
sentence accuracy close to the flag accuracy says little; the flag is the hard part.

The notes are taken from the folder that the environment variable GNOMON_SHARED_DATA names (`medec/ms_val.csv.gz` and
`medec/ms_test.csv.gz`, made of the files MEDEC-MS/*.csv of github.com/abachaa/MEDEC, CC BY 4.0).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from gnomon.claims.experiment import experiment
from gnomon.claims.real_data import real_file
from gnomon.evals.medec import Note, read_notes

__all__ = ["Surface", "bag_of_words", "error_sentence_above_chance", "location_is_easier_than_detection"]

_SHARE = 0.8  # of the vignettes, drawn anew with each seed, to train on


class Surface(NamedTuple):
    """What a bag of words makes of notes.

    ``first``: share of the notes with an error whose error sentence has the highest score. ``located``: probability
    that the error sentence has a higher score than another sentence of its note. ``detected``: probability that the
    highest score of a note with an error is above that of a note without (0.5: chance, both).
    """

    first: float
    located: float
    detected: float


@lru_cache(maxsize=2)
def _notes(split: str) -> tuple[Note, ...]:
    file = real_file(f"medec/ms_{split}.csv.gz", "MEDEC-MS/*.csv of github.com/abachaa/MEDEC, gzipped")
    return tuple(read_notes(file))


def bag_of_words(train: Sequence[Note], test: Sequence[Note]) -> Surface:
    """Train a logistic model on TF-IDF of single sentences (error or not) and rank the sentences of other notes.

    Parameters
    ----------
    train, test : sequence of Note

    Returns
    -------
    Surface
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score

    words = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    sentences = [sentence for note in train for _, sentence in note.sentences]
    errors = [int(number == note.sentence_id) for note in train for number, _ in note.sentences]
    model = LogisticRegression(C=4.0, class_weight="balanced", max_iter=300)
    model.fit(words.fit_transform(sentences), errors)
    scores = [model.decision_function(words.transform([s for _, s in note.sentences])) for note in test]
    flagged = [(score, note.sentence_id) for note, score in zip(test, scores, strict=True) if note.flag]
    first = [int(np.argmax(score)) == error for score, error in flagged]
    above = [roc_auc_score(np.arange(len(score)) == error, score) for score, error in flagged if len(score) > 1]
    detected = roc_auc_score([note.flag for note in test], [score.max() for score in scores])
    return Surface(float(np.mean(first)), float(np.mean(above)), float(detected))


@lru_cache(maxsize=16)
def _measured(seed: int) -> Surface:
    """Train on four fifths of the validation vignettes, drawn by the seed; the test notes are always the same."""
    vignettes = sorted({note.cluster for note in _notes("val")})
    drawn = np.random.default_rng(seed).permutation(len(vignettes))[: int(_SHARE * len(vignettes))]
    kept = {vignettes[i] for i in drawn}
    return bag_of_words([note for note in _notes("val") if note.cluster in kept], _notes("test"))


@experiment(
    arms=("bag-of-words", "last-sentence", "chance"),
    relation=("bag-of-words > chance by 0.5", "bag-of-words > last-sentence by 0.05"),
    unit="share of test notes with an error whose error sentence is named",
    seeds=(0, 1, 2, 3, 4),
    scales=("small",),
)
def error_sentence_above_chance(arm: str, seed: int, scale: str) -> float:
    """Where the error stands can be told from single sentences; chance is one over the number of sentences."""
    if arm == "bag-of-words":
        return _measured(seed).first
    flagged = [note for note in _notes("test") if note.flag]
    if arm == "chance":
        return float(np.mean([1 / len(note.sentences) for note in flagged]))
    return float(np.mean([note.sentence_id == len(note.sentences) - 1 for note in flagged]))


@experiment(
    arms=("location", "detection"),
    relation="location > detection by 0.3",
    unit="probability that what has the error is ranked above what has none (0.5: chance)",
    seeds=(0, 1, 2, 3, 4),
    scales=("small",),
)
def location_is_easier_than_detection(arm: str, seed: int, scale: str) -> float:
    """What names the error sentence of a note that has one does not tell whether a note has one."""
    found = _measured(seed)
    return found.located if arm == "location" else found.detected
