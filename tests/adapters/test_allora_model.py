"""ALLoRA on whole models: the layer's gradients, the plain LoRA it is saved as, reloads, several adapters, refusals."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from gnomon.adapters import ALLoRAConfig, ALLoRALinear, ALLoRAVariant, apply_allora, row_scales, train_as_allora
from gnomon.common.lora import lora_pairs
from gnomon.common.models import tiny
from gnomon.errors import ConfigError, MethodError, ModelError, NoEffectWarning

SIZES = {"vocab_size": 64, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "max_positions": 32}
EVERYWHERE: dict[str, Any] = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def ids(rows: int = 2, seed: int = 9) -> Tensor:
    return torch.randint(1, 64, (rows, 12), generator=torch.Generator().manual_seed(seed))


def base(family: str = "llama") -> Any:
    return tiny(family, **SIZES)


def attached(config: peft.LoraConfig, family: str = "llama", seed: int = 0) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return peft.get_peft_model(base(family), config)


def shake(model: Any, seed: int = 1) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return model


def pair(family: str = "llama", eta: float = 2.0, **options: Any) -> tuple[Any, Any]:
    """ALLoRA and LoRA of scale 1 with the same factors."""
    ours = shake(attached(ALLoRAConfig(r=3, eta=eta, **EVERYWHERE, **options), family))
    plain = shake(attached(peft.LoraConfig(r=3, lora_alpha=3, fan_in_fan_out=family == "gpt2", **EVERYWHERE), family))
    return ours, plain


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids()).logits


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    model(input_ids=ids(), labels=ids(), use_cache=False).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_only_the_gradients_differ_from_lora_and_by_the_scales(family: str) -> None:
    """B's rows differ by s exactly, in every layer: what reaches a layer from above is as in LoRA."""
    ours, plain = pair(family)
    assert torch.equal(logits(ours), logits(plain))
    mine, theirs = gradients(ours), gradients(plain)
    assert mine.keys() == theirs.keys()
    for p in lora_pairs(ours):
        name = f"{p.name}.lora_B.default.weight"
        scales = row_scales(p.b, p.a, 2.0)
        torch.testing.assert_close(mine[name], scales[:, None] * theirs[name], rtol=1e-5, atol=1e-8)
        assert not torch.allclose(mine[name.replace("_B", "_A")], theirs[name.replace("_B", "_A")], rtol=0.05)


def test_the_first_step_is_that_of_lora_with_the_scale_eta() -> None:
    """B = 0: LoRA with lora_alpha = eta r has eta times the gradient at B, and so has ALLoRA."""
    ours = attached(ALLoRAConfig(r=4, eta=2.0, **EVERYWHERE))
    scaled = attached(peft.LoraConfig(r=4, lora_alpha=8, **EVERYWHERE))
    mine, theirs = gradients(ours), gradients(scaled)
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-5, atol=1e-9)
        assert ("lora_A" in name) == (mine[name].abs().max() == 0)


def test_adam_cancels_the_rule_at_the_first_step() -> None:
    """From B = 0 a factor of the gradient leaves Adam's step as it is, so gradient mode equals LoRA of scale 1."""
    models = [
        attached(c)
        for c in (ALLoRAConfig(r=4, eta=4.0, **EVERYWHERE), peft.LoraConfig(r=4, lora_alpha=4, **EVERYWHERE))
    ]
    for model in models:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, eps=1e-12)
        gradients(model)
        optimizer.step()
    for (name, a), (_, b) in zip(models[0].named_parameters(), models[1].named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)
    sgd = [
        attached(c)
        for c in (ALLoRAConfig(r=4, eta=4.0, **EVERYWHERE), peft.LoraConfig(r=4, lora_alpha=4, **EVERYWHERE))
    ]
    for model in sgd:
        gradients(model)
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    for p, q in zip(lora_pairs(sgd[0]), lora_pairs(sgd[1]), strict=True):
        torch.testing.assert_close(p.b, 4 * q.b, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize(("family", "apply"), [("llama", "gradient"), ("gpt2", "update")])
def test_the_folder_is_a_plain_lora_and_loads_without_gnomon(family: str, apply: str, tmp_path: Path) -> None:
    model = shake(attached(ALLoRAConfig(r=3, apply=apply, **EVERYWHERE), family)).eval()
    model.save_pretrained(tmp_path / "adapter")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["peft_type"] == "LORA"
    assert settings["r"] == settings["lora_alpha"] == 3
    assert not {"eta", "apply"} & settings.keys()
    plain = base(family)
    plain.save_pretrained(tmp_path / "base")
    torch.save({"ids": ids(), "logits": logits(model)}, tmp_path / "expected.pt")
    code = (
        "import sys, warnings, torch\n"
        f"torch.set_num_threads({torch.get_num_threads()})\n"
        "import peft, transformers\n"
        "warnings.simplefilter('error')\n"
        "warnings.simplefilter('ignore', FutureWarning)\n"
        f"base = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / 'base')!r})\n"
        f"model = peft.PeftModel.from_pretrained(base, {str(tmp_path / 'adapter')!r}).eval()\n"
        f"expected = torch.load({str(tmp_path / 'expected.pt')!r})\n"
        "assert 'gnomon' not in sys.modules\n"
        "assert type(model.peft_config['default']) is peft.LoraConfig\n"
        "assert torch.equal(model(input_ids=expected['ids']).logits, expected['logits'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("way", ["config", "function"])
def test_a_folder_is_trained_further_by_the_rule(family: str, way: str, tmp_path: Path) -> None:
    model = shake(attached(ALLoRAConfig(r=3, eta=3.0, **EVERYWHERE), family))
    expected = gradients(model)
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, at names that PEFT asks for
        if way == "config":
            config = ALLoRAConfig.from_pretrained(str(tmp_path), eta=3.0)
            again = peft.PeftModel.from_pretrained(base(family), str(tmp_path), config=config, is_trainable=True)
        else:
            again = peft.PeftModel.from_pretrained(base(family), str(tmp_path), is_trainable=True)
            train_as_allora(again, eta=3.0)
    found = gradients(again.train())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    again.save_pretrained(tmp_path / "again")
    first, second = (json.loads((f / "adapter_config.json").read_text()) for f in (tmp_path, tmp_path / "again"))
    for settings in (first, second):
        settings["target_modules"].sort()
    assert {**second, "inference_mode": True} == {**first, "inference_mode": True}


def test_each_of_several_active_adapters_has_its_own_scales(tmp_path: Path) -> None:
    model = attached(ALLoRAConfig(r=3, eta=0.5, **EVERYWHERE))
    model.add_adapter("second", ALLoRAConfig(r=2, eta=4.0, **EVERYWHERE))
    model.add_adapter("third", peft.LoraConfig(r=2, lora_alpha=2, **EVERYWHERE))
    model.base_model.set_adapter(["default", "second", "third"])
    model.double()  # sums over tokens round otherwise in another order
    found = gradients(shake(model))
    plain = copy.deepcopy(model)
    for module in plain.modules():
        if isinstance(module, ALLoRALinear):
            module.lora_variant.clear()
    expected = gradients(plain)
    for name, eta in (("default", 0.5), ("second", 4.0)):
        for p in lora_pairs(model, name):
            key = f"{p.name}.lora_B.{name}.weight"
            scales = row_scales(p.b, p.a, eta)[:, None]
            torch.testing.assert_close(found[key], scales * expected[key], rtol=1e-10, atol=1e-14)
    for name in (n for n in found if ".third." in n):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-10, atol=1e-14)


def test_peft_s_other_ways_with_adapters() -> None:
    model = shake(attached(ALLoRAConfig(r=3, rank_pattern={"k_proj": 2}, **EVERYWHERE)))
    assert {p.scaling for p in lora_pairs(model)} == {1.0}
    assert {p.a.shape[0] for p in lora_pairs(model)} == {2, 3}
    model.add_adapter("second", ALLoRAConfig(r=2, eta=7.0, **EVERYWHERE))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "mixed", combination_type="cat")
    assert isinstance(model.peft_config["mixed"], ALLoRAConfig)
    assert model.peft_config["mixed"].lora_alpha == model.peft_config["mixed"].r
    model.delete_adapter("second")
    assert all("second" not in m.lora_variant for m in model.modules() if isinstance(m, ALLoRALinear))
    layer = next(m for m in model.modules() if isinstance(m, ALLoRALinear))
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0))
    plain, delta = layer.base_layer(x), x @ layer.get_delta_weight("default").T
    layer.scale_layer(0.5)  # PEFT's own way of weakening an adapter at inference
    torch.testing.assert_close(layer(x), plain + 0.5 * delta)
    layer.unscale_layer()
    torch.testing.assert_close(layer(x), plain + delta)
    mixed = model.eval()(input_ids=ids(3), adapter_names=["default", "__base__", "default"]).logits
    torch.testing.assert_close(mixed[0], model(input_ids=ids(3)).logits[0])


def test_a_stock_lora_layer_takes_the_rule_by_function_only() -> None:
    model = shake(attached(peft.LoraConfig(r=3, lora_alpha=3, **EVERYWHERE)))
    with pytest.raises(ValueError, match=r"variant combination: \('eta',\)"):
        model.add_adapter("second", ALLoRAConfig(r=2, **EVERYWHERE))
    model.add_adapter("third", peft.LoraConfig(r=2, lora_alpha=2, **EVERYWHERE))
    train_as_allora(model, eta=2.0, adapter="default")
    train_as_allora(model, eta=5.0, adapter="default")  # the last one counts
    variants = [m.lora_variant for m in model.modules() if isinstance(m, peft.tuners.lora.Linear)]
    assert len(variants) == 14
    assert {name for v in variants for name in v} == {"default"}
    assert {v["default"].eta for v in variants} == {5.0}
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-5)


LORAS: list[tuple[dict[str, Any], str]] = [
    ({"lora_alpha": 6}, r"q_proj: the adapter 'default' has the forward scale 2, and ALLoRA has none"),
    ({"lora_dropout": 0.1}, "has dropout, and ALLoRA has none. Set lora_dropout=0"),
    ({"use_dora": True}, r"is a LoRA variant of its own \(DoraLinearVariant\)"),
]


@pytest.mark.parametrize(("options", "message"), LORAS)
def test_a_lora_that_has_what_the_method_removes(options: dict[str, Any], message: str) -> None:
    model = attached(peft.LoraConfig(**{"r": 3, "lora_alpha": 3, **EVERYWHERE, **options}))
    with pytest.raises(MethodError, match=message):
        train_as_allora(model)
    assert not any(
        isinstance(v, ALLoRAVariant) for m in model.modules() for v in getattr(m, "lora_variant", {}).values()
    )


def test_messages_of_the_functions(tmp_path: Path) -> None:
    model = attached(peft.LoraConfig(r=3, lora_alpha=3, lora_bias=True, target_modules=["q_proj"]), "qwen")
    with pytest.raises(MethodError, match="has a bias, for which ALLoRA has no rule"):
        train_as_allora(model)
    with pytest.raises(MethodError, match="eta = -1"):
        train_as_allora(model, eta=-1)
    with pytest.raises(MethodError, match="apply = 'x'"):
        train_as_allora(model, apply="x")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="no LoRA at a linear layer"):
        train_as_allora(base())
    frozen = attached(peft.LoraConfig(r=3, lora_alpha=3, **EVERYWHERE))
    frozen.requires_grad_(False)
    with pytest.warns(NoEffectWarning, match="'default' is frozen.*is_trainable=True"):
        train_as_allora(frozen)
    peft.get_peft_model(base(), peft.VeraConfig(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path / "vera")
    with pytest.raises(ConfigError, match="adapter of the type VERA"):
        ALLoRAConfig.from_pretrained(str(tmp_path / "vera"))
    attached(peft.LoraConfig(r=3, lora_alpha=6)).save_pretrained(tmp_path / "scaled")
    with pytest.raises(MethodError, match="lora_alpha = 6 with r = 3"):
        ALLoRAConfig.from_pretrained(str(tmp_path / "scaled"))


def test_what_cannot_be_adapted_is_refused() -> None:
    attention = nn.Sequential(nn.MultiheadAttention(8, 2))
    with pytest.raises(ModelError, match=r"0\.out_proj belongs to an nn\.MultiheadAttention"):
        peft.get_peft_model(attention, ALLoRAConfig(r=2, target_modules=["out_proj"]))
    with pytest.raises(ModelError, match="0 is a MultiheadAttention"):
        peft.get_peft_model(nn.Sequential(nn.MultiheadAttention(8, 2)), ALLoRAConfig(r=2, target_modules=["0"]))
    with pytest.raises(ModelError, match=r"lm_head is a Embedding|embed_tokens is a Embedding"):
        peft.get_peft_model(base(), ALLoRAConfig(r=2, target_modules=["embed_tokens"]))


def test_numbers_that_are_not_finite_are_named_when_anomalies_are_looked_for() -> None:
    model = attached(ALLoRAConfig(r=3, **EVERYWHERE))
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "k_proj.lora_B" in n).fill_(float("nan"))
    model(input_ids=ids())
    with (
        torch.autograd.set_detect_anomaly(True),
        pytest.raises(MethodError, match=r"layers\.0\.self_attn\.k_proj: B not finite\. The training has diverged"),
    ):
        model(input_ids=ids())


def test_apply_allora_draws_from_its_seed_and_leaves_the_global_state() -> None:
    state = torch.get_rng_state()
    models = [apply_allora(base(), r=3, eta=3.0, seed=seed, target_modules="all-linear") for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    drawn = [lora_pairs(m)[0].a for m in models]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    bound = 1 / SIZES["hidden_size"] ** 0.5  # kaiming uniform with a = sqrt 5
    assert 0.5 * bound < drawn[0].abs().max() <= bound
    assert models[0].peft_config["default"].eta == 3.0
    assert apply_allora(base(), apply="update").peft_config["default"].apply == "update"


@pytest.mark.parametrize("width", [8, 4])
def test_quantised_base_layers(width: int) -> None:
    bnb = pytest.importorskip("bitsandbytes")

    def made() -> nn.Module:
        options = {"has_fp16_weights": False} if width == 8 else {"compute_dtype": torch.float32}
        layer = {8: bnb.nn.Linear8bitLt, 4: bnb.nn.Linear4bit}[width](64, 64, **options)
        weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
        layer.load_state_dict({"weight": weight, "bias": torch.zeros(64)})
        return nn.Sequential(layer).to("cpu")

    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    try:
        expected = made()(x)
    except Exception as error:
        pytest.skip(f"bitsandbytes does not run {width}-bit layers here: {error}")
    model = peft.get_peft_model(made(), ALLoRAConfig(r=4, eta=3.0, target_modules=["0"]))
    assert type(model.base_model.model[0]).__name__ == ("ALLoRALinear8bitLt" if width == 8 else "ALLoRALinear4bit")
    assert torch.allclose(model(x), expected, atol=1e-5)
    model.add_adapter("second", ALLoRAConfig(r=2, eta=1.0, target_modules=["0"]))
    for name in ("default", "second"):
        model.set_adapter(name)
        (p,) = lora_pairs(shake(model))
        model.zero_grad()
        y = model(x)
        assert torch.allclose(y, expected + x @ p.delta().T, atol=1e-3)
        y.sum().backward()
        G = torch.ones(3, 64).T @ x
        scales = row_scales(p.b, p.a, 3.0 if name == "default" else 1.0)[:, None]
        torch.testing.assert_close(p.b.grad, (scales * G) @ p.a.T, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(p.a.grad, p.b.T @ (scales * G), rtol=1e-4, atol=1e-4)
    stock = peft.get_peft_model(made(), peft.LoraConfig(r=4, lora_alpha=4, target_modules=["0"]))
    train_as_allora(stock, eta=2.0)
    assert "ALLoRAVariant" in {
        type(v).__name__ for m in stock.modules() for v in getattr(m, "lora_variant", {}).values()
    }
