"""GGPO and MGPO under DDP and FSDP2: two gloo ranks against one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import os
import warnings
import peft
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from gnomon.adapters import GGPO, MGPO, Perturbation
from gnomon.common.models import tiny
from gnomon.errors import ModelError

dist.init_process_group("gloo")
torch.set_num_threads(1)
rank = dist.get_rank()
batches = torch.randint(1, 64, (4, 4, 8), generator=torch.Generator().manual_seed(0))


def lora():
    base = tiny("llama", vocab_size=64, hidden_size=16, num_layers=2, num_heads=2, max_positions=32).double()
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        return peft.get_peft_model(base, peft.LoraConfig(r=3, lora_alpha=6, target_modules="all-linear")).train()


def sharded(model):
    for block in model.base_model.model.model.layers:
        fully_shard(block)
    return fully_shard(model)


def train(model, run, rule, backend, rows):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    perturbation = Perturbation(model, optimizer, rule, backend=backend)
    for batch in batches:
        perturbation.open(measure="in-backward")
        ids = batch[rows]
        run(input_ids=ids, labels=ids).loss.backward()
        perturbation.close()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 0.01)
        optimizer.step()
        optimizer.zero_grad()
    return perturbation


def full(x):
    return x.full_tensor() if hasattr(x, "full_tensor") else x


mine = slice(2 * rank, 2 * rank + 2)
for rule in (MGPO(0.2, 0.8), GGPO(0.2, 0.5)):
    single = lora()
    expected = train(single, single, rule, "weight", slice(None))
    for kind in ("ddp", "ddp, weight", "fsdp2"):
        model = lora()
        run = sharded(model) if kind == "fsdp2" else torch.nn.parallel.DistributedDataParallel(model)
        backend = {"ddp": "functional", "ddp, weight": "weight", "fsdp2": "auto"}[kind]
        found = train(model, run, rule, backend, mine)
        assert found.steps == 4 and found.memory.keys() == expected.memory.keys(), kind
        for name, value in expected.memory.items():
            torch.testing.assert_close(found.memory[name], value, rtol=1e-4, atol=1e-9, msg=kind + name)
        for (name, p), q in zip(model.named_parameters(), single.parameters()):
            torch.testing.assert_close(full(p.detach()), q.detach(), rtol=1e-4, atol=1e-5, msg=kind + name)
        saved = found.state_dict()["memory"]
        both = [None, None]
        dist.all_gather_object(both, {k: v.tolist() for k, v in saved.items()})
        assert both[0] == both[1]
model = sharded(lora())
try:
    Perturbation(model, torch.optim.AdamW(p for p in model.parameters() if p.requires_grad), MGPO(), backend="weight")
except ModelError as error:
    assert "its base weight is sharded (Linear). Use backend='functional'" in str(error)
else:
    raise SystemExit("the weight back-end was taken on sharded weights")
print("equal", rank, flush=True)
dist.barrier()
dist.destroy_process_group()
os._exit(0)  # threads of gloo that a wrapper still refers to can abort an ordinary exit
"""


def test_two_ranks_train_as_one(tmp_path: Path) -> None:
    script = tmp_path / "two_ranks.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("equal") == 2
