"""The claims' arms on invented notes, and what they say where the notes are missing."""

from __future__ import annotations

import numpy as np
import pytest

from gnomon.claims import medec as claims
from gnomon.errors import DataError
from gnomon.evals.medec import Note


def invented(count: int, seed: int) -> list[Note]:
    """Pairs of notes whose one telling sentence says 'diagnosed', with and without an error in it."""
    generator, notes = np.random.default_rng(seed), []
    for i in range(count):
        place, flag = int(generator.integers(4)), i % 2
        texts = [f"he has finding {generator.integers(30)} today" for _ in range(4)]
        texts[place] = f"he is diagnosed with disease {generator.integers(30)}"
        notes.append(Note(f"n-{i}", tuple(enumerate(texts)), flag, place if flag else -1, "x", cluster=f"c{i // 2}"))
    return notes


def test_a_bag_of_words_locates_what_a_word_gives_away_and_detects_nothing():
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    found = claims.bag_of_words(invented(60, 0), invented(60, 1))
    assert found.first > 0.9
    assert found.located > 0.9
    assert 0.25 < found.detected < 0.75
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002
    assert claims.bag_of_words(invented(60, 0), invented(60, 1)) == found


def test_missing_notes_are_asked_for(monkeypatch, tmp_path):
    claims._notes.cache_clear()
    for root in (None, str(tmp_path)):
        monkeypatch.delenv("GNOMON_SHARED_DATA", raising=False)
        if root:
            monkeypatch.setenv("GNOMON_SHARED_DATA", root)
        with pytest.raises(
            DataError, match=r"medec/ms_\w+.csv.gz below.*set the environment variable GNOMON_SHARED_DATA"
        ):
            claims.error_sentence_above_chance("chance", 0)


def test_chance_is_one_over_the_number_of_sentences(shared_data, monkeypatch):
    monkeypatch.setenv("GNOMON_SHARED_DATA", str(shared_data("medec").parent))
    claims._notes.cache_clear()
    flagged = [note for note in claims._notes("test") if note.flag]
    chance = claims.error_sentence_above_chance("chance", 0)
    assert chance == pytest.approx(sum(1 / len(n.sentences) for n in flagged) / len(flagged))
    assert claims.error_sentence_above_chance("last-sentence", 1) > 3 * chance
    claims._notes.cache_clear()
