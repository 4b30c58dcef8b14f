"""The report on each block, the map of angles, and the Trainer callback that watches gradients and collapse."""

from __future__ import annotations

import copy
import json
import math
import warnings

import pandas as pd
import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from gnomon.common import depth
from gnomon.common.layers import decoder_blocks
from gnomon.common.models import tiny
from gnomon.errors import GnomonWarning, MethodError, ModelError
from gnomon.nn import BlockGradientMonitor, angular_map, apply_norm_placement, layer_report
from gnomon.nn.mix_ln.monitor import unigram_entropy

IDS = torch.randint(1, 256, (5, 11), generator=torch.Generator().manual_seed(3))


def matrix(rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def wide(placement: str = "mix", architecture: str = "llama") -> nn.Module:
    return apply_norm_placement(tiny(architecture, initializer_range=0.2), placement, 0.5).eval()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("placement", ["mix", "pre", "sandwich"])
def test_the_report_holds_what_the_definitions_give(architecture: str, placement: str) -> None:
    model = wide(placement, architecture)
    report = layer_report(model, IDS, batch_size=2)
    assert list(report.columns) == ["layer", "grad_norm", "variance", "angular_distance", "loss_drop"]
    assert report["layer"].tolist() == [0, 1, 2, 3]
    blocks = decoder_blocks(model)
    twin = copy.deepcopy(model)
    twin(input_ids=IDS, labels=IDS).loss.backward()
    hidden = model(IDS, output_hidden_states=True).hidden_states
    last: list[torch.Tensor] = []
    blocks[-1].register_forward_hook(lambda module, args, output: last.append(output.detach()))
    whole = float(model(input_ids=IDS, labels=IDS).loss.detach())
    points = [*(h.detach() for h in hidden[:-1]), last[0]]
    for index, row in report.iterrows():
        block = decoder_blocks(twin)[index]
        norm = sum(float(p.grad.double().square().sum()) for p in block.parameters()) ** 0.5
        assert row["grad_norm"] == pytest.approx(norm, rel=1e-4)
        parts = points[index + 1].split(2)
        variance = sum(float(part.double().var(correction=0)) for part in parts) / 3
        assert row["variance"] == pytest.approx(variance, rel=1e-4)
        cosine = nn.functional.cosine_similarity(points[index][:, -1].double(), points[index + 1][:, -1].double())
        assert row["angular_distance"] == pytest.approx(float((cosine.arccos() / math.pi).mean()), abs=1e-6)
        removed = depth.remove_block(copy.deepcopy(model), index)
        drop = float(removed(input_ids=IDS, labels=IDS).loss.detach()) - whole
        assert row["loss_drop"] == pytest.approx(drop, abs=1e-5)


def test_the_matrix_of_angles_comes_with_the_report_and_alone() -> None:
    model = wide()
    report = layer_report(model, IDS, max_distance=3)
    table = angular_map(model, IDS, max_distance=3)
    assert table.shape == (4, 3)
    assert (table.index.name, table.columns.name, list(table.columns)) == ("layer", "distance", [1, 2, 3])
    assert table[1].tolist() == pytest.approx(report["angular_distance"].tolist())
    assert math.isnan(table.loc[2, 3]), "there is no block behind the last"
    torch.testing.assert_close(matrix(report.attrs["angular_distances"]), matrix(table.values), equal_nan=True)
    drawn = angular_map(model, IDS, max_distance=3, normalised=True)
    expected = depth.for_plotting(matrix(table.values))
    torch.testing.assert_close(matrix(drawn.values), expected, equal_nan=True)
    torch.testing.assert_close(matrix(report.attrs["angular_distances_for_plotting"]), expected, equal_nan=True)
    json.dumps(report.attrs)
    assert len(pd.concat([report, report])) == 8, "attrs must not get in the way"


def test_a_data_loader_padding_and_another_metric() -> None:
    model = wide()
    rows = [{"input_ids": IDS[0, :6]}, {"input_ids": IDS[1]}]
    padded = torch.nn.utils.rnn.pad_sequence([r["input_ids"] for r in rows], batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(r["input_ids"]) for r in rows], batch_first=True)
    loader = torch.utils.data.DataLoader(
        [{"input_ids": a, "attention_mask": b} for a, b in zip(padded, mask, strict=True)], 2
    )

    def accuracy(m: nn.Module) -> float:
        with torch.no_grad():
            return float((m(IDS).logits.argmax(-1)[:, :-1] == IDS[:, 1:]).double().mean())

    report = layer_report(model, loader, metric=accuracy)
    plain = layer_report(model, rows, batch_size=1)
    assert report["angular_distance"].tolist() == pytest.approx(plain["angular_distance"].tolist(), rel=1e-5)
    assert report["loss_drop"].tolist() == pytest.approx(plain["loss_drop"].tolist(), abs=1e-5)
    with depth.skipping_block(model, 2):
        without = accuracy(model)
    assert report["metric_drop"][2] == pytest.approx(without - accuracy(model))


def test_the_model_and_the_random_state_are_left_alone() -> None:
    model = wide().train()
    state, weights = torch.get_rng_state(), copy.deepcopy(model.state_dict())
    layer_report(model, IDS)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(weights[n], t) for n, t in model.state_dict().items())
    assert all(m.training and "forward" not in m.__dict__ and not m._forward_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_what_cannot_be_reported_is_told() -> None:
    for value in (0, 5):
        with pytest.raises(MethodError, match=rf"max_distance = {value}"):
            layer_report(tiny("llama"), IDS, max_distance=value)
    with pytest.raises(ModelError, match=r"trainable"):
        layer_report(tiny("llama").requires_grad_(False), IDS)
    with pytest.raises(ModelError, match=r"no language-model head"):
        layer_report(tiny("llama").model, IDS)


def train(tmp_path, monitor: BlockGradientMonitor, model=None, data=None, **options) -> Trainer:
    args = {"output_dir": str(tmp_path), "max_steps": 6, "logging_steps": 2, "per_device_train_batch_size": 2,
            "report_to": [], "disable_tqdm": True, "use_cpu": True, "save_strategy": "no",
            "warmup_steps": 1}  # fmt: skip
    ids = torch.randint(1, 256, (24, 12), generator=torch.Generator().manual_seed(0)) if data is None else data
    rows = [{"input_ids": row, "labels": row} for row in ids]
    model = model or apply_norm_placement(tiny("llama"))
    trainer = Trainer(model, TrainingArguments(**(args | options)), train_dataset=rows, callbacks=[monitor])
    trainer.train()
    return trainer


class TestMonitor:
    def test_it_logs_the_gradient_of_every_block_before_clipping(self, tmp_path) -> None:
        monitor = BlockGradientMonitor(collapse=False)
        trainer = train(tmp_path, monitor, max_grad_norm=1e-3, gradient_accumulation_steps=2)
        assert [entry["step"] for entry in monitor.history] == [2, 4, 6]
        logged = [entry for entry in trainer.state.log_history if "loss" in entry]
        for entry, mine in zip(logged, monitor.history, strict=True):
            norms = [entry[f"gradient_norm/block_{block}"] for block in (1, 2, 3, 4)]
            assert norms == [mine[f"gradient_norm/block_{block}"] for block in (1, 2, 3, 4)]
            total = sum(n**2 for n in norms) ** 0.5
            assert 1e-3 < total <= entry["grad_norm"] * 1.001
        model = trainer.model
        assert not model._forward_pre_hooks
        assert not any(p._post_accumulate_grad_hooks for p in model.parameters())

    def test_the_values_are_those_of_the_diagnostics(self, tmp_path) -> None:
        monitor = BlockGradientMonitor(every=1, prefix="g")
        data = torch.randint(1, 256, (8, 12), generator=torch.Generator().manual_seed(0))
        train(tmp_path, monitor, data=data, max_steps=1, per_device_train_batch_size=4, gradient_accumulation_steps=2)
        expected = depth.gradient_norms(apply_norm_placement(tiny("llama")), data)
        assert [monitor.history[0][f"g/block_{b}"] for b in (1, 2, 3, 4)] == pytest.approx(expected.tolist(), rel=1e-3)

    def test_a_collapsed_run_is_told_once(self, tmp_path) -> None:
        monitor = BlockGradientMonitor()
        skewed = torch.distributions.Categorical(torch.arange(1.0, 256.0).reciprocal())
        with torch.random.fork_rng():
            torch.manual_seed(0)
            data = skewed.sample((64, 12)) + 1
        with pytest.warns(
            GnomonWarning, match=r"At step \d+ of 20 .*frequencies of the tokens alone.*collapsed"
        ) as seen:
            train(tmp_path, monitor, data=data, max_steps=20, learning_rate=1e-5)
        assert len([w for w in seen if "collapsed" in str(w.message)]) == 1
        assert 4 <= monitor.collapsed_at <= 6

    def test_a_run_that_learns_is_not(self, tmp_path) -> None:
        monitor = BlockGradientMonitor()
        data = torch.arange(24 * 12).reshape(24, 12) % 16 + 1
        with warnings.catch_warnings():
            warnings.simplefilter("error", GnomonWarning)
            model = apply_norm_placement(tiny("llama", num_layers=2), "mix", 0.5)
            train(tmp_path, monitor, model, data, max_steps=40, logging_steps=20, learning_rate=1e-2, warmup_steps=4)
        assert monitor.collapsed_at is None

    def test_a_short_warm_up_is_warned_of_where_blocks_are_post_ln(self, tmp_path) -> None:
        with pytest.warns(GnomonWarning, match=r"Warm-up takes 0 of 6 steps, and 1 blocks are Post-LN: under 2%"):
            train(tmp_path, BlockGradientMonitor(collapse=False), warmup_steps=0)
        with warnings.catch_warnings():
            warnings.simplefilter("error", GnomonWarning)
            train(tmp_path, BlockGradientMonitor(collapse=False), tiny("llama"), warmup_steps=0)

    def test_a_step_of_zero_is_refused(self) -> None:
        with pytest.raises(MethodError, match=r"every = 0. It must be at least 1 optimizer step"):
            BlockGradientMonitor(every=0)

    def test_the_entropy_is_that_of_the_frequencies(self) -> None:
        assert unigram_entropy(torch.ones(32000)) == pytest.approx(math.log(32000))
        assert unigram_entropy(torch.tensor([5, 0, 0])) == 0.0
