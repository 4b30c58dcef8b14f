"""MEDEC: does a model detect, locate and correct the one error a clinical note may have?

**What it does.** A note is a list of numbered sentences with no error or exactly one. A system says whether there is
one (A, the flag), in which sentence (B), and how that sentence should read (C). With N notes, y the gold answer and p
the prediction:

    A = (1/N) sum [p.flag = y.flag]          B = (1/N) sum [p.sentence = y.sentence], -1 for a correct note
    C: pairs = notes where both sides have a corrected sentence, s_i = ROUGE, BERTScore or BLEURT of pair i
       subset score = mean of s_i over the pairs
       composite    = (sum of s_i + number of notes where both sides have none) / N
       aggregate    = mean of ROUGE-1, BERTScore and BLEURT of a pair, the last two clipped to [0, 1]

A note without an answer, or with one that cannot be read, is wrong in A and B and 0 in the composites; `answered`
says how many have one. In the notes of the shared task, MEDIQA-CORR 2024, and of the paper "aggregate" is the subset
score, which ranks systems there; `composite_aggregate` is about half of it. Both are given.

**How to use it.** The notes (MEDEC-MS, CC BY 4.0) are the CSV files of github.com/abachaa/MEDEC; the UW notes come
with a data-use agreement.

```
gnomon evaluate medec --model openai-api/local/NAME --model-base-url http://localhost:8000/v1 --data ms_test.csv
gnomon evaluate medec --model FOLDER --data ms_test.csv -T examples=1     # a model folder, run by transformers
gnomon evaluate medec --run predictions.txt --data ms_val.csv             # a submission file, no model
inspect eval gnomon/medec --model hf/ORG/NAME -M do_sample=false -T data=ms_test.csv
```

```python
from gnomon.evals.medec import note_scores, parse_answer, read_notes, read_run, reward, score_run

report = score_run(read_run("predictions.txt"), read_notes("ms_val.csv"))
report.summary()["flag"], report.figures["rouge1"].low
reward("2 The patient is diagnosed with gout.", note)                     # in [0, 1], for a trainer
```

**Options that matter.** `prompt` (``p2`` also names the kinds of error), `examples` (0 or 1), `parser` (``strict``
takes a sentence number only at the beginning of an answer), `bertscore` and `bleurt` (off: they need models of up to
900M parameters; ``"bert-score"``, ``"bleurt"`` or ``"module:function"``), `components` (what the aggregate averages).

**ROUGE here is not rouge_score.** The shared task uses the package `rouge` 1.0.1: sets of tokens, case and punctuation
kept except full stops, summary-level ROUGE-L. On the published baseline run ROUGE-1 is .4183, by rouge_score .4132.
White space after the last full stop of a gold sentence is a token to it, so gold sentences stand as in the file.
Scores that count a correction only where the sentence number is right are another measure still.

**Errors of the figures.** About two thirds of the MS notes come in pairs made of one vignette, one with the error and
one without, and a system that always says "error" is right in exactly one of the two. Standard errors and intervals
are therefore clustered by the beginning of the corrected note.

**Baselines.** With the share q of notes that have an error, always "error" has flag accuracy q (MS test: .521),
always "correct" has flag and sentence accuracy and all composites 1 - q. Reports print them.

**Cost.** One answer a note. Scoring takes some 0.03 ms a note; BERTScore with its DeBERTa-xlarge about 2 s a pair on a
CPU, so distinct pairs are scored once, in one call, longest first.

**Deviations from the official script.** White space in a correction is really collapsed (there the arguments of that
line are in the wrong order: it does nothing, and a backslash can crash it). An empty correction scores 0 instead of
raising. The aggregate is left out unless all its parts are there, where the script averages what it finds. Predictions
for UW notes without those notes are refused.
"""

from typing import TYPE_CHECKING

from gnomon.common.tasks import inspect_installed, needs_inspect
from gnomon.evals.medec.answers import Prediction, Submission, parse_answer, read_run, write_run
from gnomon.evals.medec.components import bert_score_component, bleurt_component
from gnomon.evals.medec.notes import Note, read_notes, split_sentences
from gnomon.evals.medec.prompts import prompt_text
from gnomon.evals.medec.rouge import Rouge, rouge
from gnomon.evals.medec.scoring import MedecReport, note_scores, reward, score_files, score_run

if TYPE_CHECKING or inspect_installed():
    from gnomon.evals.medec.task import medec, medec_scorer
else:
    medec, medec_scorer = needs_inspect("medec"), needs_inspect("medec_scorer")

__all__ = [
    "MedecReport",
    "Note",
    "Prediction",
    "Rouge",
    "Submission",
    "bert_score_component",
    "bleurt_component",
    "medec",
    "medec_scorer",
    "note_scores",
    "parse_answer",
    "prompt_text",
    "read_notes",
    "read_run",
    "reward",
    "rouge",
    "score_files",
    "score_run",
    "split_sentences",
    "write_run",
]
