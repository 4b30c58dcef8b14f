"""The scores: accuracy of flag and sentence, ROUGE on pairs of corrections, composites, the aggregate."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gnomon.common.figures import Figure, mean_figure
from gnomon.errors import DataError, GnomonWarning
from gnomon.evals.medec.answers import CORRECT, Prediction, Submission, parse_answer, read_run
from gnomon.evals.medec.components import Component, chosen_components, component_scores
from gnomon.evals.medec.notes import NA, UW_TERMS, Note, read_notes
from gnomon.evals.medec.rouge import rouge

__all__ = ["ROUGES", "SCORES", "MedecReport", "note_scores", "reward", "score_files", "score_run"]

ROUGES = ("rouge1", "rouge2", "rougeL")
SCORES = ("flag", "sentence", "answered", *ROUGES, *(f"composite_{name}" for name in ROUGES))
"""Keys of `note_scores`, in the order of reports."""

UNDEFINED = math.nan


def is_pair(note: Note, prediction: Prediction | None) -> bool:
    """Return whether both the gold answer and the prediction hold a corrected sentence."""
    return prediction is not None and note.correction != NA and prediction.correction != NA


def both_na(note: Note, prediction: Prediction | None) -> bool:
    """Return whether gold answer and prediction agree that there is nothing to correct."""
    return prediction is not None and note.correction == NA and prediction.correction == NA


def note_scores(note: Note, prediction: Prediction | None) -> dict[str, float]:
    """Score one note.

    Parameters
    ----------
    note : Note
    prediction : Prediction or None
        None for a note without an answer: wrong everywhere.

    Returns
    -------
    dict of str to float
        The keys of `SCORES`. ``flag`` and ``sentence`` are 1 where right. ``rouge*`` is NaN unless both sides have a
        corrected sentence; the mean over the others is the subset score. ``composite_*`` is the same where defined,
        1 where both sides have none, else 0.

    Examples
    --------
    >>> note = Note("my-0", ((0, "He is diagnosed with pseudogout."),), 1, 0, "He is diagnosed with gout.")
    >>> scores = note_scores(note, Prediction(1, 0, "He is diagnosed with gout."))
    >>> scores["flag"], scores["sentence"], round(scores["rouge1"], 6)
    (1.0, 1.0, 1.0)
    """
    scores = {
        "flag": float(prediction is not None and prediction.flag == note.flag),
        "sentence": float(prediction is not None and prediction.sentence_id == note.sentence_id),
        "answered": float(prediction is not None),
    }
    if prediction is not None and is_pair(note, prediction):
        values = dict(zip(ROUGES, rouge(prediction.correction, note.correction), strict=True))
        return scores | values | {f"composite_{name}": value for name, value in values.items()}
    composite = float(both_na(note, prediction))
    return scores | dict.fromkeys(ROUGES, UNDEFINED) | dict.fromkeys(SCORES[6:], composite)


def reward(answer: str, note: Note) -> float:
    """Return one number in [0, 1] for a model's answer, for use as a reward: mean of flag, sentence, composite.

    The composite is ROUGE-1's. `functools.partial` or a lambda makes the reward function of a trainer of it.

    Examples
    --------
    >>> note = Note("my-0", ((0, "He is well."),), 0, -1)
    >>> reward("CORRECT", note), reward("0 He is ill.", note)
    (1.0, 0.0)
    """
    scores = note_scores(note, parse_answer(answer))
    return (scores["flag"] + scores["sentence"] + scores["composite_rouge1"]) / 3


@dataclass(frozen=True)
class MedecReport:
    """Scores of a run.

    Attributes
    ----------
    figures : dict of str to Figure
        ``flag`` and ``sentence`` (accuracies), ``answered``; ``rouge1``, ``rouge2``, ``rougeL`` (subset means over
        pairs) and ``composite_*``; likewise ``bertscore``, ``bleurt`` and ``aggregate`` where they could be
        computed; ``flag[diagnosis]`` and so on by type of error. Intervals are clustered by note pair.
    counts : dict of str to int
        ``total`` notes, ``reference_na``, ``system_na``, ``both_na``, ``pairs``, ``missing`` and ``extra`` ids.
    baselines : dict of str to float
        What the two trivial systems reach on the same notes.
    missing_components : tuple of str
        Parts of the aggregate that were not given; it is left out then.
    notes : list of str
        What a reader of the figures should know.
    """

    figures: dict[str, Figure]
    counts: dict[str, int]
    baselines: dict[str, float]
    missing_components: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)

    def summary(self) -> dict[str, float]:
        """Return the figures' values alone."""
        return {name: figure.value for name, figure in self.figures.items()}


def score_run(
    submission: Submission | Mapping[str, Prediction],
    notes: Sequence[Note],
    *,
    bertscore: Component | str | None = None,
    bleurt: Component | str | None = None,
    components: Sequence[str] | None = None,
) -> MedecReport:
    """Score predictions as the shared task's script does.

    Parameters
    ----------
    submission : Submission or mapping of text id to Prediction
        Ids that are no note are ignored; notes without a prediction are wrong.
    notes : sequence of Note
    bertscore, bleurt : callable or str, optional
        ``(predictions, references) -> list of float``, or how to get one: a name of
        `gnomon.evals.medec.components.COMPONENTS`, or ``"module:function"``. Values are clipped to [0, 1].
    components : sequence of str, optional
        What to average in the aggregate. Default ROUGE-1, BERTScore and BLEURT, and no aggregate unless all are
        there; the official script averages in silence what it finds.

    Returns
    -------
    MedecReport

    Raises
    ------
    DataError
        When there is no note, or the run has predictions for UW notes and none of the notes is one.
    ConfigError
        When a component is unknown or not given.
    """
    predictions = submission.predictions if isinstance(submission, Submission) else submission
    if not notes:
        raise DataError("there is no note to score against. Give the file of notes.")
    known = {note.text_id for note in notes}
    extra = [text_id for text_id in predictions if text_id not in known]
    if any(i.startswith("uw-") for i in extra) and not any(i.startswith("uw-") for i in known):
        raise DataError(
            f"the run has predictions for UW notes, such as {next(i for i in extra if i.startswith('uw-'))!r}, but the "
            f"notes given hold none: {UW_TERMS}. Give that file too, or take the lines of these ids out of the run."
        )
    given = chosen_components({"bertscore": bertscore, "bleurt": bleurt}, components)
    said = [predictions.get(note.text_id) for note in notes]
    rows = [note_scores(note, p) for note, p in zip(notes, said, strict=True)]
    rows = component_scores(rows, [(p.correction, n.correction) if p and is_pair(n, p) else None
                                   for n, p in zip(notes, said, strict=True)], given)  # fmt: skip
    counts = {
        "total": len(notes),
        "reference_na": sum(note.correction == NA for note in notes),
        "system_na": sum(p is not None and p.correction == NA for p in said),
        "both_na": sum(both_na(n, p) for n, p in zip(notes, said, strict=True)),
        "pairs": sum(is_pair(n, p) for n, p in zip(notes, said, strict=True)),
        "missing": sum(p is None for p in said),
        "extra": len(extra),
    }
    found = [*(submission.notices if isinstance(submission, Submission) else []), *_remarks(counts, given.missing)]
    return MedecReport(_figures(notes, rows), counts, baselines(notes), given.missing, found)


def _figures(notes: Sequence[Note], rows: Sequence[Mapping[str, float]]) -> dict[str, Figure]:
    clusters = [note.cluster or note.text_id for note in notes]
    figures = {key: mean_figure([row[key] for row in rows], clusters, bounds=(0, 1)) for key in rows[0]}
    for kind in sorted({note.error_type for note in notes}):
        chosen = [i for i, note in enumerate(notes) if note.error_type == kind]
        for key in ("flag", "sentence"):
            values, groups = [rows[i][key] for i in chosen], [clusters[i] for i in chosen]
            figures[f"{key}[{kind}]"] = mean_figure(values, groups, bounds=(0, 1))
    return figures


def _remarks(counts: Mapping[str, int], missing: Sequence[str]) -> list[str]:
    said = []
    if counts["missing"]:
        said.append(f"{counts['missing']} of {counts['total']} notes have no prediction; they count as wrong.")
    if counts["extra"]:
        said.append(f"{counts['extra']} predictions are for ids that are no note of this file; they are ignored.")
    if missing:
        said.append(
            f"No aggregate: {' and '.join(missing)} were not given (options bertscore, bleurt). To average other "
            "parts, name them: components."
        )
    return said


def baselines(notes: Sequence[Note]) -> dict[str, float]:
    """Return what the two trivial systems reach: always 'error' and always 'correct'.

    With the share q of notes that have an error, always 'error' has flag accuracy q; always 'correct' has flag and
    sentence accuracy and every composite 1 - q.
    """
    share = sum(note.flag for note in notes) / len(notes)
    return {
        "always_error.flag": share,
        "always_correct.flag": 1 - share,
        "always_correct.sentence": 1 - share,
        "always_correct.composite": sum(both_na(note, CORRECT) for note in notes) / len(notes),
    }


def score_files(
    run: str | Path,
    data: str | Path | Sequence[str | Path],
    *,
    split: str = "",
    parser: str = "lenient",
    bertscore: Component | str | None = None,
    bleurt: Component | str | None = None,
    components: Sequence[str] | None = None,
) -> MedecReport:
    """Score a file of predictions against the file of notes; what ``gnomon evaluate medec --run`` calls.

    Parameters
    ----------
    run : str or Path
        As for `read_run`.
    data : str, Path or sequence of them
        As for `read_notes`.
    split, parser, bertscore, bleurt, components
        As for `read_notes`, `read_run` and `score_run`.

    Returns
    -------
    MedecReport

    Raises
    ------
    DataError, ConfigError
        When a file or an option cannot be used.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GnomonWarning)  # the report's notes say the same
        submission = read_run(run, parser=parser)  # type: ignore[arg-type]
    notes = read_notes(data, split=split)
    return score_run(submission, notes, bertscore=bertscore, bleurt=bleurt, components=components)
