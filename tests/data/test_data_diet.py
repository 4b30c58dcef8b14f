"""Scores from logits, forgetting events, selection: against the definitions in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gnomon.data.data_diet import (
    ForgettingTable,
    ScoreTable,
    SubsetTrial,
    TrainingPlan,
    el1,
    el2n,
    forgetting_scores,
    margin,
    noise_auc,
    noise_report,
    permute_labels,
    prune_by_score,
    select,
    sum_margin,
)
from gnomon.errors import DataError, GnomonWarning, MethodError

HISTORY = np.array([[0, 1, 0, 1], [1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 1]]).T


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def logits_of(rows: int, classes: int, scale: float = 3.0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows * 100 + classes)
    z = torch.randn(rows, classes, generator=generator, dtype=torch.float64) * scale
    return z.to(dtype), torch.randint(classes, (rows,), generator=generator)


def definitions(z: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The four scores as the paper and the authors' code write them."""
    p = z.double().softmax(1)
    onehot = torch.nn.functional.one_hot(y, z.shape[1]).double()
    py = (p * onehot).sum(1)
    others = p.masked_fill(onehot.bool(), -1).amax(1)
    return {
        "el2n": (p - onehot).norm(dim=1),
        "el1": (p - onehot).abs().sum(1),
        "margin": others - py,
        "sum_margin": (p - py[:, None]).sum(1) - 0.0,
    }


FUNCTIONS = {"el2n": el2n, "el1": el1, "margin": margin, "sum_margin": sum_margin}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(("rows", "classes"), [(7, 2), (5, 3), (33, 10), (3, 1000)])
def test_scores_are_their_definitions(name: str, rows: int, classes: int) -> None:
    z, y = logits_of(rows, classes)
    torch.testing.assert_close(FUNCTIONS[name](z, y), definitions(z, y)[name], rtol=1e-12, atol=1e-12)
    low = FUNCTIONS[name](z.float(), y)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low.double(), definitions(z.float(), y)[name], rtol=1e-5, atol=1e-6)


def test_closed_forms() -> None:
    z, y = logits_of(50, 2)
    py = z.softmax(1).gather(1, y[:, None])[:, 0]
    torch.testing.assert_close(el2n(z, y), math.sqrt(2) * (1 - py), rtol=1e-12, atol=1e-14)
    z, y = logits_of(50, 6)
    p = z.softmax(1)
    py = p.gather(1, y[:, None])[:, 0]
    torch.testing.assert_close(el2n(z, y), (p.square().sum(1) - 2 * py + 1).sqrt(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(el1(z, y), 2 * (1 - py), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(sum_margin(z, y), 1 - 6 * py, rtol=1e-12, atol=1e-12)


def test_sure_rows_keep_their_digits() -> None:
    """1 - p_y cancels in float32 near 0; the sum over the other classes does not."""
    z = torch.tensor([[30.0, 0.0, 0.0]])
    expected = definitions(z.double(), torch.tensor([0]))
    exact = math.sqrt((2 * math.exp(-30)) ** 2 + 2 * math.exp(-60))
    assert float(el2n(z, torch.tensor([0]))) == pytest.approx(exact, rel=1e-5)
    assert float(el1(z, torch.tensor([0]))) == pytest.approx(4 * math.exp(-30), rel=1e-5)
    assert float(el2n(z, torch.tensor([1]))) == pytest.approx(math.sqrt(2), rel=1e-6)
    assert float(expected["el2n"]) >= 0


def test_large_logits_do_not_overflow_and_bf16_is_close() -> None:
    z, y = logits_of(20, 5, scale=1e4)
    assert bool(torch.isfinite(el2n(z.float(), y)).all())
    z, y = logits_of(200, 10)
    assert float((el2n(z.bfloat16(), y) - el2n(z, y)).abs().max()) < 2e-2
    torch.testing.assert_close(el2n(z.bfloat16(), y), el2n(z.bfloat16().float(), y))


@given(rows=st.integers(1, 9), classes=st.integers(2, 12), scale=st.floats(0.01, 50))
def test_ranges(rows: int, classes: int, scale: float) -> None:
    z, y = logits_of(rows, classes, scale)
    assert bool((el2n(z, y) >= 0).all())
    assert bool((el2n(z, y) <= math.sqrt(2) + 1e-12).all())
    assert bool((margin(z, y).abs() <= 1 + 1e-12).all())


def test_rows_of_tokens_are_means_over_tokens_in_use() -> None:
    z, y = logits_of(12, 7)
    z, y = z.reshape(3, 4, 7), y.reshape(3, 4)
    each = definitions(z.reshape(12, 7), y.reshape(12))["el2n"].reshape(3, 4)
    y = y.clone()
    y[0, 1:] = -100
    y[2, 0] = -100
    expected = torch.stack([each[0, 0], each[1].mean(), each[2, 1:].mean()])
    torch.testing.assert_close(el2n(z, y), expected, rtol=1e-12, atol=1e-12)


def test_no_second_array_of_logits_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    from gnomon.data.data_diet import scores

    z, y = logits_of(64, 50)
    whole = el2n(z, y)
    before = z.clone()
    monkeypatch.setitem(scores._CHUNK, "cpu", 150)  # three rows at a time
    sizes: list[int] = []
    parts = scores._parts
    monkeypatch.setattr(scores, "_parts", lambda a, b: (sizes.append(len(a)), parts(a, b))[1])
    torch.testing.assert_close(el2n(z, y), whole, rtol=0, atol=0)
    assert max(sizes) == 3
    assert torch.equal(z, before)
    tokens = z.reshape(8, 8, 50)
    torch.testing.assert_close(el2n(tokens, y.reshape(8, 8)), whole.reshape(8, 8).mean(1))
    assert max(sizes) == 8  # a row of tokens at a time


def test_classes_that_are_impossible() -> None:
    z = torch.tensor([[1.0, -math.inf, -math.inf], [1.0, 1.0, -math.inf], [-math.inf, 1.0, 1.0]])
    expected = torch.tensor([0.0, math.sqrt(0.5), math.sqrt(1.5)])
    torch.testing.assert_close(el2n(z, torch.zeros(3, dtype=torch.long)), expected)
    assert bool(torch.isnan(el2n(torch.tensor([[math.nan, 0.0]]), torch.tensor([0]))).all())


def test_bad_labels_and_shapes_are_named() -> None:
    z, y = logits_of(4, 3)
    with pytest.raises(DataError, match=r"label 7 in row 2\. Allowed: 0 to 2 for 3 classes"):
        el2n(z, torch.tensor([0, 1, 7, 2]))
    with pytest.raises(DataError, match=r"label -1 in rows 0, 3\."):
        el2n(z, torch.tensor([-1, 1, 2, -1]))
    with pytest.raises(DataError, match=r"no label is in use in row 1 \(all are -100\)"):
        el2n(z.reshape(2, 2, 3), torch.tensor([[0, 1], [-100, -100]]))
    with pytest.raises(MethodError, match="single logit"):
        el2n(z[:, :1], torch.zeros(4, dtype=torch.long))
    with pytest.raises(MethodError, match="A regression has no softmax"):
        el2n(z, y.double())
    with pytest.raises(MethodError, match=r"logits have shape \(4, 3\).*targets \(3,\)"):
        el2n(z, y[:3])


def test_forgetting_table_of_six_rows() -> None:
    expected = [1, 1, math.inf, 1, 0, 1]
    assert forgetting_scores(HISTORY).tolist() == expected
    table = ForgettingTable(6)
    for line in HISTORY.astype(bool):
        order = np.random.default_rng(0).permutation(6)
        for part in np.array_split(order, 2):
            table.update(part, line[part])
    assert table.scores().tolist() == expected
    assert table.seen.tolist() == [4] * 6
    assert table.events.tolist() == [1, 1, 0, 1, 0, 1]


def test_forgetting_refuses_what_makes_no_history() -> None:
    table = ForgettingTable(3)
    with pytest.raises(MethodError, match="row 3 is not in the table"):
        table.update([3], [True])
    with pytest.raises(MethodError, match="occurs twice"):
        table.update([1, 1], [True, False])
    with pytest.raises(MethodError, match="one length"):
        table.update([1], [True, False])
    with pytest.raises(MethodError, match="at least 1 row"):
        ForgettingTable(0)
    with pytest.raises(MethodError, match="one line an epoch"):
        forgetting_scores(np.zeros(3))


def table_of(runs: list[list[float]], labels: list[int] | None = None, method: str = "el2n") -> ScoreTable:
    values = np.array(runs, dtype=np.float64)
    kept = None if labels is None else np.array(labels)
    return ScoreTable(values, method, np.arange(values.shape[1]), "", kept)


def test_windows_are_those_of_the_paper() -> None:
    scores = np.random.default_rng(0).permutation(20).astype(float)
    line = np.argsort(scores, kind="stable")
    assert select(scores, 5).tolist() == sorted(line[-5:])  # keep_max
    assert select(scores, 5, order="easy").tolist() == sorted(line[:5])  # keep_min
    assert select(scores, 5, order="easy", offset=3).tolist() == sorted(line[3:8])  # offset, from the easiest
    assert select(scores, 5, offset=2).tolist() == sorted(line[13:18])  # the two hardest are skipped
    assert select(scores, 0.25).tolist() == select(scores, 5).tolist()
    assert select(scores, 0.25, offset=0.1).tolist() == select(scores, 5, offset=2).tolist()
    assert select(scores, 1.0).tolist() == list(range(20))
    assert select(scores, 1).tolist() == [line[-1]]
    assert select(scores, 5).dtype == np.int64


def test_ties_keep_the_order_of_rows() -> None:
    assert select([1.0, 1.0, 1.0, 1.0], 2).tolist() == [2, 3]
    assert select([1.0, 1.0, 1.0, 1.0], 2, order="easy").tolist() == [0, 1]


def test_random_keeps_as_many_rows_and_nothing_else_moves() -> None:
    state = (torch.random.get_rng_state(), np.random.get_state()[1].copy())  # noqa: NPY002
    first, second = (
        select(np.arange(40.0), 0.5, order="random", seed=1),
        select(np.zeros(40), 20, order="random", seed=1),
    )
    assert first.tolist() == second.tolist()
    assert len(set(first)) == 20
    assert first.tolist() == sorted(first)
    assert first.tolist() != select(np.arange(40.0), 0.5, order="random", seed=2).tolist()
    assert torch.equal(torch.random.get_rng_state(), state[0])
    assert (np.random.get_state()[1] == state[1]).all()  # noqa: NPY002


def test_never_learnt_rows_are_hardest_and_parted_by_runs() -> None:
    table = table_of([[1, math.inf, math.inf, 3], [2, math.inf, 5, 0]], method="forgetting")
    assert table.values.tolist() == [1.5, math.inf, math.inf, 1.5]
    assert table.never.tolist() == [0, 2, 1, 0]
    assert select(table, 1).tolist() == [1]
    assert select(table, 2).tolist() == [1, 2]
    assert select(table, 1, offset=1).tolist() == [2]
    assert np.isnan(table.spread[1])
    assert table.spread[3] == pytest.approx(np.std([3, 0], ddof=1))


def test_lost_classes_are_told_and_quotas_keep_them() -> None:
    labels = [0] * 10 + [1] * 10
    table = table_of([list(range(20))], labels)
    with pytest.warns(GnomonWarning, match=r"kept by class: 0: 0 of 10, 1: 10 of 10"):
        select(table, 0.5)
    kept = select(table, 0.5, balance="class")
    assert kept.tolist() == [5, 6, 7, 8, 9, 15, 16, 17, 18, 19]
    kept = select(table, 0.5, balance="class", offset=0.2)
    assert kept.tolist() == [3, 4, 5, 6, 7, 13, 14, 15, 16, 17]
    kept = select(np.arange(20.0), 7, balance="class", labels=[0] * 15 + [1] * 5)
    assert len(kept) == 7
    assert (kept >= 15).sum() == 2
    with pytest.raises(DataError, match="balance = 'class' needs the labels"):
        select(np.arange(20.0), 7, balance="class")
    with pytest.raises(DataError, match=r"labels have shape \(3,\) for 20 scores"):
        select(np.arange(20.0), 7, balance="class", labels=[0, 1, 2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0}, "that is 0 of 5 rows"),
        ({"keep": 6}, "that is 6 of 5 rows"),
        ({"keep": -1}, "that is -1 of 5 rows"),
        ({"keep": 1.5}, "a share is between 0 and 1"),
        ({"keep": 0.01}, "that is 0 of 5 rows"),
        ({"keep": True}, "Give a share"),
        ({"keep": 3, "offset": 3}, "Their sum may be at most"),
        ({"keep": 3, "offset": -1}, "skips -1 rows"),
        ({"order": "hrad"}, "Did you mean 'hard'"),
        ({"order": "auto"}, "Give judge="),
        ({"balance": "label", "labels": [0, 1, 0, 1, 0]}, "Allowed: 'class'"),
    ],
)
def test_impossible_selections_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(MethodError, match=message):
        select(np.arange(5.0), **options)  # type: ignore[arg-type]


def test_scores_that_are_nan_are_named() -> None:
    with pytest.raises(DataError, match=r"scores of rows 1, 3 are nan"):
        select([0.0, math.nan, 1.0, math.nan], 2)
    with pytest.raises(DataError, match=r"shape \(2, 2\)"):
        select(np.zeros((2, 2)), 1)
    with pytest.raises(DataError, match="no numbers"):
        select(["a"], 1)


def test_auto_takes_the_order_its_judge_prefers() -> None:
    asked: list[list[int]] = []

    def judge(rows: np.ndarray) -> float:
        asked.append(rows.tolist())
        return float(rows.tolist() == [0, 1])

    assert select(np.arange(4.0), 2, order="auto", judge=judge).tolist() == [0, 1]
    assert len(asked) == 3


def test_a_trial_prefers_rows_with_right_labels() -> None:
    x = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] > 0).long()
    wrong = y.clone()
    wrong[100:] = 1 - wrong[100:]
    trial = SubsetTrial(lambda seed: torch.nn.Linear(2, 2), (x, wrong), (x, y), TrainingPlan(steps=60, lr=0.1))
    assert trial(range(100)) > 0.9 > 0.2 > trial(range(100, 200))
    scores = np.r_[np.zeros(100), np.ones(100)]
    assert select(scores, 0.5, order="auto", judge=trial).tolist() == list(range(100))


def test_pruned_data_sets_are_of_their_own_kind() -> None:
    from datasets import Dataset

    scores = [0.1, 0.9, 0.5, 0.7]
    hub = Dataset.from_dict({"text": list("abcd"), "label": [0, 1, 0, 1]})
    assert prune_by_score(hub, scores, 0.5)["text"][:] == ["b", "d"]
    assert prune_by_score(torch.arange(4), scores, 2).tolist() == [1, 3]
    x, y = prune_by_score((np.eye(4), np.arange(4)), scores, 2)
    assert (x.shape, y.tolist()) == ((2, 4), [1, 3])
    assert prune_by_score(list("abcd"), scores, 2, 1) == ["c", "d"]
    subset = prune_by_score(torch.utils.data.TensorDataset(torch.arange(4)), scores, 2)
    assert [int(row[0]) for row in subset] == [1, 3]
    with pytest.raises(DataError, match="4 scores for 3 rows"):
        prune_by_score(list("abc"), scores, 2)


def test_label_noise_is_a_permutation_among_the_drawn() -> None:
    labels = np.repeat(np.arange(10), 100)
    noisy = permute_labels(labels, 0.1, seed=3)
    assert noisy.drawn.sum() == 100
    assert sorted(noisy.labels) == sorted(labels)
    assert not noisy.changed[~noisy.drawn].any()
    assert 80 <= noisy.changed.sum() <= 98  # about share (1 - 1/C)
    assert (permute_labels(labels, 0.1, seed=3).labels == noisy.labels).all()
    with pytest.raises(MethodError, match=r"share = 1\.5"):
        permute_labels(labels, 1.5)


def test_noise_report_lists_the_hardest_rows() -> None:
    table = table_of([[0.1, 1.3, 0.4, 0.2], [0.3, 1.1, 0.6, 0.2]], [0, 1, 1, 0])
    report = noise_report(table, top=2, texts=list("abcd"), wrong=[False, True, False, False])
    assert report["row"].tolist() == [1, 2]
    assert report["score"].tolist() == pytest.approx([1.2, 0.5])
    assert report["quantile"].tolist() == [0.75, 0.5]
    assert report["label"].tolist() == [1, 1]
    assert report["text"].tolist() == ["b", "c"]
    assert report["spread"].tolist() == pytest.approx([np.std([1.3, 1.1], ddof=1)] * 2)
    assert report.attrs == {"auc": 1.0, "precision": 0.5}
    assert len(noise_report(table, top=0.01)) == 1
    with pytest.raises(DataError, match="text: 1 entries for 4 scores"):
        noise_report(table, texts=["a"])
    with pytest.raises(MethodError, match="top = 9"):
        noise_report(table, top=9)
    with pytest.warns(GnomonWarning, match="one run"):
        noise_report(table_of([[0.1, 0.2]]), top=1)


def test_noise_auc_takes_infinite_scores() -> None:
    table = table_of([[0, 1, math.inf, math.inf], [0, 1, 4, math.inf]])
    assert noise_auc(table, [False, False, True, True]) == 1.0
    assert noise_auc(table, [True, False, False, False]) == 0.0
    assert noise_auc([1.0, 1.0], [True, False]) == 0.5
    with pytest.raises(DataError, match="some of each kind"):
        noise_auc(table, [False] * 4)


def test_tables_are_saved_whole(tmp_path: Path) -> None:
    table = ScoreTable(np.random.default_rng(0).random((3, 5)), "el2n", np.arange(5) + 7, "mark", np.arange(5))
    found = ScoreTable.load(table.save(tmp_path / "scores"))
    assert (found.runs == table.runs).all()
    assert (found.ids == table.ids).all()
    assert found.labels is not None
    assert (found.method, found.fingerprint, found.labels.tolist()) == ("el2n", "mark", list(range(5)))
    assert ScoreTable.load(ScoreTable(table.runs, "el2n", table.ids).save(tmp_path / "scores")).labels is None
    assert np.asarray(table).tolist() == table.values.tolist()
    with pytest.raises(DataError, match="no score table"):
        ScoreTable.load(tmp_path)
