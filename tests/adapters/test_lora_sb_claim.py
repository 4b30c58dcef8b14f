"""LoRA-SB's claims at a size that takes seconds: the arms train the same numbers and do not touch one another."""

from __future__ import annotations

import pytest
import torch

from gnomon.claims import adaptation, lora_sb


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(adaptation.SIZES, "tiny", {"hidden_size": 16, "num_layers": 1, "pretrain": 3})
    monkeypatch.setitem(lora_sb._SIZES, "tiny", {"r": 4, "steps": 40, "samples": 32})
    yield
    adaptation.pretrained.cache_clear()


def test_all_arms_train_the_same_count_from_their_own_start() -> None:
    models = {arm: lora_sb.attached(arm, "names", 0, "tiny") for arm in lora_sb.better_start.arms}
    assert {m.get_nb_trainable_parameters()[0] for m in models.values()} == {7 * 16}
    base = adaptation.held_out_loss(adaptation.pretrained(0, "tiny"), "names")
    start = {arm: adaptation.held_out_loss(m.eval(), "names") for arm, m in models.items()}
    assert start["random"] == pytest.approx(base)
    assert start["lora-xs"] == pytest.approx(base, abs=1e-3)
    assert start["lora-sb"] < base


def test_an_arm_changes_no_other_and_the_first_rows_are_those_of_the_training() -> None:
    first = lora_sb.better_start.measure("lora-sb", 0, "tiny")
    lora_sb.better_start.measure("lora-xs", 0, "tiny")
    assert lora_sb.better_start.measure("lora-sb", 0, "tiny") == first
    data = adaptation.rows("names", "train")
    drawn = torch.randint(len(data), (adaptation.BATCH,), generator=torch.Generator().manual_seed(5))
    assert torch.equal(lora_sb._first_batches("names", 5, 32)[0]["input_ids"], data[drawn])
