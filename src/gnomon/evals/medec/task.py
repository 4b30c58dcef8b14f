"""MEDEC as a task of Inspect."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import GenerateConfig
from inspect_ai.scorer import Metric, SampleScore, Score, Scorer, Target, metric, scorer
from inspect_ai.solver import TaskState, generate, system_message

from gnomon.common.figures import mean_figure
from gnomon.common.rows import file_sha256
from gnomon.common.tasks import CLUSTER, mean_metrics, named_values, said
from gnomon.errors import ConfigError
from gnomon.evals.medec.answers import PARSERS, Parser, parse_answer, prediction_from
from gnomon.evals.medec.components import chosen_components, component_scores
from gnomon.evals.medec.notes import Note, data_files, read_notes
from gnomon.evals.medec.prompts import SYSTEM, PromptName, prompt_text
from gnomon.evals.medec.scoring import SCORES, baselines, is_pair, note_scores

__all__ = ["medec", "medec_scorer"]

COMPONENT_KEYS = ("bertscore", "bleurt", "aggregate")


def _sample(note: Note, prompt: str, examples: int) -> Sample:
    gold = {
        "flag": note.flag,
        "sentence_id": note.sentence_id,
        "correction": note.correction,
        "error_type": note.error_type,
        CLUSTER: note.cluster or note.text_id,
    }
    target = [str(note.flag), str(note.sentence_id), note.correction]
    return Sample(id=note.text_id, input=prompt_text(note, prompt, examples), target=target, metadata=gold)


def _gold(text_id: Any, metadata: dict[str, Any]) -> Note:
    return Note(
        text_id=str(text_id),
        sentences=(),
        flag=int(metadata["flag"]),
        sentence_id=int(metadata["sentence_id"]),
        correction=str(metadata["correction"]),
        error_type=str(metadata["error_type"]),
        cluster=str(metadata[CLUSTER]),
    )


@metric(scores="unreduced")
def medec_components(
    bertscore: str | None = None, bleurt: str | None = None, components: Sequence[str] | None = None
) -> Metric:
    """Mean BERTScore, BLEURT and aggregate over pairs, and their composites, each model called once for all pairs."""

    def compute(scores: list[SampleScore]) -> dict[str, float]:
        given = chosen_components({"bertscore": bertscore, "bleurt": bleurt}, components)
        if not scores:
            return {}
        gold = [_gold(s.sample_id, s.sample_metadata or {}) for s in scores]
        told = [prediction_from((s.score.metadata or {}).get("prediction")) for s in scores]
        pairs = [(p.correction, n.correction) if p and is_pair(n, p) else None
                 for n, p in zip(gold, told, strict=True)]  # fmt: skip
        rows = component_scores([note_scores(n, p) for n, p in zip(gold, told, strict=True)], pairs, given)
        keys = [key for key in rows[0] if key.removeprefix("composite_") in COMPONENT_KEYS]
        clusters = {note.text_id: note.cluster for note in gold}
        figures = {}
        for key in keys:
            epochs: dict[str, list[float]] = {text_id: [] for text_id in clusters}
            for note, row in zip(gold, rows, strict=True):
                if not math.isnan(row[key]):
                    epochs[note.text_id].append(row[key])
            values = [sum(v) / len(v) if v else math.nan for v in epochs.values()]
            figures[key] = mean_figure(values, list(clusters.values()), bounds=(0, 1))
        return {name: value for name, value in named_values(figures).items() if not math.isnan(value)}

    return compute


def _score_note(parser: Parser) -> Scorer:
    async def score(state: TaskState, target: Target) -> Score:
        answer = said(state)
        prediction = None if answer.reason else parse_answer(answer.text, parser)
        reason = answer.reason or (None if prediction else "invalid_response_format")
        return Score(
            value=dict(note_scores(_gold(state.sample_id, state.metadata), prediction)),
            answer=f"{prediction.flag} {prediction.sentence_id} {prediction.correction}" if prediction else "",
            reason=reason,
            metadata={"prediction": list(prediction) if prediction else None},
        )

    return score


@scorer(metrics=mean_metrics(SCORES, by={"flag": "error_type", "sentence": "error_type"}))
def medec_scorer(parser: Parser = "lenient") -> Scorer:
    """Score flag, sentence and correction of one note; see `gnomon.evals.medec.scoring.note_scores` for the keys.

    Parameters
    ----------
    parser : {"lenient", "strict"}, default "lenient"

    Returns
    -------
    Scorer
        It needs nothing but the log, so logs can be scored again with it.
    """
    return _score_note(parser)


@task
def medec(
    data: str | list[str] = "",
    split: str = "",
    prompt: PromptName = "p1",
    examples: int = 0,
    parser: Parser = "lenient",
    max_tokens: int = 512,
    temperature: float = 0.0,
    bertscore: str | None = None,
    bleurt: str | None = None,
    components: list[str] | None = None,
) -> Task:
    """Detect, locate and correct the one error a clinical note may have.

    Parameters
    ----------
    data : str or list of str
        The file of notes, several such files, or a folder together with `split`. See `read_notes`.
    split : str, optional
        Part of the file's name in a folder, such as ``"test"``.
    prompt : {"p1", "p2"}, default "p1"
        Wording; ``"p2"`` also says what kinds of error there are.
    examples : {0, 1}, default 0
        Worked examples in the prompt.
    parser : {"lenient", "strict"}, default "lenient"
        How answers are read. See `parse_answer`.
    max_tokens : int, default 512
        Longest answer.
    temperature : float, default 0
        A model run by transformers (``hf/...``) needs ``do_sample=false`` with 0.
    bertscore, bleurt : str, optional
        ``"bert-score"``, ``"bleurt"``, or ``"module:function"`` of ``(predictions, references) -> list of float``.
    components : list of str, optional
        Parts of the aggregate, where not ROUGE-1, BERTScore and BLEURT.

    Returns
    -------
    Task

    Raises
    ------
    ConfigError, DataError
        When an option or a file cannot be used.

    Examples
    --------
    >>> from inspect_ai import eval
    >>> eval(medec(data="ms_test.csv"), model="openai-api/local/my-model")  # doctest: +SKIP
    """
    if parser not in PARSERS:
        raise ConfigError(f"parser = {parser!r}. Allowed: {', '.join(PARSERS)}.")
    files = data_files(data, split)
    notes = read_notes(files)
    given = chosen_components({"bertscore": bertscore, "bleurt": bleurt}, components)
    more = [medec_components(bertscore, bleurt, components)] if given.callables or given.parts else []
    remarks = [f"No aggregate: {' and '.join(given.missing)} were not given."] if given.missing else []
    means = mean_metrics(SCORES, by={"flag": "error_type", "sentence": "error_type"})
    return Task(
        dataset=MemoryDataset([_sample(note, prompt, examples) for note in notes], name="medec"),
        solver=[system_message(SYSTEM), generate()],
        scorer=medec_scorer(parser),
        metrics=[means, *more] if more else None,
        config=GenerateConfig(max_tokens=max_tokens, temperature=temperature),
        version=1,
        metadata={
            "data": [str(file) for file in files],
            "data_sha256": file_sha256(*files),
            "baselines": baselines(notes),
            "notes": remarks,
        },
    )
