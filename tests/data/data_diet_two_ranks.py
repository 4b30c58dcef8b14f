"""Scoring and the callback on two gloo ranks; started twice by test_data_diet_trainer.py.

python data_diet_two_ranks.py RANK FOLDER
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from gnomon.data.data_diet import DataDietCallback, ForgettingTable, score_examples
from gnomon.errors import DataError, ModelError

ROWS = 13


def make() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def callback(rank: int) -> tuple[DataDietCallback, ForgettingTable]:
    """Three epochs in which rows move between ranks; the second table sees the same batches in one process."""
    watched, single = DataDietCallback(ROWS), ForgettingTable(ROWS)
    generator = np.random.default_rng(0)
    for epoch in range(3):
        order, right = generator.permutation(ROWS), generator.random(ROWS) < 0.5
        for step, part in enumerate(np.array_split(order, 4)):
            single.update(part, right[part])
            if step % 2 == rank:
                watched._log.append((4 * epoch + step, part, right[part], None))
        if epoch > 0:
            watched.on_epoch_end(*(SimpleNamespace() for _ in range(3)))  # type: ignore[arg-type]
    return watched, single


def main() -> None:
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    address = {"MASTER_ADDR": "127.0.0.1", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ.update(address)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    x = torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(0))
    rows = (x, x[:, :3].argmax(1))
    models = [make(), make()]
    found: dict[str, Any] = {}
    for method in ("el2n", "grand"):
        shared = score_examples(models, rows, method, distributed=True, batch_size=4)  # type: ignore[arg-type]
        found[method] = float(np.abs(shared - score_examples(models, rows, method)).max())  # type: ignore[arg-type]
    wrapped = nn.parallel.DistributedDataParallel(make())
    alone = score_examples(models, rows, "grand")
    found["ddp"] = float(np.abs(score_examples([wrapped] * 2, rows, "grand", distributed=True) - alone).max())
    both: list[Any] = [None, None]
    dist.all_gather_object(both, score_examples(models, rows, distributed=True, batch_size=5).tolist())
    found["same on both"] = both[0] == both[1]
    sharded = make()
    for layer in (sharded[0], sharded[2]):
        fully_shard(layer)
    fully_shard(sharded)
    shared = score_examples([sharded] * 2, rows, distributed=True, batch_size=4)
    found["fsdp"] = float(np.abs(shared - score_examples(models, rows)).max())
    try:
        score_examples([sharded] * 2, rows, "grand", distributed=True)
    except ModelError as error:
        found["refused"] = str(error)
    wrong = rows[1].clone()
    wrong[4] = 9  # on the first rank only
    try:
        score_examples(models, (x, wrong), distributed=True)
    except DataError as error:
        found["heard"] = str(error)
    both = [None, None]
    dist.all_gather_object(both, found["heard"])
    found["heard"] = both
    watched, single = callback(rank)
    found |= {"seen": watched.table.seen.tolist(), "events": watched.table.events.tolist()}
    found["events of one rank"] = single.events.tolist()
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
