"""Adapters in the loops people train with: two ranks, the Trainer with a resume, TRL."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import Trainer, TrainingArguments

sys.path.insert(0, str(Path(__file__).parent))
from adapter_members import adapted, base_model, config, ids, initialised, logits, members, trained

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning")]
MEMBERS = members()
every = pytest.mark.parametrize("member", MEMBERS)
each_slug = pytest.mark.parametrize("member", [m for m in MEMBERS if ":" not in m])


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("ranks")
    script = Path(__file__).with_name("adapter_two_ranks.py")
    tail = [str(folder / "store"), str(folder / "found.json"), str(folder), *MEMBERS]
    ranks = [
        subprocess.Popen([sys.executable, script, str(rank), *tail], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        errors = [rank.communicate(timeout=400)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert all(rank.returncode == 0 for rank in ranks), errors
    return json.loads((folder / "found.json").read_text())


@every
def test_two_ranks_equal_one(two_ranks: dict[str, Any], member: str) -> None:
    found = two_ranks[member]
    assert found["moved"] > 1e-4
    assert found["ddp"] < 1e-9
    assert found["fsdp2"] < 1e-9
    assert found["sharded"]
    assert found["reloaded"] < 1e-5  # saved in float32 where the method keeps its numbers so


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Eight rows of tokens."""

    rows = ids(rows=8)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def trainer(member: str, folder: Path, steps: int) -> Trainer:
    torch.manual_seed(0)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        save_steps=2,
        learning_rate=0.05,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        label_names=["labels"],
        seed=3,
    )
    return Trainer(model=adapted(member), args=arguments, train_dataset=Rows())


@every
def test_a_run_cut_in_two_ends_where_the_whole_one_does(member: str, tmp_path: Path) -> None:
    whole = trainer(member, tmp_path / "whole", 4)
    start = {name: p.detach().clone() for name, p in trained(whole.model).items()}
    whole.train()
    trainer(member, tmp_path / "half", 2).train()
    resumed = trainer(member, tmp_path / "half", 4)
    resumed.train(resume_from_checkpoint=True)
    after = trained(resumed.model)
    for name, expected in trained(whole.model).items():
        assert torch.equal(after[name], expected), name
    assert any(not torch.equal(p, start[name]) for name, p in after.items())
    saved = peft.PeftModel.from_pretrained(base_model(), str(tmp_path / "whole" / "checkpoint-4")).eval()
    assert torch.equal(logits(saved), logits(whole.model.eval()))


@each_slug
def test_one_step_of_trl(member: str, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from gnomon.common.text import byte_tokenizer

    base = base_model(vocab_size=257)
    before = {name: p.clone() for name, p in base.named_parameters()}
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=2,
        max_length=16,
        learning_rate=0.05,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        bf16=False,
        gradient_checkpointing=True,
    )
    run = trl.SFTTrainer(
        model=base,
        args=arguments,
        train_dataset=datasets.Dataset.from_dict({"text": ["the gnomon stands upright", "and casts its shadow"] * 2}),
        processing_class=byte_tokenizer(),
        peft_config=config(member, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    initialised(member, run.model)
    start = {name: p.detach().clone() for name, p in trained(run.model).items()}
    assert start
    run.train()
    assert any(not torch.equal(p, start[name]) for name, p in trained(run.model).items())
    kept = {n.replace("base_model.model.", "").replace(".base_layer", ""): p for n, p in run.model.named_parameters()}
    assert all(torch.equal(kept[name].float(), p) for name, p in before.items())
