"""``gnomon plan`` as a user meets it: what it prints, what it reads, one message per mistake."""

from __future__ import annotations

import json
import subprocess
import sys

import pandas as pd
import pytest
from transformers import LlamaConfig

from gnomon import catalog
from gnomon.cli.main import main
from gnomon.cli.planning import parse_count
from gnomon.errors import ConfigError


def call(capsys, *words):
    """Run in this process; return exit code, stdout, stderr."""
    with pytest.raises(SystemExit) as stopped:
        main(list(map(str, words)))
    out, err = capsys.readouterr()
    return stopped.value.code, out, err


def data(capsys, *words, verb="plan"):
    code, out, err = call(capsys, "plan", *words, "--json")
    assert code == 0, err
    return json.loads(out)[verb]["step-law"]


@pytest.fixture
def table(shared_data):
    return shared_data("step-law") / "dense_lr_bs_loss.csv.gz"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7e9", 7e9),
        ("7B", 7e9),
        ("1.4T", 1.4e12),
        ("500_000", 5e5),
        ("300m", 3e8),
        ("4k", 4e3),
        ("1.E2", 100),
        (".5b", 5e8),
    ],
)
def test_counts_are_read(text, value):
    assert parse_count(text, "MODEL") == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "x", "-1", "0", "nan", "inf", "1e999", "7BB", "7,5e9", "0B"])
def test_what_is_no_count_is_refused(text):
    with pytest.raises(ConfigError, match=r"--tokens .* is no positive number. Write it as 7e9, 7B"):
        parse_count(text, "--tokens")


def test_a_number_and_tokens_print_rate_batch_and_steps_with_intervals(capsys):
    code, out, err = call(capsys, "plan", "7B", "--tokens", "1.4T", "--seq-len", "2048")
    assert (code, err) == (0, "")
    for part in (
        "7,000,000,000 without embeddings",
        "9.347e-04  (95 % interval 7.62e-04 to 1.15e-03)",
        "4,997,120 tokens = 2,440 sequences of 2048",
        "4,996,911 tokens  (95 % interval 4,201,484 to 5,942,929)",
        "280,162",
        "warm-up 2,000 steps, cosine to 1e-5",
        "note: the law holds for pre-training from scratch with AdamW",
        "note: the number is taken as the non-embedding parameters",
    ):
        assert part in out
    assert "laws" not in out


def test_it_fits_the_batch_to_the_machine_and_takes_a_chosen_one(capsys):
    code, out, _ = call(capsys, "plan", "1e9", "--tokens", "100e9", "--micro-batch", 8, "--devices", 16)
    assert code == 0
    assert "4 x 8 sequences on 16 devices" in out
    assert "1,048,576 tokens = 512 sequences" in out
    assert "not from the paper" in out
    found = data(capsys, "1e9", "--tokens", "100e9", "--batch", "4M", "--seq-len", 4096)
    assert (found["batch_tokens"], found["batch_sequences"], found["seq_len"]) == (4001792, 977, 4096)


def test_extrapolation_is_a_note_and_said_once(capsys):
    code, out, err = call(capsys, "plan", "70B", "--tokens", "15T")
    assert (code, err) == (0, "")
    assert out.count("extrapolation") == 1


def test_all_laws_or_one_stand_beside_it(capsys):
    code, out, _ = call(capsys, "plan", "1B", "--tokens", "100B", "--law", "all", "--loss", "2.4")
    assert code == 0
    for law in ("step-law", "openai", "deepseek", "porian", "minicpm"):
        assert f"\n    {law} " in out
    found = data(capsys, "1B", "--tokens", "100B", "--law", "deepseek")["laws"]
    assert set(found) == {"step-law", "deepseek"}
    assert found["deepseek"]["lr"] == pytest.approx(0.3188 * 6e20**-0.125)
    assert data(capsys, "1B", "--tokens", "100B", "--law", "openai")["laws"]["openai"]["batch_tokens"] is None


def test_recipe_sizes_folders_and_configurations_are_counted(capsys, tmp_path):
    found = data(capsys, "llama:130m", "--tokens", "10B")
    assert found["n_params"] == 12 * (4 * 768**2 + 3 * 768 * 2048)
    LlamaConfig(hidden_size=960, intermediate_size=9368, num_hidden_layers=7, num_attention_heads=15).save_pretrained(
        tmp_path
    )
    found = data(capsys, tmp_path, "--tokens", "20B", "--law", "all")
    assert found["n_params"] == 214_663_680
    assert found["embedding_params"] == 2 * 32000 * 960
    compute = 6 * (4 * 960 + 3 * 9368 + 2 * 2048) * 7 * 960 * 20e9
    assert found["laws"]["deepseek"]["lr"] == pytest.approx(0.3188 * compute**-0.125)
    code, out, _ = call(capsys, "plan", "mixtral:small", "--tokens", "2B")
    assert code == 0
    assert "all experts; " in out


def test_a_table_of_runs_is_fitted_and_compared(capsys, table):
    code, out, _ = call(capsys, "plan", "--fit", table, "--compare", table)
    assert code == 0
    for part in ("1334 in 12 (N, D) groups", "90 within 0.25 %", "12 of 12", "lr_coefN", "-0.74082", "loss law"):
        assert part in out
    assert out.index("step-law") < out.index("deepseek") < out.index("constant")
    fitted = data(capsys, "--fit", table, verb="fit")
    assert fitted["coefficients"]["bs_coefD"]["fit"] == pytest.approx(0.62921, abs=5e-6)
    assert data(capsys, "--compare", table, verb="compare")["step-law"]["mean"] < 1.5


def test_a_model_is_planned_by_the_refit(capsys, table):
    own, published = (data(capsys, "1B", "--tokens", "50B", *more) for more in (("--fit", table), ()))
    assert own["lr"] != published["lr"]
    assert "refitted on 90 runs of 12 groups" in own["notes"]
    assert own["intervals"]["lr"][0] < own["lr"] < own["intervals"]["lr"][1]
    laws = data(capsys, "1B", "--tokens", "50B", "--fit", table, "--law", "all")["laws"]
    loss = (2e8 / laws["openai"]["batch_tokens"]) ** (1 / 4.7619)
    assert 2.05 < loss < 2.25, "the loss law of the table stands in for --loss"


def test_a_small_table_has_no_loss_law_and_says_so(capsys, tmp_path, table):
    frame = pd.read_csv(table)
    pairs = {(214663680, 4e9), (268304384, 14.2e9), (429260800, 5e10), (536872960, 28.4e9)}
    few = frame[[pair in pairs for pair in zip(frame["N"], frame["D"], strict=True)]]
    few.to_csv(tmp_path / "few.csv", index=False)
    code, out, _ = call(capsys, "plan", "--fit", tmp_path / "few.csv")
    assert code == 0
    assert "note: no loss law: " in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "Plan what? Give a model and tokens"),
        (("7B",), "step-law needs --tokens"),
        (("--tokens", "1T", "--fit", "runs.csv"), "go with a model"),
        (("0", "--tokens", "1T"), "MODEL '0' is no positive number"),
        (("7Q", "--tokens", "1T"), "MODEL '7Q' is no positive number, nor a folder"),
        (("--tokens", "1T", "--", "-7e9"), "MODEL '-7e9' is no positive number"),
        (("nan", "--tokens", "1T"), "MODEL 'nan' is no positive number"),
        (("7B", "--tokens", "many"), "--tokens 'many' is no positive number"),
        (("7B", "--tokens", "1T", "--batch", "512"), "512 sequences are 1048576"),
        (("7B", "--tokens", "1T", "--devices", "0"), "devices = 0"),
        (("7B", "--tokens", "1T", "--law", "deepsek"), "Did you mean 'deepseek'"),
        (("7B", "--tokens", "1T", "--law", "microsoft"), "units"),
        (("7B", "--tokens", "1T", "--law", "all", "--loss", "-1"), "loss = -1"),
        (("lama:1b", "--tokens", "1T"), "Did you mean 'llama'"),
        (("llama:7b", "--tokens", "1T"), "Did you mean '1b'"),
        (("marian:nano", "--tokens", "1T"), "encoder-decoder"),
        (("/no/model", "--tokens", "1T"), "'/no/model' is no model"),
        (("--fit", "/no/runs.csv"), "/no/runs.csv: there is no such file"),
    ],
)
def test_mistakes_get_one_message_and_exit_code_2(capsys, words, message):
    code, out, err = call(capsys, "plan", *words)
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert out == ""


def test_planners_are_found_through_the_catalog_alone(capsys, monkeypatch):
    asked = []

    def other(model, tokens, devices, gpu_memory):
        asked.append("other")

    real = catalog.resolve
    card = catalog.get("step-law")
    twin = type(card)(**{**vars(card), "slug": "other", "verbs": {"plan": "other:plan"}})
    monkeypatch.setattr(catalog, "methods", lambda **_: [twin, card])
    monkeypatch.setattr(catalog, "resolve", lambda target: other if target == "other:plan" else real(target))
    code, out, _ = call(capsys, "plan", "1B", "--tokens", "50B")
    assert (code, asked) == (0, []), "a planner that lacks something is left out while another answers"
    assert "peak learning rate" in out
    monkeypatch.setattr(catalog, "methods", lambda **_: [twin])
    assert "other needs --devices, --gpu-memory" in call(capsys, "plan", "1B", "--tokens", "50B")[2]
    monkeypatch.setattr(catalog, "methods", lambda **_: [])
    assert "no planner has this verb" in call(capsys, "plan", "1B", "--tokens", "50B")[2]


def test_a_number_is_planned_without_importing_torch():
    code = (
        "import sys\nfrom gnomon.cli.main import main\ntry:\n    main(['plan', '7B', '--tokens', '1T'])\n"
        "except SystemExit:\n    print('torch' in sys.modules, 'sklearn' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False False"
