"""``gnomon evaluate`` as a user meets it: a folder, a real server, files of predictions, interruption, mistakes."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest

from gnomon import catalog
from gnomon.cli.main import main
from gnomon.common.models import save_model, tiny, workbench
from gnomon.common.text import byte_tokenizer

HEAD = "Text ID,Sentences,Error Flag,Error Type,Error Sentence ID,Corrected Sentence\n"
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


def call(capsys, *words):
    """Run in this process; return exit code, stdout, stderr."""
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", *map(str, words)])
    out, err = capsys.readouterr()
    return stopped.value.code, out, err


@pytest.fixture
def notes(tmp_path):
    """Six notes: three vignettes, each with and without the error."""
    rows = []
    for i in range(3):
        text = f'"0 Case {i} has a fever.\n1 Drug %s is given."'
        rows.append(f"n-{i}," + text % "B" + ",1,treatment,1,Drug A is given.")
        rows.append(f"m-{i}," + text % "A" + ",0,,-1,NA")
    (tmp_path / "notes.csv").write_text(HEAD + "\n".join(rows) + "\n")
    return tmp_path / "notes.csv"


@pytest.fixture
def run_file(tmp_path):
    (tmp_path / "run.txt").write_text("n-0 1 1 Drug A is given.\nm-0 0 -1 NA\nn-1 1 0 Drug C is given.\nwhat is this\n")
    return tmp_path / "run.txt"


# -- without a model ---------------------------------------------------------------------------------------------------


def test_alone_it_lists_the_tasks(capsys):
    code, out, _ = call(capsys)
    assert code == 0
    for card in catalog.methods(plugs="task"):
        assert card.slug in out
    assert "gnomon evaluate TASK --model NAME --data FILE" in out
    assert {"slug": "medec", "lets_you": catalog.get("medec").lets_you, "offline": True} in json.loads(
        call(capsys, "--json")[1]
    )


def test_a_file_of_predictions(capsys, notes, run_file, tmp_path):
    code, out, _ = call(capsys, "medec", "--run", run_file, "--data", notes)
    assert code == 0
    for part in ("flag", "0.5000", "counts: total 6, reference_na 3, system_na 1", "always_error.flag 0.5",
                 "1 lines have not the form", "3 of 6 notes have no prediction", "No aggregate"):  # fmt: skip
        assert part in out, part
    assert not (tmp_path / "runs").exists()
    out_folder = tmp_path / "scored"
    code, out, _ = call(capsys, "medec", "--run", run_file, "--data", notes, "--out", out_folder, "--json",
                        "-T", "components=rouge1,rouge2")  # fmt: skip
    assert code == 0
    run = json.loads(out)
    assert run == json.loads((out_folder / "run.json").read_text())
    assert run["kind"] == "evaluation"
    assert run["metrics"]["flag"]["value"] == 0.5
    assert run["metrics"]["aggregate"]["n"] == 2
    assert len(run["data"]["sha256"]) == len(run["predictions"]["sha256"]) == 64
    assert run["task"]["options"]["components"] == ["rouge1", "rouge2"]
    assert run["environment"]["inspect-ai"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("medek",), "There is no task 'medek'. Did you mean 'medec'"),
        (("fira",), "There is no task 'fira'"),
        (("medec",), "What is to be evaluated? --model NAME runs medec on a model, or --run FILE to score"),
        (("medec", "--model", "hf/x", "--run", "r.txt"), "Give either --model or --run, not both"),
        (("medec", "--run", "/no.txt", "--data", "NOTES"), "/no.txt: there is no such file. Expected: one line"),
        (("medec", "--run", "RUN"), "--data FILE is missing"),
        (("medec", "--run", "RUN", "--data", "/no.csv"), "/no.csv: there is no such file"),
        (("medec", "--run", "RUN", "--data", "NOTES", "--limit", "3"), "--limit goes with --model"),
        (("medec", "--run", "RUN", "--data", "NOTES", "--model-arg", "a=1"), "--model-arg goes with --model"),
        (("medec", "--run", "RUN", "--data", "NOTES", "--model-base-url", "x"), "--model-base-url goes with --model"),
        (("medec", "--run", "RUN", "--data", "NOTES", "-T", "prompt=p1"), "-T prompt: there is no such option"),
        (("medec", "--model", "hf/x", "--data", "NOTES", "-T", "promt=p1"), "Did you mean 'prompt'"),
        (("medec", "--model", "hf/x", "--data", "NOTES", "-T", "prompt"), "-T 'prompt': write it as key=value"),
        (("medec", "--model", "hf/x", "--data", "NOTES", "-T", "prompt=p7"), "prompt=p7: Input should be 'p1' or 'p2'"),
        (("medec", "--model", "hf/x", "--data", "NOTES", "-T", "examples=many"), "-T examples=many: Input should be"),
        (("medec", "--model", "hf/x", "--data", "NOTES", "-T", "examples=[1"), "the value is no YAML"),
        (("medec", "--model", "hf/x", "--data", "NOTES", "--limit", "0"), "--limit 0: allowed is 1 or more"),
        (("medec", "--model", "hf/x"), "MEDEC needs the file of notes"),
        (("medec", "--model", "gpt-4o", "--data", "NOTES"), "'gpt-4o' is neither a folder nor an Inspect model name"),
        (("medec", "--model", "./none", "--data", "NOTES"), "./none: there is no such folder"),
        (("medec", "--model", "nobody/m", "--data", "NOTES"), "Model API nobody of model 'nobody/m' not recognized"),
        (("medec", "--model", "openai-api/m", "--data", "NOTES"), "write openai-api/<service>/<model>"),
        (("medec", "--model", "openai-api/far/m", "--data", "NOTES"), "FAR_API_KEY defined in the environment"),
        (("medec", "--model", "openai-api/s/m", "--data", "NOTES", "--model-base-url", "http://127.0.0.1:9/v1"),
         "no server answers at http://127.0.0.1:9/v1"),
        (("medec", "--model", "openai-api/s/m", "--data", "NOTES", "--model-base-url", "localhost"), "no web address"),
        (("medec", "--model", "EMPTY", "--data", "NOTES"), "holds no config.json, so it is no model folder"),
        (("medec", "--model", "EMPTY", "--data", "NOTES", "--model-base-url", "http://x"), "is a folder, run in this"),
    ],
)  # fmt: skip
def test_mistakes_get_one_message_and_exit_code_2(capsys, monkeypatch, tmp_path, notes, run_file, words, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("S_API_KEY", "x")
    (tmp_path / "empty").mkdir()
    places = {"NOTES": notes, "RUN": run_file, "EMPTY": tmp_path / "empty"}
    code, out, err = call(capsys, *(places.get(word, word) for word in words))
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert out == ""
    assert not (tmp_path / "runs").exists()


def test_without_inspect_a_model_cannot_be_run_but_predictions_can_be_scored(notes, run_file):
    code = (
        "import sys; sys.modules['inspect_ai'] = None\n"
        "from gnomon.cli.main import main\n"
        "main(['evaluate', 'medec', *sys.argv[1:]])"
    )

    def run(*words):
        return subprocess.run(
            [sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, check=False
        )

    scored = run("--run", run_file, "--data", notes)
    assert (scored.returncode, "flag" in scored.stdout) == (0, True), scored.stderr
    refused = run("--model", "hf/x", "--data", notes)
    assert refused.returncode == 2
    assert "pip install 'gnomon[evals]'" in refused.stderr


# -- a folder ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A tiny model without a chat template."""
    tokenizer = byte_tokenizer()
    model = tiny("llama", vocab_size=len(tokenizer), num_layers=2, hidden_size=32, max_positions=4096)
    save_model(model, tmp_path / "model", tokenizer)
    return tmp_path / "model"


@pytest.mark.slow
def test_a_model_folder(capsys, folder, notes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ("medec", "--model", folder, "--data", notes, "-T", "max_tokens=4", "--limit", "2", "--epochs", "2",
             "--out", "out")  # fmt: skip
    code, out, err = call(capsys, *words)
    assert code == 0, err
    assert "answered" in out
    assert "counts: samples 4" in out
    run = json.loads(Path("out/run.json").read_text())
    assert run["model"]["name"] == str(folder)
    assert run["generation"]["max_tokens"] == 4
    assert run["usage"]["hf/local"]["output_tokens"] <= 16
    assert run["metrics"]["answered"]["n"] == 2
    assert Path("out", run["log"]).is_file()
    assert run["data"]["rows"] == 6
    # again: everything is there, nothing is run a second time
    code, out, _ = call(capsys, *words, "--json")
    again = json.loads(out)
    assert (code, again["log"], again["metrics"]) == (0, run["log"], run["metrics"])
    code, _, err = call(capsys, *words, "-T", "prompt=p2")
    assert code == 2
    assert "out holds a run of another recipe (task.options.prompt: None -> 'p2')" in err
    # other weights in the same folder are another run
    (folder / "model.safetensors").touch()
    assert call(capsys, *words)[0] == 2
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    code, _, err = call(capsys, *words)
    assert (code, "holds no tokenizer" in err) == (2, True)


def test_a_folder_that_gnomon_changed_is_rebuilt(folder):
    """Plain transformers would leave out what was recorded in the configuration, or the adapter."""
    import peft
    import torch

    from gnomon.common.inspect_models import open_model
    from gnomon.common.models import load_model

    base = load_model(folder)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    with torch.random.fork_rng():
        save_model(peft.get_peft_model(base, config), folder, byte_tokenizer())
    model = open_model(str(folder), args={"device": "cpu"})
    ids = torch.arange(1, 20)[None]
    adapted = load_model(folder)
    with torch.no_grad():
        assert torch.equal(model.api.model(ids).logits, adapted(ids).logits)
        with adapted.disable_adapter():
            assert not torch.allclose(model.api.model(ids).logits, adapted(ids).logits)
    assert model.api.do_sample is False


# -- a server ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """``transformers serve`` with the workbench model on a free port of this machine: (base URL, model id)."""
    folder = tmp_path_factory.mktemp("served") / "workbench"
    bench = workbench()
    bench.tokenizer.chat_template = TEMPLATE
    save_model(bench.model, folder, bench.tokenizer)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["-m", "transformers.cli.transformers", "serve", str(folder), "--device", "cpu", "--host", "127.0.0.1"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with (folder.parent / "server.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, *words, "--port", str(port)], stdout=log, stderr=log, env=environment
        )
        try:
            _wait(f"http://127.0.0.1:{port}/health", process, folder.parent / "server.log")
            yield f"http://127.0.0.1:{port}/v1", str(folder)
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(url, process, log):
    for _ in range(240):
        assert process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(url, timeout=2) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.5)
    pytest.fail(f"the server did not start: {log.read_text()}")


@pytest.mark.slow
def test_a_real_server(capsys, server, notes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LOCAL_API_KEY", raising=False)  # a server on this machine needs none
    url, name = server
    model = f"openai-api/local/{name}"
    words = ("medec", "--model", model, "--model-base-url", url, "--data", notes, "--limit", 3, "--json")
    code, out, err = call(capsys, *words, "-T", "max_tokens=6", "-T", "examples=1")
    assert code == 0, err
    run = json.loads(out)
    assert run["folder"].startswith("runs/evaluate-medec-")
    assert json.loads(Path(run["folder"], "run.json").read_text())["metrics"] == run["metrics"]
    assert run["counts"]["samples"] == 3
    assert run["model"]["base_url"] == url
    assert next(iter(run["usage"].values()))["output_tokens"] > 0
    assert any("cut at the limit of tokens" in warning for warning in run["warnings"])


class _Stub(http.server.BaseHTTPRequestHandler):
    """An OpenAI-compatible server in a few lines, whose answers and pace a test sets."""

    answer, delay, status, seen = "CORRECT", 0.0, 200, []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).seen.append(body)
        time.sleep(self.delay)
        message = {"role": "assistant", "content": self.answer}
        reply = {"id": "1", "object": "chat.completion", "created": 1, "model": body["model"],
                 "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
                 "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}}  # fmt: skip
        if self.status != 200:
            reply = {"error": {"message": "the model 'm' does not exist", "type": "not_found", "code": self.status}}
        content = json.dumps(reply).encode()
        self.send_response(self.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        with contextlib.suppress(BrokenPipeError):  # whoever asked was interrupted
            self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def stub():
    handler = type("Handler", (_Stub,), {"seen": []})
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield handler, f"http://127.0.0.1:{httpd.server_address[1]}/v1"
    httpd.shutdown()
    httpd.server_close()


def test_what_a_server_is_asked_and_what_it_says(capsys, stub, notes, tmp_path, monkeypatch):
    handler, url = stub
    words = ("medec", "--model", "openai-api/local/m", "--model-base-url", url, "--data", notes, "--quiet")
    monkeypatch.chdir(tmp_path)
    code, out, err = call(capsys, *words, "--model-arg", "client_timeout=30", "--json")
    assert code == 0, err
    run = json.loads(out)
    assert run["metrics"]["flag"]["value"] == 0.5
    assert run["metrics"]["flag"]["stderr"] == 0.0, "each pair has one right and one wrong"
    assert run["baselines"]["always_correct.flag"] == 0.5
    body = handler.seen[0]
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("m", 512, 0.0)
    assert [m["role"] for m in body["messages"]] == ["system", "user"]
    handler.status = 404
    code, out, err = call(capsys, *words, "--out", "other")
    assert (code, out) == (2, "")
    assert "the evaluation stopped" in err
    assert "the model 'm' does not exist" in err
    assert "run the same command again to go on" in err
    handler.status = 200  # mended: the same command goes on
    assert call(capsys, *words, "--out", "other")[0] == 0


def test_keys_do_not_enter_the_run_folder(capsys, stub, notes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOCAL_API_KEY", "sesame-of-the-environment")
    words = (
        "medec",
        "--model",
        "openai-api/local/m",
        "--model-base-url",
        stub[1],
        "--data",
        notes,
        "--quiet",
        "--json",
    )
    code, out, err = call(capsys, *words, "--model-arg", "api_key=sesame-of-the-line", "--out", "out")
    assert code == 0, err
    assert "sesame" not in out + err
    for file in Path("out").rglob("*"):
        if file.is_file() and file.suffix in (".json", ".yaml"):
            assert "sesame" not in file.read_text(), file
    from gnomon.common.tasks import read_log

    log = read_log(next(Path("out/logs").glob("*.eval")))
    assert "sesame" not in log.model_dump_json()


@pytest.mark.slow
def test_an_interrupted_evaluation_goes_on_where_it_was(capsys, stub, tmp_path, monkeypatch):
    handler, url = stub
    monkeypatch.chdir(tmp_path)
    text = '"0 Case {i} has a fever.\n1 Drug A is given.",0,,-1,NA'
    (tmp_path / "many.csv").write_text(HEAD + "\n".join(f"m-{i}," + text.format(i=i) for i in range(60)) + "\n")
    handler.delay = 0.4
    words = ["evaluate", "medec", "--model", "openai-api/local/m", "--model-base-url", url, "--data", "many.csv",
             "--out", "out", "--quiet"]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "gnomon.cli.main", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for _ in range(600):
        if len(handler.seen) >= 30:  # the first twenty or so, asked at once, are finished
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, (out, err)
    assert "run the same command again to go on" in err
    assert "Traceback" not in err
    asked = len(handler.seen)
    assert asked < 60
    assert not Path("out/run.json").exists()
    handler.delay = 0.0
    code, out, err = call(capsys, *words[1:])
    assert code == 0, err
    assert json.loads(Path("out/run.json").read_text())["counts"]["samples"] == 60
    assert len(handler.seen) < 60 + asked - 5, "finished samples are not asked again"
