"""The settings that claims on adapters share: what is trained on what, and that nothing stands in both parts."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch

from gnomon.claims import adaptation, encoder
from gnomon.errors import DataError

TINY = {"hidden_size": 16, "num_layers": 1, "pretrain": 3}


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(adaptation.SIZES, "tiny", dict(TINY))
    monkeypatch.setitem(encoder.SIZES, "tiny", dict(TINY))
    yield
    adaptation.pretrained.cache_clear()
    encoder._encoder.cache_clear()


@pytest.mark.parametrize("text", ["names", "source"])
def test_no_row_stands_in_both_parts(text: str) -> None:
    train, valid = adaptation.rows(text, "train"), adaptation.rows(text, "valid")
    assert len(valid) == 1024
    assert len(train) > 2 * len(valid)
    seen = {tuple(row) for row in train.tolist()}
    assert sum(tuple(row) in seen for row in valid.tolist()) < 5


def test_the_base_is_made_once_and_copies_are_adapted() -> None:
    base = adaptation.pretrained(0, "tiny")
    before = {name: p.clone() for name, p in base.named_parameters()}
    state = torch.get_rng_state()
    model = adaptation.adapted(peft.LoraConfig(r=2, target_modules="all-linear"), 0, "tiny")
    seen: list[int] = []
    losses = adaptation.fit(
        model, adaptation.rows("names", "train"), 3, 1e-2, 1, on_step=lambda step, _: seen.append(step)
    )
    assert torch.equal(state, torch.get_rng_state())
    assert (len(losses), seen) == (3, [0, 1, 2])
    assert adaptation.pretrained(0, "tiny") is base
    assert all(torch.equal(p, before[name]) for name, p in base.named_parameters())
    assert adaptation.held_out_loss(model, "names") != adaptation.held_out_loss(base, "names")


def test_real_rows_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GNOMON_SHARED_DATA", raising=False)
    adaptation.rows.cache_clear()
    encoder._read.cache_clear()
    with pytest.raises(DataError, match="gsm8k_train"):
        adaptation.rows("maths", "train")
    with pytest.raises(DataError, match="sst2_train"):
        encoder._read("sst2", "train")


def _accuracy_by_hand(model: torch.nn.Module, task: encoder.Task) -> float:
    data = encoder.sentences(task, "test")
    with torch.no_grad():
        logits = model(input_ids=data.ids, attention_mask=data.mask).logits
    return 100 * float((logits.argmax(dim=-1) == data.labels).double().mean())


@pytest.mark.parametrize("task", ["sst2", "trec", "snips"])
def test_a_classifier_starts_from_the_encoder_and_learns(
    task: encoder.Task, shared_data, monkeypatch: pytest.MonkeyPatch
) -> None:
    root: Path = shared_data("sora").parent
    monkeypatch.setenv("GNOMON_SHARED_DATA", str(root))
    model = encoder.classifier(task, 0, "tiny")
    body = encoder._encoder(0, "tiny").bert.state_dict()
    assert all(torch.equal(model.bert.state_dict()[name], value) for name, value in body.items())
    batch = encoder.sentences(task, "test").batch(torch.arange(4))
    assert model(**batch).logits.shape == (4, {"sst2": 2, "trec": 6, "snips": 7}[task])
    rows = encoder.sentences(task, "test").batch(torch.arange(128))
    before = float(model(**rows).loss)
    encoder.fit_classifier(model, task, 60, 1e-2, 0)
    learned = before - float(model(**rows).loss)
    assert task == "sst2" or learned > 0.02  # 16 channels are too few for sentiment
    assert encoder.accuracy(model, task) == pytest.approx(_accuracy_by_hand(model, task))
    assert any(not torch.equal(model.bert.state_dict()[name], value) for name, value in body.items())
