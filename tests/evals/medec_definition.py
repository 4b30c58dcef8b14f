"""The definitions of MEDEC's scores as plain loops, and a small set of invented notes."""

from __future__ import annotations

from gnomon.evals.medec import Note, Prediction


def pieces(text):
    return [" ".join(piece.split()).split(" ") for piece in text.split(".") if len(piece) > 0]


def f_value(overlap, hypothesis, reference):
    p, r = overlap / hypothesis, overlap / reference
    return 2 * ((p * r) / (p + r + 1e-8))


def lcs(x, y):
    """The full table, then back from the end: equal goes diagonal, strictly better goes up, else left."""
    table = {(i, j): 0 for i in range(len(x) + 1) for j in range(len(y) + 1)}
    for i in range(1, len(x) + 1):
        for j in range(1, len(y) + 1):
            if x[i - 1] == y[j - 1]:
                table[i, j] = table[i - 1, j - 1] + 1
            else:
                table[i, j] = max(table[i - 1, j], table[i, j - 1])
    found, i, j = [], len(x), len(y)
    while i and j:
        if x[i - 1] == y[j - 1]:
            found.append(x[i - 1])
            i, j = i - 1, j - 1
        elif table[i - 1, j] > table[i, j - 1]:
            i -= 1
        else:
            j -= 1
    return found


def rouge_loop(hypothesis, reference):
    said, meant = pieces(hypothesis), pieces(reference)
    h, r = [t for piece in said for t in piece], [t for piece in meant for t in piece]
    if not h or not r:
        return (0.0, 0.0, 0.0)
    one = f_value(len(set(h) & set(r)), len(set(h)), len(set(r)))
    bigrams_h, bigrams_r = ({tuple(t[i : i + 2]) for i in range(len(t) - 1)} for t in (h, r))
    two = 0.0
    if bigrams_h and bigrams_r:
        two = f_value(len(bigrams_h & bigrams_r), len(bigrams_h), len(bigrams_r))
    union, gain = set(), 0
    for piece in meant:
        before = len(union)
        for other in said:
            union |= set(lcs(piece, other))
        gain += len(union) - before
    return (one, two, f_value(gain, len(set(h)), len(set(r))))


def scores_loop(notes, predictions, metric):
    """The walk over reference ids with its treatment of NA, as the shared task describes it."""
    total = both = flags = sentences = 0
    values = []
    for note in notes:
        total += 1
        if note.text_id not in predictions:
            continue
        said = predictions[note.text_id]
        flags += str(said.flag) == str(note.flag)
        sentences += str(said.sentence_id) == str(note.sentence_id)
        if said.correction == "NA" and note.correction == "NA":
            both += 1
        elif said.correction != "NA" and note.correction != "NA":
            values.append(metric(said.correction, note.correction))
    return {
        "flag": flags / total,
        "sentence": sentences / total,
        "subset": sum(values) / len(values) if values else float("nan"),
        "composite": (sum(values) + both) / total,
    }


WRONG = Note(
    "my-0",
    (
        (0, "A 30-year-old man has a painful red knee."),
        (1, "Fluid shows needle-shaped negatively birefringent crystals."),
        (2, "The patient is diagnosed with pseudogout."),
    ),
    1,
    2,
    "The patient is diagnosed with gout.",
    "diagnosis",
    "A 30-year-old man",
)
RIGHT = Note(
    "my-1",
    ((0, "A 30-year-old man has a painful red knee."), (1, "The patient is diagnosed with gout.")),
    0,
    -1,
    cluster="A 30-year-old man",
)
OTHER = Note(
    "my-2",
    ((0, "She has a fever."), (1, "Heparin 5,000 units are given.")),
    1,
    1,
    "Warfarin 5 mg is given.",
    "pharmacotherapy",
    "She has a fever.",
)
NOTES = [WRONG, RIGHT, OTHER]

PERFECT = {note.text_id: Prediction(note.flag, note.sentence_id, note.correction) for note in NOTES}

CSV = """Text ID,Text,Sentences,Error Flag,Error Type,Error Sentence ID,Error Sentence,Corrected Sentence,Corrected Text
my-0,,"0 A 30-year-old man has a painful red knee.
1 Fluid shows needle-shaped negatively birefringent crystals.
2 The patient is diagnosed with pseudogout.",1,diagnosis,2,,The patient is diagnosed with gout.,
my-1,,"0 A 30-year-old man has a painful red knee.
1 The patient is diagnosed with gout.",0,NA,-1,NA,NA,NA
my-2,,"0 She has a fever.
1 Heparin 5,000 units are given.",1,pharmacotherapy,1,"Heparin 5,000 units are given.",Warfarin 5 mg is given.,
"""
