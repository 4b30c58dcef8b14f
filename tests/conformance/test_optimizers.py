"""What every optimizer of the library must do, whatever its arithmetic; members come from the catalog."""

from __future__ import annotations

import copy
import io
import json
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from gnomon.errors import NoEffectWarning

sys.path.insert(0, str(Path(__file__).parent))
from optimizer_members import accepts, build, groups, members, optimizer_class, tiny_model

MEMBERS = members()
pytestmark = pytest.mark.parametrize("member", MEMBERS)

# member -> {check: why it is excused}
EXCUSED: dict[str, dict[str, str]] = {}


@pytest.fixture(autouse=True)
def _excused(member: str, request: pytest.FixtureRequest) -> None:
    reason = EXCUSED.get(member, {}).get(request.node.originalname)
    if reason:
        pytest.skip(reason)


def batch(step: int) -> torch.Tensor:
    return torch.randint(0, 64, (4, 12), generator=torch.Generator().manual_seed(step))


def train(model: Any, optimizer: Any, steps: range, sign: float = 1.0) -> list[float]:
    losses = []
    for step in steps:
        ids = batch(step)
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(float(loss.detach()))
        (sign * loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def close(left: list[torch.Tensor], right: list[torch.Tensor], atol: float) -> bool:
    return all(torch.allclose(a, b, atol=atol) for a, b in zip(left, right, strict=True))


def test_it_is_a_torch_optimizer_that_lowers_the_loss(member: str) -> None:
    model = tiny_model()
    optimizer = build(member, model)
    assert isinstance(optimizer, torch.optim.Optimizer)
    ids = batch(0)
    losses = []
    for _ in range(20):
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.9 * losses[0]


def test_it_leaves_the_global_generator_alone(member: str) -> None:
    model = tiny_model()
    before = torch.get_rng_state()
    train(model, build(member, model), range(5))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_state_survives_a_safe_checkpoint_bit_for_bit(member: str, dtype: torch.dtype) -> None:
    model = tiny_model(dtype)
    optimizer = build(member, model)
    train(model, optimizer, range(3))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, range(3, 8))

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = tiny_model(dtype, seed=1)
    resumed.load_state_dict(saved["model"])
    other = build(member, resumed, lr=0.5)
    other.load_state_dict(saved["optimizer"])
    train(resumed, other, range(3, 8))
    assert same(weights(model), weights(resumed))
    for p, q in zip(model.parameters(), resumed.parameters(), strict=True):
        assert optimizer.state[p].keys() == other.state[q].keys()


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_go_on_alike(member: str, way: str) -> None:
    model = tiny_model()
    optimizer = build(member, model)
    train(model, optimizer, range(3))
    pair = (model, optimizer)
    other, copied = copy.deepcopy(pair) if way == "deepcopy" else pickle.loads(pickle.dumps(pair))
    train(model, optimizer, range(3, 6))
    assert not same(weights(model), weights(other))
    train(other, copied, range(3, 6))
    assert same(weights(model), weights(other))


def test_foreach_equals_the_loop(member: str) -> None:
    if not accepts(member, "foreach"):
        pytest.skip("has no foreach option")
    results = []
    for foreach in (None, True, False):
        model = tiny_model()
        train(model, build(member, model, foreach=foreach), range(4))
        results.append(weights(model))
    assert same(results[0], results[1])
    assert close(results[1], results[2], 1e-7)


def test_closure(member: str) -> None:
    model, plain = tiny_model(), tiny_model()
    optimizer = build(member, model)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(input_ids=batch(0), labels=batch(0)).loss
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert float(loss) == pytest.approx(train(plain, build(member, plain), range(1))[0])
    assert same(weights(model), weights(plain))
    assert build(member, tiny_model()).step() is None


def test_maximize_is_minimising_the_negative(member: str) -> None:
    if not accepts(member, "maximize"):
        pytest.skip("has no maximize option")
    model, other = tiny_model(torch.float64), tiny_model(torch.float64)
    train(model, build(member, model, maximize=True), range(5), sign=-1.0)
    train(other, build(member, other), range(5))
    assert close(weights(model), weights(other), 1e-12)


def test_parameters_without_a_gradient_stay_and_catch_up(member: str) -> None:
    model = tiny_model()
    optimizer = build(member, model)
    frozen = model.model.layers[0]
    for name, p in frozen.named_parameters():
        p.requires_grad_("norm" in name)
    before = [p.detach().clone() for p in frozen.parameters() if not p.requires_grad]
    train(model, optimizer, range(3))
    assert same(before, [p.detach().clone() for p in frozen.parameters() if not p.requires_grad])
    for p in frozen.parameters():
        p.requires_grad_(True)
    train(model, optimizer, range(3, 6))
    after = [p.detach().clone() for n, p in frozen.named_parameters() if "norm" not in n]
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_a_step_without_any_gradient_does_nothing(member: str) -> None:
    model = tiny_model()
    before = weights(model)
    build(member, model).step()
    assert same(before, weights(model))


def test_sparse_gradients_are_refused_by_name(member: str) -> None:
    embedding = nn.Embedding(10, 4, sparse=True)
    optimizer = optimizer_class(member)([("words.weight", embedding.weight)], lr=0.01)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises((ValueError, RuntimeError), match=r"words\.weight.*sparse"):
        optimizer.step()


def test_complex_parameters_are_refused(member: str) -> None:
    with pytest.raises((ValueError, TypeError), match="complex"):
        optimizer_class(member)([nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))], lr=0.01)


def test_zero_learning_rate_changes_nothing(member: str) -> None:
    model = tiny_model()
    before = weights(model)
    options = {"weight_decay": 0.1} if accepts(member, "weight_decay") else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoEffectWarning)
        optimizer = build(member, model, lr=0.0, **options)
    train(model, optimizer, range(3))
    assert same(before, weights(model))


def test_negative_learning_rate_is_refused(member: str) -> None:
    with pytest.raises(ValueError, match="lr"):
        build(member, tiny_model(), lr=-0.1)


def test_learning_rate_may_be_a_tensor_and_scheduled(member: str) -> None:
    model, other = tiny_model(), tiny_model()
    train(model, build(member, model, lr=torch.tensor(0.01, dtype=torch.float64)), range(3))
    train(other, build(member, other, lr=0.01), range(3))
    assert close(weights(model), weights(other), 1e-7)
    optimizer = build(member, model)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=3)
    for step in range(3):
        train(model, optimizer, range(step, step + 1))
        scheduler.step()
    before = weights(model)
    train(model, optimizer, range(3, 5))
    assert same(before, weights(model))


def test_groups_have_their_own_learning_rate_and_may_be_added(member: str) -> None:
    model = tiny_model()
    made = groups(member, model)
    for group in made:
        group["lr"] = 0.0
    extra = nn.Parameter(torch.ones(3))
    optimizer = optimizer_class(member)(made, lr=0.01)
    named = "param_names" in optimizer.param_groups[0]
    optimizer.add_param_group({"params": [("extra", extra)] if named else [extra]})
    before = weights(model)
    extra.grad = torch.ones(3)
    train(model, optimizer, range(2))
    assert same(before, weights(model))
    assert (extra < 1).all()


def test_a_parameter_in_two_groups_is_refused(member: str) -> None:
    p = nn.Parameter(torch.ones(3, 3))
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer_class(member)([{"params": [p]}, {"params": [p]}], lr=0.01)


def test_bfloat16_parameters_follow_the_exact_ones(member: str) -> None:
    model, exact, start = tiny_model(torch.bfloat16), tiny_model(), tiny_model()
    optimizers = build(member, model), build(member, exact)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        for p, q in zip(model.parameters(), exact.parameters(), strict=True):
            q.grad = torch.randn(q.shape, generator=generator) * 0.1
            p.grad = q.grad.bfloat16()
        for optimizer in optimizers:
            optimizer.step()
    for p, q, before in zip(model.parameters(), exact.parameters(), start.parameters(), strict=True):
        assert p.dtype == torch.bfloat16
        assert (p.float() - q).norm() < 0.5 * (q - before).norm() + 0.01 * q.norm()


def test_scaled_gradients(member: str) -> None:
    model, other = tiny_model(), tiny_model()
    optimizer, scaler = build(member, model), torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(3):
        scaler.scale(model(input_ids=batch(step), labels=batch(step)).loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    train(other, build(member, other), range(3))
    assert close(weights(model), weights(other), 2e-5)
    before = weights(model)
    scaler.scale(model(input_ids=batch(3), labels=batch(3)).loss * float("inf")).backward()
    scaler.step(optimizer)
    assert same(before, weights(model))


def test_accumulated_gradients_are_one_step(member: str) -> None:
    model, other = tiny_model(torch.float64), tiny_model(torch.float64)
    pair = build(member, model), build(member, other)
    for step in range(3):
        ids = batch(step)
        for part in ids.split(2):
            (model(input_ids=part, labels=part).loss / 2).backward()
        other(input_ids=ids, labels=ids).loss.backward()
        for optimizer in pair:
            optimizer.step()
            optimizer.zero_grad()
    assert close(weights(model), weights(other), 1e-9)


@pytest.mark.parametrize("way", ["optimizers", "optimizer_cls_and_kwargs"])
def test_trainer(member: str, way: str, tmp_path: Path) -> None:
    model = tiny_model()
    rows = [{"input_ids": ids, "labels": ids} for step in range(4) for ids in batch(step)]
    options: dict[str, Any] = {"optimizers": (build(member, model), None)}
    if way == "optimizer_cls_and_kwargs":
        options = {way: (optimizer_class(member), {"params": groups(member, model), "lr": 0.01})}
    arguments = TrainingArguments(
        str(tmp_path), max_steps=4, per_device_train_batch_size=4, report_to=[], use_cpu=True, save_steps=2,
        lr_scheduler_type="constant", disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    before = weights(model)
    trainer = Trainer(model, arguments, train_dataset=rows, **options)
    trainer.train()
    assert not any(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))
    final = weights(model)
    again = tiny_model()
    options = {"optimizers": (build(member, again), None)}
    Trainer(again, arguments, train_dataset=rows, **options).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-2")
    )
    assert close(final, weights(again), 1e-7)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    script = Path(__file__).with_name("two_ranks.py")
    tail = [str(folder / "store"), str(folder / "found.json"), *MEMBERS]
    ranks = [
        subprocess.Popen([sys.executable, script, str(rank), *tail], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        errors = [rank.communicate(timeout=240)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert all(rank.returncode == 0 for rank in ranks), errors
    return json.loads((folder / "found.json").read_text())


@pytest.mark.slow
def test_two_ranks_equal_one(member: str, two_ranks: dict[str, dict[str, Any]]) -> None:
    found = two_ranks[member]
    assert found["moved"] > 1e-3
    assert found["ddp"] < 1e-9
    assert found["sharded"]
    assert found["fsdp2"] < 1e-9
