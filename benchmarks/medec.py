"""MEDEC's ROUGE on pairs of real length against the plain loop, and the cost of scoring a note.

    python benchmarks/medec.py [--pairs 597] [--rounds 7]

Pairs are drawn from the notes in the folder that GNOMON_SHARED_DATA names, or else made of the English of Python's
documentation; a pair is a sentence and the same sentence with one phrase replaced.
"""

from __future__ import annotations

import argparse
import os
import random
from pathlib import Path

from timing import check, compare, finish, measure

from gnomon.evals.medec import Note, Prediction, note_scores, parse_answer, read_notes, read_run, rouge, score_run


def pairs_of(count: int) -> list[tuple[str, str]]:
    """Real corrections with the published baseline's, or sentences of documentation with a changed phrase."""
    folder = Path(os.environ.get("GNOMON_SHARED_DATA", "")) / "medec"
    if os.environ.get("GNOMON_SHARED_DATA") and folder.is_dir():
        run = read_run(folder / "baseline_run_ms_val.txt").predictions
        notes = {n.text_id: n for n in read_notes(folder / "ms_val.csv.gz")}
        real = [(p.correction, notes[i].correction) for i, p in run.items() if p.flag and notes[i].flag]
        print(f"{len(real)} real pairs, repeated to {count}")
        return (real * (count // len(real) + 1))[:count]
    from gnomon.common import corpora

    generator = random.Random(0)
    found = []
    for text in corpora.load("python-docs").train:
        for sentence in text.split(". "):
            words = sentence.split()
            if 8 <= len(words) <= 40:
                at = generator.randrange(len(words) - 3)
                found.append(
                    (" ".join([*words[:at], "another", "phrase", *words[at + 3 :]]) + ".", " ".join(words) + ".")
                )
            if len(found) == count:
                return found
    return found


def loop(hypothesis: str, reference: str) -> tuple[float, float, float]:
    """The definition, with the full table of every pair of sentences."""
    said, meant = ([" ".join(p.split()).split(" ") for p in t.split(".") if p] for t in (hypothesis, reference))
    h, r = ([token for piece in pieces for token in piece] for pieces in (said, meant))

    def f(overlap: int, n: int, m: int) -> float:
        p, q = overlap / max(n, 1), overlap / max(m, 1)
        return 2 * ((p * q) / (p + q + 1e-8))

    bigrams = [{tuple(t[i : i + 2]) for i in range(len(t) - 1)} for t in (h, r)]
    union: set[str] = set()
    for x in meant:
        for y in said:
            table = {(i, j): 0 for i in range(len(x) + 1) for j in range(len(y) + 1)}
            for i in range(1, len(x) + 1):
                for j in range(1, len(y) + 1):
                    same = x[i - 1] == y[j - 1]
                    table[i, j] = table[i - 1, j - 1] + 1 if same else max(table[i - 1, j], table[i, j - 1])
            i, j = len(x), len(y)
            while i and j:
                if x[i - 1] == y[j - 1]:
                    union.add(x[i - 1])
                    i, j = i - 1, j - 1
                elif table[i - 1, j] > table[i, j - 1]:
                    i -= 1
                else:
                    j -= 1
    counts = (len(set(h)), len(set(r)))
    first = f(len(set(h) & set(r)), *counts)
    return first, f(len(bigrams[0] & bigrams[1]), len(bigrams[0]), len(bigrams[1])), f(len(union), *counts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=597)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    pairs = pairs_of(options.pairs)
    assert all(tuple(rouge(*pair)) == loop(*pair) for pair in pairs)
    candidates = {"rouge": lambda: [rouge(*pair) for pair in pairs], "plain loop": lambda: [loop(*p) for p in pairs]}
    compare(f"ROUGE-1, -2 and -L of {len(pairs)} pairs", candidates, ours="rouge", peer="plain loop", at_least=3,
            rounds=options.rounds)  # fmt: skip
    check("seconds for all pairs", measure({"rouge": candidates["rouge"]}, rounds=options.rounds)["rouge"], at_most=0.1)

    notes = [Note(f"n-{i}", ((0, "x"),), 1, 0, meant, "diagnosis", f"n-{i // 2}") for i, (_, meant) in enumerate(pairs)]
    answers = [f"0 {said}" for said, _ in pairs]

    def one_by_one() -> None:
        for note, answer in zip(notes, answers, strict=True):
            note_scores(note, parse_answer(answer))

    run = {note.text_id: Prediction(0 if i % 3 else 1, 0, pairs[i][0]) for i, note in enumerate(notes)}
    seconds = measure({"notes": one_by_one, "report": lambda: score_run(run, notes)}, rounds=options.rounds)
    print("\nscoring, milliseconds a note")
    check("parse and score one answer", seconds["notes"] * 1e3 / len(notes), at_most=1.0)
    check("a whole report with its intervals", seconds["report"] * 1e3 / len(notes), at_most=1.0)
    finish()


if __name__ == "__main__":
    main()
