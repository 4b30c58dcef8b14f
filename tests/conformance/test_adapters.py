"""What every adapter owes, over all members the catalog finds and PEFT's own LoRA; exceptions carry a reason."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import sys
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from gnomon import catalog
from gnomon.errors import GnomonError

sys.path.insert(0, str(Path(__file__).parent))
from adapter_members import (
    CODED,
    CONTROL,
    LARGER,
    NO_IDENTITY,
    OPTIONS,
    SAVED_AS,
    STUBBORN,
    TAKES_EMBEDDINGS,
    TRAINED,
    adapted,
    base_model,
    config,
    ids,
    logits,
    members,
    offered,
    shaken,
    trained,
    with_families,
)

MEMBERS = members()
every = pytest.mark.parametrize("member", MEMBERS)
in_families = pytest.mark.parametrize(("member", "family"), with_families())
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*no fewer than:gnomon.errors.GnomonWarning"),
]


def load(folder: Path, family: str = "llama", **options: Any) -> Any:
    return peft.PeftModel.from_pretrained(base_model(family), str(folder), **options)


def close(a: Tensor, b: Tensor, atol: float = 2e-5) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=atol)


@in_families
def test_an_adapter_starts_as_the_identity(member: str, family: str) -> None:
    model = adapted(member, family)
    difference = float((logits(model) - logits(base_model(family))).abs().max())
    if member in NO_IDENTITY:
        assert 0 < difference < 0.5
    else:
        assert difference == 0.0


@in_families
def test_only_the_documented_numbers_are_trained(member: str, family: str) -> None:
    model = adapted(member, family)
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    assert len(layers) > 4
    found = trained(model)
    assert all("base_layer" not in name for name in found)
    count = TRAINED[member.partition(":")[0]]
    assert sum(p.numel() for p in found.values()) == sum(count(x.in_features, x.out_features) for x in layers)
    assert model.get_nb_trainable_parameters()[0] == sum(p.numel() for p in found.values())


@every
def test_the_familys_usual_layers_are_the_default(member: str) -> None:
    model = peft.get_peft_model(base_model(), config(member))
    names = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
    assert names == {"q_proj", "v_proj"}


@every
def test_layers_are_chosen_as_in_peft(member: str) -> None:
    def chosen(**options: Any) -> set[str]:
        model = peft.get_peft_model(base_model(), config(member, **options))
        return {n.partition(".layers.")[2] for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)}

    assert chosen(target_modules=["up_proj"], layers_to_transform=[1]) == {"1.mlp.up_proj"}
    assert chosen(target_modules=r".*0\..*(q|k)_proj") == {"0.self_attn.q_proj", "0.self_attn.k_proj"}
    assert chosen(target_modules="all-linear", exclude_modules=r".*(mlp|1\.|k_|v_).*") == {
        "0.self_attn.q_proj",
        "0.self_attn.o_proj",
    }
    with pytest.raises(ValueError, match="not found in the base model"):
        chosen(target_modules=["no_such_layer"])


@pytest.mark.parametrize("target", ["model.embed_tokens", "conv"])
@every
def test_what_is_no_linear_layer_is_refused_by_name(member: str, target: str) -> None:
    model = base_model() if target != "conv" else nn.Sequential()
    if target == "conv":
        model.add_module("conv", nn.Conv1d(3, 4, 1))
    if member.partition(":")[0] in TAKES_EMBEDDINGS:
        peft.get_peft_model(model, config(member, target_modules=[target]))
        return
    with pytest.raises(GnomonError, match=rf"{target}.* is a (Embedding|Conv1d)"):
        peft.get_peft_model(model, config(member, target_modules=[target]))


@in_families
def test_all_trained_numbers_get_gradients_and_the_base_none(member: str, family: str) -> None:
    model = shaken(adapted(member, family)).train()
    before = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW(trained(model).values(), lr=0.02, weight_decay=0.0)
    losses = []
    for _ in range(8):
        loss = model(input_ids=ids(), labels=ids()).loss
        loss.backward()
        for name, p in trained(model).items():
            assert p.grad is not None, name
            assert torch.isfinite(p.grad).all(), name
            assert p.grad.abs().max() > 0, name
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    if member not in STUBBORN:
        assert losses[-1] < losses[0]
    for name, p in model.named_parameters():
        if not p.requires_grad:
            assert torch.equal(p, before[name]), name


@in_families
def test_a_saved_adapter_comes_back_to_the_bit(member: str, family: str, tmp_path: Path) -> None:
    model = shaken(adapted(member, family))
    model.save_pretrained(tmp_path)
    again = load(tmp_path, family)
    assert torch.equal(logits(again), logits(model))
    assert not trained(again)
    saved_as = SAVED_AS.get(member.partition(":")[0], type(model.peft_config["default"]))
    assert type(again.peft_config["default"]) is saved_as
    further = load(tmp_path, family, is_trainable=True)
    assert trained(further).keys() == trained(model).keys()
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "adapter_model.safetensors"
    ).read_bytes()
    assert torch.equal(logits(load(tmp_path, family, low_cpu_mem_usage=True)), logits(model))


@every
def test_a_saved_adapter_is_small(member: str, tmp_path: Path) -> None:
    model = shaken(adapted(member))
    model.save_pretrained(tmp_path)
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    if member in LARGER:
        pytest.skip(LARGER[member])
    tensors = len(trained(model))
    assert size < sum(p.numel() * 4 for p in trained(model).values()) + 200 * tensors + 1000


@every
def test_a_second_adapter_and_switching(member: str, tmp_path: Path) -> None:
    first, second = shaken(adapted(member)), shaken(adapted(member), seed=2)
    second.save_pretrained(tmp_path)
    expected = {"default": logits(first), "second": logits(second)}
    assert not torch.equal(*expected.values())
    first.load_adapter(str(tmp_path), "second")
    assert torch.equal(logits(first), expected["default"])
    for name in ("second", "default", "second"):
        first.set_adapter(name)
        assert torch.equal(logits(first), expected[name])
        assert all(f".{name}" in n for n in trained(first))
        assert trained(first)
    first.save_pretrained(tmp_path / "both")
    both = load(tmp_path / "both")
    both.load_adapter(str(tmp_path / "both" / "second"), "second")
    both.set_adapter("second")
    assert torch.equal(logits(both), expected["second"])


@every
def test_a_further_adapter_elsewhere_changes_nothing_until_it_is_chosen(member: str) -> None:
    model = shaken(adapted(member, target_modules=["q_proj"]))
    expected, before = logits(model), trained(model).keys()
    model.add_adapter("second", config(member, target_modules=["up_proj"]))
    assert torch.equal(logits(model), expected)
    assert trained(model).keys() == before
    model.set_adapter("second")
    assert all("up_proj" in name for name in trained(model))


@every
def test_several_active_adapters_add_up(member: str, tmp_path: Path) -> None:
    first, second = shaken(adapted(member)), shaken(adapted(member), seed=2)
    second.save_pretrained(tmp_path)
    first.load_adapter(str(tmp_path), "second")
    first.base_model.set_adapter(["default", "second"])
    together = logits(first)
    first.merge_adapter()
    close(logits(first), together)
    first.unmerge_adapter()
    plain = base_model()
    for name, module in first.base_model.model.named_modules():
        if isinstance(module, BaseTunerLayer):
            weight = plain.get_submodule(name).weight.data
            weight += module.get_delta_weight("default") + module.get_delta_weight("second")
    close(logits(plain), together)


@in_families
def test_disabling_merging_and_unloading(member: str, family: str) -> None:
    plain = logits(base_model(family))
    model = shaken(adapted(member, family))
    with_adapter = logits(model)
    assert (with_adapter - plain).abs().max() > 1e-3
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    assert torch.equal(logits(model), with_adapter)
    model.merge_adapter()
    close(logits(model), with_adapter)
    with model.disable_adapter():
        close(logits(model), plain)
    model.merge_adapter(safe_merge=True)
    close(logits(model), with_adapter)
    model.unmerge_adapter()
    close(logits(model), with_adapter)
    kept = copy.deepcopy(model)
    merged = model.merge_and_unload()
    assert type(merged) is type(base_model(family))
    assert merged.state_dict().keys() == base_model(family).state_dict().keys()
    close(logits(merged), with_adapter)
    unloaded = kept.unload()
    assert unloaded.state_dict().keys() == base_model(family).state_dict().keys()
    close(logits(unloaded), plain)


@every
def test_a_merge_that_is_not_finite_is_refused(member: str) -> None:
    model = shaken(adapted(member))
    name, broken = next(iter(trained(model).items()))
    with torch.no_grad():
        broken.fill_(float("nan"))
    weights = {n: p.clone() for n, p in model.named_parameters() if "base_layer" in n}
    with pytest.raises(ValueError, match=r"(?i)not finite|nans"):
        model.merge_adapter(safe_merge=True)
    layer = name.split(".self_attn.")[0]
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters() if n in weights and layer in n)


@every
def test_deleting_an_adapter(member: str) -> None:
    model = shaken(adapted(member))
    expected = logits(model)
    model.add_adapter("second", config(member, target_modules="all-linear"))
    model.delete_adapter("second")
    assert list(model.peft_config) == ["default"]
    assert not any(".second" in name for name in model.state_dict())
    assert torch.equal(logits(model), expected)
    model.add_adapter("third", config(member, target_modules="all-linear"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.delete_adapter("default")
    assert not any(".default" in name for name in model.state_dict())
    if member not in NO_IDENTITY:
        assert torch.equal(logits(model), logits(base_model()))


@every
def test_modules_trained_whole_are_saved_beside(member: str, tmp_path: Path) -> None:
    model = shaken(adapted(member, target_modules=["q_proj", "up_proj"], modules_to_save=["lm_head"]))
    assert any("lm_head" in name for name in trained(model))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(model))
    close(logits(copy.deepcopy(model).merge_and_unload()), logits(model))


@every
def test_bfloat16_weights_and_autocast(member: str, tmp_path: Path) -> None:
    model = shaken(adapted(member, dtype=torch.bfloat16))
    assert all(p.dtype == torch.float32 for p in trained(model).values())
    out = model(input_ids=ids(), labels=ids())
    assert out.logits.dtype == torch.bfloat16
    out.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in trained(model).values())
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(base_model(dtype=torch.bfloat16), str(tmp_path))
    assert torch.equal(logits(again), logits(model))
    merged = logits(copy.deepcopy(model).merge_and_unload()).float()
    assert (merged - logits(model).float()).abs().max() < 0.15

    full = shaken(adapted(member))
    reference = gradients(full)
    with torch.autocast("cpu", torch.bfloat16):
        cast = gradients(full)
    apart = torch.cat([(cast[name] - expected).flatten() for name, expected in reference.items()])
    assert apart.norm() < 0.15 * torch.cat([g.flatten() for g in reference.values()]).norm()


def gradients(model: nn.Module, parts: int = 1) -> dict[str, Tensor]:
    model.zero_grad()
    for part in ids(rows=4).chunk(parts):
        (model(input_ids=part, labels=part, use_cache=False).loss / parts).backward()
    return {name: p.grad.clone() for name, p in trained(model).items()}


@every
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(member: str, reentrant: bool) -> None:
    model = shaken(adapted(member)).train()
    model.enable_input_require_grads()
    plain = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for _ in range(2):
        checkpointed = gradients(model)
        assert plain.keys() == checkpointed.keys()
        for name, expected in plain.items():
            torch.testing.assert_close(checkpointed[name], expected, rtol=1e-5, atol=1e-7)


@every
def test_gradient_accumulation_gives_the_same_gradients(member: str) -> None:
    model = shaken(adapted(member)).train()
    whole, summed = gradients(model), gradients(model, parts=4)
    for name, expected in whole.items():
        torch.testing.assert_close(summed[name], expected, rtol=1e-4, atol=1e-6)


@every
def test_writing_through_data_is_seen(member: str) -> None:
    model = shaken(adapted(member))
    before = logits(model)
    for parameter in trained(model).values():
        parameter.data.mul_(2.0)
    after = logits(model)
    assert (after - before).abs().max() > 1e-3
    assert torch.equal(after, logits(copy.deepcopy(model)))


@every
def test_copies_and_pickles(member: str) -> None:
    model = shaken(adapted(member)).train()
    model(input_ids=ids(), labels=ids()).loss.backward()
    model.zero_grad()
    expected = logits(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
        assert torch.equal(logits(twin), expected)
        shaken(twin, seed=3)
        assert not torch.equal(logits(twin), expected)
        assert torch.equal(logits(model), expected)
        twin(input_ids=ids(), labels=ids()).loss.backward()
        assert all(p.grad is not None for p in trained(twin).values())
        assert all(p.grad is None for p in trained(model).values())
    settings = copy.deepcopy(model.peft_config["default"])
    assert settings.to_dict() == pickle.loads(pickle.dumps(settings)).to_dict()


@every
def test_the_state_dict_goes_into_another_model(member: str) -> None:
    model, other = shaken(adapted(member)), adapted(member)
    state = peft.get_peft_model_state_dict(model)
    result = peft.set_peft_model_state_dict(other, state)
    assert not result.unexpected_keys
    assert torch.equal(logits(other), logits(model))
    third = adapted(member)
    third.load_state_dict(model.state_dict())
    assert torch.equal(logits(third), logits(model))


def load_and_run(plain: Any, folder: Path) -> None:
    plain.load_adapter(str(folder))
    logits(plain)


@every
def test_transformers_own_loading(member: str, tmp_path: Path) -> None:
    model = shaken(adapted(member, target_modules=["q_proj", "up_proj"]))
    model.save_pretrained(tmp_path)
    plain = base_model()
    if member in CODED:
        with pytest.raises((RuntimeError, GnomonError), match=r"ignore_mismatched_sizes|has no factors yet"):
            load_and_run(plain, tmp_path)
        return
    plain.load_adapter(str(tmp_path))
    assert torch.equal(logits(plain.eval()), logits(model))


@every
def test_generation_with_cache_equals_the_full_forward(member: str) -> None:
    model, prompt = shaken(adapted(member)), ids(tokens=5)
    made = model.generate(
        input_ids=prompt, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    full = logits(model, made.sequences)
    for step, of_step in enumerate(made.logits):
        close(of_step, full[:, prompt.shape[1] - 1 + step], atol=1e-4)


@every
def test_an_adapter_becomes_a_plain_lora(member: str, tmp_path: Path) -> None:
    model = shaken(adapted(member))
    if member == CONTROL or not model.supports_lora_conversion():
        pytest.skip("is one already" if member == CONTROL else "not an addition to the weight")
    peft.save_as_lora(tmp_path, model, rank=4)
    again = load(tmp_path)
    assert isinstance(again.peft_config["default"], peft.LoraConfig)
    close(logits(again), logits(model))


@pytest.mark.slow
@pytest.mark.parametrize("member", [m for m in MEMBERS if ":" not in m])
def test_torch_compile_traces_it(member: str) -> None:
    model = shaken(adapted(member))
    expected = gradients(model)
    compiled = torch.compile(model, backend="eager")
    assert torch.allclose(logits(compiled), logits(model), atol=1e-5)
    compiled.zero_grad()
    compiled(input_ids=ids(rows=4), labels=ids(rows=4), use_cache=False).loss.backward()
    for name, p in trained(model).items():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-6)
    torch.compiler.reset()


@pytest.mark.parametrize("slug", [card.slug for card in catalog.methods(plugs="adapter")])
def test_recipes_attach_it_by_one_call(slug: str) -> None:
    call = catalog.get(slug).recipe.get("call")
    if call is None:
        pytest.skip("joins no recipe by a call of its own")
    function = catalog.resolve(call)
    given = {name: value for name, value in offered().items() if name in inspect.signature(function).parameters}
    model = function(base_model(), **given, **OPTIONS.get(slug, {}))
    assert isinstance(model, peft.PeftModel)
    assert trained(model)
    with pytest.raises(GnomonError, match="has adapters already"):
        function(model, **given, **OPTIONS.get(slug, {}))
