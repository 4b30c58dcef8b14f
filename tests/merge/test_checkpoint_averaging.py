"""The running mean against the definition, torch's own averaging and closed forms."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel

sys.path.insert(0, str(Path(__file__).parent))
from checkpoint_averaging_definition import mean_of, seeded_states

from gnomon.errors import MethodError
from gnomon.merge import RunningAverage, average_states


def worst(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert set(a) == set(b)
    return max((float((a[k].double() - b[k].double()).abs().max()) for k in a if a[k].numel()), default=0.0)


def test_ten_seeded_states_agree_with_the_definition_to_float_precision() -> None:
    states = seeded_states(10)
    found = average_states(states)
    largest = max(float(t.abs().max()) for t in found.values() if t.is_floating_point() and t.numel())
    assert worst(found, mean_of(states)) < 1.2e-7 * largest
    assert {k: v.dtype for k, v in found.items()} == {k: v.dtype for k, v in states[0].items()}
    assert found["position_ids"].tolist() == [9, 10, 11, 12], "integers come from the last state"
    assert found["mask"].tolist() == [False, True]


def test_float64_states_are_averaged_in_float64() -> None:
    states = seeded_states(7, torch.float64)
    assert worst(average_states(states), mean_of(states)) < 1e-15


def test_one_state_and_equal_states_stay_bitwise_what_they_are() -> None:
    state = seeded_states(1)[0]
    for count in (1, 3, 10):
        found = average_states([state] * count)
        assert all(torch.equal(found[k], state[k]) for k in state), count
    low = seeded_states(1, torch.bfloat16)[0]
    assert all(torch.equal(v, low[k]) for k, v in average_states([low] * 7).items())


@given(order=st.permutations(range(5)))
def test_the_order_does_not_matter(order: list[int]) -> None:
    states = [{k: v for k, v in s.items() if v.is_floating_point()} for s in seeded_states(5)]
    assert worst(average_states([states[i] for i in order]), average_states(states)) < 5e-7


@given(factor=st.sampled_from([-2.0, 0.5, 4.0, 1024.0]))
def test_it_is_linear(factor: float) -> None:
    states = [{k: v for k, v in s.items() if v.is_floating_point()} for s in seeded_states(4)]
    scaled = average_states([{k: v * factor for k, v in s.items()} for s in states])
    assert all(torch.equal(scaled[k], v * factor) for k, v in average_states(states).items())


@given(
    raw=st.lists(st.floats(0, 10).filter(lambda w: w == 0 or w > 1e-3), min_size=2, max_size=6).filter(
        lambda values: sum(values) > 0
    )
)
def test_weights_are_those_of_the_definition(raw: list[float]) -> None:
    states = seeded_states(len(raw))
    weights = [w / sum(raw) for w in raw]
    assert worst(average_states(states, raw, normalise=True), mean_of(states, weights)) < 1e-6


def test_it_equals_torchs_averaged_model() -> None:
    model = nn.Linear(6, 4)
    peer, ours = AveragedModel(model), RunningAverage()
    generator = torch.Generator().manual_seed(0)
    for _ in range(9):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn(p.shape, generator=generator))
        peer.update_parameters(model)
        ours.update(model.state_dict())
    # torch divides by a count that it keeps in float32
    assert worst(ours.result(), peer.module.state_dict()) < 3e-7


@pytest.mark.parametrize(("dtype", "ours", "theirs"), [(torch.bfloat16, 9e-3, 1.5e-2), (torch.float16, 1.1e-3, 2e-3)])
def test_low_precision_states_are_summed_in_float32(dtype: torch.dtype, ours: float, theirs: float) -> None:
    generator = torch.Generator().manual_seed(0)
    states = [{"w": torch.randn(20_000, generator=generator).to(dtype)} for _ in range(50)]
    exact = mean_of(states)["w"]
    found = average_states(states)["w"]
    assert found.dtype == dtype
    assert torch.equal(found, exact.to(dtype)) or worst({"w": found}, {"w": exact}) < ours
    naive = torch.zeros(20_000, dtype=dtype)
    for state in states:
        naive += state["w"] / 50
    error = float((found.double() - exact).abs().max())
    assert float((naive.double() - exact).abs().max()) > 4 * error
    # what is left is the final cast alone
    assert error <= float((exact.to(dtype).double() - exact).abs().max()) * 1.01


def test_for_a_linear_model_the_average_is_the_ensemble() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 6, generator=generator, dtype=torch.float64)
    states = [
        {
            "weight": torch.randn(3, 6, generator=generator).double(),
            "bias": torch.randn(3, generator=generator).double(),
        }
        for _ in range(5)
    ]
    outputs = torch.stack([x @ s["weight"].T + s["bias"] for s in states]).mean(0)
    mean = average_states(states)
    torch.testing.assert_close(x @ mean["weight"].T + mean["bias"], outputs, rtol=0, atol=1e-14)


def test_states_are_neither_kept_nor_changed_nor_drawn_from() -> None:
    before = torch.random.get_rng_state()
    states = seeded_states(3)
    copies = [{k: v.clone() for k, v in s.items()} for s in states]
    average = RunningAverage()
    for state in states:
        average.update(state)
    first = average.result()
    assert all(torch.equal(a[k], b[k]) for a, b in zip(states, copies, strict=True) for k in a)
    for state in states:
        for tensor in state.values():
            tensor.zero_()
    assert all(torch.equal(v, first[k]) for k, v in average.result().items())
    first["scale"].fill_(99)
    assert float(average.result()["scale"]) != 99
    assert torch.equal(before, torch.random.get_rng_state())


def test_large_states_go_through_in_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = average_states(seeded_states(4))
    monkeypatch.setattr("gnomon.merge.checkpoint_averaging.running._BUCKET", 40)
    parts = average_states(seeded_states(4))
    assert all(torch.equal(parts[k], whole[k]) for k in whole)


def broken(change: Any) -> list[dict[str, torch.Tensor]]:
    states = seeded_states(3)
    change(states[1])
    return states


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("scale"), r"state 2 has other tensors .*\(missing: scale\)"),
        (lambda s: s.update(extra=torch.zeros(1)), "unexpected: extra"),
        (
            lambda s: s.update({"embed.weight": torch.zeros(38, 5)}),
            r"shape \(38, 5\), before it was \(37, 5\). Was the",
        ),
        (lambda s: s["layer.bias"].fill_(torch.nan), "state 2: 'layer.bias' holds values that are not finite"),
        (lambda s: s["layer.weight"][0].fill_(torch.inf), "state 2: 'layer.weight' holds values that are not finite"),
        (lambda s: s.update(scale=torch.tensor(1j)), "complex64. Complex tensors are not averaged"),
        (lambda s: s.clear(), "state 2 holds no tensors"),
    ],
)
def test_states_that_do_not_fit_are_told_apart(change: Any, message: str) -> None:
    with pytest.raises(MethodError, match=message):
        average_states(broken(change))


def test_a_refused_state_leaves_the_mean_as_it_was() -> None:
    average = RunningAverage()
    good, bad = seeded_states(1)[0], seeded_states(1)[0]
    bad["scale"].fill_(torch.nan)
    average.update(good)
    with pytest.raises(MethodError):
        average.update(bad)
    assert average.count == 1
    assert all(torch.equal(v, good[k]) for k, v in average.result().items())


def test_missing_names_are_listed_five_at_most() -> None:
    states = [{f"w{i}": torch.zeros(1) for i in range(9)}, {"w0": torch.zeros(1)}]
    with pytest.raises(MethodError, match=r"missing: w1, w2, w3, w4, w5 and 3 more\)"):
        average_states(states)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([0.5, 0.5], "2 weights were given for 3 checkpoints"),
        ([0.5, 0.5, 0.5], "sum to 1.5, not to 1. Set normalise=True"),
        ([1.5, -0.5, 0.0], "-0.5 is not allowed; each must be finite and 0 or more"),
        ([float("nan"), 0.5, 0.5], "nan is not allowed"),
        ([0.0, 0.0, 0.0], "sum to 0"),
    ],
)
def test_weights_that_do_not_fit_are_refused(weights: list[float], message: str) -> None:
    with pytest.raises(MethodError, match=message):
        average_states(seeded_states(3), weights)


def test_nothing_to_average_is_refused() -> None:
    for call in (lambda: average_states([]), lambda: average_states([], [1.0]), lambda: RunningAverage().result()):
        with pytest.raises(MethodError, match="There is no state to average"):
            call()
    with pytest.raises(MethodError, match="weight = 0 of state 1"):
        RunningAverage().update(seeded_states(1)[0], 0)


def test_a_state_of_weight_zero_counts_for_nothing_but_its_integers() -> None:
    states = seeded_states(3)
    states[2] = {k: v * 1000 for k, v in states[2].items() if k != "mask"} | {"mask": states[2]["mask"]}
    found = average_states(states, [0.5, 0.5, 0.0])
    assert worst({k: v for k, v in found.items() if v.is_floating_point()},
                 {k: v for k, v in mean_of(states[:2]).items() if v.is_floating_point()}) < 1e-6  # fmt: skip
    assert torch.equal(found["position_ids"], states[2]["position_ids"])
