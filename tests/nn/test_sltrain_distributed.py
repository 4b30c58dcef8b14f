"""SLTrain and per-layer updates under DDP and FSDP2: two gloo ranks against one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import os
import sys
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from gnomon.common.models import tiny
from gnomon.common.per_layer import per_layer_optimizer
from gnomon.errors import MethodError, ModelError
from gnomon.nn import apply_sltrain, fold_sltrain

kind = sys.argv[1]
dist.init_process_group("gloo")
torch.set_num_threads(1)
rank = dist.get_rank()
ids = torch.randint(1, 256, (4, 12), generator=torch.Generator().manual_seed(0))
mine = ids[2 * rank : 2 * rank + 2]


def build():
    model = apply_sltrain(tiny("llama", num_layers=2), 5, 0.1)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return model


def whole(t):
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def refused(call, error, text):
    try:
        call()
    except error as raised:
        assert text in str(raised), raised
    else:
        raise SystemExit(text + ": was accepted")


def sharded():
    model = build()
    for block in model.model.layers:
        fully_shard(block)
    return fully_shard(model)


single = build()
optimizer = torch.optim.SGD(single.parameters(), lr=0.1, momentum=0.9)
run = torch.nn.parallel.DistributedDataParallel(build()) if kind == "ddp" else sharded()
theirs = torch.optim.SGD(run.parameters(), lr=0.1, momentum=0.9)
layered = None
if kind == "ddp":
    refused(lambda: per_layer_optimizer(build(), torch.optim.SGD, lr=0.1), MethodError, "2 ranks have not averaged")
else:
    refused(lambda: apply_sltrain(fully_shard(tiny("llama")), 4), ModelError, "Apply sltrain before fully_shard")
    refused(lambda: fold_sltrain(run), ModelError, "are sharded")
    layered = sharded()
    inside = per_layer_optimizer(layered, torch.optim.SGD, lr=0.1, momentum=0.9)
for step in range(2):
    single(input_ids=ids, labels=ids).loss.backward()
    run(input_ids=mine, labels=mine).loss.backward()
    for (name, p), q in zip(single.named_parameters(), run.parameters()):
        torch.testing.assert_close(whole(q.grad), p.grad, atol=1e-6, rtol=1e-4, msg=name)
    if layered is not None:
        layered(input_ids=mine, labels=mine).loss.backward()
        assert all(p.grad is None for p in layered.parameters())
        inside.step()
    for o in (optimizer, theirs):
        o.step()
        o.zero_grad()
for (name, p), q in zip(single.named_parameters(), (layered or run).parameters()):
    torch.testing.assert_close(whole(q).detach(), p.detach(), atol=1e-5, rtol=1e-4, msg=name)
for name, buffer in run.named_buffers():
    if name.endswith("indices"):
        assert torch.equal(buffer, dict(single.named_buffers())[name.removeprefix("module.")])
print("equal", rank, flush=True)
dist.barrier()
dist.destroy_process_group()
os._exit(0)  # threads of gloo that a wrapper still refers to can abort an ordinary exit
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_ranks_give_the_steps_of_one(tmp_path: Path, kind: str) -> None:
    script = tmp_path / "two_ranks.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script), kind]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("equal") == 2
