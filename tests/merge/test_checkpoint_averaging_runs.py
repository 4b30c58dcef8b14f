"""Averaging over runs, the selection rules and their table, and the few-shot baseline."""

from __future__ import annotations

import copy
import functools
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gnomon.common.models import tiny
from gnomon.errors import GnomonWarning, MethodError, ModelError
from gnomon.merge import (
    XltRun,
    accumulate_runs,
    average_states,
    gradient_vaccine,
    multilingual_loss,
    project_gradients,
    run_average,
    score_run,
    xlt_report,
)


class Net(nn.Module):
    def __init__(self, seed: int = 0, encoder_seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(encoder_seed)
            self.encoder = nn.Linear(4, 6)
            torch.manual_seed(seed)
            self.classifier = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.tanh(self.encoder(x)))


def train(model: nn.Module, seed: int, snapshot: Callable[[], None], log: Any = None, steps: int = 6) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(steps):
        x = torch.randn(8, 4, generator=generator)
        nn.functional.cross_entropy(model(x), (x.sum(1) > 0).long()).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 2 == 1:
            snapshot()
            if log is not None:
                log.append((seed, {k: v.clone() for k, v in model.state_dict().items()}))


def accuracy(model: nn.Module) -> float:
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(99))
    with torch.no_grad():
        return float((model(x).argmax(1) == (x.sum(1) > 0)).float().mean())


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.allclose(a[k], b[k], rtol=0, atol=3e-7) for k in a)


def test_further_runs_start_at_the_base_with_the_first_ones_head_frozen() -> None:
    base, log = Net(), []
    found = run_average(base, functools.partial(train, log=log), seeds=[3, 4, 5], evaluate=accuracy)
    states = {seed: [s for other, s in log if other == seed] for seed in (3, 4, 5)}
    first, head = copy.deepcopy(base), states[3][-1]
    train(first, 3, lambda: None)
    assert same(first.state_dict(), states[3][-1]), "the first run is an ordinary one"
    for seed in (4, 5):
        again = copy.deepcopy(base)
        again.classifier.load_state_dict({k: head[f"classifier.{k}"] for k in ("weight", "bias")})
        again.classifier.requires_grad_(False)
        train(again, seed, lambda: None)
        assert same(again.state_dict(), states[seed][-1])
        assert all(torch.equal(s["classifier.weight"], head["classifier.weight"]) for s in states[seed])
    assert same(found.last, average_states([states[s][-1] for s in (3, 4, 5)]))
    assert same(found.all, average_states([s for _, s in log]))
    assert found.snapshots == [3, 3, 3]
    assert found.seeds == [3, 4, 5]
    model = Net()
    model.load_state_dict(found.all)
    assert found.scores["RA(CA)"] == [accuracy(model)]
    model.load_state_dict(average_states(states[4]))
    assert found.scores["CA"][1] == accuracy(model)
    model.load_state_dict(states[4][-1])
    assert found.scores["LAST"][1] == accuracy(model)
    assert all(p.requires_grad for p in base.parameters()), "the base itself is left alone"
    assert same(base.state_dict(), Net().state_dict())


def test_the_soup_shares_the_first_head_and_trains_it() -> None:
    starts, log = [], []

    def watch(model: nn.Module, seed: int, snapshot: Callable[[], None]) -> None:
        starts.append(model.classifier.weight.detach().clone())
        train(model, seed, snapshot, log)

    run_average(lambda seed: Net(seed), watch, seeds=[3, 4], share_head="init")
    assert torch.equal(starts[0], starts[1])
    assert torch.equal(starts[0], Net(3).classifier.weight)
    assert not torch.equal(log[-1][1]["classifier.weight"], starts[0])


def test_runs_from_different_starts_are_told() -> None:
    with pytest.warns(GnomonWarning, match=r"seed 4 starts from other task heads than the first \(classifier.weight"):
        run_average(lambda seed: Net(seed), train, seeds=[3, 4], share_head="none")
    with pytest.warns(GnomonWarning, match="seed 4 starts from other weights than the first .*one common start"):
        run_average(lambda seed: Net(0, encoder_seed=seed), train, seeds=[3, 4])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run_average(lambda seed: Net(seed), train, seeds=[3, 4])
        run_average(Net(), train, seeds=[3, 4], share_head="none")


def test_ray_gives_the_same_as_here() -> None:
    pytest.importorskip("ray")
    here, there = (run_average(Net(), train, seeds=[1, 2], evaluate=accuracy, engine=e) for e in ("local", "ray"))
    assert all(torch.equal(here.all[k], there.all[k]) for k in here.all)
    assert here.scores == there.scores


test_ray_gives_the_same_as_here = pytest.mark.slow(test_ray_gives_the_same_as_here)


def test_a_run_without_snapshots_counts_with_its_last_weights() -> None:
    log: list[Any] = []

    def quiet(model: nn.Module, seed: int, snapshot: Callable[[], None]) -> None:
        train(model, seed, lambda: None, log)

    found = run_average(Net(), quiet, seeds=[1, 2])
    assert found.snapshots == [1, 1]
    assert same(found.all, found.last)


def test_runs_with_more_snapshots_weigh_more() -> None:
    log: list[Any] = []

    def uneven(model: nn.Module, seed: int, snapshot: Callable[[], None]) -> None:
        train(model, seed, snapshot, log, steps=2 * seed)

    found = run_average(Net(), uneven, seeds=[1, 4])
    assert found.snapshots == [1, 4]
    assert same(found.all, average_states([state for _, state in log])), "the mean of all snapshots, not of two means"


def test_a_folder_is_a_base(tmp_path: Path) -> None:
    tiny("bert", hidden_size=16, num_layers=1, num_heads=2, vocab_size=32).save_pretrained(tmp_path)
    found = run_average(str(tmp_path), lambda m, s, snapshot: snapshot(), seeds=[1, 2], head_names=["cls"])
    assert any(name.startswith("cls.") for name in found.all)


def test_run_average_checks_what_it_is_given() -> None:
    def meddle(model: nn.Module, seed: int, snapshot: Callable[[], None]) -> None:
        with torch.no_grad():
            model.classifier.weight += seed

    for error, options, message in (
        (MethodError, {"seeds": [1]}, r"seeds = \[1\]. Give two or more, all different"),
        (MethodError, {"seeds": [1, 1]}, "all different"),
        (MethodError, {"share_head": "freeze"}, "share_head = 'freeze' is unknown"),
        (
            ModelError,
            {"head_names": ["scores"]},
            r"head_names = \('scores',\); the model's parts are: encoder, classifier",
        ),
        (ModelError, {"train_fn": meddle}, r"changed the frozen head \(classifier.weight\)"),
    ):
        with pytest.raises(error, match=message):
            run_average(Net(), **{"train_fn": train, "seeds": [1, 2], **options})  # type: ignore[arg-type]


def test_accumulation_is_the_mean_and_stops_when_it_stops_helping() -> None:
    taken: list[float] = []

    def runs() -> Iterator[dict[str, Tensor]]:
        for value in (0.0, 2.0, 6.5, 8.0, 1.0):
            taken.append(value)
            yield {"weight": torch.tensor([[value]])}

    model = nn.Linear(1, 1, bias=False)

    def miss(m: nn.Module) -> float:
        return abs(float(m.weight.detach()) - 1)

    found = accumulate_runs(model, runs(), miss, higher_is_better=False)
    assert taken == [0.0, 2.0, 6.5], "not trained beyond the stop"
    assert (found.count, float(model.weight)) == (2, 1.0)
    assert found.scores == pytest.approx([1.0, 0.0, 17 / 6 - 1])
    taken.clear()
    assert accumulate_runs(model, runs(), lambda m: -miss(m), patience=3).count == 2
    assert len(taken) == 5
    with pytest.raises(MethodError, match="no runs to accumulate"):
        accumulate_runs(model, [], miss)
    with pytest.raises(MethodError, match="patience = 0"):
        accumulate_runs(model, runs(), miss, patience=0)


def xlt(seed: int = 0, **changes: Any) -> XltRun:
    values: dict[str, Any] = {
        "test": {"de": [10.0, 30.0, 20.0], "fr": [40.0, 50.0, 60.0]},
        "average": {"de": 25.0, "fr": 65.0},
        "source_dev": [0.9, 0.7, 0.8],
        "target_dev": {"de": [1.0, 2.0, 0.0], "fr": [0.0, 3.0, 3.0]},
    }
    return XltRun(seed, **{**values, **changes})


def test_the_rules_choose_as_defined() -> None:
    run = xlt()
    assert run.scores("LAST") == {"de": 20.0, "fr": 60.0}
    assert run.scores("S-DEV") == {"de": 10.0, "fr": 40.0}
    assert run.scores("T-DEV") == {"de": 30.0, "fr": 50.0}, "the first of equals, each language by itself"
    assert run.scores("CA") == {"de": 25.0, "fr": 65.0}
    assert xlt(source_dev=None).scores("S-DEV") is None


def test_the_table_has_means_and_deviations_over_seeds_and_settings() -> None:
    shifted = {"de": [11.0, 31.0, 24.0], "fr": [40.0, 50.0, 64.0]}
    runs = [
        xlt(0, setting="lr 1"),
        xlt(1, setting="lr 1", test=shifted),
        xlt(0, setting="lr 2", average={"de": 1, "fr": 2}),
    ]
    report = xlt_report(runs, by_language=True)
    row = report.row("LAST", "lr 1")
    assert (row.mean, row.runs) == (42.0, 2)
    assert row.std == pytest.approx(math.sqrt(8))
    assert report.row("LAST", "all", "de").mean == pytest.approx((20 + 24 + 20) / 3)
    assert math.isnan(report.row("CA", "lr 2").std)
    assert report.to_dict()[0]["rule"] == "LAST"
    assert all(r["std"] is None for r in report.to_dict() if r["runs"] == 1)
    text = str(xlt_report(runs)).splitlines()
    assert text[0].split() == ["lr", "1", "lr", "2", "all"]
    assert [line.split()[0] for line in text[1:]] == ["LAST", "S-DEV", "CA", "T-DEV"]
    assert "42.00 ± 2.83" in text[1]
    assert str(xlt_report([xlt()])).splitlines()[1].split() == ["LAST", "40.00"]
    assert "T-DEV" not in str(xlt_report([xlt(), xlt(1, target_dev=None)]))
    with pytest.raises(MethodError, match=r"has no \('EMA', 'all', 'mean'\)"):
        report.row("EMA")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test": {}}, "run of seed 0: there are no test scores"),
        ({"source_dev": [0.5]}, "source_dev has 1 scores for 3 snapshots"),
        ({"target_dev": {"de": [0.0] * 3, "fr": [0.0] * 2}}, r"target_dev\['fr'\] has 2 scores"),
        ({"average": {"de": 1.0}}, r"average has the languages \['de'\], test has \['de', 'fr'\]"),
        ({"average": {"de": 1.0, "fr": math.nan}}, "average holds a score that is not finite"),
    ],
)
def test_scores_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(MethodError, match=message):
        xlt(**changes)


def test_reports_check_their_runs() -> None:
    with pytest.raises(MethodError, match="no runs to report on"):
        xlt_report([])
    with pytest.raises(MethodError, match="Seed 0 stands twice in the setting ''"):
        xlt_report([xlt(), xlt()])
    other = XltRun(1, {"cs": [1.0]}, {"cs": 1.0})
    with pytest.raises(MethodError, match=r"languages \['cs'\], the first one \['de', 'fr'\]"):
        xlt_report([xlt(), other])


def test_a_run_is_scored_snapshot_by_snapshot() -> None:
    model = Net()
    states = [Net(seed).state_dict() for seed in range(3)]

    def evaluate(m: nn.Module) -> dict[str, Any]:
        return {"test": {"de": float(m.classifier.bias.detach().sum())}, "source_dev": accuracy(m)}

    run = score_run(model, states, evaluate, seed=7, setting="x")
    assert run.test["de"] == pytest.approx([float(s["classifier.bias"].sum()) for s in states])
    assert run.average["de"] == pytest.approx(sum(run.test["de"]) / 3, abs=1e-6)
    assert (run.seed, run.setting, run.target_dev) == (7, "x", None)
    assert same(model.state_dict(), average_states(states))


def test_conflicting_gradients_are_projected() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        g, o = ([torch.randn(s, generator=generator) for s in ((3, 4), (5,))] for _ in range(2))
        inner = sum(float((a * b).sum()) for a, b in zip(g, o, strict=True))
        square = sum(float((b * b).sum()) for b in o)
        found = project_gradients(g, o)
        for a, b, c in zip(g, o, found, strict=True):
            torch.testing.assert_close(c, a - min(0.0, inner / square) * b)
        after = sum(float((a * b).sum()) for a, b in zip(found, o, strict=True))
        assert after >= -1e-4
    assert project_gradients(g, [torch.zeros_like(t) for t in o])[0] is g[0]


def test_the_vaccine_leaves_one_language_out_and_spares_it() -> None:
    before = torch.random.get_rng_state()
    weight, spare = nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.zeros(2))
    chosen = set()
    for seed in range(12):
        losses = {"en": weight[0] - weight[1], "de": 3 * weight[1], "fr": weight[0] * 2 + weight[1]}
        out = gradient_vaccine(losses, [weight, spare], torch.Generator().manual_seed(seed))
        chosen.add(out)
        gradients = {name: torch.autograd.grad(loss, weight)[0] for name, loss in losses.items()}
        rest = torch.stack([g for name, g in gradients.items() if name != out]).mean(0)
        (expected,) = project_gradients([rest], [gradients[out]])
        torch.testing.assert_close(weight.grad, expected)
        assert float(weight.grad @ gradients[out]) >= -1e-6
        assert torch.equal(spare.grad, torch.zeros(2))
    assert chosen == {"en", "de", "fr"}
    assert torch.equal(before, torch.random.get_rng_state())
    with pytest.raises(MethodError, match=r"of 1 language\(s\): \['en'\]. One is left out; give two"):
        gradient_vaccine({"en": weight.sum()}, [weight], torch.Generator())
    with pytest.raises(MethodError, match="There is no loss to average"):
        multilingual_loss({})
    assert float(multilingual_loss({"a": torch.tensor(1.0), "b": torch.tensor(2.0)})) == 1.5
