"""The hook under DDP with two gloo ranks: equal to the simulation, saved, resumed, safe."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gnomon.errors import GnomonWarning, MethodError, NoEffectWarning
from gnomon.optim import EControlCallback, EControlState, ErrorFeedback
from gnomon.optim.econtrol.feedback import Memory

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("ranks")
    script = Path(__file__).with_name("econtrol_two_ranks.py")
    tail = [str(folder / "store"), str(folder / "found.json")]
    ranks = [
        subprocess.Popen([sys.executable, script, str(rank), *tail], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        errors = [rank.communicate(timeout=300)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert all(rank.returncode == 0 for rank in ranks), errors
    return json.loads((folder / "found.json").read_text())


def test_eight_steps_equal_the_simulation_although_buckets_are_rebuilt(found):
    assert len(found["simulation"]) == 12
    for name, difference in found["simulation"].items():
        assert difference < 1e-7, name


def test_all_processes_hold_the_same_bits_after_a_hundred_steps(found):
    assert found["different"] == 0


def test_every_compressor_lowers_the_loss(found):
    assert set(found["losses"]) == {"identity", "topk", "randk", "sign", "lowrank", "rounding"}
    for name, (before, after) in found["losses"].items():
        assert after < 0.9 * before, name


def test_accumulated_gradients_are_exchanged_once(found):
    assert found["accumulation"] < 1e-9


def test_a_saved_state_goes_on_as_if_never_stopped(found):
    assert found["saved"] < 1e-12


def test_gradients_that_are_not_finite_reach_no_memory(found):
    text = found["nonfinite"]["raise"]
    assert "gradients are not finite in process 1" in text
    assert "nonfinite='skip'" in text
    assert found["nonfinite"]["raise kept"]
    assert found["nonfinite"]["skip"] is True
    assert found["nonfinite"]["skip kept"]
    assert found["nonfinite"]["goes on"]


def test_traffic_is_counted_in_bytes(found):
    sizes = [140, 20, 300, 15, 45, 3]
    message = 1 + sum((4 + 8) * -(-size // 10) for size in sizes)
    assert found["traffic"]["steps"] == 3
    # one bucket in the first step, at most one a tensor after DDP has rebuilt them
    assert 3 * message <= found["traffic"]["sent_bytes"] <= 3 * message + 15
    assert found["traffic"]["received_bytes"] == found["traffic"]["sent_bytes"]
    assert found["traffic"]["allreduce_bytes"] == 3 * 4 * sum(sizes)
    assert found["traffic"]["memory"] == 3 * 8 * sum(sizes)


def test_only_ddp_is_accepted(found):
    assert "works with DistributedDataParallel only" in found["unwrapped"]


def test_the_trainer_callback_resumes_to_the_same_weights(found):
    assert found["trainer"]["resumed"] < 1e-6
    assert found["trainer"]["file"]
    assert found["trainer"]["steps"] == 6
    assert 0 < found["trainer"]["ratio"] < 1.5


def _remembering(world: int = 1) -> tuple[ErrorFeedback, nn.Linear]:
    state, layer = EControlState(dense_below=0), nn.Linear(3, 2)
    state.name_parameters(layer)
    state.memory[layer.weight] = Memory(torch.ones(2, 3), torch.full((2, 3), 5.0))
    state.averages[layer.weight] = torch.full((2, 3), 4.0)
    return state, layer


def test_another_number_of_processes_starts_from_the_average():
    state, layer = _remembering()
    saved = {**copy.deepcopy(state.state_dict()), "world_size": 4}
    again, twin = EControlState(dense_below=0), nn.Linear(3, 2)
    with pytest.warns(GnomonWarning, match="saved with 4 processes and is loaded with 1"):
        again.load_state_dict(saved)
    again.name_parameters(twin)
    assert torch.equal(again.memory[twin.weight].e, torch.zeros(2, 3))
    assert torch.equal(again.memory[twin.weight].h, again.averages[twin.weight])
    assert layer.weight not in again.memory


def test_a_new_loss_scale_rescales_the_memory():
    state, layer = _remembering()
    state.set_scale(8.0)
    assert torch.equal(state.memory[layer.weight].h, torch.full((2, 3), 40.0))
    assert torch.equal(state.averages[layer.weight], torch.full((2, 3), 32.0))
    state.set_scale(8.0)
    assert torch.equal(state.memory[layer.weight].e, torch.full((2, 3), 8.0))


def test_bad_states_are_refused():
    state, _ = _remembering()
    with pytest.raises(MethodError, match="of the kind 'econtrol', this one of 'ec'"):
        ErrorFeedback("ec").load_state_dict(state.state_dict())
    other = EControlState()
    other.load_state_dict(state.state_dict())
    with pytest.raises(MethodError, match=r"has shape \(2, 3\), the parameter \(5, 3\)"):
        other.name_parameters(nn.Linear(3, 5))
    nameless = EControlState()
    nameless.memory[nn.Parameter(torch.zeros(2))] = Memory()
    with pytest.raises(MethodError, match="have no names"):
        nameless.state_dict()


def test_pickling_leaves_the_process_group_out_and_says_so():
    with pytest.warns(GnomonWarning, match="process group is not saved"):
        twin = pickle.loads(pickle.dumps(EControlState(ratio=0.2)))
    assert twin.compressor.ratio == 0.2
    assert twin.process_group is None


def test_in_one_process_the_callback_does_nothing_and_says_so():
    with pytest.warns(NoEffectWarning, match="nothing to do in a single process"):
        EControlCallback().on_train_begin(None, None, None, model=nn.Linear(2, 2))
