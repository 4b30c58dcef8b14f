"""Masks saved, applied, and held during fine-tuning."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from gnomon.common.layers import weight_of
from gnomon.common.models import tiny
from gnomon.compress.dsnot import apply_masks, freeze_masks, load_masks, masks_of, prune, save_masks
from gnomon.errors import DataError, ModelError


def sparse(family: str = "llama") -> nn.Module:
    return prune(tiny(family, num_layers=2), method="magnitude", sparsity=0.5)


def train(model: nn.Module, steps: int = 3, **options: float) -> None:
    """Train with everything that moves weights: momentum, weight decay, and noise on top."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9, **options)
    ids = torch.arange(64).view(2, 32)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.01 * torch.randn(p.shape, generator=generator))


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 9), width=st.integers(1, 19), seed=st.integers(0, 99))
def test_any_mask_survives_the_file(tmp_path_factory: pytest.TempPathFactory, rows: int, width: int, seed: int) -> None:
    mask = torch.rand(rows, width, generator=torch.Generator().manual_seed(seed)) < 0.5
    path = tmp_path_factory.mktemp("masks") / "masks.safetensors"
    save_masks({"a.b": mask}, path)
    assert torch.equal(load_masks(path)["a.b"], mask)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_models_masks_take_a_bit_per_weight_and_come_back(family: str, tmp_path: Path) -> None:
    model, path = sparse(family), tmp_path / "deep" / "masks.safetensors"
    save_masks(model, path)
    masks = load_masks(path)
    weights = sum(mask.numel() for mask in masks.values())
    assert path.stat().st_size < weights / 8 + 4000
    assert list(path.parent.iterdir()) == [path]
    again = apply_masks(tiny(family, num_layers=2), masks)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    wrapped = peft.get_peft_model(tiny(family, num_layers=2), peft.LoraConfig(r=2, target_modules="all-linear"))
    assert all(torch.equal(masks_of(apply_masks(wrapped, masks))[name], mask) for name, mask in masks.items())


def test_bad_mask_files_and_masks(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read as a mask file"):
        load_masks(tmp_path / "none.safetensors")
    (tmp_path / "text").write_text("no masks")
    with pytest.raises(DataError, match="cannot be read as a mask file"):
        load_masks(tmp_path / "text")
    save_file({"a": torch.ones(2)}, str(tmp_path / "other"))
    with pytest.raises(DataError, match="this safetensors file holds no masks"):
        load_masks(tmp_path / "other")
    with pytest.raises(DataError, match=r"The mask 'a' has dtype torch\.float32"):
        save_masks({"a": torch.ones(2, 2)}, tmp_path / "x")
    with pytest.raises(ModelError, match=r"The masks hold 'a' of shape \(2, 2\); in this model that layer is missing"):
        apply_masks(sparse(), {"a": torch.ones(2, 2, dtype=torch.bool)})
    name = "model.layers.0.mlp.up_proj"
    with pytest.raises(ModelError, match=r"that layer has shape \(176, 64\)"):
        freeze_masks(sparse(), {name: torch.ones(2, 2, dtype=torch.bool)})


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen", "gpt_neox"])
def test_sparsity_survives_training_and_keys_are_stock(family: str, tmp_path: Path) -> None:
    model = sparse(family)
    masks, keys = masks_of(model), list(model.state_dict())
    parameters = [id(p) for p in model.parameters()]
    frozen = freeze_masks(model)
    assert sorted(model.state_dict()) == sorted(keys)
    train(model, weight_decay=0.1)
    model.save_pretrained(tmp_path / "during")
    during = AutoModelForCausalLM.from_pretrained(tmp_path / "during")
    frozen.remove()
    frozen.remove()
    assert list(model.state_dict()) == keys or sorted(model.state_dict()) == sorted(keys)
    assert sorted(map(id, model.parameters())) == sorted(parameters)
    ids = torch.arange(32)[None]
    for name, mask in masks.items():
        for found in (model, during):
            weight = weight_of(found.get_submodule(name))
            assert not weight[~mask].any()
            assert float((weight[mask] != 0).float().mean()) > 0.99
    assert torch.equal(model.eval()(ids).logits, during.eval()(ids).logits)
    model.save_pretrained(tmp_path / "after")
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "after")
    assert torch.equal(model(ids).logits, after(ids).logits)


def test_training_without_frozen_masks_loses_the_sparsity() -> None:
    model = sparse()
    before = masks_of(model)
    train(model)
    assert all(float(mask.float().mean()) > 0.99 for mask in masks_of(model).values())
    assert all(float(mask.float().mean()) < 0.51 for mask in before.values())


def test_frozen_models_take_plain_state_dicts_and_pruned_places_get_no_gradient() -> None:
    model, other = sparse(), tiny("llama", num_layers=2, seed=1)
    masks = masks_of(model)
    with freeze_masks(model):
        model.load_state_dict(other.state_dict())
        ids = torch.arange(32)[None]
        model(input_ids=ids, labels=ids).loss.backward()
        layer = model.get_submodule("model.layers.0.mlp.up_proj")
        gradient: Tensor = layer.parametrizations.weight.original.grad
        assert not gradient[~masks["model.layers.0.mlp.up_proj"]].any()
        assert gradient.any()
    for name, mask in masks.items():
        assert torch.equal(weight_of(model.get_submodule(name)), weight_of(other.get_submodule(name)) * mask)


def test_a_second_freeze_is_refused_and_dense_layers_are_left_alone() -> None:
    model = tiny("llama", num_layers=1)
    with freeze_masks(model):
        assert "parametrizations" not in dict(model.named_modules())
        assert not any("parametrizations" in name for name, _ in model.named_modules())
    model = sparse()
    with freeze_masks(model), pytest.raises(ModelError, match="is parametrised already"):
        freeze_masks(model)


def test_adapters_train_over_a_frozen_base() -> None:
    model = sparse()
    masks = masks_of(model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with freeze_masks(wrapped):
        train(wrapped)
    assert all(torch.equal(mask, masks[name]) for name, mask in masks_of(wrapped).items())
