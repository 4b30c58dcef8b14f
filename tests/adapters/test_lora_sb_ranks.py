"""LoRA-SB's initialisation on two ranks equals that on one: gradients are summed before the sign."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = """
import sys, torch, peft
from gnomon.adapters import LoRASBConfig, initialize_lora_sb, lora_sb_factors
from gnomon.common.models import tiny
from gnomon.common.ranks import ranks

sizes = dict(vocab_size=64, hidden_size=16, num_layers=1, num_heads=2, max_positions=32)
model = peft.get_peft_model(tiny("llama", **sizes).double(), LoRASBConfig(r=4, target_modules="all-linear")).double()
ids = torch.randint(1, 64, (7, 12), generator=torch.Generator().manual_seed(1))
state = ranks()
own = ids[state.process_index :: state.num_processes]
initialize_lora_sb(model, [{"input_ids": row[None], "labels": row[None]} for row in own], eta=0.01, num_samples=5)
try:
    initialize_lora_sb(model, [{"input_ids": own, "labels": own}], eta=0.01, num_samples=8)
except ValueError as error:
    assert "num_samples = 8" in str(error)
else:
    raise SystemExit("too many rows were not noticed")
torch.save(lora_sb_factors(model), f"{sys.argv[1]}/{state.num_processes}-{state.process_index}.pt")
"""


@pytest.mark.slow
def test_two_ranks_probe_what_one_does(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for world in (1, 2):
        for rank in range(world):
            environment = dict(os.environ, OMP_NUM_THREADS="1")
            if world > 1:
                environment |= {
                    "WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2",
                    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                }  # fmt: skip
            command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
            started.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    try:
        errors = [process.communicate(timeout=120)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert all(process.returncode == 0 for process in started), errors
    one, first, second = (torch.load(tmp_path / f"{n}.pt", weights_only=False) for n in ("1-0", "2-0", "2-1"))
    for key, expected in one.items():
        for letter in "ABR":
            found = getattr(first[key], letter)
            torch.testing.assert_close(found, getattr(expected, letter))
            assert torch.equal(getattr(second[key], letter), found)
