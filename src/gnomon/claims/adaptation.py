"""The setting that claims on adapters share: a small Llama trained on one kind of bytes and adapted to another.

The base is trained on the Python documentation. What it is adapted to:

- ``"names"``: the names of the Unicode characters, far from prose (capitals, few words);
- ``"source"``: Python source, near;
- ``"maths"``: school arithmetic with worked answers, real rows that are no part of the package (`real_file`).
"""

from __future__ import annotations

import sysconfig
import unicodedata
import warnings
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

from gnomon.claims.real_data import real_file
from gnomon.common import corpora, models
from gnomon.common.rows import read_rows
from gnomon.common.text import byte_tokenizer
from gnomon.errors import DataError

__all__ = ["BATCH", "CONTEXT", "SIZES", "adapted", "fit", "held_out_loss", "pretrained", "rows"]

CONTEXT, BATCH = 64, 16
SIZES: dict[str, dict[str, int]] = {
    "small": {"hidden_size": 64, "num_layers": 2, "pretrain": 600},
    "medium": {"hidden_size": 256, "num_layers": 4, "pretrain": 3000},
    "large": {"hidden_size": 512, "num_layers": 8, "pretrain": 20000},
}


def _names() -> list[str]:
    """Names of characters with their category, in an order without runs of one script."""
    lines = [
        f"{unicodedata.category(c)} {unicodedata.name(c)}" for c in map(chr, range(0x3000)) if unicodedata.name(c, "")
    ]
    order = torch.randperm(len(lines), generator=torch.Generator().manual_seed(0)).tolist()
    return [lines[i] for i in order]


def _sources() -> list[str]:
    """The modules of the standard library, their first 20,000 characters."""
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = [path.read_text(encoding="utf-8", errors="replace")[:20_000] for path in sorted(root.glob("*.py"))]
    if len(texts) < 20:
        raise DataError(
            "fewer than 20 modules of the standard library lie here as source. Install Python's sources.", file=root
        )
    return texts


def _maths() -> list[str]:
    """Questions of GSM8K with their worked answers."""
    path = real_file("llm2llm/gsm8k_train.jsonl.gz", "the training rows of openai/grade-school-math (GSM8K)")
    return [f"{row['question']}\n{row['answer']}" for row in read_rows(path, columns=("question", "answer"))]


_PIECES = {"names": _names, "source": _sources, "maths": _maths}


@lru_cache(maxsize=8)
def rows(text: str, split: str) -> Tensor:
    """Return windows of `CONTEXT` bytes; every fifth piece of text is kept for validation, 1024 windows at most.

    Parameters
    ----------
    text : {"docs", "names", "source", "maths"}
    split : {"train", "valid"}
    """
    tokenizer = byte_tokenizer()
    if text == "docs":
        return corpora.windows(corpora.load("python-docs").tokens(tokenizer, split, 2_000_000), CONTEXT)
    chosen = [piece for i, piece in enumerate(_PIECES[text]()) if (i % 5 == 4) == (split == "valid")]
    ids = tokenizer("\n".join(chosen), verbose=False)["input_ids"]
    found = corpora.windows(torch.tensor(ids), CONTEXT)
    return found[:1024] if split == "valid" else found


def fit(
    model: nn.Module,
    data: Tensor,
    steps: int,
    lr: float,
    seed: int,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    on_step: Any = None,
) -> list[float]:
    """Train with 20 steps of warm-up and a linear decay, on windows drawn with the seed.

    Parameters
    ----------
    model : nn.Module
    data : Tensor (windows, CONTEXT)
    steps : int
    lr : float
        Of AdamW without weight decay.
    seed : int
    optimizer : torch.optim.Optimizer, optional
        Instead of that AdamW; `lr` is then its own.
    on_step : callable, optional
        Called with (step, optimizer) after backward, before the optimizer steps.

    Returns
    -------
    list of float
        The training loss of every step.
    """
    if optimizer is None:
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1.0, (i + 1) / 20) * (1 - i / steps))
    generator = torch.Generator().manual_seed(seed)
    losses = []
    model.train()
    for step in range(steps):
        batch = data[torch.randint(len(data), (BATCH,), generator=generator)]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        losses.append(float(loss))
        if on_step is not None:
            on_step(step, optimizer)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()
    return losses


@torch.no_grad()
def held_out_loss(model: nn.Module, text: str) -> float:
    """Return the mean loss over the validation windows of a text, in nats per byte."""
    data = rows(text, "valid")
    return sum(float(model(input_ids=part, labels=part).loss) * len(part) for part in data.split(128)) / len(data)


@lru_cache(maxsize=1)
def pretrained(seed: int, scale: str) -> Any:
    """Return a Llama trained on the Python documentation; the same object for the same arguments, so copy it."""
    size = SIZES[scale]
    model = models.tiny(
        "llama",
        vocab_size=len(byte_tokenizer()),
        hidden_size=size["hidden_size"],
        num_layers=size["num_layers"],
        max_positions=CONTEXT,
        seed=seed,
    )
    fit(model, rows("docs", "train"), size["pretrain"], 3e-3, seed)
    return model


def adapted(config: peft.PeftConfig, seed: int, scale: str) -> Any:
    """Return a copy of the pre-trained model with a fresh adapter."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)  # LoRA draws its start from the global generator
        return peft.get_peft_model(deepcopy(pretrained(seed, scale)), config)
