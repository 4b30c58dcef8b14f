"""The callback on two gloo ranks; started twice by test_checkpoint_averaging_distributed.py.

python checkpoint_averaging_two_ranks.py RANK STORE FOLDER
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import TrainerControl, TrainerState

sys.path.insert(0, str(Path(__file__).parent))
from checkpoint_averaging_definition import mean_of
from test_checkpoint_averaging_callback import SIZES, Watch, difference, trainer

from gnomon.common.models import load_model, tiny
from gnomon.merge import CheckpointAveraging

RANK, STORE, FOLDER = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])


def replicated() -> dict[str, Any]:
    """DDP inside the Trainer: the first rank keeps the mean, all hold it at the end; then a resumed run."""
    found: dict[str, Any] = {}
    for keep in ("online", "disk"):
        folder, watch = FOLDER / f"ddp-{keep}", Watch()
        callback = CheckpointAveraging(keep=keep, out=str(folder / "out"))  # type: ignore[arg-type]
        options = {"save_strategy": "epoch", "num_train_epochs": 3, "ddp_backend": "gloo"}
        run = trainer(folder, callback, watch, **options)
        run.train()
        assert run.args.world_size == 2
        mean = mean_of([watch.states[i] for i in callback.steps])
        found[f"{keep} error"] = difference(run.model.state_dict(), mean)
        found[f"{keep} saved"] = difference(load_model(folder / "out").state_dict(), mean)
        found[f"{keep} held"] = len(callback.average.mean)
        found[f"{keep} steps"] = callback.steps
        again = trainer(folder, CheckpointAveraging(keep=keep), **options)  # type: ignore[arg-type]
        again.train(resume_from_checkpoint=str(folder / f"checkpoint-{callback.steps[1]}"))
        found[f"{keep} resumed"] = difference(again.model.state_dict(), run.model.state_dict())
    return found


def sharded() -> dict[str, Any]:
    """FSDP2: every rank averages its own shards; the first one writes whole tensors."""
    found: dict[str, Any] = {}
    for keep in ("online", "disk"):
        folder = FOLDER / f"fsdp-{keep}"
        whole = drive(folder, keep, 0)
        found[f"{keep} error"], found[f"{keep} saved"] = whole["error"], whole["saved"]
        found[f"{keep} divided"] = whole["divided"]
        found[f"{keep} resumed"] = drive(folder, keep, 2)["error"]
        assert all(tensor.equal(whole["result"][name]) for name, tensor in drive(folder, keep, 2)["result"].items())
    return found


def drive(folder: Path, keep: Any, resume: int) -> dict[str, Any]:
    """Call the events as the Trainer does, over four steps from `resume` on."""
    model = tiny("qwen", **SIZES)
    for layer in model.model.layers:
        fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    fully_shard(model)
    args = SimpleNamespace(
        output_dir=str(folder), resume_from_checkpoint=None, load_best_model_at_end=False, gradient_accumulation_steps=1
    )
    state = TrainerState(max_steps=4, global_step=resume, epoch=0.0, is_world_process_zero=RANK == 0)
    control, callback = TrainerControl(), CheckpointAveraging(every=1, keep=keep, out=str(folder / "out"))
    callback.on_train_begin(args, state, control, model=model)
    divided = all(hasattr(p, "placements") for p in model.parameters())
    x, states = torch.arange(8)[None], []
    for step in range(4):
        model(input_ids=x, labels=x).loss.backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.5 * p.grad
                p.grad = None
        states.append({k: p.full_tensor().clone() for k, p in model.state_dict().items()})
        if step < resume:
            continue  # as if the weights had been loaded
        state.global_step, control.should_save = step + 1, step == 1
        callback.on_step_begin(args, state, control, model=model)
        callback.on_step_end(args, state, control, model=model)
        if step == 1:
            with torch.no_grad():
                model(input_ids=x)  # an evaluation leaves the outer weights gathered
            (folder / "checkpoint-2").mkdir(parents=True, exist_ok=True)
            callback.on_save(args, state, control, model=model)
    with torch.no_grad():
        model(input_ids=x)
    callback.on_train_end(args, state, control, model=model)
    result = {name: p.full_tensor() for name, p in model.state_dict().items()}
    mean = mean_of(states)
    saved = load_model(folder / "out")
    assert type(saved).__name__ == "Qwen2ForCausalLM"
    return {
        "error": difference(result, mean),
        "saved": difference(saved.state_dict(), mean),
        "divided": divided,
        "result": result,
    }


def main() -> None:
    torch.set_num_threads(1)
    os.environ.update({"RANK": str(RANK), "LOCAL_RANK": str(RANK), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"})
    dist.init_process_group("gloo", init_method=f"file://{STORE}", rank=RANK, world_size=2)
    found = {"ddp": replicated(), "fsdp2": sharded()}
    (FOLDER / f"found{RANK}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
