"""Scoring whole data sets of every form, the scorer of several runs, engines, windows of a language model."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn

from gnomon import catalog
from gnomon.common.models import tiny
from gnomon.data.data_diet import (
    ExampleScorer,
    Reading,
    TrainingPlan,
    el2n,
    forgetting_scores,
    grand,
    prune_by_score,
    score_examples,
    select,
    select_windows,
)
from gnomon.data.data_diet.rows import Rows
from gnomon.data.data_diet.training import seeds_of, train_model
from gnomon.errors import DataError, GnomonWarning, MethodError, ModelError

N, V = 37, 23
PLAN = TrainingPlan(epochs=6, batch_size=8, lr=0.01)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def points(rows: int = N) -> tuple[Tensor, Tensor]:
    x = torch.randn(rows, 4, generator=torch.Generator().manual_seed(0))
    return x, (x[:, :3].argmax(1)).long()


def make(seed: int = 0, classes: int = 3, dropout: float = 0.0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, classes))


def pair() -> list[nn.Module]:
    return [make(0), make(1)]


def expected(method: str = "el2n") -> np.ndarray:
    x, y = points()
    with torch.no_grad():
        runs = [el2n(m(x), y) if method == "el2n" else grand(m, (x, y)) for m in pair()]
    return torch.stack(runs).double().mean(0).numpy()


@pytest.mark.parametrize("method", ["el2n", "grand"])
@pytest.mark.parametrize("batch_size", [1, 8, 64])  # 37 is no multiple of 8
def test_scores_do_not_depend_on_batches_or_order(method: Any, batch_size: int) -> None:
    x, y = points()
    found = score_examples(pair(), (x, y), method, batch_size=batch_size)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected(method), rtol=1e-5, atol=1e-7)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    moved = score_examples(pair(), (x[order], y[order]), method, batch_size=batch_size)
    np.testing.assert_allclose(moved, found[order], rtol=1e-5, atol=1e-7)


def test_every_form_of_a_data_set() -> None:
    x, y = points()
    forms = [
        (x.numpy(), y.numpy()),
        torch.utils.data.TensorDataset(x, y),
        list(zip(x, y.tolist(), strict=True)),
        [(row.tolist(), int(label)) for row, label in zip(x, y, strict=True)],
        torch.utils.data.Subset(torch.utils.data.TensorDataset(x, y), range(N)),
    ]
    for form in forms:
        np.testing.assert_allclose(score_examples(pair(), form), expected(), rtol=1e-6)
    collated = Reading(collate=lambda rows: (torch.stack([r[0] for r in rows]), torch.stack([r[1] for r in rows])))
    np.testing.assert_allclose(score_examples(pair(), (x, y), reading=collated), expected(), rtol=1e-6)


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = make()

    def forward(self, features: Tensor) -> dict[str, Tensor] | Tensor:
        return self.net(features)


@pytest.mark.parametrize("label", ["label", "labels"])
def test_columns_of_a_dataset(label: str) -> None:
    x, y = points()
    rows = Dataset.from_dict({"features": x.tolist(), label: y.tolist()})
    found = score_examples([Named(), Named()], rows)
    with torch.no_grad():
        np.testing.assert_allclose(found, el2n(make()(x), y).double().numpy(), rtol=1e-6)


def test_token_rows_of_unequal_length_are_padded_and_not_counted() -> None:
    model = tiny("llama", vocab_size=V, hidden_size=16, num_layers=1)
    generator = torch.Generator().manual_seed(0)
    rows = [{"input_ids": torch.randint(V, (n,), generator=generator).tolist(), "text": "x"} for n in (3, 9, 5, 2)]
    labelled = [{**row, "labels": row["input_ids"]} for row in rows]
    for method in ("el2n", "grand"):
        together = score_examples([model, model], Dataset.from_list(rows), method, batch_size=4)
        np.testing.assert_allclose(score_examples([model, model], labelled, method, batch_size=4), together, rtol=1e-5)
        alone = [float(score_examples([model, model], [row], method)[0]) for row in rows]
        np.testing.assert_allclose(together, alone, rtol=1e-4)
    ids = torch.tensor([rows[1]["input_ids"]])
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    assert alone[1] == pytest.approx(float(grand(model, {"input_ids": ids})[0]), rel=1e-5)
    by_hand = (logits[0, :-1].softmax(-1) - nn.functional.one_hot(ids[0, 1:], V)).norm(dim=1).mean()
    assert score_examples([model] * 2, ids)[0] == pytest.approx(float(by_hand), rel=1e-5)


def test_models_are_used_in_evaluation_mode_and_not_changed() -> None:
    x, y = points()
    model = make(dropout=0.5).train()
    before = [p.clone() for p in model.parameters()]
    state = torch.random.get_rng_state()
    first = score_examples([model, model], (x, y))
    assert (first == score_examples([model, model], (x, y))).all()
    assert model.training
    score_examples([model, model], (x, y), plan=PLAN)
    score_examples([model, model], (x, y), "forgetting", plan=PLAN)
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_one_run_is_allowed_and_said_to_be_noisy() -> None:
    with pytest.warns(GnomonWarning, match="one run are noisy"):
        score_examples(make(), points())
    with pytest.warns(GnomonWarning, match="one run are noisy"):
        ExampleScorer(runs=1)
    with pytest.warns(GnomonWarning, match="GraNd at initialisation follows the norm of the inputs"):
        ExampleScorer("grand", at_step=0)


def history_of(run: int, x: Tensor, y: Tensor, plan: TrainingPlan) -> np.ndarray:
    """Whether each row was right in its batch, one line an epoch."""
    model_seed, seed = seeds_of(3, run)
    batches: list[tuple[Tensor, Tensor]] = []

    def note(numbers: Tensor, logits: Tensor, targets: Tensor) -> None:
        batches.append((numbers, logits.argmax(1) == targets))

    train_model(make(model_seed), Rows((x, y)), plan, seed=seed, on_batch=note)
    history = np.zeros((7, len(y)))
    for step, (numbers, right) in enumerate(batches):
        history[step // 4, numbers] = right
    assert len(batches) == 28
    return history


def test_forgetting_is_counted_in_training_batches() -> None:
    x, y = points(32)
    plan = TrainingPlan(epochs=7, batch_size=8, lr=0.05)
    scorer = ExampleScorer("forgetting", runs=2, plan=plan, seed=3)
    found = scorer.fit(make, (x, y))
    again = [forgetting_scores(history_of(run, x, y, plan)) for run in range(2)]
    np.testing.assert_array_equal(found.runs, np.stack(again))
    assert found.method == "forgetting"
    direct = score_examples([make(), make()], (x, y), "forgetting", plan=plan)
    assert direct.shape == (32,)
    assert (direct >= 0).all()


def test_scorer_is_train_then_score_and_averages() -> None:
    x, y = points()
    scorer = ExampleScorer(runs=3, plan=PLAN, at_epoch=2, seed=5, keep_models=True, batch_size=10)
    table = scorer.fit(make, (x, y))
    assert table.runs.shape == (3, N)
    assert table.labels is not None
    assert table.labels.tolist() == y.tolist()
    for run, model in enumerate(scorer.models_):
        with torch.no_grad():
            np.testing.assert_allclose(table.runs[run], el2n(model.eval()(x), y).double(), rtol=1e-6)
    np.testing.assert_allclose(table.values, table.runs.mean(0))
    assert not np.allclose(table.runs[0], table.runs[1])
    again = ExampleScorer(runs=3, plan=PLAN, at_epoch=2, seed=5).fit(make, (x, y))
    np.testing.assert_allclose(again.runs, table.runs, rtol=1e-5)
    new = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    later = scorer.score(new)
    assert later.runs.shape == (3, 5)
    np.testing.assert_allclose(scorer.score((x, y)).runs, table.runs)
    with pytest.raises(MethodError, match="keep_models=True"):
        ExampleScorer(runs=2).score(new)


def test_early_scores_keep_the_schedule_of_the_whole_plan() -> None:
    """Stopping at epoch 2 of 6 is not the same as a plan of 2 epochs, whose rate falls to 0."""
    x, y = points()
    early = ExampleScorer(runs=2, plan=PLAN, at_epoch=2).fit(make, (x, y))
    short = ExampleScorer(runs=2, plan=TrainingPlan(epochs=2, batch_size=8, lr=0.01)).fit(make, (x, y))
    assert not np.allclose(early.values, short.values)
    assert np.allclose(early.values, ExampleScorer(runs=2, plan=PLAN, at_step=8).fit(make, (x, y)).values)
    usual = ExampleScorer(runs=2, plan=PLAN).fit(make, (x, y))
    assert np.allclose(usual.values, ExampleScorer(runs=2, plan=PLAN, at_epoch=5).fit(make, (x, y)).values)
    start = ExampleScorer(runs=2, plan=PLAN, at_step=0).fit(make, (x, y))
    assert abs(start.values.mean() - math.sqrt(2 / 3)) < 0.15


def test_training_of_ones_own() -> None:
    def train(model: nn.Module, dataset: Any, seed: int) -> None:
        train_model(model, Rows(dataset), TrainingPlan(steps=3, batch_size=8), seed=seed)

    x, y = points()
    mine = ExampleScorer(runs=2, train=train).fit(make, (x, y))
    built_in = ExampleScorer(runs=2, plan=TrainingPlan(steps=3, batch_size=8)).fit(make, (x, y))
    np.testing.assert_array_equal(mine.runs, built_in.runs)


def test_an_interrupted_fit_goes_on(tmp_path: Path) -> None:
    x, y = points()
    made: list[int] = []

    def counting(seed: int) -> nn.Module:
        made.append(seed)
        if len(made) == 3:
            raise KeyboardInterrupt
        return make(seed)

    whole = ExampleScorer(runs=4, plan=PLAN).fit(make, (x, y))
    with pytest.raises(KeyboardInterrupt):
        ExampleScorer(runs=4, plan=PLAN).fit(counting, (x, y), folder=tmp_path)
    table = ExampleScorer(runs=4, plan=PLAN).fit(counting, (x, y), folder=tmp_path)
    assert len(made) == 5
    np.testing.assert_array_equal(table.runs, whole.runs)
    assert table.labels is not None
    ExampleScorer(runs=4, plan=PLAN, seed=1).fit(counting, (x, y), folder=tmp_path)  # other options, other scores
    assert len(made) == 9


def test_shuffled_or_other_rows_are_found_out() -> None:
    x, y = points()
    rows = Dataset.from_dict({"features": x.tolist(), "label": y.tolist()})
    table = ExampleScorer(runs=2, plan=PLAN).fit(lambda seed: Named(), rows)
    assert len(prune_by_score(rows, table, 0.5)) == 18
    with pytest.raises(DataError, match="another order"):
        prune_by_score(rows.shuffle(seed=0), table, 0.5)
    with pytest.raises(DataError, match="37 rows were scored, the data set has 36"):
        prune_by_score(rows.select(range(36)), table, 0.5)


class Augmented(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return N

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        return points()[0][place] + torch.rand(()), int(points()[1][place])


def test_augmented_rows_are_warned_of() -> None:
    with pytest.warns(GnomonWarning, match="other rows each time"):
        table = ExampleScorer(runs=2, plan=TrainingPlan(steps=1)).fit(make, Augmented())
    assert table.fingerprint == ""


def test_augmentation_of_the_plan_reaches_training_only() -> None:
    seen: list[tuple[Tensor, ...]] = []

    def augment(inputs: tuple[Tensor, ...], generator: torch.Generator) -> tuple[Tensor, ...]:
        seen.append(inputs)
        return (inputs[0] + torch.randn(inputs[0].shape, generator=generator),)

    plan = TrainingPlan(steps=4, batch_size=8, augment=augment)
    table = ExampleScorer(runs=2, plan=plan, keep_models=True)
    found = table.fit(make, points())
    assert len(seen) == 8
    with torch.no_grad():
        x, y = points()
        np.testing.assert_allclose(found.runs[0], el2n(table.models_[0].eval()(x), y).double(), rtol=1e-6)


def test_row_ids_come_from_a_column() -> None:
    x, y = points()
    rows = Dataset.from_dict({"features": x.tolist(), "label": y.tolist(), "key": list(range(100, 100 + N))})
    reading = Reading(id_column="key", collate=lambda rows: (
        torch.tensor([r["features"] for r in rows]), torch.tensor([r["label"] for r in rows])))  # fmt: skip
    table = ExampleScorer(runs=2, plan=PLAN, reading=reading).fit(make, rows)
    assert table.ids.tolist() == list(range(100, 100 + N))
    twice = rows.remove_columns("key").add_column("key", [0, *range(N - 1)])
    with pytest.raises(DataError, match="row ids occur more than once in 'key': 0"):
        ExampleScorer(runs=2, plan=PLAN, reading=reading).fit(make, twice)
    with pytest.raises(DataError, match="no column 'key'"):
        ExampleScorer(runs=2, plan=PLAN, reading=reading).fit(make, rows.remove_columns("key"))


def test_rows_that_cannot_be_scored_are_named() -> None:
    x, y = points()
    wrong = y.clone()
    wrong[20] = 9
    for method in ("el2n", "grand"):
        with pytest.raises(DataError, match=r"label 9 in row 20\. Allowed: 0 to 2"):
            score_examples(pair(), (x, wrong), method, batch_size=8)
    broken = x.clone()
    broken[[11, 30]] = math.nan
    for method in ("el2n", "grand"):
        with pytest.raises(ModelError, match=r"run 0: the model's output is not finite for row 11"):
            score_examples(pair(), (broken, y), method, batch_size=8)
    with pytest.raises(ModelError, match=r"the loss is nan at step \d+"):
        ExampleScorer(runs=2, plan=PLAN).fit(make, (broken, y))
    diverged = make()
    nn.init.constant_(diverged[0].weight, math.nan)
    with pytest.raises(ModelError, match=r"run 1: .* rows 0, 1"):
        score_examples([make(), diverged], (x, y), batch_size=8)
    model = tiny("llama", vocab_size=V, hidden_size=16, num_layers=1)
    rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 3 + [{"input_ids": [1, 2, 3], "labels": [-100] * 3}]
    for method in ("el2n", "grand"):
        with pytest.raises(DataError, match=r"no label is in use in row 3 "):
            score_examples([model] * 2, rows, method, batch_size=2)


def test_regressions_have_a_gradient_but_no_el2n() -> None:
    x, _ = points()
    heads = [make(0, classes=1), make(1, classes=1)]
    with pytest.raises(MethodError, match="A regression has no softmax"):
        score_examples(heads, (x, x[:, 0]))
    with pytest.raises(MethodError, match="single logit"):
        score_examples(heads, (x, torch.zeros(N, dtype=torch.long)))
    assert (score_examples(heads, (x, x[:, 0]), "grand") > 0).all()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: score_examples(pair(), points(), "el3n"), MethodError, "Did you mean 'el2n'"),
        (lambda: score_examples([], points()), MethodError, "model is nothing"),
        (lambda: score_examples([1], points()), MethodError, "model is int"),
        (lambda: score_examples(pair(), points(), batch_size=0), MethodError, "batch_size = 0"),
        (lambda: score_examples(pair(), points(), distributed=True, shards=2), MethodError, "already"),
        (lambda: score_examples(pair(), points(), "forgetting", distributed=True), MethodError, "DataDietCallback"),
        (lambda: score_examples(pair(), (points()[0], points()[1][:3])), DataError, "inputs have 37 rows, labels 3"),
        (lambda: score_examples(pair(), iter([])), DataError, "no data set that can be scored"),
        (lambda: score_examples(pair(), []), DataError, "has no rows"),
        (lambda: score_examples(pair(), [object()]), DataError, "row 0 is a object"),
        (lambda: score_examples(pair(), [([1.0], 0), ([1.0, 2.0], 1)]), DataError, "part 0 of rows 0 to 1"),
        (lambda: ExampleScorer(runs=0), MethodError, "runs = 0"),
        (lambda: ExampleScorer(at_epoch=1, at_step=2), MethodError, "give one of them"),
        (lambda: ExampleScorer("forgetting", train=print), MethodError, "DataDietCallback"),
        (lambda: ExampleScorer(plan=PLAN, at_epoch=7).fit(make, points()), MethodError, "step 28 of a plan of 24"),
        (lambda: ExampleScorer("forgetting", at_step=0).fit(make, points()), MethodError, "before training"),
        (lambda: ExampleScorer().fit(lambda seed: 3, points()), ModelError, "model_init returned a int"),
        (lambda: TrainingPlan(lr=0), MethodError, "lr = 0"),
        (lambda: TrainingPlan(steps=0), MethodError, "steps = 0"),
        (lambda: TrainingPlan(schedule="linear"), MethodError, "Allowed: cosine, steps, constant"),
    ],
)
def test_impossible_calls_are_refused(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_a_plan_of_the_paper() -> None:
    plan = TrainingPlan(epochs=200, batch_size=128, optimizer="sgd", lr=0.1, weight_decay=5e-4, schedule="steps")
    assert plan.epoch_steps(50_000) == 390
    assert plan.total_steps(50_000) == 78_000
    rates = [plan.lr * plan.factor(390 * epoch, 78_000) for epoch in (0, 59, 60, 119, 120, 160, 199)]
    assert rates == pytest.approx([0.1, 0.1, 0.02, 0.02, 0.004, 0.0008, 0.0008])
    sizes: list[int] = []
    plan = TrainingPlan(steps=9, batch_size=16, optimizer="sgd", schedule="constant")
    train_model(make(), Rows(points()), plan, on_batch=lambda numbers, logits, targets: sizes.append(len(numbers)))
    assert sizes == [16] * 9  # 37 rows: the last 5 of an epoch are dropped


def test_both_engines_give_the_same_numbers() -> None:
    ray = pytest.importorskip("ray")
    x, y = points()
    options: dict[str, Any] = {"runs": 2, "plan": PLAN, "at_epoch": 2, "shards": 3, "keep_models": True}
    local = ExampleScorer("grand", **options).fit(make, (x, y))
    unsharded = ExampleScorer("grand", **{**options, "shards": 1}).fit(make, (x, y))
    np.testing.assert_allclose(local.runs, unsharded.runs, rtol=1e-5)
    model = tiny("llama", vocab_size=V, hidden_size=16, num_layers=1)
    rows = torch.randint(V, (12, 8), generator=torch.Generator().manual_seed(0))
    here = select_windows(model, rows, warm_steps=3, batch_size=4)
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        far = ExampleScorer("grand", engine="ray", **options)
        np.testing.assert_allclose(far.fit(functools.partial(_remote_make), (x, y)).runs, local.runs, rtol=1e-6)
        assert len(far.models_) == 2
        np.testing.assert_allclose(
            score_examples(pair(), (x, y), engine="ray", shards=2), score_examples(pair(), (x, y)), rtol=1e-6
        )
        assert torch.equal(select_windows(model, rows, warm_steps=3, batch_size=4, engine="ray"), here)
    finally:
        ray.shutdown()


def _remote_make(seed: int) -> nn.Module:
    return make(seed)


def test_windows_of_a_language_model() -> None:
    model = tiny("llama", vocab_size=V, hidden_size=16, num_layers=1)
    before = [p.clone() for p in model.parameters()]
    rows = torch.full((20, 12), 5)
    rows[::2] = torch.randint(V, (10, 12), generator=torch.Generator().manual_seed(0))  # noise among constants
    state = torch.random.get_rng_state()
    hard = select_windows(model, rows, warm_steps=30, batch_size=4, lr=1e-2)
    assert hard.dtype == torch.int64
    assert hard.tolist() == list(range(0, 20, 2))
    easy = select_windows(model, rows, warm_steps=30, batch_size=4, lr=1e-2, order="easy")
    assert easy.tolist() == list(range(1, 20, 2))
    assert torch.equal(select_windows(model, rows, warm_steps=30, batch_size=4, lr=1e-2), hard)
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), state)
    random = select_windows(model, rows, order="random", seed=4)
    assert len(random) == len(hard)
    assert random.tolist() == sorted(random.tolist())
    assert not torch.equal(random, select_windows(model, rows, order="random", seed=5))
    as_it_is = select_windows(model, rows, warm_steps=0, method="grand", keep=0.3, offset=0.1)
    scores = score_examples([model, model], rows, "grand", batch_size=16)
    assert as_it_is.tolist() == select(scores, 0.3, offset=0.1).tolist()


def test_windows_refuse_what_they_cannot_use() -> None:
    model, rows = tiny("llama", vocab_size=V), torch.zeros(4, 8, dtype=torch.long)
    for wrong in (torch.zeros(4), torch.zeros(4, 8), [[1, 2]]):
        with pytest.raises(DataError, match="Give token ids"):
            select_windows(model, wrong)  # type: ignore[arg-type]
    for options, message in (
        ({"warm_steps": -1}, "warm_steps = -1"),
        ({"order": "auto"}, "Allowed: hard, easy, random"),
        ({"method": "forgetting"}, "Allowed for rows of tokens"),
        ({"keep": 0.0}, "that is 0 of 4 rows"),
        ({"keep": 0.9, "offset": 0.5}, "Their sum"),
    ):
        with pytest.raises(MethodError, match=message):
            select_windows(model, rows, **options)  # type: ignore[arg-type]


def test_the_card_leads_here() -> None:
    assert catalog.load("data-diet") is score_examples
    card = catalog.get("data-diet")
    assert catalog.resolve(card.recipe["call"]) is select_windows
    import gnomon.data

    assert gnomon.data.select_windows is select_windows
