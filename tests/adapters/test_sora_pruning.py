"""From a trained SoRA to a plain LoRA, and to smaller tensors during training."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from gnomon.adapters.sora import (
    SoRAConfig,
    SoRALinear,
    SoRAProximal,
    apply_sora,
    prune_sora,
    repack_sora,
    sora_ranks,
    sora_summary,
)
from gnomon.common.models import tiny
from gnomon.errors import MethodError, ModelError

SIZES = {"vocab_size": 64, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "max_positions": 32}
LEFT_OUT = "model.layers.1.mlp.up_proj"


def ids(seed: int = 0) -> Tensor:
    return torch.randint(1, 64, (2, 12), generator=torch.Generator().manual_seed(seed))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids()).logits


def sparse(model: Any, adapter: str = "default", seed: int = 0) -> Any:
    """Moved factors; gates zero here and there, all of one module."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, SoRALinear) and layer.has(adapter):
                _, gate, b = layer.factors(adapter)
                b.normal_(std=0.3, generator=generator)
                gate *= torch.rand(gate.shape, generator=generator) < 0.5
                gate[1] = 0.7
                if layer.key == LEFT_OUT:
                    gate.zero_()
    return model.eval()


def adapted(family: str = "llama", **options: Any) -> Any:
    given = {"r": 5, "lora_alpha": 7.0, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    return peft.get_peft_model(tiny(family, **SIZES), SoRAConfig(**given))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_pruned_adapter_computes_the_same_and_is_stock_lora(family: str, tmp_path: Path) -> None:
    model = sparse(adapted(family))
    ranks, expected = sora_ranks(model), logits(model)
    before = torch.random.get_rng_state()
    pruned = prune_sora(model)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.testing.assert_close(logits(pruned), expected, rtol=0, atol=1e-6)
    layers = {name: m for name, m in pruned.base_model.model.named_modules() if isinstance(m, LoraLayer)}
    assert {name: layer.r["default"] for name, layer in layers.items()} == {k: r for k, r in ranks.items() if r}
    assert all(layer.scaling["default"] == pytest.approx(7 / 5, rel=1e-12) for layer in layers.values())
    assert not any(isinstance(m, SoRALinear) for m in pruned.modules())
    assert type(pruned.peft_config["default"]) is peft.LoraConfig
    assert not pruned.training
    assert {n for n, p in pruned.named_parameters() if p.requires_grad} == {
        n for n, _ in pruned.named_parameters() if "lora_" in n
    }
    pruned.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(tiny(family, **SIZES), str(tmp_path)).eval()
    assert torch.equal(logits(again), logits(pruned))
    torch.testing.assert_close(logits(copy.deepcopy(pruned).merge_and_unload()), expected, rtol=1e-4, atol=1e-5)


def test_a_pruned_adapter_loads_without_this_library(tmp_path: Path) -> None:
    model = sparse(adapted())
    prune_sora(model).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"
    code = (
        "import sys, peft, transformers; c = transformers.LlamaConfig(**{sizes}); "
        "m = peft.PeftModel.from_pretrained(transformers.LlamaForCausalLM(c), {folder!r}); "
        "assert not any('gnomon' in name for name in sys.modules); "
        "print(len(m.peft_config['default'].rank_pattern))"
    )
    config = tiny("llama", **SIZES).config
    keys = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "intermediate_size")  # fmt: skip
    filled = code.format(sizes={k: getattr(config, k) for k in keys}, folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", filled], capture_output=True, text=True, timeout=100, check=False)
    assert done.stdout.strip() == "13", done.stderr


def test_a_module_without_a_rank_is_left_out_and_the_others_keep_their_names() -> None:
    pruned = prune_sora(sparse(adapted()))
    config = pruned.peft_config["default"]
    assert f"^{LEFT_OUT}".replace(".", "\\.") not in config.rank_pattern
    assert len(config.rank_pattern) == len(config.alpha_pattern) == 13
    assert not isinstance(pruned.base_model.model.get_submodule(LEFT_OUT), LoraLayer)


class Nested(nn.Module):
    """Paths that are ends of other paths, and a dot that matches any character."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.proj, self.inner = nn.Linear(6, 6), nn.ModuleDict({"proj": nn.Linear(6, 6), "projx0": nn.Linear(6, 6)})
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator) * 0.3

    def forward(self, x: Tensor) -> Tensor:
        return self.inner["projx0"](self.inner["proj"](self.proj(x)))


@pytest.mark.parametrize("zero", [("proj",), ("inner.proj",), (), ("proj", "inner.projx0")])
def test_paths_that_are_ends_of_others(zero: tuple[str, ...], tmp_path: Path) -> None:
    model = sparse(peft.get_peft_model(Nested(), SoRAConfig(r=4, target_modules=r".*proj.*")))
    for name in zero:
        model.base_model.model.get_submodule(name).lora_gate["default"].data.zero_()
    with torch.no_grad():
        model.base_model.model.inner["projx0"].lora_gate["default"][:2] *= 0
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    expected, ranks = model(x), sora_ranks(model)
    pruned = prune_sora(model)
    torch.testing.assert_close(pruned(x), expected, rtol=0, atol=1e-6)
    found = {n: m.r["default"] for n, m in pruned.base_model.model.named_modules() if isinstance(m, LoraLayer)}
    assert found == {name: rank for name, rank in ranks.items() if rank}
    pruned.save_pretrained(tmp_path)
    assert torch.equal(peft.PeftModel.from_pretrained(Nested(), str(tmp_path)).eval()(x), pruned(x))


@pytest.mark.parametrize("bias", ["all", "adapter_only"])
def test_trained_biases_are_carried_over(bias: str, tmp_path: Path) -> None:
    model = peft.get_peft_model(Nested(), SoRAConfig(r=4, target_modules=["proj", "projx0"], bias=bias))
    sparse(model)
    model.base_model.model.proj.lora_gate["default"].data.zero_()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(".bias"):
                assert p.requires_grad
                p += 0.5
    x = torch.ones(2, 6)
    expected = model(x)
    pruned = prune_sora(model)
    torch.testing.assert_close(pruned(x), expected, rtol=0, atol=1e-6)
    pruned.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(Nested(), str(tmp_path)).eval()
    torch.testing.assert_close(again(x), expected, rtol=0, atol=1e-6)


def test_a_trained_head_is_carried_over(tmp_path: Path) -> None:
    def base() -> Any:
        from transformers import BertConfig, BertForSequenceClassification

        with torch.random.fork_rng():
            torch.manual_seed(0)
            sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
            return BertForSequenceClassification(BertConfig(vocab_size=64, num_labels=3, **sizes)).eval()

    model = sparse(apply_sora(base(), r=4, target_modules=r".*encoder.*(query|value|dense)"))
    head = [p for name, p in model.named_parameters() if "classifier" in name and p.requires_grad]
    assert len(head) == 2
    with torch.no_grad():
        for p in head:
            p.normal_(generator=torch.Generator().manual_seed(3))
    expected = logits(model)
    pruned = prune_sora(model)
    assert type(pruned) is peft.PeftModelForSequenceClassification
    torch.testing.assert_close(logits(pruned), expected, rtol=0, atol=1e-6)
    pruned.save_pretrained(tmp_path)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(base(), str(tmp_path)).eval()), logits(pruned))


def test_several_adapters_are_pruned_together() -> None:
    model = adapted()
    model.add_adapter("second", SoRAConfig(r=3, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"))
    sparse(sparse(model), "second", seed=4)
    expected = {}
    for name in ("default", "second"):
        model.set_adapter(name)
        expected[name] = logits(model)
    pruned = prune_sora(model)
    assert pruned.active_adapter == "second"
    for name, value in expected.items():
        pruned.set_adapter(name)
        torch.testing.assert_close(logits(pruned), value, rtol=0, atol=1e-6)


def test_merging_before_and_after_pruning_is_the_same() -> None:
    model = sparse(adapted())
    expected = logits(model)
    before = logits(copy.deepcopy(model).merge_and_unload())
    after = logits(prune_sora(model).merge_and_unload())
    for found in (before, after):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_what_is_left_is_counted() -> None:
    model = sparse(adapted())
    summary, ranks = sora_summary(model), sora_ranks(model)
    layers = {m.key: m for m in model.modules() if isinstance(m, SoRALinear)}
    assert summary.ranks == ranks
    assert ranks[LEFT_OUT] == 0
    assert summary.gates == sum(ranks.values())
    assert summary.all_gates == 5 * 14
    assert summary.kept == summary.gates / 70
    whole = sum(p.numel() for p in model.parameters() if p.requires_grad)
    zero = sum((5 - ranks[k]) * (layer.in_features + layer.out_features) for k, layer in layers.items())
    assert summary.parameters == whole - zero
    pruned = prune_sora(model)
    assert sum(p.numel() for p in pruned.parameters() if p.requires_grad) == summary.parameters - 70


# --- re-packing


def steps(model: Any, optimizer: Any, numbers: range) -> None:
    for number in numbers:
        model(input_ids=ids(number), labels=ids(number)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def proximal(model: Any, xi: float = 0.05) -> SoRAProximal:
    parameters = [p for p in model.parameters() if p.requires_grad]
    return SoRAProximal(torch.optim.AdamW(parameters, lr=1e-2), model, xi=xi)


def test_repacked_training_goes_on_as_before_on_what_is_left(tmp_path: Path) -> None:
    model = adapted()
    optimizer = proximal(model)
    steps(model, optimizer, range(12))
    ranks = sora_ranks(model)
    reference = copy.deepcopy((model, optimizer))
    expected, held = logits(model.eval()), {id(p) for p in model.parameters()}
    left = repack_sora(model, optimizer, after=1)
    assert left == ranks
    assert {id(p) for p in model.parameters()} == held
    assert sora_summary(model).gates == sum(ranks.values())
    assert sora_summary(model).all_gates == 70
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-6)
    assert model.base_model.model.model.layers[0].mlp.up_proj.scaling["default"] == 7 / 5
    for made, own in ((model, optimizer), reference):
        made.train()
        own.xi = 0.0
        own.gates.lambda1 = 0.0
        steps(made, own, range(12, 13))
    for name, p in reference[0].named_parameters():
        if "lora_gate" in name:
            layer = dict(reference[0].named_modules())[name.partition(".lora_gate")[0]]
            kept = dict(model.named_parameters())[name]
            assert kept.numel() == ranks[layer.key]
            assert all(any(torch.isclose(x, y, atol=1e-5) for y in p) for x in kept)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(tiny("llama", **SIZES), str(tmp_path), is_trainable=True).eval()
    assert torch.equal(logits(again), logits(model.eval()))
    assert sora_ranks(again) == sora_ranks(model)
    torch.testing.assert_close(logits(prune_sora(again)), logits(model), rtol=0, atol=1e-6)


def test_only_ranks_that_stayed_zero_are_dropped() -> None:
    model = adapted()
    optimizer = proximal(model, xi=0.0)
    gate = model.base_model.model.model.layers[0].mlp.up_proj.lora_gate["default"]
    for step in range(4):
        with torch.no_grad():
            gate[0] = 0.0
            gate[1] = 0.0 if step == 3 else 1.0
        for p in model.parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad else None
        optimizer.gates.lambda1 = 0.0
        optimizer.step()
    left = repack_sora(model, optimizer, after=4)
    assert left["model.layers.0.mlp.up_proj"] == 4
    assert sum(left.values()) == 69
    assert float(gate.detach()[0]) == 0.0


# --- bad input


def test_models_that_cannot_be_pruned() -> None:
    with pytest.raises(ModelError, match=r"prune_sora takes a PeftModel, not a LlamaForCausalLM"):
        prune_sora(tiny("llama", **SIZES))  # type: ignore[arg-type]
    lora = peft.get_peft_model(tiny("llama", **SIZES), peft.LoraConfig())
    with pytest.raises(ModelError, match=r"has no SoRA layers"):
        prune_sora(lora)
    model = sparse(adapted())
    model.merge_adapter()
    with pytest.raises(ModelError, match=r"the adapter 'default' is merged into model.layers.0"):
        prune_sora(model)
    model.unmerge_adapter()
    for layer in model.modules():
        if isinstance(layer, SoRALinear):
            layer.lora_gate["default"].data.zero_()
    with pytest.raises(MethodError, match=r"all gates of the adapter 'default' are zero, so no LoRA is left"):
        prune_sora(model)


def test_repacking_that_is_not_possible() -> None:
    model = adapted()
    optimizer = proximal(model, xi=10.0)
    with pytest.raises(MethodError, match=r"after = 0: a whole number of steps"):
        repack_sora(model, optimizer, after=0)
    assert sum(repack_sora(model, optimizer, after=1).values()) == 70  # nothing has stepped yet
    steps(model, optimizer, range(1))
    first = model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight
    optimizer.state[first]["blocks"] = torch.zeros(3)
    with pytest.raises(MethodError, match=r"keeps blocks of shape \(3,\) for a parameter of shape \(5, 16\)"):
        repack_sora(model, optimizer, after=1)
    assert first.shape == (5, 16)
