"""What is read from answers, submission files, tables and note files, and what is said of bad ones."""

from __future__ import annotations

import csv
import gzip
import json
import sys
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gnomon.errors import ConfigError, DataError, GnomonWarning, MethodError
from gnomon.evals.medec import Prediction, parse_answer, prompt_text, read_notes, read_run, split_sentences, write_run

sys.path.insert(0, str(Path(__file__).parent))
from medec_definition import CSV, NOTES, PERFECT, RIGHT, WRONG

CORRECT = Prediction(0, -1, "NA")
GOUT = Prediction(1, 3, "He has gout.")


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("CORRECT", CORRECT),
        (" correct.\n", CORRECT),
        ("**CORRECT**", CORRECT),
        ("`CORRECT`", CORRECT),
        ('"Correct"', CORRECT),
        ("CORRECT. All 12 sentences are fine.", CORRECT),
        ("CORRECT\n\nThe note has 3 findings.", CORRECT),
        ("-1", CORRECT),
        ("-1 NA", CORRECT),
        ("3 He has gout.", GOUT),
        ("3. He has gout.", GOUT),
        ("3: He has gout.", GOUT),
        ("3 | He has gout.", GOUT),
        ("S3 He has gout.", GOUT),
        ("Sentence 3: He has gout.", GOUT),
        ("**3** He has gout.", GOUT),
        ("<3> He has\n gout.", GOUT),
        ('3 "He has gout."', GOUT),
        ("The error is in sentence 3: He has gout.", GOUT),
        ("sentence id: 3\nHe has gout.", GOUT),
        ("3", Prediction(1, 3, "NA")),
        ("3 NA", Prediction(1, 3, "NA")),
        ("99 He has gout.", Prediction(1, 99, "He has gout.")),
        ("-1 He has gout.", Prediction(1, -1, "He has gout.")),
        ("7 , and platelets are 280,000/mm3.", Prediction(1, 7, ", and platelets are 280,000/mm3.")),
        (r"3 He has \1 gout.", Prediction(1, 3, r"He has \1 gout.")),
        ("", None),
        ("   ", None),
        ("I cannot tell.", None),
        ("The CD4 count is low.", None),
        ("His temperature of 38.5 is high, and 90% is low.", None),
        ("The text is correct.", None),
    ],
)
def test_answers(answer, expected):
    assert parse_answer(answer) == expected


def test_the_strict_parser_wants_the_number_first():
    for answer in ("3 He has gout.", "S3: He has gout.", "**Sentence 3** He has gout.", "<3> He has gout."):
        assert parse_answer(answer, "strict") == GOUT, answer
    assert parse_answer("CORRECT.", "strict") == CORRECT
    for answer in ("The error is in sentence 3: He has gout.", "CORRECT. All is well.", "There are 2 errors."):
        assert parse_answer(answer, "strict") is None
    with pytest.raises(MethodError, match=r"parser = 'loose'\. Allowed: lenient, strict"):
        parse_answer("3", "loose")


@given(st.text(max_size=60))
def test_any_answer_can_be_read(text):
    found = parse_answer(text)
    if found is not None:
        assert found.correction
        assert found.correction == " ".join(found.correction.split())
        assert (found.flag == 0) == (found == CORRECT)


@given(st.integers(0, 40), st.from_regex(r"[A-Z][a-z ,]{0,30}[a-z]\.", fullmatch=True))
def test_an_answer_in_the_form_asked_for_is_read_back(number, sentence):
    for parser in ("lenient", "strict"):
        assert parse_answer(f"{number} {sentence}", parser) == (1, number, " ".join(sentence.split()))


RUN = """my-0 1 2 The patient is  diagnosed with "gout".
my-1 0 4 something
my-2 1 S3 no number
My-3 1 3 capital
my-0 1 1 "Fluid shows\\tcrystals."

my-4 1 0 ""
"""


def test_submission_lines(tmp_path):
    file = tmp_path / "run.txt"
    file.write_bytes(b"\xef\xbb\xbf" + RUN.replace("\n", "\r\n").encode())
    with pytest.warns(GnomonWarning) as caught:
        run = read_run(file)
    assert run.predictions == {
        "my-1": (0, 4, "NA"),  # flag 0 has no correction; the sentence number stays, and is wrong
        "my-0": (1, 1, "Fluid shows\\tcrystals."),  # the last line counts, quotes go
        "my-4": (1, 0, "NA"),
    }
    assert [number for number, _ in run.ignored] == [3, 4]
    assert run.repeated == ["my-0"]
    assert run.odd == ["my-1", "my-4"]
    said = " ".join(str(w.message) for w in caught)
    for part in ("2 lines have not the form", "1 ids occur again", "2 answers have flag 0 with a sentence number"):
        assert part in said


def test_what_is_written_is_read_back(tmp_path):
    write_run(PERFECT, tmp_path / "run.txt")
    assert (tmp_path / "run.txt").read_text().splitlines()[1] == "my-1 0 -1 NA"
    assert read_run(tmp_path / "run.txt").predictions == PERFECT
    with pytest.raises(MethodError, match="does not fit the form of a submission"):
        write_run({"My_0": CORRECT}, tmp_path / "no.txt")
    assert not (tmp_path / "no.txt").exists()


def test_tables_of_answers_and_of_predictions(tmp_path):
    answers = tmp_path / "answers.jsonl"
    answers.write_text("\n".join(json.dumps({"text_id": f"my-{i}", "answer": a})
                                 for i, a in enumerate(["2 He has gout.", "CORRECT", "no idea"])))  # fmt: skip
    with pytest.warns(GnomonWarning, match="1 answers could not be read and count as missing; the first is 'my-2'"):
        run = read_run(answers)
    assert run.predictions == {"my-0": (1, 2, "He has gout."), "my-1": CORRECT}
    table = tmp_path / "run.csv"
    with table.open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerows([["Text ID", "Flag", "Sentence ID", "Correction"], ["my-0", "1.0", "2", "He has gout."]])
    assert read_run(table).predictions == {"my-0": (1, 2, "He has gout.")}
    table.write_text("text_id,flag,sentence_id\nmy-0,yes,2\n")
    with pytest.raises(DataError, match=r"run.csv, row 1: flag and sentence_id must be whole numbers"):
        read_run(table)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ("\n\n", "the file is empty"),
        ("what is this\n", "no line of this file is a prediction"),
    ],
)
def test_run_files_that_hold_nothing(tmp_path, text, message):
    file = tmp_path / "run.txt"
    file.write_text(text)
    with pytest.raises(DataError, match=message):
        read_run(file)
    with pytest.raises(DataError, match=r"there is no such file\. Expected: one line per note"):
        read_run(tmp_path / "none.txt")


def test_sentences_are_split_at_expected_numbers_only():
    assert split_sentences("0 a\n1 b\r\n3 c\n2 d\n2 e\n") == ((0, "a"), (1, "b\n3 c"), (2, "d\n2 e"))
    assert split_sentences("1 a") == split_sentences("") == ()
    assert split_sentences("0 a\n1b\n10 c") == ((0, "a\n1b\n10 c"),)


@given(st.lists(st.from_regex(r"[A-Za-z][a-z 0-9]{0,12}(\n[a-z]{1,3})?", fullmatch=True), min_size=1, max_size=12))
def test_numbered_sentences_are_split_back(sentences):
    text = "\n".join(f"{i} {s}" for i, s in enumerate(sentences))
    assert [s.rstrip() for _, s in split_sentences(text)] == [s.rstrip() for s in sentences]


def test_real_notes(shared_data):
    notes = {name: read_notes(shared_data("medec") / f"ms_{name}.csv.gz") for name in ("val", "test")}
    assert [len(n) for n in notes.values()] == [402, 418]
    assert read_notes(shared_data("medec"), split="test") == notes["test"]
    many = sum(any("\n" in s for _, s in note.sentences) for note in notes["val"])
    assert many == 62, "notes whose sentences go on in a line without a number"
    assert {n.error_type for n in notes["test"]} == {
        "none", "diagnosis", "management", "treatment", "pharmacotherapy", "causalOrganism"
    }  # fmt: skip
    for note in notes["test"]:
        assert (note.flag == 1) == (note.sentence_id >= 0) == (note.correction != "NA")


def test_every_format_gives_the_same_notes(tmp_path):
    plain = tmp_path / "notes.csv"
    plain.write_text(CSV)
    notes = read_notes(plain)
    assert [n.text_id for n in notes] == ["my-0", "my-1", "my-2"]
    assert [(n.flag, n.sentence_id, n.correction) for n in notes] == [tuple(PERFECT[n.text_id]) for n in notes]
    assert notes[0].sentences == WRONG.sentences
    assert notes[0].cluster.startswith("A 30-year-old man has a painful red knee. Fluid")
    assert "diagnosed with gout." in notes[0].cluster + notes[0].correction
    table = pd.read_csv(plain, keep_default_na=False, dtype=str)
    (tmp_path / "crlf.csv").write_bytes(b"\xef\xbb\xbf" + CSV.replace("\n", "\r\n").encode())
    (tmp_path / "z.csv.gz").write_bytes(gzip.compress(CSV.encode()))
    table.to_parquet(tmp_path / "notes.parquet")
    table.rename(columns=lambda c: c.lower().replace(" ", "_")).to_json(
        tmp_path / "n.jsonl", orient="records", lines=True
    )
    # the public test file: empty rows at its end turn flags into "1.0" for whoever reads it with pandas
    floats = table.assign(**{"Error Flag": table["Error Flag"] + ".0"})
    pd.concat([floats, pd.DataFrame("", index=range(5), columns=table.columns)]).to_csv(tmp_path / "e.csv", index=False)
    for file in ("crlf.csv", "z.csv.gz", "notes.parquet", "n.jsonl", "e.csv"):
        assert read_notes(tmp_path / file) == notes, file


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("my-0,,", "my-0,,,"), "row 1: 10 cells where the heading has 9"),
        ((",1,diagnosis,2,", ",2,diagnosis,2,"), "row 1: Error Flag is '2'. Allowed: 1"),
        ((",1,diagnosis,2,", ",1,diagnosis,-1,"), "row 1: Error Sentence ID is '-1' with Error Flag 1"),
        ((",1,diagnosis,2,", ",1,diagnosis,3,"), "the number of a sentence of this note, 0 to 2, with flag 1"),
        (('",0,NA,-1', '",0,NA,1'), "row 2: Error Sentence ID is '1' with Error Flag 0"),
        (
            ('"0 A 30-year-old man has a painful red knee.\n1 The', '"A 30-year-old man. \n1 The'),
            "row 2: Sentences begins",
        ),
        (("Error Flag", "Flag"), "the column 'error_flag' is missing. Found: text_id"),
    ],
)
def test_rows_that_cannot_be_used(tmp_path, change, message):
    file = tmp_path / "notes.csv"
    assert change[0] in CSV
    file.write_text(CSV.replace(*change))
    with pytest.raises(DataError, match=message):
        read_notes(file)


def test_places_that_hold_no_notes(tmp_path):
    with pytest.raises(DataError, match="MEDEC needs the file of notes: --data FILE"):
        read_notes("")
    with pytest.raises(DataError, match=r"no such file. Expected: a table .*abachaa/MEDEC"):
        read_notes(tmp_path / "no.csv")
    (tmp_path / "a_test.csv").write_text(CSV)
    (tmp_path / "b_test.csv").write_text(CSV)
    with pytest.raises(DataError, match=r"2 tables whose name contains split = 'test'. Tables: a_test.csv, b_test.csv"):
        read_notes(tmp_path, split="test")
    with pytest.raises(DataError, match="no split was given"):
        read_notes(tmp_path)
    (tmp_path / "x.csv").write_text("Text ID,Sentences,Error Flag,Error Sentence ID,Corrected Sentence\n,0 a,0,-1,NA\n")
    with pytest.raises(DataError, match="no row has a Text ID"):
        read_notes(tmp_path / "x.csv")


def test_repeated_ids_and_missing_corrections_are_told(tmp_path):
    file = tmp_path / "notes.csv"
    file.write_text(CSV + CSV.split("\n", 1)[1].replace("with gout.,", "with gout!,"))
    with pytest.warns(GnomonWarning, match=r"Text ID 'my-0' occurs again \(3 such\); its last row counts"):
        notes = read_notes(file)
    assert len(notes) == 3
    assert notes[0].correction == "The patient is diagnosed with gout!"
    file.write_text(CSV.replace("Warfarin 5 mg is given.", "NA"))
    with pytest.warns(GnomonWarning, match="1 notes have an error but no Corrected Sentence, such as 'my-2'"):
        read_notes(file)


def test_prompts():
    texts = {(p, e): prompt_text(WRONG, p, e) for p in ("p1", "p2") for e in (0, 1)}
    assert len(set(texts.values())) == 4
    for (prompt, examples), text in texts.items():
        assert text.endswith("2 The patient is diagnosed with pseudogout.\n\nAnswer:")
        assert "CORRECT" in text
        assert ("the diagnosis" in text) == (prompt == "p2")
        assert ("Example" in text) == bool(examples)
    assert parse_answer(texts["p1", 1].split("Answer: ")[1].split("\n")[0]) == (
        1,
        2,
        "The patient is diagnosed with gout.",
    )
    assert RIGHT.text.splitlines() == [f"{i} {s}" for i, s in NOTES[1].sentences]
    with pytest.raises(ConfigError, match=r"prompt = 'p3'\. Did you mean"):
        prompt_text(WRONG, "p3")
    with pytest.raises(ConfigError, match=r"examples = 2\. Allowed: 0 or 1"):
        prompt_text(WRONG, "p1", 2)
