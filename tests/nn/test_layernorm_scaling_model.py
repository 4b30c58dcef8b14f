"""LayerNorm scaling among the tools models are used with: saving, generation, checkpointing, compile, LoRA, Trainer."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import peft
import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, Trainer, TrainingArguments

import gnomon
from gnomon.common import surgery
from gnomon.common.depth import residual_variance
from gnomon.common.models import tiny
from gnomon.errors import MethodError, ModelError
from gnomon.nn import (
    LNSLlamaConfig,
    LNSLlamaForCausalLM,
    LNSLlamaModel,
    ResidualStreamMonitor,
    apply_layer_scale,
    apply_layernorm_scaling,
    depth_scales,
    fold_layernorm_scaling,
)

IDS = torch.randint(1, 256, (2, 12), generator=torch.Generator().manual_seed(3))
SIZES = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
}
GAINS = torch.Generator().manual_seed(1)


def trained(model):
    """Give every gain a random value, so that a lost scale shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=GAINS))
    return model.eval()


@pytest.fixture
def scaled():
    return trained(apply_layernorm_scaling(tiny("llama")))


def grads(model) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("position", ["norm", "residual"])
def test_saved_and_loaded_it_is_the_same_model(tmp_path, position: str) -> None:
    model = trained(apply_layernorm_scaling(tiny("qwen"), position=position))
    gnomon.save_model(model, tmp_path / "m")
    loaded = gnomon.load_model(tmp_path / "m")
    assert surgery.recorded(loaded) == [
        {"slug": "layernorm-scaling", "options": {"position": position, "kind": "depth", "blocks": 4}}
    ]
    assert depth_scales(loaded) == depth_scales(model)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert loaded.model.embed_tokens.weight.device.type == "cpu"
    gnomon.save_model(loaded, tmp_path / "again")
    assert torch.equal(gnomon.load_model(tmp_path / "again")(IDS).logits, model(IDS).logits)


def test_a_learned_factor_is_saved_and_loaded(tmp_path) -> None:
    model = trained(apply_layer_scale(tiny("llama"), init=0.5))
    gnomon.save_model(model, tmp_path / "m")
    loaded = gnomon.load_model(tmp_path / "m")
    assert surgery.recorded(loaded)[0]["options"]["kind"] == "layer_scale"
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_a_folded_model_loads_with_plain_transformers(tmp_path, scaled) -> None:
    logits = scaled(IDS).logits
    folded = fold_layernorm_scaling(scaled)
    folded.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is transformers.LlamaForCausalLM
    assert not hasattr(loaded.config, "gnomon")
    assert float((loaded(IDS).logits - logits).detach().abs().max()) < 1e-5


def test_a_model_with_other_blocks_than_the_record_is_not_loaded(tmp_path, scaled) -> None:
    del scaled.model.layers[2]
    scaled.config.num_hidden_layers = 3
    gnomon.save_model(scaled, tmp_path / "m")
    with pytest.raises(ModelError, match=r"made for 4 blocks, but this 'llama' model has 3"):
        gnomon.load_model(tmp_path / "m")


def test_generation_with_cache_equals_the_full_forward(scaled) -> None:
    prompt = IDS[:, :5]
    tokens = scaled.generate(
        prompt, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    full = scaled(tokens.sequences, use_cache=False).logits
    for step, logits in enumerate(tokens.logits):
        torch.testing.assert_close(logits, full[:, 4 + step], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("position", ["norm", "residual", "branch"])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
def test_gradient_checkpointing_gives_the_same_gradients(position: str) -> None:
    model = trained(apply_layernorm_scaling(tiny("llama"), position=position)).train()
    plain = grads(model)
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        assert all(torch.equal(a, b) for a, b in zip(grads(model).values(), plain.values(), strict=True))


def test_bfloat16_autocast_and_bfloat16_weights(scaled) -> None:
    exact = scaled(IDS).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = scaled(IDS).logits
    torch.testing.assert_close(autocast.float(), exact, atol=0.03, rtol=0.1)
    half = copy.deepcopy(scaled).bfloat16()
    logits = half(IDS).logits
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), exact, atol=0.03, rtol=0.1)
    half(input_ids=IDS, labels=IDS).loss.backward()
    assert half.model.layers[3].input_layernorm.weight.grad.dtype == torch.bfloat16


def test_the_factor_is_not_rounded_to_the_activations_dtype() -> None:
    model = apply_layernorm_scaling(tiny("llama", num_layers=3)).bfloat16()
    norm = model.model.layers[2].input_layernorm
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = (norm.forward(x).float() * 3**-0.5).bfloat16()
    assert torch.equal(norm(x), expected)


def test_deepcopy_and_pickle_keep_the_scales(scaled) -> None:
    logits = scaled(IDS).logits
    for twin in (copy.deepcopy(scaled), pickle.loads(pickle.dumps(scaled))):
        assert depth_scales(twin) == depth_scales(scaled)
        assert torch.equal(twin(IDS).logits, logits)
        fold_layernorm_scaling(twin)
    assert len(depth_scales(scaled)) == 8, "folding a copy leaves the model alone"
    assert torch.equal(scaled(IDS).logits, logits)


@pytest.mark.slow
def test_torch_compile_traces_the_whole_model(scaled) -> None:
    compiled = torch.compile(scaled, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(IDS, use_cache=False).logits, scaled(IDS, use_cache=False).logits)
    compiled(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    ours = {n: p.grad.clone() for n, p in scaled.named_parameters()}
    for name, grad in grads(scaled).items():
        torch.testing.assert_close(ours[name], grad, atol=1e-6, rtol=1e-4)
    assert depth_scales(compiled) == depth_scales(scaled)


def test_lora_sees_scaled_inputs_and_the_model_still_folds(tmp_path, scaled) -> None:
    lora = peft.get_peft_model(
        scaled, peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    )
    lora.eval()
    seen: list[torch.Tensor] = []
    adapter = scaled.model.layers[3].mlp.up_proj.lora_A["default"]
    adapter.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    given: list[torch.Tensor] = []
    norm = scaled.model.layers[3].post_attention_layernorm
    norm.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    logits = lora(IDS).logits
    torch.testing.assert_close(seen[0], norm.forward(given[0]) / 2)
    gnomon.save_model(lora, tmp_path / "m")
    torch.testing.assert_close(gnomon.load_model(tmp_path / "m")(IDS).logits, logits)
    folded = fold_layernorm_scaling(copy.deepcopy(lora))
    torch.testing.assert_close(folded(IDS).logits, logits, atol=1e-5, rtol=1e-5)
    with pytest.raises(ModelError, match="already"):
        apply_layernorm_scaling(lora)


def test_applied_below_an_adapter(scaled) -> None:
    lora = peft.get_peft_model(tiny("llama"), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    assert apply_layernorm_scaling(lora) is lora
    assert len(depth_scales(lora)) == 8


class TestTheLlamaClass:
    def test_the_auto_classes_know_it(self, tmp_path) -> None:
        config = LNSLlamaConfig(**SIZES)
        model = trained(AutoModelForCausalLM.from_config(config))
        assert isinstance(model, LNSLlamaForCausalLM)
        assert isinstance(AutoModel.from_config(config), LNSLlamaModel)
        model.save_pretrained(tmp_path)
        assert AutoConfig.from_pretrained(tmp_path).model_type == "lns_llama"
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert isinstance(loaded, LNSLlamaForCausalLM)
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
        assert torch.equal(AutoModel.from_pretrained(tmp_path)(IDS)[0], model.model(IDS)[0])

    def test_it_equals_the_hooked_llama_and_folds_into_a_stock_one(self, tmp_path) -> None:
        model = trained(LNSLlamaForCausalLM(LNSLlamaConfig(**SIZES)))
        stock = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
        stock.load_state_dict(model.state_dict())
        logits = model(IDS).logits
        assert torch.equal(apply_layernorm_scaling(stock, from_scratch=True)(IDS).logits, logits)
        folded = fold_layernorm_scaling(model)
        assert type(folded) is transformers.LlamaForCausalLM
        assert type(folded.model) is transformers.LlamaModel
        assert type(folded.config) is transformers.LlamaConfig
        assert folded.model.layers[0].self_attn.config is folded.config
        torch.testing.assert_close(folded(IDS).logits, logits, atol=1e-5, rtol=1e-5)
        folded.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert type(loaded) is transformers.LlamaForCausalLM
        torch.testing.assert_close(loaded(IDS).logits, logits, atol=1e-5, rtol=1e-5)

    def test_twice_is_refused(self) -> None:
        with pytest.raises(ModelError, match=r"applied to this 'lns_llama' model already"):
            apply_layernorm_scaling(LNSLlamaForCausalLM(LNSLlamaConfig(**SIZES)))


class TestMonitor:
    DATA = torch.randint(1, 256, (24, 12), generator=torch.Generator().manual_seed(0))

    def train(self, tmp_path, monitor, model=None, **options) -> Trainer:
        args = {"output_dir": str(tmp_path), "max_steps": 6, "logging_steps": 2, "per_device_train_batch_size": 2,
                "report_to": [], "disable_tqdm": True, "use_cpu": True, "save_strategy": "no"}  # fmt: skip
        data = [{"input_ids": row, "labels": row} for row in self.DATA]
        model = model or apply_layernorm_scaling(tiny("llama"))
        trainer = Trainer(model, TrainingArguments(**(args | options)), train_dataset=data, callbacks=[monitor])
        trainer.train()
        return trainer

    def test_it_logs_the_variance_of_every_block(self, tmp_path) -> None:
        monitor = ResidualStreamMonitor(gradients=True)
        trainer = self.train(tmp_path, monitor, max_grad_norm=1e-3, gradient_accumulation_steps=2)
        assert [entry["step"] for entry in monitor.history] == [2, 4, 6]
        logged = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert len(logged) == 3
        for entry, mine in zip(logged, monitor.history, strict=True):
            for block in (1, 2, 3, 4):
                assert entry[f"residual_variance/block_{block}"] == mine[f"residual_variance/block_{block}"] > 0
            norms = [entry[f"gradient_norm/block_{block}"] for block in (1, 2, 3, 4)]
            assert sum(n**2 for n in norms) ** 0.5 <= entry["grad_norm"] * 1.001, "before clipping, blocks alone"
            assert sum(n**2 for n in norms) ** 0.5 > 0.3 * entry["grad_norm"]
        assert not any(block._forward_hooks for block in trainer.model.model.layers)

    def test_the_variance_is_that_of_the_diagnostics(self, tmp_path) -> None:
        monitor = ResidualStreamMonitor(every=1)
        model = apply_layernorm_scaling(tiny("llama"))
        self.train(tmp_path, monitor, model, max_steps=1, logging_steps=50, per_device_train_batch_size=24)
        assert len(monitor.history) == 1
        values = [monitor.history[0][f"residual_variance/block_{b}"] for b in (1, 2, 3, 4)]
        expected = residual_variance(apply_layernorm_scaling(tiny("llama")), self.DATA, batch_size=24)
        assert values == pytest.approx(expected.tolist(), rel=1e-4)

    def test_a_step_of_zero_is_refused(self) -> None:
        with pytest.raises(MethodError, match=r"every = 0. It must be at least 1 optimizer step"):
            ResidualStreamMonitor(every=0)


def test_the_own_class_loads_in_a_process_that_has_not_imported_the_method(tmp_path):
    config = apply_layernorm_scaling(tiny("llama", num_layers=2).config)
    LNSLlamaForCausalLM(config).save_pretrained(tmp_path / "m")
    code = f"import gnomon; print(type(gnomon.load_model({str(tmp_path / 'm')!r})).__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "LNSLlamaForCausalLM", done.stderr
