"""NOLA on whole models: its file, its header, its bits, and how often it draws its bases."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gnomon.adapters import NOLAConfig, NOLALinear, accumulated, apply_nola, quantize_nola
from gnomon.adapters.nola.bases import Bases
from gnomon.adapters.nola.codes import quantize, straight_through
from gnomon.common.models import tiny
from gnomon.errors import MethodError, ModelError

SIZES = {"vocab_size": 64, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "max_positions": 32}
OPTIONS = {"r": 3, "num_basis_a": 11, "num_basis_b": 7, "target_modules": "all-linear"}


def ids(rows: int = 2, seed: int = 9) -> Tensor:
    return torch.randint(1, 64, (rows, 12), generator=torch.Generator().manual_seed(seed))


def adapted(family: str = "llama", seed: int = 1, **changes: Any) -> Any:
    """An adapter with moved coefficients on a tiny model, in evaluation mode."""
    model = peft.get_peft_model(tiny(family, **SIZES), NOLAConfig(**{**OPTIONS, **changes})).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "nola_" in name:
                p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids()).logits


def loss(model: nn.Module, rows: Tensor | None = None) -> Tensor:
    rows = ids() if rows is None else rows
    return model(input_ids=rows, labels=rows, use_cache=False).loss


def layers(model: nn.Module) -> list[NOLALinear]:
    return [m for m in model.modules() if isinstance(m, NOLALinear)]


def load(folder: Path, **options: Any) -> Any:
    return peft.PeftModel.from_pretrained(tiny("llama", **SIZES), str(folder), **options).eval()


@pytest.mark.parametrize("bits", [None, 2, 4, 5, 8, 16])
def test_the_file_holds_coefficients_and_a_header_only(bits: int | None, tmp_path: Path) -> None:
    adapted(coeff_bits=bits).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    raw = path.read_bytes()
    modules = 14
    per_module = sum(4 * k if bits is None else 2 * k if bits == 16 else 8 + -(-k * bits // 8) for k in (11, 7))
    tensors = load_file(path)
    header = json.loads(tensors["base_model.nola_header"].numpy().tobytes())
    table = int.from_bytes(raw[:8], "little")
    assert len(tensors) == 2 * modules + 1
    assert len(raw) == 8 + table + modules * per_module + tensors["base_model.nola_header"].numel()
    assert table < 145 * len(tensors)
    assert header["coeff_bits"] == bits
    assert header["module"] == "model.layers.0.self_attn.q_proj"
    assert len(header["checksum"]) == 10
    first, _ = NOLAConfig(**OPTIONS).bases("a", header["module"], 3, 16)
    assert torch.tensor(header["checksum"]).tolist() == first.draw(0, 1).flatten()[:10].tolist()
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert {settings[k] for k in ("peft_type", "seed", "r", "generator")} == {"NOLA", 0, 3, "mt19937"}


def test_a_small_adapter_is_a_kilobyte(tmp_path: Path) -> None:
    model = adapted(num_basis_a=32, num_basis_b=32, target_modules=["q_proj"], layers_to_transform=[0])
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 1250


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"r": 4}, "r"),
        ({"num_basis_a": 12}, "num_basis_a"),
        ({"seed": 1}, "seed"),
        ({"lora_alpha": 3.0}, "lora_alpha"),
        ({"share_basis": "shape"}, "share_basis"),
        ({"generator": "philox"}, "generator"),
        ({"variant": "vision", "lora_alpha": 8.0}, "variant"),
    ],
)
def test_another_configuration_is_refused_with_both_headers(change: dict[str, Any], field: str, tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    with pytest.raises(MethodError) as error:
        load(tmp_path, config=NOLAConfig(**{**OPTIONS, **change}))
    lines = str(error.value).splitlines()
    assert lines[0].startswith("the saved NOLA adapter differs from the configuration in ")
    assert field in lines[0]
    saved, here = json.loads(lines[1].partition(": ")[2]), json.loads(lines[2].partition(": ")[2])
    assert saved[field] != here[field]
    assert here[field] == next(iter(change.values()))
    assert lines[3] == "Load it with its own configuration (leave config out)."


def test_other_random_numbers_are_refused(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    header = json.loads(tensors["base_model.nola_header"].numpy().tobytes())
    header["checksum"][3] += 1e-6
    tensors["base_model.nola_header"] = torch.frombuffer(bytearray(json.dumps(header).encode()), dtype=torch.uint8)
    save_file(tensors, path)
    with pytest.raises(MethodError, match=r"generator gives other numbers here(.|\n)*saved: .*\nhere: "):
        load(tmp_path)
    header["format"] = 2
    tensors["base_model.nola_header"] = torch.frombuffer(bytearray(json.dumps(header).encode()), dtype=torch.uint8)
    save_file(tensors, path)
    with pytest.raises(MethodError, match="has format 2; this version reads format 1"):
        load(tmp_path)
    tensors["base_model.nola_header"] = torch.zeros(5, dtype=torch.uint8)
    save_file(tensors, path)
    with pytest.raises(MethodError, match="header of the NOLA file cannot be read"):
        load(tmp_path)
    del tensors["base_model.nola_header"]
    save_file(tensors, path)
    assert torch.equal(logits(load(tmp_path)), logits(adapted()))  # coefficients alone: taken at the user's word


def test_codes_without_their_header_are_refused(tmp_path: Path) -> None:
    model = adapted(coeff_bits=4)
    state = peft.get_peft_model_state_dict(model)
    del state["base_model.nola_header"]
    peft.set_peft_model_state_dict(adapted(coeff_bits=4), state)
    with pytest.raises(MethodError, match="is coded, but its width is not known"):
        peft.set_peft_model_state_dict(adapted(), state)
    plain = adapted()  # with the header, any width goes into any model
    peft.set_peft_model_state_dict(plain, peft.get_peft_model_state_dict(model))
    assert torch.equal(logits(plain), logits(model))


def test_the_factors_of_an_adapter_that_is_put_away_are_dropped() -> None:
    model = adapted(share_basis="shape")
    expected = logits(model)
    model.add_adapter("second", NOLAConfig(**OPTIONS))
    kept = [shared for sides in (x.shared["default"] for x in layers(model)) for shared in sides.values()]
    assert all(shared._factors for shared in kept)
    model.set_adapter("second")
    logits(model)
    assert not any(shared._factors for shared in kept)
    model.set_adapter("default")
    assert torch.equal(logits(model), expected)


def test_another_process_computes_the_same(tmp_path: Path) -> None:
    model = adapted(share_basis="shape", coeff_bits=4)
    model.save_pretrained(tmp_path)
    code = (
        "import sys, torch, gnomon.adapters\n"
        "assert 'torch.nn' in sys.modules and 'peft' not in sys.modules\n"
        "import peft\n"
        f"torch.set_num_threads({torch.get_num_threads()})\n"
        "from gnomon.common.models import tiny\n"
        f"model = peft.PeftModel.from_pretrained(tiny('llama', **{SIZES!r}), {str(tmp_path)!r}).eval()\n"
        "ids = torch.randint(1, 64, (2, 12), generator=torch.Generator().manual_seed(9))\n"
        f"torch.save(model(input_ids=ids).logits.detach(), {str(tmp_path / 'logits.pt')!r})\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, capture_output=True)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits(model))


def test_modules_have_their_own_bases_or_those_of_their_shape() -> None:
    for share, distinct in (("module", 28), ("shape", 5)):  # A: 16 and 48 in; B: 16 and 48 out, k and l differ
        model = adapted(share_basis=share)
        sides = {id(s): s for x in layers(model) for s in x.shared["default"].values()}
        assert len({s.bases for s in sides.values()}) == len(sides)
        assert len(sides) == (distinct if share == "module" else 4)
        assert sum(len(s.members) for s in sides.values()) == 28
    first, second = (adapted(seed=1).base_model.model.model.layers[i].self_attn.q_proj.delta("default") for i in (0, 1))
    assert not torch.equal(first, second)
    assert not torch.equal(logits(adapted()), logits(adapted_with_seed(2**33)))


def adapted_with_seed(seed: int) -> Any:
    return peft.get_peft_model(tiny("llama", **SIZES), NOLAConfig(**OPTIONS, seed=seed, variant="vision")).eval()


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[Bases]:
    """The bases in the order in which passes over them were made."""
    made: list[Bases] = []
    honest = Bases.chunks

    def chunks(self: Bases, *args: Any, **options: Any) -> Any:
        made.append(self)
        return honest(self, *args, **options)

    monkeypatch.setattr(Bases, "chunks", chunks)
    return made


@pytest.mark.parametrize(("share", "sets"), [("module", 28), ("shape", 4)])
def test_bases_are_drawn_once_a_step_and_direction(share: str, sets: int, passes: list[Bases]) -> None:
    model = adapted(share_basis=share).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)

    def drawn(action: Any) -> int:
        passes.clear()
        action()
        return sum(b.count > 1 for b in passes)

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    assert drawn(lambda: loss(model)) == sets
    assert drawn(lambda: loss(model).backward()) == sets  # the factors are still there: backward only
    step()
    assert drawn(lambda: loss(model).backward()) == 2 * sets
    step()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    assert drawn(lambda: loss(model).backward()) == 2 * sets
    model.gradient_checkpointing_disable()
    step()
    parts = ids(rows=4).split(1)

    def accumulate() -> None:
        with accumulated(model):
            for part in parts:
                (loss(model, part) / 4).backward()

    assert drawn(accumulate) == 2 * sets
    step()
    assert drawn(lambda: [(loss(model, part) / 4).backward() for part in parts]) == 5 * sets
    step()
    model.eval()
    assert drawn(lambda: model.generate(input_ids=ids()[:, :3], max_new_tokens=4, do_sample=False)) == sets
    assert drawn(lambda: logits(model)) == 0


@pytest.mark.parametrize("share", ["module", "shape"])
def test_accumulated_gradients_are_the_gradients(share: str) -> None:
    model = adapted(share_basis=share).train()
    loss(model, ids(rows=4)).backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with accumulated(model):
        for part in ids(rows=4).split(1):
            (loss(model, part) / 4).backward()
        assert all(p.grad is None for p in model.parameters())
    assert len(expected) == 28
    for name, p in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-6)
    loss(model, ids(rows=4)).backward()  # after the block gradients arrive as ever, and add up
    name, p = next((n, p) for n, p in model.named_parameters() if n in expected)
    torch.testing.assert_close(p.grad, 2 * expected[name], rtol=1e-4, atol=1e-6)


def test_accumulated_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has no NOLA layers"), accumulated(tiny("llama", **SIZES)):
        pass
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(adapted())
        with pytest.raises(ModelError, match=r"accumulated\(\) works on one rank.*no_sync"), accumulated(wrapped):
            pass
    finally:
        torch.distributed.destroy_process_group()


def test_a_module_that_is_left_out_of_a_pass_gets_no_gradient() -> None:
    """Layers that share bases share an autograd node; one that did not run must neither fail nor leak."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor, both: bool = True) -> Tensor:
            return self.two(self.one(x)) if both else self.one(x)

    options = {**OPTIONS, "target_modules": ["one", "two"], "variant": "vision"}
    grads = {}
    for share in ("shape", "module"):
        model = peft.get_peft_model(Two(), NOLAConfig(**options, share_basis=share))
        x = torch.ones(2, 6)
        model(x, both=False).sum().backward()
        one, two = model.base_model.model.one, model.base_model.model.two
        assert one.nola_alpha["default"].grad is not None
        assert two.nola_alpha["default"].grad is None
        model.zero_grad()
        with torch.no_grad():
            two.nola_alpha["default"].mul_(3.0)
        expected = two.base_layer(one(x)) + two.branch("default", one(x))
        assert torch.allclose(model(x), expected)
        model(x).sum().backward()
        grads[share] = one.nola_alpha["default"].grad, two.nola_alpha["default"].grad
        assert all(g is not None for g in grads[share])


def test_a_factor_that_was_made_but_not_taken_is_not_taken_later() -> None:
    model = adapted(share_basis="shape").train()
    first, second = (model.base_model.model.model.layers[i].self_attn.q_proj for i in (0, 1))
    first.factors("default")  # one node for both
    with torch.no_grad():
        for side in "ab":
            second.parameter(side, "default").mul_(3.0)
    A, B = second.factors("default")
    honest = second.shared["default"]
    honest["a"].forget()
    honest["b"].forget()
    assert torch.allclose(A, second.factors("default")[0], atol=1e-6)
    assert torch.allclose(B, second.factors("default")[1], atol=1e-6)


def test_coefficients_put_in_the_place_of_old_ones_get_the_gradient() -> None:
    model = adapted(share_basis="shape").train()
    loss(model)
    layer = layers(model)[0]
    first = layer.nola_alpha["default"]
    layer.shared["default"]["a"].factor(layer)  # makes a node with the old parameters
    for other in layers(model):
        other.nola_alpha["default"] = nn.Parameter(other.nola_alpha["default"].detach().clone())
    loss(model).backward()
    assert first.grad is None
    assert all(other.nola_alpha["default"].grad is not None for other in layers(model))


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16])
def test_evaluation_computes_with_what_is_saved(bits: int, tmp_path: Path) -> None:
    model = adapted(coeff_bits=bits)
    layer = layers(model)[3]
    stored = layer.nola_beta["default"]
    rounded = layer.coefficients("b", "default")
    assert torch.equal(rounded, straight_through(stored, bits))
    assert not torch.equal(rounded, stored)
    if bits < 16:
        assert len(torch.unique(quantize(stored, bits)[0])) <= 2**bits
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), expected)
    model.train()
    assert torch.equal(layer.coefficients("b", "default"), rounded if bits < 4 else stored)
    loss(model).backward()
    assert layer.nola_beta["default"].grad.abs().max() > 0


def test_a_model_in_training_saves_what_the_training_needs(tmp_path: Path) -> None:
    model = adapted(coeff_bits=2).train()
    model.save_pretrained(tmp_path)
    again = load(tmp_path, is_trainable=True)
    for one, other in zip(layers(model), layers(again), strict=True):
        assert torch.equal(one.nola_alpha["default"], other.nola_alpha["default"])
    assert torch.equal(logits(again), logits(model.eval()))


def test_bits_can_be_tried_after_training(tmp_path: Path) -> None:
    model = adapted()
    plain, start = logits(model), float(loss(model))
    errors = []
    for bits in (16, 8, 6, 4, 2):
        assert quantize_nola(model, bits) is model
        errors.append(float((logits(model) - plain).abs().max()))
    assert errors == sorted(errors)
    quantize_nola(model, 16)
    assert abs(float(loss(model)) - start) < 1e-3
    quantize_nola(model, None)
    assert torch.equal(logits(model), plain)
    quantize_nola(model, 4).save_pretrained(tmp_path)
    four = logits(model)
    assert torch.equal(logits(load(tmp_path)), four)
    with pytest.raises(MethodError, match=r"there is no NOLA adapter 'other'\. Adapters: default"):
        quantize_nola(model, 4, "other")
    with pytest.raises(MethodError, match=r"coeff_bits = 12\. Allowed: 2, 3"):
        quantize_nola(model, 12)


def test_coefficients_stay_in_float32() -> None:
    model = peft.get_peft_model(tiny("llama", **SIZES).bfloat16(), NOLAConfig(**OPTIONS), autocast_adapter_dtype=False)
    assert all(p.dtype == torch.float32 for n, p in model.named_parameters() if "nola_" in n)
    assert model.bfloat16()(input_ids=ids()).logits.dtype == torch.bfloat16  # cast by force, they still work


@pytest.mark.parametrize("width", [8, 4])
def test_quantised_base_layers(width: int) -> None:
    bnb = pytest.importorskip("bitsandbytes")

    def base() -> nn.Module:
        generator = torch.Generator().manual_seed(0)
        options = {"has_fp16_weights": False} if width == 8 else {"compute_dtype": torch.float32}
        made = {8: bnb.nn.Linear8bitLt, 4: bnb.nn.Linear4bit}[width](64, 64, **options)
        weight = torch.randn(64, 64, generator=generator)
        made.load_state_dict({"weight": weight, "bias": torch.zeros(64)})
        return nn.Sequential(made).to("cpu")

    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    plain = base()
    try:
        expected = plain(x)
    except Exception as error:
        pytest.skip(f"bitsandbytes does not run {width}-bit layers here: {error}")
    model = peft.get_peft_model(base(), NOLAConfig(r=4, num_basis_a=9, target_modules=["0"], lora_alpha=1.0))
    assert torch.allclose(model(x), expected, atol=1e-5)
    layer = layers(model)[0]
    with torch.no_grad():
        layer.nola_alpha["default"].fill_(0.2)
        layer.nola_beta["default"].fill_(0.3)
    with_adapter = expected + x @ layer.delta("default").T
    assert torch.allclose(model(x), with_adapter, atol=1e-4)
    model(x).sum().backward()
    assert layer.nola_alpha["default"].grad.abs().max() > 0


def test_what_cannot_be_adapted_is_refused() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2)

    with pytest.raises(ModelError, match=r"attention\.out_proj belongs to an nn.MultiheadAttention"):
        peft.get_peft_model(Attention(), NOLAConfig(target_modules=["out_proj"]))
    with pytest.raises(ModelError, match="which linear layers of a 'marian' model to adapt is not known"):
        peft.get_peft_model(tiny("marian", **SIZES), NOLAConfig())


def test_apply_nola() -> None:
    with pytest.warns(match="no fewer than"):
        model = apply_nola(tiny("llama", **SIZES))
    assert {x.key.rpartition(".")[2] for x in layers(model)} == {"q_proj", "v_proj"}
    model = apply_nola(tiny("gpt2", **SIZES), 4, 16, seed=3, coeff_bits=8, target_modules="all-linear")
    settings = model.peft_config["default"]
    assert (settings.num_basis_b, settings.seed, settings.coeff_bits) == (16, 3, 8)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 8 * 32


def test_real_rows_are_learnt(shared_data: Any) -> None:
    from gnomon.common.text import byte_tokenizer

    with gzip.open(shared_data("nola") / "e2e_valid.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for _, line in zip(range(64), file, strict=False)]
    tokenizer = byte_tokenizer()
    texts = [f"{row['mr']} = {row['ref']}" for row in rows]
    tokens = torch.tensor([tokenizer(text)["input_ids"][:64] for text in texts if len(text) >= 64])
    model = apply_nola(
        tiny("llama", **{**SIZES, "vocab_size": 257, "max_positions": 64}), 4, 24, target_modules="all-linear"
    )
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for step in range(16):
        batch = tokens[step % 4 :: 4]
        value = loss(model, batch)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(value.detach()))
    assert sum(losses[-4:]) < sum(losses[:4]) - 0.2
