"""The callback in a transformers Trainer, and scoring on two gloo ranks."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from gnomon.common.models import tiny
from gnomon.data.data_diet import DataDietCallback, IndexCollator, el2n, forgetting_scores, select, with_row_ids
from gnomon.errors import ConfigError, DataError, GnomonWarning, MethodError

N, V, T = 24, 23, 6


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def rows_of(rows: int = N) -> Dataset:
    ids = torch.randint(V, (rows, T), generator=torch.Generator().manual_seed(0))
    return with_row_ids(Dataset.from_dict({"input_ids": ids.tolist(), "labels": (ids.sum(1) % 3).tolist()}))


def classifier() -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=V, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, num_labels=3
    )
    return BertForSequenceClassification(config)


class Spy(TrainerCallback):
    """Records what went into the model and what came out, by a hook of its own."""

    def __init__(self) -> None:
        self.batches: list[tuple[list[int], torch.Tensor, torch.Tensor]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        def before(model: Any, a: Any, kw: dict[str, Any]) -> None:
            self.ids = kw["row_id"].tolist() if "row_id" in kw else []

        def after(model: Any, a: Any, kw: dict[str, Any], output: Any) -> None:
            if model.training:
                self.batches.append((self.ids, output.logits.detach().clone(), kw["labels"]))

        kwargs["model"].register_forward_pre_hook(before, with_kwargs=True, prepend=True)
        kwargs["model"].register_forward_hook(after, with_kwargs=True)


def trainer_of(folder: Path, callback: DataDietCallback, *more: TrainerCallback, **options: Any) -> Trainer:
    settings = {"max_steps": 30, "save_strategy": "no", "eval_strategy": "no", **options}
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, learning_rate=1e-2, report_to=[], use_cpu=True,
        disable_tqdm=True, remove_unused_columns=False, seed=0, **settings,
    )  # fmt: skip
    collator = IndexCollator(default_data_collator)
    held = rows_of(8) if options.get("eval_strategy") == "steps" else rows_of(8).remove_columns("row_id")
    return Trainer(
        model=classifier(), args=arguments, train_dataset=rows_of(), eval_dataset=held, data_collator=collator,
        callbacks=[callback, *more],
    )  # fmt: skip


def test_events_and_el2n_of_the_batches_seen(tmp_path: Path) -> None:
    callback, spy = DataDietCallback(N, from_step=6, until_step=18), Spy()
    trainer_of(tmp_path, callback, spy, eval_strategy="steps", eval_steps=7).train()
    assert len(spy.batches) == 30
    history = np.zeros((5, N))  # 24 rows in batches of 4: an epoch is 6 steps
    sums = np.zeros(N)
    for step, (ids, logits, labels) in enumerate(spy.batches):
        history[step // 6, ids] = (logits.argmax(1) == labels).numpy()
        if 6 <= step < 18:
            sums[ids] += el2n(logits, labels).numpy()
    np.testing.assert_array_equal(callback.scores("forgetting").values, forgetting_scores(history))
    np.testing.assert_allclose(callback.scores("el2n").values, sums / 2, rtol=1e-6)
    assert callback.table.seen.tolist() == [5] * N
    assert callback.table.events.sum() > 0
    rows = rows_of()
    table = callback.scores("el2n", rows)
    table.check(rows)
    assert len(select(table, 0.5)) == 12
    assert not callback._handles


def test_training_itself_is_not_changed(tmp_path: Path) -> None:
    with_callback = trainer_of(tmp_path / "a", DataDietCallback(N), max_steps=8)
    with_callback.train()

    class Pop(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            kwargs["model"].register_forward_pre_hook(
                lambda m, a, kw: (a, {k: v for k, v in kw.items() if k != "row_id"}), with_kwargs=True
            )

    plain = trainer_of(tmp_path / "b", Pop(), max_steps=8)  # type: ignore[arg-type]
    plain.train()
    pairs = zip(with_callback.model.parameters(), plain.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_counts_go_on_from_a_checkpoint(tmp_path: Path) -> None:
    whole = DataDietCallback(N)
    trainer_of(tmp_path / "whole", whole, save_strategy="steps", save_steps=10).train()
    resumed = DataDietCallback(N)
    trainer_of(tmp_path / "whole", resumed).train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-20"))
    for name in ("forgetting", "el2n"):
        np.testing.assert_allclose(resumed.scores(name).values, whole.scores(name).values, rtol=1e-5)  # type: ignore[arg-type]
    assert resumed.table.seen.tolist() == [5] * N
    (tmp_path / "whole" / "checkpoint-20" / "data_diet.npz").unlink()
    with pytest.warns(GnomonWarning, match="counts start at the step"):
        trainer_of(tmp_path / "whole", DataDietCallback(N)).train(
            resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-20")
        )


def test_language_models_have_el2n_and_no_events(tmp_path: Path) -> None:
    ids = torch.randint(V, (8, T), generator=torch.Generator().manual_seed(0)).tolist()
    callback = DataDietCallback(8)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, report_to=[], use_cpu=True,
        disable_tqdm=True, remove_unused_columns=False, save_strategy="no",
    )  # fmt: skip
    rows = with_row_ids(Dataset.from_dict({"input_ids": ids, "labels": ids}))
    model = tiny("llama", vocab_size=V, hidden_size=16, num_layers=1)
    collator = IndexCollator(default_data_collator)
    Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collator, callbacks=[callback]).train()
    assert (callback.scores("el2n").values > 0).all()
    assert np.isnan(callback.scores("forgetting").values).all()


def test_rows_without_an_identity_are_refused(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, DataDietCallback(N))
    trainer.args.remove_unused_columns = True
    with pytest.raises(ConfigError, match=r"remove_unused_columns=True drops the column 'row_id'"):
        trainer.train()
    trainer = trainer_of(tmp_path, DataDietCallback(N))
    trainer.train_dataset = trainer.train_dataset.remove_columns("row_id")
    with pytest.raises(DataError, match="A training batch has no 'row_id'"):
        trainer.train()
    trainer = trainer_of(tmp_path, DataDietCallback(5))
    with pytest.raises(DataError, match=r"row id \d+ is outside 0 to 4"):
        trainer.train()
    with pytest.raises(MethodError, match="no steps at all"):
        DataDietCallback(N, from_step=5, until_step=5)
    with pytest.raises(MethodError, match="Allowed: 'forgetting', 'el2n'"):
        DataDietCallback(N).scores("grand")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="1 rows of a batch have no 'row_id'"):
        IndexCollator(default_data_collator)([{"row_id": 1, "label": 0}, {"label": 1}])


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("ranks")
    script = Path(__file__).with_name("data_diet_two_ranks.py")
    both = [
        subprocess.Popen([sys.executable, script, str(rank), str(folder)], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        errors = [rank.communicate(timeout=120)[1] for rank in both]
    finally:
        for rank in both:
            rank.kill()
    assert all(rank.returncode == 0 for rank in both), errors
    found: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return found


def test_ranks_gather_by_row(ranks: dict[str, Any]) -> None:
    for name in ("el2n", "grand", "ddp", "fsdp"):
        assert ranks[name] < 1e-5, name
    assert ranks["same on both"]


def test_gradients_of_sharded_models_are_refused(ranks: dict[str, Any]) -> None:
    assert "sharded (FSDP)" in ranks["refused"]


def test_ranks_put_their_batches_together(ranks: dict[str, Any]) -> None:
    assert ranks["seen"] == [3] * 13
    assert ranks["events"] == ranks["events of one rank"]


def test_an_error_on_one_rank_is_raised_on_all(ranks: dict[str, Any]) -> None:
    assert ["label 9 in row 4" in message for message in ranks["heard"]] == [True, True]
