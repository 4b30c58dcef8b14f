"""The task in Inspect: a replayed real run gives the offline scorer's numbers; components, logs, options."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
from inspect_ai import eval as run_eval

from gnomon.common.tasks import failure_of, log_figures, read_log, rescore, scripted_model
from gnomon.errors import ConfigError, DataError
from gnomon.evals.medec import (
    medec,
    medec_scorer,
    prompt_text,
    read_notes,
    read_run,
    score_files,
    score_run,
)

sys.path.insert(0, str(Path(__file__).parent))
from medec_definition import CSV


def run(task, answer, folder, **options):
    log = run_eval(task, model=scripted_model(answer), log_dir=str(folder), display="none", **options)[0]
    assert log.status == "success", failure_of(log)
    return log


@pytest.fixture
def data(tmp_path):
    (tmp_path / "notes.csv").write_text(CSV)
    return str(tmp_path / "notes.csv")


def by_sentence(text: str) -> str:
    if "pseudogout" in text.rpartition("Note:")[2]:
        return "2 The patient is diagnosed with gout."
    return "CORRECT" if "gout" in text.rpartition("Note:")[2] else "1 Aspirin 5 mg is given."


def close(a, b, keys):
    for key in keys:
        for name in ("value", "stderr", "low", "high"):
            x, y = getattr(a[key], name), getattr(b[key], name)
            assert x == pytest.approx(y, rel=1e-12, abs=1e-12, nan_ok=True), (key, name)


@pytest.mark.slow
def test_a_replayed_run_has_the_official_numbers(shared_data, tmp_path):
    folder = shared_data("medec")
    file = str(folder / "ms_val.csv.gz")
    notes = read_notes(file)
    predictions = read_run(folder / "baseline_run_ms_val.txt").predictions
    answers = {}
    for note in notes:
        said = predictions[note.text_id]
        answers[prompt_text(note, "p2", 1)] = f"{said.sentence_id} {said.correction}" if said.flag else "CORRECT"
    log = run(medec(data=file, prompt="p2", examples=1), answers.__getitem__, tmp_path)
    found = log_figures(log)
    assert found["rouge1"].value == pytest.approx(0.4280453595, abs=5e-11)
    offline = score_files(folder / "baseline_run_ms_val.txt", file)
    keys = [key for key in offline.figures if "[" not in key]
    close(found, offline.figures, keys)
    assert all(found[k].n == offline.figures[k].n for k in keys)
    for key, figure in offline.figures.items():
        assert found[key].value == pytest.approx(figure.value, abs=1e-12), key
    # the log itself is a file of predictions
    assert score_files(log.location, file).figures == offline.figures


def test_inspect_knows_it_by_name(data, tmp_path):
    log = run("gnomon/medec", by_sentence, tmp_path / "logs", task_args={"data": data, "max_tokens": 32})
    assert log.eval.task == "gnomon/medec"
    assert log.eval.task_args_passed == {"data": data, "max_tokens": 32}
    assert log.plan.config.max_tokens == 32
    assert log.plan.config.temperature == 0.0
    figures = log_figures(log)
    assert figures["flag"].value == figures["sentence"].value == 1.0
    assert figures["flag[diagnosis]"].value == 1.0
    assert {key.partition("[")[2] for key in figures if "[" in key} == {"diagnosis]", "none]", "pharmacotherapy]"}
    assert [m.role for m in log.samples[0].messages] == ["system", "user", "assistant"]
    assert log.samples[0].scores["medec_scorer"].answer == "1 2 The patient is diagnosed with gout."


def test_components_see_all_pairs_of_all_epochs_at_once(data, tmp_path, monkeypatch):
    import types

    calls = []

    def score(predictions, references):
        calls.append(len(predictions))
        return [float(len(p)) / 100 for p in predictions]

    monkeypatch.setitem(sys.modules, "medec_parts", types.SimpleNamespace(score=score))
    task = medec(data=data, bertscore="medec_parts:score", bleurt="medec_parts:score")
    assert task.metadata["notes"] == []
    turn = iter(range(100))

    def answer(text):
        if "Heparin" not in text:
            return by_sentence(text)
        return ["1 Warfarin 5 mg is given.", "1 Aspirin is given.", "CORRECT"][next(turn) % 3]

    log = run(task, answer, tmp_path / "logs", epochs=3)
    assert set(calls) == {3}, "the distinct pairs, in one call for each of the two parts"
    found = log_figures(log)
    gout = len("The patient is diagnosed with gout.") / 100
    given = (len("Warfarin 5 mg is given.") + len("Aspirin is given.")) / 200
    assert found["bertscore"].value == found["bleurt"].value == pytest.approx((gout + given) / 2)
    assert found["bertscore"].n == 9
    composites = [gout, 1.0, given * 2 / 3]
    assert found["composite_bertscore"].value == pytest.approx(sum(composites) / 3)
    assert 0 < found["aggregate"].value < 1
    assert found["aggregate"].low < found["aggregate"].value < found["aggregate"].high
    once = run(
        medec(data=data, bertscore="medec_parts:score", bleurt="medec_parts:score"), by_sentence, tmp_path / "l2"
    )
    notes = {n.text_id: n for n in read_notes(data)}
    said = {s.id: s.scores["medec_scorer"].metadata["prediction"] for s in once.samples}
    from gnomon.evals.medec import Prediction

    offline = score_run(
        {k: Prediction(*v) for k, v in said.items()}, list(notes.values()), bertscore=score, bleurt=score
    )
    close(log_figures(once), offline.figures, ["bertscore", "composite_bleurt", "aggregate", "composite_aggregate"])


def test_no_aggregate_without_its_parts(data, tmp_path):
    task = medec(data=data)
    assert task.metadata["notes"] == ["No aggregate: bertscore and bleurt were not given."]
    assert "aggregate" not in log_figures(run(task, by_sentence, tmp_path / "logs"))
    chosen = run(medec(data=data, components=["rouge1", "rouge2"]), by_sentence, tmp_path / "logs")
    figures = log_figures(chosen)
    assert figures["aggregate"].value == pytest.approx((figures["rouge1"].value + figures["rouge2"].value) / 2)


def test_a_log_is_scored_again_by_another_parser(data, tmp_path):
    log = run(medec(data=data), lambda text: "It is sentence 2: He has gout.", tmp_path / "logs")
    assert log_figures(log)["answered"].value == 1.0
    strict = log_figures(rescore(Path(log.location), medec_scorer("strict")))
    assert strict["answered"].value == 0.0
    assert math.isnan(strict["rouge1"].value)
    assert math.isnan(strict["rouge1"].low)
    again = log_figures(rescore(Path(log.location), medec_scorer()))
    close(again, log_figures(log), again)
    assert log_figures(read_log(log.location))["answered"].value == 1.0, "the file stays as it is"


def test_a_refusal_is_told_from_silence(data, tmp_path):
    from inspect_ai.model import ModelOutput, ModelUsage, get_model

    def output(messages, tools, choice, config):
        made = ModelOutput.from_content("mockllm/model", "I cannot help with 2 notes.", stop_reason="content_filter")
        made.usage = ModelUsage(input_tokens=1, output_tokens=1, total_tokens=2)
        return made

    model = get_model("mockllm/model", custom_outputs=output, memoize=False)
    log = run_eval(medec(data=data), model=model, log_dir=str(tmp_path / "logs"), display="none")[0]
    assert {s.scores["medec_scorer"].reason for s in log.samples} == {"refusal"}
    assert log_figures(log)["answered"].value == 0.0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"prompt": "p9"}, ConfigError, "prompt = 'p9'"),
        ({"examples": 3}, ConfigError, "examples = 3"),
        ({"parser": "loose"}, ConfigError, "parser = 'loose'"),
        ({"components": ["rouge9"]}, ConfigError, "'rouge9' is no part"),
        ({"bleurt": "nothing"}, ConfigError, "'nothing' is no scorer of texts"),
        ({"data": "/no.csv"}, DataError, "there is no such file"),
    ],
)
def test_options_are_checked_when_the_task_is_made(data, options, error, message):
    with pytest.raises(error, match=message):
        medec(**{"data": data, **options})


def test_several_files_are_one_task(data, tmp_path):
    other = tmp_path / "more.csv"
    other.write_text(CSV.replace("my-", "uw-"))
    task = medec(data=[data, str(other)])
    assert [s.id for s in task.dataset] == ["my-0", "my-1", "my-2", "uw-0", "uw-1", "uw-2"]
    assert task.metadata["data"] == [data, str(other)]
    assert task.metadata["data_sha256"] != medec(data=data).metadata["data_sha256"]
