"""The hook under DDP on two gloo ranks; started twice by test_econtrol_hook.py.

python econtrol_two_ranks.py RANK STORE OUTPUT
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parent))
from econtrol_definition import loop, top

from gnomon.common.models import tiny
from gnomon.errors import ModelError
from gnomon.optim import EControlCallback, EControlState, ErrorFeedback, TopK, econtrol_hook

RATIO, ETA, LR, BELOW = 0.1, 0.2, 0.05, 16


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 20), nn.Tanh(), nn.Linear(20, 15), nn.Tanh(), nn.Linear(15, 3)).to(dtype)


def batch(rank: int, step: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(9, 7, generator=generator, dtype=dtype), torch.randn(9, 3, generator=generator, dtype=dtype)


def gradients(model: nn.Module, rank: int, step: int) -> list[torch.Tensor]:
    x, y = batch(rank, step)
    return list(torch.autograd.grad(((model(x) - y) ** 2).mean() * (rank + 1), list(model.parameters())))


def descend(model: nn.Module, step: int, rank: int, dtype: torch.dtype = torch.float64) -> None:
    x, y = batch(rank, step, dtype)
    model.zero_grad()
    (((model(x) - y) ** 2).mean() * (rank + 1)).backward()
    with torch.no_grad():
        for p in model.parameters():
            p.sub_(LR * p.grad)


def simulated(kind: str, steps: int, *, dense: bool, one_vector: bool = False, start: int = 0) -> nn.Module:
    """Both workers in this process, tensor by tensor (or all as one vector), by the plain loop."""
    model = network()
    history: list[list[list[torch.Tensor]]] = []
    for step in range(steps):
        of_workers = [gradients(model, rank, step) for rank in range(2)]
        updates = [sum(pair) / 2 for pair in zip(*of_workers, strict=True)]
        if step >= start:
            history.append(of_workers)
            large = [i for i, u in enumerate(updates) if u.numel() >= BELOW]
            for i in set(range(len(updates))) - set(large):
                grads = [[gs[i] for gs in both] for both in history]
                updates[i] = loop(kind, grads, lambda v: v, eta=ETA, dense=dense)[-1]
            if one_vector:
                grads = [[torch.cat([gs[i].reshape(-1) for i in large]) for gs in both] for both in history]
                count = TopK(RATIO).count((grads[0][0].numel(),))
                flat = loop(kind, grads, lambda v, k=count: top(v, k), eta=ETA, dense=dense)[-1]
                pieces = flat.split([updates[i].numel() for i in large])
                for i, piece in zip(large, pieces, strict=True):
                    updates[i] = piece.view_as(updates[i])
            else:
                for i in large:
                    count = TopK(RATIO).count((updates[i].numel(),))
                    grads = [[gs[i] for gs in both] for both in history]
                    updates[i] = loop(kind, grads, lambda v, k=count: top(v, k), eta=ETA, dense=dense)[-1]
        with torch.no_grad():
            for p, u in zip(model.parameters(), updates, strict=True):
                p.sub_(LR * u)
    return model


def apart(a: nn.Module, b: nn.Module) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def trained(state: ErrorFeedback, rank: int, steps: int, **ddp: Any) -> nn.Module:
    model = network()
    wrapped = DistributedDataParallel(model, **ddp)
    state.register(wrapped)
    for step in range(steps):
        descend(wrapped, step, rank)
    return model


def equal_to_the_simulation(rank: int) -> dict[str, float]:
    found = {}
    for kind in ("econtrol", "ec", "ef21", "ef21-sgdm", "none"):
        for init in ("dense", "compressed"):
            state = ErrorFeedback(kind, ratio=RATIO, eta=ETA, init=init, dense_below=BELOW)  # type: ignore[arg-type]
            model = trained(state, rank, 8, bucket_cap_mb=0.001)
            found[f"{kind}, {init}"] = apart(model, simulated(kind, 8, dense=init == "dense"))
    state = EControlState(ratio=RATIO, eta=ETA, dense_below=BELOW, granularity="global")
    found["one vector"] = apart(trained(state, rank, 8), simulated("econtrol", 8, dense=True, one_vector=True))
    state = EControlState(ratio=RATIO, eta=ETA, dense_below=BELOW, start_iter=3)
    found["later start"] = apart(trained(state, rank, 8), simulated("econtrol", 8, dense=True, start=3))
    return found


def identical_everywhere(rank: int) -> float:
    state = EControlState("topk", 0.05, dense_below=0)
    model = network(torch.float32)
    wrapped = DistributedDataParallel(model, bucket_cap_mb=0.001)
    wrapped.register_comm_hook(state, econtrol_hook)
    for step in range(100):
        descend(wrapped, step, rank, torch.float32)
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    both = [torch.empty_like(flat) for _ in range(2)]
    dist.all_gather(both, flat)
    assert all(bool(torch.isfinite(b).all()) for b in both)
    return float((both[0] != both[1]).sum())


def every_compressor_runs(rank: int) -> dict[str, list[float]]:
    losses = {}
    for name in ("identity", "topk", "randk", "sign", "lowrank", "rounding"):
        model = network(torch.float32)
        wrapped = DistributedDataParallel(model)
        state = EControlState(name, 0.2, dense_below=0)
        state.register(wrapped)
        x, y = batch(rank, 0, torch.float32)
        of_steps = []
        for _ in range(60):
            loss = ((wrapped(x) - y) ** 2).mean()
            of_steps.append(float(loss))
            model.zero_grad()
            loss.backward()
            with torch.no_grad():
                for p in model.parameters():
                    p.sub_(0.1 * p.grad)
        losses[name] = [of_steps[0], of_steps[-1]]
    return losses


def accumulation(rank: int) -> float:
    """Two passes under no_sync and one exchange equal one pass over both batches."""
    models = []
    for split in (False, True):
        model = network()
        wrapped = DistributedDataParallel(model)
        EControlState(ratio=RATIO, eta=ETA, dense_below=0).register(wrapped)
        for step in range(4):
            x, y = batch(rank, step)
            model.zero_grad()
            if split:
                with wrapped.no_sync():
                    ((wrapped(x[:3]) - y[:3]) ** 2).sum().backward()
                ((wrapped(x[3:]) - y[3:]) ** 2).sum().backward()
            else:
                ((wrapped(x) - y) ** 2).sum().backward()
            with torch.no_grad():
                for p in model.parameters():
                    p.sub_(0.001 * p.grad)
        models.append(model)
    return apart(*models)


def saved_and_loaded(rank: int) -> float:
    straight = trained(EControlState(ratio=RATIO, dense_below=BELOW), rank, 8, bucket_cap_mb=0.001)
    first = EControlState(ratio=RATIO, dense_below=BELOW)
    model = network()
    wrapped = DistributedDataParallel(model, bucket_cap_mb=0.001)
    first.register(wrapped)
    for step in range(4):
        descend(wrapped, step, rank)
    kept, weights = first.state_dict(), {k: v.clone() for k, v in model.state_dict().items()}
    again = network()
    again.load_state_dict(weights)
    wrapped = DistributedDataParallel(again, bucket_cap_mb=0.001)
    second = EControlState(ratio=RATIO, dense_below=BELOW)
    second.load_state_dict(kept)
    second.register(wrapped)
    for step in range(4, 8):
        descend(wrapped, step, rank)
    return apart(straight, again)


def not_finite(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for how in ("raise", "skip"):
        model = network()
        wrapped = DistributedDataParallel(model)
        state = EControlState(ratio=RATIO, dense_below=0, nonfinite=how)  # type: ignore[arg-type]
        state.register(wrapped)
        descend(wrapped, 0, rank)
        before = {k: m.h.clone() for k, m in state.memory.items()}
        x, y = batch(rank, 1)
        if rank == 1:
            x[0, 0] = float("inf")
        model.zero_grad()
        try:
            ((wrapped(x) - y) ** 2).mean().backward()
            found[how] = bool(torch.isnan(next(model.parameters()).grad).all())
        except Exception as error:
            found[how] = f"{type(error).__name__}: {error}"
        found[f"{how} kept"] = all(torch.equal(before[k], m.h) for k, m in state.memory.items())
        if how == "skip":
            descend(wrapped, 2, rank)
            found["goes on"] = all(bool(torch.isfinite(p).all()) for p in model.parameters())
    return found


def traffic(rank: int) -> dict[str, float]:
    state = EControlState(ratio=0.1, dense_below=0, init="compressed")
    trained(state, rank, 3)
    return {**state.statistics(), "memory": state.memory_bytes()}


def with_the_trainer(rank: int, folder: Path) -> dict[str, Any]:
    from transformers import Trainer, TrainingArguments

    rows = [
        {"input_ids": r, "labels": r}
        for r in torch.randint(1, 256, (32, 16), generator=torch.Generator().manual_seed(0))
    ]

    def run(name: str, steps: int, resume: bool = False) -> tuple[nn.Module, EControlCallback, list[dict[str, Any]]]:
        callback = EControlCallback(ratio=0.05)
        trainer = Trainer(
            model=tiny("llama", num_layers=1),
            args=TrainingArguments(
                output_dir=str(folder / name), max_steps=6, per_device_train_batch_size=4, save_steps=3,
                logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, lr_scheduler_type="constant",
                ddp_find_unused_parameters=False,
            ),
            train_dataset=rows,
            callbacks=[callback, *([_StopAt(steps)] if steps < 6 else [])],
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=str(folder / name / "checkpoint-3") if resume else None)
        return trainer.model, callback, trainer.state.log_history

    whole, callback, logs = run("whole", 6)
    run("parts", 3)
    dist.barrier()
    rest, _, _ = run("parts", 6, resume=True)
    return {
        "resumed": apart(whole, rest),
        "file": (folder / "whole" / "checkpoint-3" / f"econtrol-{rank}.pt").is_file(),
        "ratio": [entry["econtrol_ratio"] for entry in logs if "econtrol_ratio" in entry][-1],
        "steps": callback.state.iteration,
    }


class _StopAt:
    def __new__(cls, step: int) -> Any:
        from transformers import TrainerCallback

        class Stop(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
                control.should_training_stop = state.global_step >= step
                return control

        return Stop()


def main(rank: int, store: str, output: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    folder = Path(output).parent / "trainer"
    found: dict[str, Any] = {
        "simulation": equal_to_the_simulation(rank),
        "different": identical_everywhere(rank),
        "losses": every_compressor_runs(rank),
        "accumulation": accumulation(rank),
        "saved": saved_and_loaded(rank),
        "nonfinite": not_finite(rank),
        "traffic": traffic(rank),
    }
    try:
        EControlState().register(network())
    except ModelError as error:
        found["unwrapped"] = str(error)
    found["trainer"] = with_the_trainer(rank, folder)
    if rank == 0:
        Path(output).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    import os

    os.environ |= {"RANK": sys.argv[1], "WORLD_SIZE": "2", "LOCAL_RANK": sys.argv[1], "ACCELERATE_USE_CPU": "true",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}  # fmt: skip
    warnings.simplefilter("ignore")
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
