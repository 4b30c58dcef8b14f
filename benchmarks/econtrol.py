"""EControl's hook against PowerSGD's and plain all-reduce on two gloo processes; selection against `torch.topk`.

python benchmarks/econtrol.py [--rounds N]
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from timing import check, compare, finish
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as powersgd
from torch.nn.parallel import DistributedDataParallel

from gnomon.optim import EControlState
from gnomon.optim.econtrol.compressors import top_indices

WIDTH, DEPTH = 1024, 6


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH)])


def worker(rank: int, store: str, rounds: int, times: object) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    generator = torch.Generator().manual_seed(rank)
    states = {"econtrol": EControlState(ratio=0.01), "powersgd": powersgd.PowerSGDState(None, 4, start_powerSGD_iter=2)}
    models = {}
    for name in ("all-reduce", "powersgd", "econtrol"):
        # one bucket: with several, PowerSGD's nested exchanges can come in another order on each process under gloo
        models[name] = DistributedDataParallel(network(), bucket_cap_mb_list=[1000])
        if name == "powersgd":
            models[name].register_comm_hook(states[name], powersgd.powerSGD_hook)
        elif name == "econtrol":
            states[name].register(models[name])
    for turn in range(4 + rounds):
        x = torch.randn(64, WIDTH, generator=generator)  # the same data again would leave nothing to send
        for name, model in models.items():
            dist.barrier()
            started = time.perf_counter()
            model(x).square().mean().backward()
            model.zero_grad()
            if rank == 0 and turn >= 4:
                times[name] = [*times[name], time.perf_counter() - started]  # type: ignore[index]
    if rank == 0:
        times["statistics"] = states["econtrol"].statistics()  # type: ignore[index]
    dist.destroy_process_group()


def hooks(rounds: int) -> None:
    with mp.Manager() as manager, tempfile.TemporaryDirectory() as folder:
        times = manager.dict({name: [] for name in ("all-reduce", "powersgd", "econtrol")})
        mp.spawn(worker, (os.path.join(folder, "store"), rounds, times), nprocs=2)
        found = dict(times)
    statistics = found.pop("statistics")
    medians = {name: sorted(values)[len(values) // 2] for name, values in found.items()}
    print(f"\nbackward pass with exchange, {DEPTH} matrices of {WIDTH}^2, 2 processes on one machine (loopback)")
    for name, seconds in medians.items():
        print(f"  {name:<48} {seconds * 1e3:10.3f} ms")
    check("EControl over plain all-reduce, time", medians["econtrol"] / medians["all-reduce"])
    check("EControl over PowerSGD of rank 4, time", medians["econtrol"] / medians["powersgd"], at_most=1.5)
    check("bytes received over all-reduce, first dense round included", statistics["ratio"], at_most=0.2)


def selection(rounds: int) -> None:
    for d in (1_000_000, 10_000_000):
        x = torch.randn(d, generator=torch.Generator().manual_seed(0))
        k = d // 100
        compare(
            f"the {k:,} largest of {d:,} entries",
            {"ours": lambda x=x, k=k: top_indices(x, k), "torch.topk": lambda x=x, k=k: x.abs().topk(k)},
            ours="ours",
            peer="torch.topk",
            at_least=1.5,
            rounds=rounds,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    selection(given.rounds)
    hooks(given.rounds)
    finish()
