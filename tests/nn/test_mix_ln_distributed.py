"""Norm placements under DDP and FSDP2: two gloo ranks against one process."""

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
from gnomon.errors import ModelError
from gnomon.nn import apply_norm_placement

kind = sys.argv[1]
dist.init_process_group("gloo")
torch.set_num_threads(1)
rank = dist.get_rank()
ids = torch.randint(1, 256, (4, 12), generator=torch.Generator().manual_seed(0))
mine = ids[2 * rank : 2 * rank + 2]


def build(placement):
    model = apply_norm_placement(tiny("llama", num_layers=3), placement, 0.5).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return model


for placement in ("mix", "deepnorm", "sandwich"):
    single = build(placement)
    single(input_ids=ids, labels=ids).loss.backward()
    model = build(placement)
    if kind == "ddp":
        run = torch.nn.parallel.DistributedDataParallel(model)
    else:
        for block in model.model.layers:
            fully_shard(block)
        run = fully_shard(model)
    run(input_ids=mine, labels=mine).loss.backward()
    for (name, p), q in zip(model.named_parameters(), single.parameters()):
        grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        torch.testing.assert_close(grad, q.grad, atol=1e-6, rtol=1e-4, msg=name)
if kind == "fsdp2":
    try:
        apply_norm_placement(fully_shard(tiny("llama")))
    except ModelError as error:
        assert "Apply mix-ln before fully_shard" in str(error)
    else:
        raise SystemExit("a sharded model was accepted")
print("equal", rank, flush=True)
dist.barrier()
dist.destroy_process_group()
os._exit(0)  # threads of gloo that a wrapper still refers to can abort an ordinary exit
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_ranks_give_the_gradients_of_one(tmp_path: Path, kind: str) -> None:
    script = tmp_path / "two_ranks.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script), kind]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("equal") == 2
