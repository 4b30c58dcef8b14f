"""The torch head: the estimator's probabilities and optimum, crossed boundaries, a transformers classifier."""

from __future__ import annotations

import functools
import io
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from gnomon.errors import MethodError
from gnomon.estimators import PRESTO, PrestoHead, ordered_log_proba

sys.path.insert(0, str(Path(__file__).parent))
import presto_definition as definition


@functools.cache
def data() -> tuple[np.ndarray, np.ndarray]:
    return definition.simulated(n=300, spread=0.1, seed=2)


def tensors() -> tuple[torch.Tensor, torch.Tensor]:
    X, y = data()
    return torch.as_tensor(X), torch.as_tensor(y)


def test_a_head_from_an_estimator_gives_its_probabilities():
    X, y = tensors()
    model = PRESTO(0.005).fit(*data())
    head = PrestoHead.from_estimator(model, dtype=torch.float64)
    P = torch.as_tensor(model.predict_proba(data()[0]))
    torch.testing.assert_close(head(X).exp(), P, atol=1e-12, rtol=0)
    torch.testing.assert_close(head.proba(X), P, atol=1e-12, rtol=0)
    torch.testing.assert_close(head.rare_proba(X), torch.as_tensor(model.rare_proba(data()[0])), atol=1e-12, rtol=0)
    loss = head.loss(X, y)
    assert loss.item() == pytest.approx(-model.log_likelihood_ / len(y), abs=1e-12)
    assert cross_entropy(head(X), y).item() == pytest.approx(loss.item(), abs=1e-12)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.6),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "dampened": lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.5, dampening=0.5),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.02, betas=(0.9, 0.99)),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.0, amsgrad=True),
}


@pytest.mark.parametrize(
    ("optimizer", "l1_ratio", "first"),
    [("sgd", 1.0, True), ("momentum", 0.5, True), ("momentum", 1.0, False), ("dampened", 1.0, True),
     ("nesterov", 1.0, True), ("adam", 1.0, True), ("amsgrad", 0.5, True)],
)  # fmt: skip
def test_every_optimizer_ends_at_the_estimators_optimum(optimizer, l1_ratio, first):
    X, y = tensors()
    lam = 0.02
    model = PRESTO(lam, alpha=l1_ratio, penalize_first=first).fit(*data())
    head = PrestoHead(4, 4, lam=lam, l1_ratio=l1_ratio, penalize_first=first, dtype=torch.float64)
    head.standardise(X)
    head.start_at_counts(torch.bincount(y))
    optimizer = OPTIMIZERS[optimizer](head.parameters())
    handle = head.attach(optimizer)
    for _ in range(250):
        optimizer.zero_grad()
        head.loss(X, y).backward()
        optimizer.step()
    total = head.loss(X, y) + head.penalty()
    assert total.item() == pytest.approx(model.objective_, abs=1e-5)
    scale = head.scale[:, None].numpy()
    np.testing.assert_allclose(head.psi.detach().T.numpy() / scale, model.psi_, atol=5e-3)
    assert torch.equal(head.psi.detach().T == 0, torch.as_tensor(model.psi_ == 0))
    handle.remove()
    head.lam = 1e6
    optimizer.zero_grad()
    head.loss(X, y).backward()
    optimizer.step()  # without the hook a step is the optimizer's alone
    assert head.psi.detach().any()


def test_the_proximal_map_is_that_of_the_penalty():
    head = PrestoHead(3, 3, lam=0.4, l1_ratio=0.75, penalize_first=False, dtype=torch.float64)
    start = torch.tensor([[1.0, -2.0, 0.1], [1.0, -2.0, 0.1]], dtype=torch.float64)
    with torch.no_grad():
        head.psi.copy_(start)
    assert head.penalty().item() == pytest.approx(0.4 * (0.75 * 3.1 + 0.125 * 5.01))
    head.prox_step(0.5)
    torch.testing.assert_close(head.psi.detach()[0], start[0])
    grid = torch.linspace(-3, 3, 600001, dtype=torch.float64)
    for value, at in zip(head.psi.detach()[1], start[1], strict=True):
        objective = 0.5 * (grid - at) ** 2 + 0.5 * 0.4 * (0.75 * grid.abs() + 0.125 * grid**2)
        assert value.item() == pytest.approx(grid[objective.argmin()].item(), abs=1e-5)


def test_log_probabilities_and_their_gradient_across_the_floor():
    T = torch.tensor([[-1.0, 0.5, 2.0], [0.3, 0.002, 1.0], [0.0, 40.0, 1e-3 + 1e-9]], dtype=torch.float64)
    F = torch.sigmoid(T.cumsum(1))
    edge = torch.ones(3, 1, dtype=torch.float64)
    raw = torch.cat([F, edge], 1) - torch.cat([0 * edge, F], 1)
    torch.testing.assert_close(ordered_log_proba(T).exp(), raw, atol=1e-14, rtol=1e-9)
    crossed = torch.tensor([[0.2, 5e-4, -1.5], [0.2, -2.0, 1.0]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ordered_log_proba, crossed)
    assert torch.autograd.gradcheck(ordered_log_proba, T.clone().requires_grad_(), atol=1e-4)
    # value and slope are continuous at the floor, and the loss is convex through it
    line = torch.linspace(-0.01, 0.01, 2001, dtype=torch.float64)
    points = torch.stack([torch.zeros_like(line), line], 1)
    middle = -ordered_log_proba(points)[:, 1]
    slopes = middle.diff() / line.diff()
    assert (slopes.diff() > -1e-6).all()
    assert torch.isfinite(middle).all()


def test_a_crossed_head_is_pulled_apart_and_clips_its_probabilities():
    head = PrestoHead(2, 3)
    with torch.no_grad():
        head.psi[1] = torch.tensor([-5.0, 0.0])
    x, y = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.tensor([1, 1])
    P = head.proba(x)
    assert (P >= 0).all()
    torch.testing.assert_close(P.sum(1), torch.ones(2))
    assert P[0, 1] == 0
    torch.testing.assert_close(head.rare_proba(x), torch.sigmoid(-head.spacings(x).sum(1)))
    optimizer = torch.optim.SGD(head.parameters(), lr=1e-3)
    first = head.loss(x, y).item()
    for _ in range(50):
        optimizer.zero_grad()
        head.loss(x, y).backward()
        optimizer.step()
    assert head.loss(x, y).item() < first
    assert (head.spacings(x)[:, 1] > 0).all()


def test_the_barrier_keeps_classes_alive():
    X, y = tensors()
    head = PrestoHead.from_estimator(PRESTO(0.01).fit(*data()), dtype=torch.float64)
    plain, held = head.loss(X, y), head.loss(X, y, barrier=0.01)
    assert held.item() == pytest.approx(plain.item() - 0.01 * head(X).sum(1).mean().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_computes_in_float32(dtype):
    head = PrestoHead(4, 4, dtype=dtype)
    x = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    out = head(x)
    assert out.dtype == torch.float32
    assert out.shape == (3, 5, 4)
    head.loss(x, torch.zeros(3, 5, dtype=torch.long)).backward()
    assert head.psi.grad.dtype == dtype
    head.prox_step(0.1)


def test_start_and_state():
    head = PrestoHead(5, 4)
    torch.testing.assert_close(head.proba(torch.randn(2, 5)), torch.full((2, 4), 0.25))
    head.start_at_counts([70, 20, 9, 1])
    torch.testing.assert_close(head(torch.zeros(5)).exp(), torch.tensor([0.7, 0.2, 0.09, 0.01]), atol=1e-6, rtol=0)
    constant = torch.ones(10, 5)
    head.standardise(constant)
    assert torch.equal(head.scale, torch.ones(5))
    buffer = io.BytesIO()
    torch.save(head.state_dict(), buffer)
    buffer.seek(0)
    other = PrestoHead(5, 4)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(other(x), head(x))
    assert "num_classes=4" in repr(head)


def test_as_the_head_of_a_transformers_classifier():
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                         num_attention_heads=2, num_labels=3, pad_token_id=0)  # fmt: skip
    model = LlamaForSequenceClassification(config)
    model.score = PrestoHead(16, 3, lam=0.02)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    model.score.attach(optimizer)
    ids = torch.randint(1, 50, (48, 6), generator=torch.Generator().manual_seed(1))
    labels = torch.bucketize(ids[:, -1].contiguous(), torch.tensor([20, 40]))
    losses = []
    for _ in range(40):
        out = model(input_ids=ids, labels=labels)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(out.loss.item())
    assert out.logits.shape == (48, 3)
    assert losses[-1] < 0.5 * losses[0]
    assert (model.score.psi[1] == 0).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_features": 0}, "in_features = 0; it must be at least 1"),
        ({"num_classes": 1}, "num_classes = 1; ordered classes are 3 or more"),
        ({"lam": -1.0}, "lam = -1.0; a penalty must be"),
        ({"l1_ratio": 2.0}, "l1_ratio = 2.0; it must lie in"),
        ({"floor": 0.0}, "floor = 0.0; it must be positive"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(MethodError, match=message):
        PrestoHead(**{"in_features": 4, "num_classes": 3, **arguments})


def test_what_else_is_refused():
    head = PrestoHead(4, 3)
    with pytest.raises(MethodError, match=r"counts = \[1.0, 0.0, 2.0\]; 3 positive numbers are needed"):
        head.start_at_counts([1, 0, 2])
    with pytest.raises(MethodError, match="does not hold psi of this head"):
        head.attach(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1))
