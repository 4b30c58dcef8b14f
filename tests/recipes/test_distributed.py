"""The same recipe on two gloo ranks under torchrun ends where one process ends."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
import yaml

import gnomon

pytestmark = pytest.mark.slow


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def test_two_ranks_equal_one(recipe, tmp_path):
    recipe["stages"][0]["train"]["tokens"] = 3000
    (tmp_path / "mini.yaml").write_text(yaml.safe_dump(recipe))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    ranks = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={_free_port()}"]
    for out, launcher in (("one", []), ("two", ranks)):
        words = [sys.executable, *launcher, "-m", "gnomon.cli.main", "run", "mini.yaml", "--out", out, "--json"]
        done = subprocess.run(
            words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert json.loads(done.stdout)["status"] == "finished", "the first rank alone prints"
    one, two = (json.loads((tmp_path / out / "run.json").read_text()) for out in ("one", "two"))
    curves = [torch.tensor(r["arms"][0]["stages"][0]["details"]["loss_curve"]) for r in (one, two)]
    torch.testing.assert_close(*curves, rtol=0, atol=2e-4)  # the logged losses are rounded
    ends = [r["arms"][0]["stages"][1]["metrics"]["perplexity"]["value"] for r in (one, two)]
    assert ends[1] == pytest.approx(ends[0], rel=1e-5)
    weights = [gnomon.load_model(tmp_path / out / "model").state_dict() for out in ("one", "two")]
    for name, tensor in weights[0].items():
        if "embed_tokens" in name:
            torch.testing.assert_close(weights[1][name], tensor, rtol=0, atol=1e-5)
