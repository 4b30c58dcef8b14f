"""The command as a user meets it: output, exit codes, one message per mistake."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from gnomon.cli.main import main
from gnomon.progress import Progress, duration

GNOMON = [sys.executable, "-m", "gnomon.cli.main"]


def call(capsys, *words):
    """Run in this process; return exit code, stdout, stderr."""
    with pytest.raises(SystemExit) as stopped:
        main(list(map(str, words)))
    out, err = capsys.readouterr()
    return stopped.value.code, out, err


def test_methods_lists_filters_and_searches(capsys):
    code, out, _ = call(capsys, "methods")
    assert code == 0
    assert {line.split()[0] for line in out.splitlines() if not line.startswith(" ")} >= {"fira", "dsnot", "eora"}
    assert call(capsys, "methods", "--plugs", "optimizer")[1].startswith("fira")
    cards = json.loads(call(capsys, "methods", "--pillar", "compress", "--json")[1])
    assert {c["slug"] for c in cards} >= {"dsnot", "eora"}
    code, _, err = call(capsys, "methods", "fiora")
    assert code == 2
    assert "No method matches 'fiora'. Did you mean 'fira'" in err


def test_show_prints_the_card(capsys):
    code, out, _ = call(capsys, "show", "fira")
    assert code == 0
    for part in ("Fira (fira)", "from gnomon.optim.fira import Fira", "2410.01623", "gnomon claims run fira"):
        assert part in out
    assert json.loads(call(capsys, "show", "fira", "--json")[1])["paper"]["arxiv"] == "2410.01623"
    code, _, err = call(capsys, "show", "fria")
    assert (code, "Did you mean 'fira'" in err) == (2, True)


def test_version_help_and_wrong_usage(capsys):
    assert call(capsys, "--version")[1].startswith("gnomon 0.")
    assert "claims" in call(capsys, "--help")[1]
    code, _, err = call(capsys, "rnu")
    assert code == 2
    assert "No such command" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("run",), "Which recipe? Built in: finetune-small, pretrain-lowmem, quickstart, squeeze"),
        (("run", "quikstart"), "Did you mean 'quickstart'"),
        (("run", "quickstart", "--set", "fira.rnk=3", "--dry-run"), "unknown option 'rnk'. Did you mean 'rank'"),
        (("run", "quickstart", "--set", "nonsense"), "write it as key=value"),
        (("run", "squeeze", "--set", "model=x", "--set", "data=/no/such.txt"), "there is no such file"),
        (("claims", "run"), "Name the methods whose claims to run, or --all"),
        (("claims", "run", "fira", "--all"), "not both"),
        (("claims", "run", "fira", "--seeds", "2"), "at least 3 seeds"),
        (("claims", "run", "fria"), "Did you mean 'fira'"),
        (("claims", "table", "--ledger", "/no/ledger.json"), "holds no claims yet"),
        (("report", "/no/run"), "run.json"),
    ],
)
def test_mistakes_get_one_message_and_exit_code_2(capsys, words, message):
    code, out, err = call(capsys, *words)
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert out == ""


def test_the_schema_is_json(capsys):
    assert json.loads(call(capsys, "run", "--schema")[1])["properties"]["stages"]


def test_a_dry_run_prints_plan_sizes_and_memory_and_writes_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = call(capsys, "run", "quickstart", "--dry-run")
    assert code == 0
    for part in ("parameters", "1. train", "steps", "MiB", "fira", "arms: all, without layernorm-scaling"):
        assert part in out
    found = json.loads(call(capsys, "run", "quickstart", "--dry-run", "--json")[1])
    assert found["stages"][0]["memory_bytes"] > 2 * found["weight_bytes"]
    low_rank = found["stages"][0]["memory_bytes"]
    recipe = found["recipe"]
    recipe["stages"][0]["train"]["methods"] = []
    (tmp_path / "adamw.yaml").write_text(yaml.safe_dump(recipe))
    full = json.loads(call(capsys, "run", "adamw.yaml", "--dry-run", "--json")[1])["stages"][0]["memory_bytes"]
    assert low_rank < full, "low-rank optimizer state is smaller"
    assert [p.name for p in tmp_path.iterdir()] == ["adamw.yaml"]


@pytest.fixture
def mini(tmp_path):
    """A recipe file and its text; a run takes seconds."""
    text = "\n\n".join(f"The {i}th line tells of {i * 7 % 31} things and {i * 5 % 17} others." for i in range(900))
    (tmp_path / "text.txt").write_text(text)
    recipe = {
        "name": "mini",
        "model": {"architecture": "llama", "size": "nano", "vocab_size": 300, "options": {"num_layers": 2}},
        "data": {"corpus": "text.txt", "context": 32},
        "stages": [
            {"train": {"tokens": 40_000, "batch_size": 4, "checkpoint_every": 10}},
            {"evaluate": {"metrics": ["perplexity"], "tokens": 500}},
        ],
    }
    (tmp_path / "mini.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


@pytest.mark.slow
def test_a_run_writes_table_report_and_json(mini, capsys, monkeypatch):
    monkeypatch.chdir(mini)
    code, out, err = call(capsys, "run", "mini.yaml", "--out", "here")
    assert code == 0
    assert "perplexity" in out
    assert Path("here/report.html").is_file()
    assert "train: done in" in err
    code, out, err = call(capsys, "run", "mini.yaml", "--out", "here", "--json", "--quiet")
    found = json.loads(out)
    assert found["status"] == "finished"
    assert found["arms"][0]["stages"][0]["skipped"]
    assert err == ""
    code, out, _ = call(capsys, "report", "here")
    assert out.strip() == "here/report.html"


def _start(folder, *words, **kwargs):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*GNOMON, *words], cwd=folder, env=environment, text=True, **pipes, **kwargs)


def _wait_for_checkpoint(folder, seconds=240):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if list(folder.rglob("gnomon_complete")):
            return
        time.sleep(0.05)
    raise AssertionError("no checkpoint appeared")


@pytest.mark.slow
def test_killed_in_training_and_started_again_equals_a_run_never_killed(mini):
    first = _start(mini, "run", "mini.yaml", "--out", "killed")
    _wait_for_checkpoint(mini / "killed")
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert not (mini / "killed" / "model").exists()
    for out in ("killed", "whole"):
        again = _start(mini, "run", "mini.yaml", "--out", out)
        _, err = again.communicate(timeout=300)
        assert again.returncode == 0, err
    weights = [(mini / out / "model" / "model.safetensors").read_bytes() for out in ("killed", "whole")]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on(mini):
    # Long enough that it cannot end before the signal comes.
    process = _start(mini, "run", "mini.yaml", "--out", "r", "--set", "train.tokens=2000000", start_new_session=True)
    _wait_for_checkpoint(mini / "r")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "run the same command again to go on" in err
    assert "Traceback" not in err
    assert json.loads((mini / "r" / "run.json").read_text())["status"] == "interrupted"


@pytest.mark.slow
def test_a_full_disk_is_one_message_and_leaves_nothing_half_written(mini):
    # A limit on file size fails writes the way a full disk does, at the same places.
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000));"
        "from gnomon.cli.main import main; main(sys.argv[1:])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "run", "mini.yaml", "--out", "r"],
        cwd=mini, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "the disk is full" in done.stderr
    assert "run the same command again to go on" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((mini / "r").rglob("*.part"))
    assert not list((mini / "r").rglob("result.json"))


def test_an_unexpected_fault_is_ours_and_exits_with_1(capsys, monkeypatch):
    from gnomon import catalog

    def broken(**kwargs):
        raise RuntimeError("unexpected")

    monkeypatch.setattr(catalog, "methods", broken)
    code, _, err = call(capsys, "methods")
    assert code == 1
    assert "RuntimeError: unexpected" in err
    assert "a fault of gnomon itself" in err


class _Pipe(list):
    def write(self, text):
        self.append(text)

    def flush(self):
        pass

    def isatty(self):
        return False


def test_progress_in_a_pipe_is_plain_lines_with_an_estimate(monkeypatch):
    clock = iter(range(0, 1000, 3))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    pipe = _Pipe()
    with Progress(pipe, every=5).task("work", 10) as task:
        for i in range(10):
            task.advance(note=f"loss {i}")
    text = "".join(pipe)
    assert "left" in text
    assert "work: done in" in text
    assert "\r" not in text
    assert "\x1b" not in text
    assert duration(8) == "8 s"
    assert duration(125) == "2 min 05 s"
    assert duration(3840) == "1 h 04 min"
