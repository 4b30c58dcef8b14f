"""Norm placements among the tools models are used with: saving, generation, checkpointing, compile, Auto classes."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import peft
import pytest
import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, Trainer, TrainingArguments

import gnomon
from gnomon.common import surgery
from gnomon.common.depth import remove_block, skipping_block
from gnomon.common.models import tiny
from gnomon.errors import MethodError, ModelError
from gnomon.nn import (
    MixLNLlamaConfig,
    MixLNLlamaForCausalLM,
    MixLNLlamaModel,
    apply_layernorm_scaling,
    apply_norm_placement,
    block_placements,
)

IDS = torch.randint(1, 256, (2, 12), generator=torch.Generator().manual_seed(3))
SIZES = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
}
PLACEMENTS = ["mix", "pre", "post", "pre_post", "sandwich", "deepnorm"]
FAMILIES = ["llama", "qwen", "qwen3", "mistral", "gpt2"]


def shaken(model: nn.Module) -> nn.Module:
    """Give every gain a random value, so that a lost or exchanged norm shows."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def made(placement: str = "mix", architecture: str = "llama", **options) -> nn.Module:
    return shaken(apply_norm_placement(tiny(architecture, **options), placement, 0.5))


def grads(model: nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_saved_and_loaded_it_is_the_same_model(tmp_path, placement: str) -> None:
    model = made(placement)
    gnomon.save_model(model, tmp_path / "m")
    loaded = gnomon.load_model(tmp_path / "m")
    options = {"placement": placement, "layer_placements": block_placements(4, placement, 0.5)}
    options |= {"residual_scale": 8**0.25} if placement == "deepnorm" else {}
    assert surgery.recorded(loaded) == [{"slug": "mix-ln", "options": options}]
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert [type(b) for b in loaded.model.layers] == [type(b) for b in model.model.layers]
    assert loaded._no_split_modules == model._no_split_modules
    gnomon.save_model(loaded, tmp_path / "again")
    assert torch.equal(gnomon.load_model(tmp_path / "again")(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_generation_with_cache_equals_the_full_forward(architecture: str) -> None:
    model = made("mix", architecture)
    prompt = IDS[:, :5]
    tokens = model.generate(prompt, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True)
    full = model(tokens.sequences, use_cache=False).logits
    for step, logits in enumerate(tokens.logits):
        torch.testing.assert_close(logits, full[:, 4 + step], atol=1e-5, rtol=1e-4)


def test_left_padding_is_masked_in_the_batch() -> None:
    model = made()
    alone = model(IDS[:1, 4:]).logits
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :4] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    padded = model(input_ids=IDS, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(padded[:1, 4:], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("placement", ["mix", "sandwich", "deepnorm"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
def test_gradient_checkpointing_gives_the_same_gradients(architecture: str, placement: str) -> None:
    model = made(placement, architecture).train()
    plain = grads(model)
    calls: list[int] = []
    blocks = model.model.layers if architecture == "llama" else model.transformer.h
    blocks[0].mlp.register_forward_hook(lambda module, args, output: calls.append(1))
    for reentrant in (False, True):
        calls.clear()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        assert all(torch.equal(a, b) for a, b in zip(grads(model).values(), plain.values(), strict=True))
        assert len(calls) == 2, "recomputed"


@pytest.mark.parametrize("architecture", FAMILIES)
@pytest.mark.parametrize("placement", ["mix", "sandwich"])
def test_hidden_states_and_attentions_are_recorded(architecture: str, placement: str) -> None:
    model = made(placement, architecture)
    model.set_attn_implementation("eager")
    seen: list[torch.Tensor] = []
    blocks = model.transformer.h if architecture == "gpt2" else model.model.layers
    for block in blocks:
        block.register_forward_hook(lambda module, args, output: seen.append(output))
    output = model(IDS, output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 5
    assert len(output.attentions) == 4
    for recorded, state in zip(output.hidden_states[1:-1], seen[:-1], strict=True):
        assert torch.equal(recorded, state)


def test_bfloat16_autocast_and_bfloat16_weights() -> None:
    for placement in ("mix", "deepnorm", "sandwich"):
        model = made(placement)
        exact = model(IDS).logits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            autocast = model(IDS).logits
        half = copy.deepcopy(model).bfloat16()
        logits = half(IDS).logits
        assert logits.dtype == torch.bfloat16
        for found in (autocast, logits):
            torch.testing.assert_close(found.float(), exact, atol=0.03, rtol=0.1)
        half(input_ids=IDS, labels=IDS).loss.backward()
        assert all(bool(p.grad.isfinite().all()) for p in half.parameters())


def test_deepcopy_and_pickle_give_equal_independent_models() -> None:
    model = made("sandwich")
    logits = model(IDS).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [type(b) for b in twin.model.layers] == [type(b) for b in model.model.layers]
        assert torch.equal(twin(IDS).logits, logits)
        with torch.no_grad():
            twin.model.layers[0].pre_feedforward_layernorm.weight.zero_()
        assert not torch.equal(twin(IDS).logits, logits)
    assert torch.equal(model(IDS).logits, logits)


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "placement"), [("llama", "mix"), ("llama", "sandwich"), ("gpt2", "deepnorm")])
def test_torch_compile_traces_the_whole_model(architecture: str, placement: str) -> None:
    model = made(placement, architecture, num_layers=2)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found, expected = (each(IDS, use_cache=False).logits for each in (compiled, model))
    torch.testing.assert_close(found, expected)
    ours = torch.autograd.grad(found.square().mean(), list(model.parameters()))
    theirs = torch.autograd.grad(expected.square().mean(), list(model.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_below_and_above_an_adapter(tmp_path) -> None:
    lora = peft.get_peft_model(tiny("llama"), peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    lora.eval()
    assert apply_norm_placement(lora, "deepnorm") is lora
    assert type(lora.get_base_model().model.layers[0]).__name__ == "DeepNormLlamaDecoderLayer"
    model = peft.get_peft_model(made(), peft.LoraConfig(r=4, target_modules=["o_proj"], init_lora_weights=False)).eval()
    logits = model(IDS).logits
    gnomon.save_model(model, tmp_path / "m")
    torch.testing.assert_close(gnomon.load_model(tmp_path / "m")(IDS).logits, logits)
    with pytest.raises(ModelError, match="applied to this 'llama' model already"):
        apply_norm_placement(model)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_the_classes_fsdp_wraps_by_name_are_those_of_the_blocks(placement: str) -> None:
    from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    class Plugin:
        auto_wrap_policy = staticmethod(transformer_auto_wrap_policy)
        transformer_cls_names_to_wrap = None

    model = made(placement)
    assert model._no_split_modules == {type(block).__name__ for block in model.model.layers}
    assert model.model._no_split_modules == model._no_split_modules
    policy = fsdp2_prepare_auto_wrap_policy(Plugin, model)
    assert [m for m in model.modules() if policy(m)] == list(model.model.layers)


def test_the_trainer_trains_and_resumes_it(tmp_path) -> None:
    data = [{"input_ids": row, "labels": row} for row in IDS.repeat(8, 1)]
    args = {"output_dir": str(tmp_path), "per_device_train_batch_size": 4, "report_to": [], "disable_tqdm": True,
            "use_cpu": True, "save_steps": 3, "max_steps": 6, "learning_rate": 1e-3}  # fmt: skip
    trainer = Trainer(
        apply_norm_placement(tiny("llama", num_layers=2), "mix", 0.5), TrainingArguments(**args), train_dataset=data
    )
    trainer.train()
    expected = {n: p.clone() for n, p in trainer.model.state_dict().items()}
    again = Trainer(
        apply_norm_placement(tiny("llama", num_layers=2), "mix", 0.5), TrainingArguments(**args), train_dataset=data
    )
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for name, tensor in again.model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], msg=name)


@pytest.mark.parametrize("placement", ["mix", "pre_post", "deepnorm", "sandwich"])
@pytest.mark.parametrize("index", [0, 3])
def test_a_removed_block_equals_the_identity_and_is_saved_so(tmp_path, placement: str, index: int) -> None:
    model = made(placement)
    with skipping_block(model, index):
        expected = model(IDS).logits
    removed = remove_block(copy.deepcopy(model), index)
    assert torch.equal(removed(IDS).logits, expected)
    kinds = surgery.recorded(removed)[0]["options"]["layer_placements"]
    assert kinds == [k for i, k in enumerate(block_placements(4, placement, 0.5)) if i != index]
    assert surgery.recorded(model)[0]["options"]["layer_placements"] == block_placements(4, placement, 0.5)
    gnomon.save_model(removed, tmp_path / "m")
    loaded = gnomon.load_model(tmp_path / "m")
    assert torch.equal(loaded(IDS).logits, expected), "DeepNorm keeps the factor of the original depth"
    tokens = [removed.generate(IDS[:, :4], max_new_tokens=4, do_sample=False, use_cache=c) for c in (True, False)]
    assert torch.equal(*tokens)


class TestTheLlamaClass:
    @pytest.mark.parametrize("placement", PLACEMENTS)
    def test_the_auto_classes_know_it(self, tmp_path, placement: str) -> None:
        config = MixLNLlamaConfig(**SIZES, norm_placement=placement, num_post_layers=None, post_ratio=0.5)
        model = shaken(AutoModelForCausalLM.from_config(config))
        assert isinstance(model, MixLNLlamaForCausalLM)
        assert isinstance(AutoModel.from_config(config), MixLNLlamaModel)
        model.save_pretrained(tmp_path)
        assert AutoConfig.from_pretrained(tmp_path).layer_placements == block_placements(4, placement, 0.5)
        for loaded in (AutoModelForCausalLM.from_pretrained(tmp_path), gnomon.load_model(tmp_path)):
            assert isinstance(loaded, MixLNLlamaForCausalLM)
            assert torch.equal(loaded(IDS).logits, model(IDS).logits)
        assert torch.equal(AutoModel.from_pretrained(tmp_path)(IDS)[0], model.model(IDS)[0])

    @pytest.mark.parametrize("placement", PLACEMENTS)
    def test_it_equals_the_placed_llama(self, placement: str) -> None:
        config = MixLNLlamaConfig(**SIZES, norm_placement=placement)
        model = shaken(MixLNLlamaForCausalLM(config))
        stock = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
        placed = apply_norm_placement(stock, placement).eval()
        placed.load_state_dict(model.state_dict())
        assert torch.equal(placed(IDS).logits, model(IDS).logits)
        output = model(IDS, output_hidden_states=True)
        assert len(output.hidden_states) == 5
        assert model._no_split_modules == placed._no_split_modules

    def test_its_initial_weights_are_those_of_its_configuration(self) -> None:
        torch.manual_seed(0)
        config = MixLNLlamaConfig(**SIZES | {"hidden_size": 128}, embed_std=0.5, scaled_init=True)
        model = MixLNLlamaForCausalLM(config)
        assert float(model.model.embed_tokens.weight.detach().std()) == pytest.approx(0.5, rel=1e-3)
        assert float(model.model.layers[1].mlp.down_proj.weight.detach().std()) == pytest.approx(
            0.02 / 8**0.5, rel=0.05
        )
        torch.manual_seed(0)
        again = MixLNLlamaForCausalLM(config)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
        deep = MixLNLlamaForCausalLM(MixLNLlamaConfig(**SIZES, norm_placement="deepnorm"))
        expected = 32**-0.25 * (2 / (64 + 96)) ** 0.5
        assert float(deep.model.layers[0].mlp.up_proj.weight.detach().std()) == pytest.approx(expected, rel=0.05)

    def test_the_number_of_post_ln_blocks_follows_the_ratio_or_the_count(self) -> None:
        sizes = SIZES | {"num_hidden_layers": 12}
        assert MixLNLlamaConfig(**sizes).layer_placements.count("post") == 3
        assert MixLNLlamaConfig(**sizes, num_post_layers=5).layer_placements.count("post") == 5
        for options in ({"post_ratio": 1.2}, {"num_post_layers": 13}, {"norm_placement": "peri"}):
            with pytest.raises(MethodError):
                MixLNLlamaConfig(**sizes, **options)
        config = MixLNLlamaConfig(**sizes)
        config.num_hidden_layers = 6
        with pytest.raises(ModelError, match=r"names 12 blocks, num_hidden_layers is 6"):
            MixLNLlamaForCausalLM(config)

    def test_a_stock_checkpoint_is_refused(self, tmp_path) -> None:
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).save_pretrained(tmp_path)
        message = r"post_feedforward_layernorm.*Mix-LN is an architecture for training from scratch"
        with pytest.raises(ModelError, match=message):
            AutoModelForCausalLM.from_pretrained(tmp_path, config=MixLNLlamaConfig(**SIZES))
        with pytest.raises(ModelError, match=message):
            MixLNLlamaModel.from_pretrained(tmp_path)
        loaded, info = MixLNLlamaForCausalLM.from_pretrained(
            tmp_path, config=MixLNLlamaConfig(**SIZES, norm_placement="pre"), output_loading_info=True
        )
        assert not info["missing_keys"], "with no Post-LN block it is a stock Llama"
        assert all(
            type(block) is transformers.models.llama.modeling_llama.LlamaDecoderLayer for block in loaded.model.layers
        )

    def test_a_removed_block_is_saved_so(self, tmp_path) -> None:
        model = shaken(MixLNLlamaForCausalLM(MixLNLlamaConfig(**SIZES, norm_placement="deepnorm")))
        remove_block(model, 1)
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert loaded.config.layer_placements == ["deepnorm"] * 3
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)

    def test_twice_and_together_with_layernorm_scaling_is_refused(self) -> None:
        model = MixLNLlamaForCausalLM(MixLNLlamaConfig(**SIZES))
        with pytest.raises(ModelError, match=r"applied to this 'mix_ln_llama' model already"):
            apply_norm_placement(model)
        with pytest.raises(ModelError, match=r"Post-LN"):
            apply_layernorm_scaling(model)


def test_a_saved_folder_loads_in_a_process_that_has_not_imported_the_method(tmp_path) -> None:
    MixLNLlamaForCausalLM(MixLNLlamaConfig(**SIZES)).save_pretrained(tmp_path / "m")
    where = repr(str(tmp_path / "m"))
    for code in (
        f"import gnomon; model = gnomon.load_model({where})",
        f"import os; os.environ['HF_MODULES_CACHE'] = {str(tmp_path / 'cache')!r}\n"
        "import transformers\n"
        f"model = transformers.AutoModelForCausalLM.from_pretrained({where}, trust_remote_code=True)",
    ):
        script = f"{code}\nprint(type(model).__module__, type(model.model.layers[0]).__name__)"
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        assert done.stdout.strip() == "gnomon.nn.mix_ln.llama PostNormLlamaDecoderLayer", done.stderr


def test_a_stock_state_dict_is_refused_with_the_reason() -> None:
    stock = tiny("llama").state_dict()
    for placement in ("mix", "sandwich", "deepnorm"):
        model = apply_norm_placement(tiny("llama"), placement)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(ModelError, match=r"those of a stock model.*for training from scratch"):
            model.load_state_dict(stock)
        assert list(before) == list(model.state_dict())
    with pytest.raises(ModelError, match=r"have 'transformer.h.0.ln_1.weight'"):
        apply_norm_placement(tiny("gpt2")).load_state_dict(tiny("gpt2").state_dict())
