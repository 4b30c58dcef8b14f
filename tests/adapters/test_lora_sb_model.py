"""LoRA-SB on whole models: the initialisation, what is refused, what is saved, the export."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from gnomon.adapters import (
    LoRASBConfig,
    LoRAXSConfig,
    apply_lora_sb,
    apply_lora_xs,
    initialize_lora_sb,
    lora_sb_as_lora,
    lora_sb_factors,
    save_lora_sb_as_lora,
    set_lora_sb_factors,
)
from gnomon.adapters.lora_sb.factors import first_update, update_factors
from gnomon.adapters.lora_sb.tuner import LatentLinear
from gnomon.common.layers import linear_layers
from gnomon.common.models import tiny
from gnomon.errors import GnomonWarning, MethodError, ModelError

SIZES = {"vocab_size": 64, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "max_positions": 32}
START: dict[str, Any] = {"lr": 1e-2, "num_training_steps": 100}


def batch(rows: int = 4, seed: int = 9) -> dict[str, Tensor]:
    ids = torch.randint(1, 64, (rows, 12), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


BATCHES = [batch(4, 1), batch(4, 2)]


def bare(family: str = "llama", **options: Any) -> Any:
    config = LoRASBConfig(**{"r": 4, "target_modules": "all-linear", **options})
    return peft.get_peft_model(tiny(family, **SIZES), config).eval()


def ready(family: str = "llama", **options: Any) -> Any:
    model = bare(family, **options)
    initialize_lora_sb(model, BATCHES, **START)
    return model


def shaken(model: Any, seed: int = 1) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=batch()["input_ids"]).logits


def layers(model: nn.Module) -> dict[str, LatentLinear]:
    return {m.key: m for m in model.modules() if isinstance(m, LatentLinear)}


def load(folder: Path, family: str = "llama", **options: Any) -> Any:
    return peft.PeftModel.from_pretrained(tiny(family, **SIZES), str(folder), **options).eval()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("passes", [1, 3])
def test_the_start_is_the_first_step_of_full_fine_tuning(family: str, passes: int) -> None:
    plain = tiny(family, **SIZES)
    (sum(plain(**b).loss / 4 for b in BATCHES)).backward()
    model = bare(family)
    before = {n: p.clone() for n, p in model.named_parameters() if "base_layer" in n or "lorasb" not in n}
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    start = initialize_lora_sb(model, BATCHES, passes=passes, **START)
    assert start.eta == pytest.approx(1e-2 / 2)
    assert not start.without_gradient
    assert [n for n, p in model.named_parameters() if p.requires_grad] == trained
    assert all("lorasb_R" in n for n in trained)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    for name, layer in linear_layers(plain).items():
        if "lm_head" in name:
            continue
        G = layer.weight.grad.T if family == "gpt2" else layer.weight.grad
        A, B, R = update_factors(first_update(G, start.eta), 4)
        found = layers(model)[name]
        torch.testing.assert_close(found.delta("default").detach(), B @ R @ A, rtol=1e-4, atol=1e-6)
        share = 1 - float(((first_update(G, start.eta) - B @ R @ A) ** 2).sum() / (start.eta**2 * G.numel()))
        assert start.captured[name] == pytest.approx(share, abs=1e-4)


def test_the_loss_after_the_start_lies_between_the_base_and_the_full_step() -> None:
    rows = BATCHES[0]
    model = ready()
    with torch.no_grad():
        start = float(model(**rows).loss)
        with model.disable_adapter():
            base = float(model(**rows).loss)
    full = tiny("llama", **SIZES)
    (sum(full(**b).loss / 4 for b in BATCHES)).backward()
    with torch.no_grad():
        for name, layer in linear_layers(full).items():
            if "lm_head" not in name:
                layer.weight += first_update(layer.weight.grad, 5e-3)
        assert float(full(**rows).loss) < start < base


@pytest.mark.parametrize("alpha", [1.0, 8.0])
def test_the_start_does_not_depend_on_the_scale(alpha: float) -> None:
    torch.testing.assert_close(logits(ready(lora_alpha=alpha)), logits(ready()), rtol=1e-4, atol=1e-6)


def test_an_adapter_without_factors_raises_but_its_base_works(tmp_path: Path) -> None:
    model = bare()
    with pytest.raises(ModelError, match=r"no factors yet at .*q_proj.*initialize_lora_sb\(model, dataloader"):
        model(**BATCHES[0])
    with pytest.raises(ModelError, match="no factors yet"):
        copy.deepcopy(model).merge_and_unload()
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tiny("llama", **SIZES)))
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no factors yet"):
        logits(load(tmp_path))
    ready().save_pretrained(tmp_path)
    peft.set_peft_model_state_dict(model, load_file(tmp_path / "adapter_model.safetensors"))
    assert torch.equal(logits(model), logits(ready()))
    with pytest.raises(ModelError, match="set_lora_sb_factors"):
        logits(bare(init="given"))


def test_the_global_generator_is_untouched() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    model = bare(parity=True)
    peft.get_peft_model(tiny("llama", **SIZES), LoRAXSConfig(r=4, target_modules=["q_proj"]))
    torch.manual_seed(1)
    initialize_lora_sb(model, BATCHES, **START)
    assert torch.equal(torch.rand(3), expected)


def test_bad_calls_are_told() -> None:
    model = bare()
    with pytest.raises(MethodError, match="lr = None, num_training_steps = 2: the size of the first step"):
        initialize_lora_sb(model, BATCHES)
    with pytest.raises(MethodError, match="num_training_steps = None"):
        initialize_lora_sb(model, iter(BATCHES), lr=1.0)
    with pytest.raises(MethodError, match=r"num_training_steps = 0, warmup_ratio = 0.02"):
        initialize_lora_sb(model, BATCHES, lr=1.0, num_training_steps=0)
    with pytest.raises(MethodError, match="learning rate of -1"):
        initialize_lora_sb(model, BATCHES, eta=-1.0)
    with pytest.raises(MethodError, match="num_samples = 9, but the batches hold 8"):
        initialize_lora_sb(model, BATCHES, num_samples=9, **START)
    with pytest.raises(MethodError, match="num_samples counts rows of a loader"):
        initialize_lora_sb(model, lambda: None, num_samples=9, **START)
    with pytest.raises(MethodError, match="the gradient is 0 at every layer"):
        initialize_lora_sb(model, [{**BATCHES[0], "labels": torch.full((4, 12), -100)}], **START)
    with pytest.raises(ModelError, match="a LlamaForCausalLM is no PeftModel"):
        initialize_lora_sb(tiny("llama", **SIZES), BATCHES, **START)
    lora = peft.get_peft_model(tiny("llama", **SIZES), peft.LoraConfig(r=2))
    with pytest.raises(ModelError, match="no LoRA-SB or LoRA-XS adapter 'default'"):
        initialize_lora_sb(lora, BATCHES, **START)
    with pytest.raises(ModelError, match="adapter 'other'; it has default"):
        initialize_lora_sb(model, BATCHES, adapter_name="other", **START)
    with pytest.raises(MethodError, match=r"init = 'given', not 'sb'\. Set its factors with set_lora_sb_factors"):
        initialize_lora_sb(bare(init="given"), BATCHES, **START)
    merged = ready()
    merged.merge_adapter()
    with pytest.raises(ModelError, match="merged into its weight"):
        initialize_lora_sb(merged, BATCHES, **START)
    quantised = bare()
    layers(quantised)["model.layers.0.mlp.up_proj"].quantization_backend = object()
    with pytest.raises(
        ModelError, match=r"up_proj is quantised .*has no gradient\. Initialise on the model in bfloat16"
    ):
        initialize_lora_sb(quantised, BATCHES, **START)
    with pytest.raises(MethodError, match="so r is at most 16, not 20"):
        bare(r=20)


def test_tied_weights_are_refused() -> None:
    model = tiny("llama", **SIZES)
    model.lm_head.weight = model.model.embed_tokens.weight
    with pytest.raises(ModelError, match=r"weight of lm_head is also that of model.embed_tokens"):
        peft.get_peft_model(model, LoRASBConfig(r=4, target_modules=["lm_head"]))


@pytest.mark.parametrize("options", [{"warmup_ratio": 0.0}, {"lr": 0.0}])
def test_without_a_first_step_r_is_0(options: dict[str, float]) -> None:
    for parity in (False, True):
        model = bare(parity=parity)
        with pytest.warns(GnomonWarning, match="learning rate of 0"):
            initialize_lora_sb(model, BATCHES, **{**START, **options})
        assert torch.equal(logits(model), logits(tiny("llama", **SIZES)))
        assert lora_sb_factors(model)["model.layers.0.mlp.up_proj"].A.norm() == pytest.approx(2.0, rel=0.02)


class Half(nn.Module):
    """Two layers of which one is not used, as an expert without rows."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(6, 5), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


@pytest.mark.parametrize("save_factors", [True, "seeded-sketch"])
def test_a_layer_that_no_gradient_reaches(save_factors: Any) -> None:
    base = Half()
    weight = base.idle.weight.detach().clone()
    model = peft.get_peft_model(base, LoRASBConfig(r=2, target_modules=["used", "idle"], save_factors=save_factors))
    rows = [{"x": torch.randn(3, 6, generator=torch.Generator().manual_seed(0))}]
    with pytest.warns(GnomonWarning, match=r"no gradient reached 1 of 2 layers \(idle\)"):
        start = initialize_lora_sb(model, rows, loss=lambda m, b: m(**b).square().mean(), eta=1.0)
    assert start.without_gradient == ("idle",)
    A, B, R = lora_sb_factors(model)["idle"]
    assert not R.any()
    torch.testing.assert_close(A @ A.T, torch.eye(2))
    torch.testing.assert_close(B.T @ B, torch.eye(2))
    if save_factors is True:
        torch.testing.assert_close((B.T @ weight @ A.T).diag(), torch.linalg.svdvals(weight)[:2])


@pytest.mark.parametrize("save_factors", [True, "bf16", "seeded-sketch", False])
def test_what_is_saved(save_factors: Any, tmp_path: Path) -> None:
    model = shaken(ready(save_factors=save_factors, **({"sketch_size": 8} if save_factors == "seeded-sketch" else {})))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    sizes = {True: 4 * 4 * 32, "bf16": 2 * 4 * 32, "seeded-sketch": 4 * 2 * 8 * 4, False: 0}
    stored = sum(t.numel() * t.element_size() for name, t in tensors.items() if "layers.0.self_attn.q_proj" in name)
    assert stored == 4 * 16 + sizes[save_factors]
    torch.manual_seed(99)  # a reader's random state must not matter
    if save_factors is not False:
        assert torch.equal(logits(load(tmp_path)), logits(model))
        return
    again = load(tmp_path)
    with pytest.raises(ModelError, match="keep_latent=True keeps what was trained"):
        logits(again)
    initialize_lora_sb(again, BATCHES, keep_latent=True, **START)
    assert torch.equal(logits(again), logits(model))
    assert not any(p.requires_grad for p in again.parameters())
    third = load(tmp_path)
    set_lora_sb_factors(third, lora_sb_factors(model), keep_latent=True)
    assert torch.equal(logits(third), logits(model))


def test_xs_factors_are_computed_again_and_compared(tmp_path: Path) -> None:
    model = shaken(peft.get_peft_model(tiny("llama", **SIZES), LoRAXSConfig(r=4, target_modules="all-linear")))
    model.save_pretrained(tmp_path)
    assert sum(t.numel() for t in load_file(tmp_path / "adapter_model.safetensors").values()) == 14 * 16 + 14
    for low in (False, True):
        assert torch.equal(logits(load(tmp_path, low_cpu_mem_usage=low)), logits(model.eval()))
    other = tiny("llama", **SIZES, seed=5)
    with pytest.raises(MethodError, match=r"come out otherwise here .* the base model is another one"):
        peft.PeftModel.from_pretrained(other, str(tmp_path))
    layer = layers(model)["model.layers.0.mlp.up_proj"]
    A, B, _ = layer.tensors("default")
    U, S, Vh = torch.linalg.svd(layer.get_base_weight())
    torch.testing.assert_close(B @ A, (U[:, :4] * S[:4]) @ Vh[:4], rtol=1e-4, atol=1e-6)
    model.merge_adapter()
    with pytest.raises(ModelError, match="merged into its weight, which would change the factors"):
        model.add_adapter("second", LoRAXSConfig(r=4, target_modules="all-linear"))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_export_is_a_plain_lora_without_gnomon(family: str, tmp_path: Path) -> None:
    model = shaken(ready(family, lora_alpha=6.0, modules_to_save=["lm_head"]))
    config, state = lora_sb_as_lora(model)
    key = next(iter(layers(model)))
    A, B, R = lora_sb_factors(model)[key]
    assert config.lora_alpha / config.r == 1.5
    assert torch.equal(state[f"base_model.model.{key}.lora_A.weight"], A)
    assert torch.equal(state[f"base_model.model.{key}.lora_B.weight"], B @ R)
    save_lora_sb_as_lora(tmp_path / "lora", model)
    torch.testing.assert_close(logits(load(tmp_path / "lora", family)), logits(model), rtol=1e-4, atol=1e-5)
    tiny(family, **SIZES).save_pretrained(tmp_path / "base")
    torch.save((batch()["input_ids"], logits(model)), tmp_path / "expected.pt")
    code = (
        "import sys, torch, peft, transformers\n"
        "base = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1] + '/base')\n"
        "model = peft.PeftModel.from_pretrained(base, sys.argv[1] + '/lora').eval()\n"
        "ids, expected = torch.load(sys.argv[1] + '/expected.pt')\n"
        "assert 'gnomon' not in sys.modules\n"
        "torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=100)
    (tmp_path / "file").write_text("")
    with pytest.raises(MethodError, match="is a file"):
        save_lora_sb_as_lora(tmp_path / "file", model)


def test_the_mean_of_r_is_the_mean_of_the_changes() -> None:
    first = ready()
    clients = [shaken(copy.deepcopy(first), seed) for seed in (1, 2, 3)]
    mean = {
        key: (f.A, f.B, sum(lora_sb_factors(c)[key].R for c in clients) / 3)
        for key, f in lora_sb_factors(first).items()
    }
    set_lora_sb_factors(first, mean)
    for key, layer in layers(first).items():
        expected = sum(layers(c)[key].delta("default") for c in clients) / 3
        torch.testing.assert_close(layer.delta("default"), expected, rtol=1e-4, atol=1e-6)


def test_factors_by_hand_that_are_refused() -> None:
    model = bare(init="given", target_modules=["q_proj"])
    good = {key: (torch.eye(16)[:4], torch.eye(16)[:, :4], torch.eye(4)) for key in layers(model)}
    set_lora_sb_factors(model, good)
    assert torch.equal(next(iter(layers(model).values())).delta("default"), torch.diag((torch.arange(16) < 4).float()))
    with pytest.raises(MethodError, match="there is no adapted layer 'q_prj'"):
        set_lora_sb_factors(model, {**good, "q_prj": good[next(iter(good))]})
    with pytest.raises(MethodError, match="and 0 further layers are missing"):
        set_lora_sb_factors(model, dict(list(good.items())[:1]))
    sketched = bare(save_factors="seeded-sketch", target_modules=["q_proj"], sketch_size=4)
    with pytest.raises(MethodError, match="do not lie in the sketch of seed 0"):
        set_lora_sb_factors(sketched, good)


def test_recipes_calls() -> None:
    many = [batch(2, seed) for seed in range(3)]
    model = apply_lora_sb(tiny("llama", **SIZES), many, 1e-2, 100, r=4, target_modules="all-linear")
    first = bare()
    initialize_lora_sb(first, many[:1], **START)  # a thousandth of three batches is one
    assert torch.equal(logits(model.eval()), logits(first))
    chosen = apply_lora_sb(tiny("llama", **SIZES), many, 1e-2, 100, r=4, num_samples=5, target_modules="all-linear")
    initialize_lora_sb(first, many, num_samples=5, **START)
    assert torch.equal(logits(chosen.eval()), logits(first))
    xs = apply_lora_xs(tiny("llama", **SIZES), r=4, target_modules="all-linear")
    assert xs.peft_config["default"].peft_type.value == "LORA_XS"


def test_a_training_step_keeps_no_input() -> None:
    base = nn.Linear(64, 32)
    layer = layers(peft.get_peft_model(nn.Sequential(base), LoRAXSConfig(r=4, target_modules=["0"])))["0"]
    kept: list[Tensor] = []
    x = torch.randn(10, 64, generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    assert not any(t.data_ptr() == x.data_ptr() for t in kept)
    assert any(t.shape == (10, 4) for t in kept)
