"""The diagnostics of depth against their definitions, written out."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from gnomon.common import depth
from gnomon.common.layers import decoder_blocks
from gnomon.common.models import tiny, workbench
from gnomon.errors import DataError, MethodError, ModelError
from gnomon.nn import apply_layernorm_scaling, fold_layernorm_scaling

IDS = torch.randint(1, 256, (5, 11), generator=torch.Generator().manual_seed(3))


def states(model: nn.Module, ids: torch.Tensor, **kwargs) -> list[torch.Tensor]:
    """Inputs of every block and the output of the last one, before the final norm."""
    seen: list[torch.Tensor] = []
    for block in decoder_blocks(model):
        block.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    decoder_blocks(model)[-1].register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    with torch.no_grad():
        model(ids, **kwargs)
    return seen


def loss_of(model: nn.Module, ids: torch.Tensor) -> float:
    with torch.no_grad():
        logits = model(ids).logits
    return float(nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))


def wide(architecture: str = "llama", **options) -> nn.Module:
    return tiny(architecture, initializer_range=0.2, **options).eval()


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "qwen", "gemma2"])
def test_variance_is_over_all_elements_and_averaged_over_batches(architecture: str) -> None:
    model = wide(architecture)
    measured = depth.residual_variance(model, IDS, batch_size=2)
    parts = [states(copy.deepcopy(model), part) for part in IDS.split(2)]
    for block in range(4):
        expected = sum(float(part[block + 1].double().var(correction=0)) for part in parts) / 3
        assert float(measured[block]) == pytest.approx(expected, rel=1e-5)


def test_variance_leaves_padding_out() -> None:
    model = wide()
    short = depth.residual_variance(model, IDS[:, :7])
    padded = IDS.clone()
    padded[:, 7:] = 0
    mask = (torch.arange(11) < 7).long().expand(5, -1)
    padded_variance = depth.residual_variance(model, {"input_ids": padded, "attention_mask": mask})
    torch.testing.assert_close(padded_variance, short, atol=1e-6, rtol=1e-5)
    assert float(depth.output_variance(torch.tensor([[[1.0, 3.0], [9.0, 9.0]]]), torch.tensor([[1, 0]]))) == 1.0


def test_angles_between_vectors() -> None:
    x, y = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])
    assert float(depth.angular_distance(x, y)) == 0.5
    assert float(depth.angular_distance(x, -3 * x)) == 1.0
    assert float(depth.angular_distance(x, x)) == 0.0
    assert float(depth.angular_distance(x, x + y / 2)) == pytest.approx(0.25)
    assert math.isnan(float(depth.angular_distance(x, torch.zeros(2))))
    many = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    assert depth.angular_distance(many, 1e3 * many).max() < 1e-7, "the cosine is clamped, never over 1"


def test_the_map_of_angular_distances_is_its_definition() -> None:
    model = wide()
    measured = depth.angular_distances(model, IDS, batch_size=2)
    points = [point[:, -1].double() for point in states(copy.deepcopy(model), IDS)]
    assert measured.shape == (4, 4)
    for block in range(4):
        for distance in range(1, 5):
            value = measured[block, distance - 1]
            if block + distance > 4:
                assert value.isnan()
                continue
            cosine = nn.functional.cosine_similarity(points[block], points[block + distance]).clamp(-1, 1)
            assert float(value) == pytest.approx(float((cosine.arccos() / math.pi).mean()), abs=1e-6)
    assert depth.angular_distances(model, IDS, max_distance=2).shape == (4, 2)


def test_angular_distance_takes_the_last_token_that_is_no_padding() -> None:
    model = wide()
    expected = (depth.angular_distances(model, IDS[:1, :4]) + depth.angular_distances(model, IDS[1:2])) / 2
    rows = [{"input_ids": IDS[0, :4]}, {"input_ids": IDS[1]}]
    padded = depth.angular_distances(model, rows)
    torch.testing.assert_close(padded, expected, atol=1e-6, rtol=1e-5, equal_nan=True)


def test_a_zero_vector_gives_nan_and_not_a_number_made_up() -> None:
    model = wide()
    with torch.no_grad():
        model.model.embed_tokens.weight.zero_()
    assert depth.angular_distances(model, IDS)[0].isnan().all()


def test_rows_for_pictures_lie_between_0_and_1() -> None:
    rows = torch.tensor([[0.1, 0.4, 0.2], [0.3, 0.3, 0.3], [0.5, 0.7, torch.nan]], dtype=torch.float64)
    drawn = depth.for_plotting(rows)
    assert drawn[0].min() == 0
    assert drawn[0].max() == 1
    assert (drawn[1] == 0).all()
    assert drawn[2, 2].isnan()


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_the_drop_of_a_block_is_the_loss_without_it(architecture: str) -> None:
    model = wide(architecture)
    drops = depth.block_removal_drop(model, IDS, batch_size=2)
    for index in range(4):
        removed = depth.remove_block(copy.deepcopy(model), index)
        assert len(decoder_blocks(removed)) == removed.config.num_hidden_layers == 3
        assert float(drops[index]) == pytest.approx(loss_of(removed, IDS) - loss_of(model, IDS), abs=1e-5)
    assert depth.block_removal_drop(model, IDS, blocks=[2]).tolist() == pytest.approx([float(drops[2])], abs=1e-6)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_a_removed_block_equals_an_identity_also_when_generating(architecture: str) -> None:
    model = wide(architecture)
    removed = depth.remove_block(copy.deepcopy(model), 1)
    with depth.skipping_block(model, 1):
        skipped = model(IDS).logits
    torch.testing.assert_close(removed(IDS).logits, skipped)
    assert not torch.equal(model(IDS).logits, skipped), "the block is back"
    tokens = removed.generate(IDS[:, :4], max_new_tokens=5, do_sample=False, use_cache=True)
    again = removed.generate(IDS[:, :4], max_new_tokens=5, do_sample=False, use_cache=False)
    assert torch.equal(tokens, again), "cache slots are numbered anew"


def test_one_pass_gives_variance_and_angles() -> None:
    model = wide()
    rows = [{"input_ids": IDS[0, :4]}, {"input_ids": IDS[1]}, {"input_ids": IDS[2]}]
    passes: list[int] = []
    model.model.layers[0].register_forward_pre_hook(lambda module, args: passes.append(1))
    variance, angles = depth.stream_statistics(model, rows, batch_size=2)
    assert len(passes) == 2, "one pass a batch"
    assert torch.equal(variance, depth.residual_variance(model, rows, batch_size=2))
    torch.testing.assert_close(angles, depth.angular_distances(model, rows, batch_size=2), equal_nan=True)
    assert depth.stream_statistics(model, rows, max_distance=0)[1].shape == (4, 0)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "gemma2"])
def test_drops_measured_from_inside_are_those_of_full_passes(architecture: str) -> None:
    model = wide(architecture)
    rows = [{"input_ids": IDS[0, :4]}, {"input_ids": IDS[1]}, {"input_ids": IDS[2]}]
    full = [
        depth.block_removal_drop(model, metric=lambda m: depth.token_loss(m, rows, batch_size=2), blocks=[index])
        for index in range(4)
    ]
    expected = torch.cat(full)
    torch.testing.assert_close(depth.block_removal_drop(model, rows, batch_size=2), expected, atol=1e-6, rtol=1e-5)
    some = depth.block_removal_drop(model, rows, batch_size=2, blocks=[3, 1, 3])
    torch.testing.assert_close(some, expected[[3, 1, 3]], atol=1e-6, rtol=1e-5)
    assert depth.block_removal_drop(model, rows, blocks=[]).shape == (0,)


def test_drops_measured_from_inside_run_half_of_the_blocks() -> None:
    model = wide(num_layers=8)
    calls: list[int] = []
    for block in model.model.layers:
        block.mlp.register_forward_hook(lambda module, args, output: calls.append(1))
    depth.block_removal_drop(model, IDS)
    whole, look = 8, 8
    assert len(calls) - whole - look == sum(8 - 1 - index for index in range(8)) + 7, "those behind, and one to go on"
    assert not any("forward" in block.__dict__ for block in model.model.layers)


def test_compiled_and_shared_blocks_are_measured_by_full_passes() -> None:
    model = wide(num_layers=3)
    expected = depth.block_removal_drop(model, IDS)
    calls: list[int] = []
    model.model.layers[2].mlp.register_forward_hook(lambda module, args, output: calls.append(1))
    model.model.layers[0]._compiled_call_impl = model.model.layers[0]._call_impl
    torch.testing.assert_close(depth.block_removal_drop(model, IDS), expected, atol=1e-6, rtol=1e-5)
    assert len(calls) == 4, "the whole model, and without each block"
    shared = wide(num_layers=3)
    shared.model.layers = nn.ModuleList([shared.model.layers[0]] * 3)
    assert depth.block_removal_drop(shared, IDS).shape == (3,)


def test_an_interrupted_measurement_leaves_the_blocks_alone() -> None:
    model = wide()
    before = model(IDS).logits

    def stop(module, args):
        if len(args[0]) == 5 and "forward" in model.model.layers[0].__dict__:
            raise KeyboardInterrupt

    handle = model.lm_head.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        depth.block_removal_drop(model, IDS)
    handle.remove()
    assert torch.equal(model(IDS).logits, before)


def test_lists_with_an_entry_a_block_lose_that_of_a_removed_one() -> None:
    model = tiny("llama")
    model.config.gnomon = [
        {"slug": "one", "options": {"layer_placements": ["a", "b", "c", "d"], "target_modules": ["e", "f", "g", "h"]}}
    ]
    twin = copy.deepcopy(model)
    depth.remove_block(model, 1)
    assert model.config.gnomon[0]["options"] == {
        "layer_placements": ["a", "c", "d"],
        "target_modules": ["e", "f", "g", "h"],
    }
    assert len(twin.config.gnomon[0]["options"]["layer_placements"]) == 4


def test_blocks_that_share_a_cache_slot_are_not_removed() -> None:
    model = tiny("llama")
    model.model.layers[3].self_attn.layer_idx = 2
    with pytest.raises(ModelError, match=r"share slots of the KV cache \(layer_idx \[0, 1, 2, 2\]\)"):
        depth.remove_block(model, 1)
    assert len(model.model.layers) == 4


def test_the_drop_takes_any_metric() -> None:
    model = wide()

    def accuracy(m: nn.Module) -> float:
        return float((m(IDS).logits.argmax(-1)[:, :-1] == IDS[:, 1:]).double().mean())

    drops = depth.block_removal_drop(model, metric=accuracy)
    with depth.skipping_block(model, 0):
        without = accuracy(model)
    assert float(drops[0]) == pytest.approx(without - accuracy(model))
    with pytest.raises(MethodError, match=r"neither batches nor a metric"):
        depth.block_removal_drop(model)


def test_removing_a_block_needs_folded_scales() -> None:
    model = apply_layernorm_scaling(tiny("llama"))
    with pytest.raises(ModelError, match=r"'llama' model carries LayerNorm scaling.*fold_layernorm_scaling"):
        depth.remove_block(model, 1)
    assert len(depth.remove_block(fold_layernorm_scaling(model), 1).model.layers) == 3


def test_token_loss_weighs_tokens_not_batches() -> None:
    model = wide()
    rows = [{"input_ids": IDS[0, :4]}, {"input_ids": IDS[1]}, {"input_ids": IDS[2]}]
    losses = [(loss_of(model, row["input_ids"][None]), len(row["input_ids"]) - 1) for row in rows]
    expected = sum(loss * n for loss, n in losses) / sum(n for _, n in losses)
    assert depth.token_loss(model, rows, batch_size=2) == pytest.approx(expected, abs=1e-5)


def test_gradient_norms_are_those_of_the_mean_token_loss() -> None:
    model = wide()
    norms = depth.gradient_norms(model, IDS, batch_size=2)
    assert all(p.grad is None for p in model.parameters())
    model(input_ids=IDS, labels=IDS).loss.backward()
    for index, block in enumerate(model.model.layers):
        expected = sum(float(p.grad.double().square().sum()) for p in block.parameters()) ** 0.5
        assert float(norms[index]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("seed", [0, 1])
def test_at_initialisation_gradients_fall_with_depth_in_pre_ln(seed: int) -> None:
    ids = torch.randint(1, 256, (16, 64), generator=torch.Generator().manual_seed(seed))
    model = tiny("llama", num_layers=12, intermediate_size=172, seed=seed)
    norms = depth.gradient_norms(model, ids, batch_size=16)
    assert norms[0] / norms[-1] > 1.5


def test_the_jacobian_is_that_of_autograd() -> None:
    model = wide(num_layers=2, hidden_size=16, num_heads=2).double()
    ids = IDS[:2, :3]
    measured = depth.block_jacobian(model, ids, 1, positions=3)
    block, rotary = model.model.layers[1], model.model.rotary_emb(torch.zeros(1, 3, 16), torch.arange(3)[None])
    total = torch.zeros(16, 16, dtype=torch.float64)
    for x in states(copy.deepcopy(model), ids)[1]:
        full = torch.autograd.functional.jacobian(lambda h: block(h[None], position_embeddings=rotary)[0], x)
        total += sum(full[t, :, t, :] for t in range(3))
    torch.testing.assert_close(measured, total / 6, atol=1e-6, rtol=1e-5)
    assert depth.block_jacobian(model, ids, 0, positions=1).shape == (16, 16)


def test_diagonal_dominance() -> None:
    assert depth.diagonal_dominance(torch.eye(3)) == 1.0
    assert depth.diagonal_dominance(torch.ones(4, 4)) == 0.25
    small = depth.jacobian_dominance(tiny("llama", num_layers=2, initializer_range=1e-4), IDS[:2, :4], positions=2)
    large = depth.jacobian_dominance(wide(num_layers=2), IDS[:2, :4], positions=2)
    assert small.shape == (2,)
    assert (large < small).all(), "a block that does nothing is the identity"
    model = tiny("llama", num_layers=2)
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
    assert depth.jacobian_dominance(model, IDS[:2, :4], positions=2).tolist() == [1.0, 1.0]


def test_the_model_is_left_as_it_was() -> None:
    model = tiny("llama", attention_dropout=0.5).train()
    model.model.layers[1].eval()
    model.requires_grad_(True)
    before = {n: (m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()}
    state, weights = torch.get_rng_state(), copy.deepcopy(model.state_dict())
    for measure in (
        depth.residual_variance,
        depth.angular_distances,
        depth.block_removal_drop,
        depth.gradient_norms,
        depth.token_loss,
    ):
        measure(model, IDS)
    depth.jacobian_dominance(model, IDS[:1, :3], positions=1)
    assert before == {
        n: (m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()
    }
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(weights[n], t) for n, t in model.state_dict().items())


def test_what_cannot_be_measured_is_told() -> None:
    model = tiny("llama")
    with pytest.raises(MethodError, match=r"There is no block 4. Blocks are numbered from 0 to 3"):
        depth.remove_block(model, 4)
    with pytest.raises(MethodError, match=r"max_distance = 9. It must be between 1 and .* 4"):
        depth.angular_distances(model, IDS, max_distance=9)
    with pytest.raises(MethodError, match=r"positions = 0"):
        depth.block_jacobian(model, IDS, 0, positions=0)
    with pytest.raises(MethodError, match=r"has one block"):
        depth.remove_block(tiny("llama", num_layers=1), 0)
    with pytest.raises(DataError, match=r"no token to predict"):
        depth.token_loss(model, IDS[:, :1])
    with pytest.raises(ModelError, match=r"'llama' model \(LlamaModel\) has no language-model head"):
        depth.token_loss(model.model, IDS)
    with pytest.raises(ModelError, match=r"No parameter in the blocks of this 'llama' model is trainable"):
        depth.gradient_norms(model.requires_grad_(False), IDS)
    model.model.layers = nn.ModuleList([model.model.layers[0]] * 3)
    with pytest.raises(ModelError, match=r"share their weights"):
        depth.remove_block(model, 1)
    assert depth.residual_variance(model, IDS).shape == (3,)


@pytest.mark.slow
def test_a_trained_pre_ln_model_shows_the_curse_of_depth() -> None:
    model, _, _, valid = workbench()
    ids = valid[: 16 * 64].reshape(16, 64)
    variance = depth.residual_variance(model, ids, batch_size=16)
    assert (variance.diff() > 0).all(), "the residual stream grows with every block"
    drops = depth.block_removal_drop(model, ids, batch_size=16)
    assert drops[0] > 0.9, "the first block is needed"
    assert drops[0] > 3 * drops[2:-1].min(), "a middle block far less"
