"""LoRA adapters: the mean of products against the dense computation, PEFT's own SVD merge, and a merged base."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from gnomon.common.models import load_model, tiny
from gnomon.errors import GnomonWarning, MethodError, ModelError
from gnomon.merge import average_checkpoints, mean_delta

SIZES: dict[str, Any] = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "vocab_size": 32}


def base(family: str = "llama") -> Any:
    return tiny(family, **SIZES)


def save_adapters(folder: Path, count: int = 3, family: str = "llama", **options: Any) -> list[Path]:
    paths = []
    targets = ["c_attn", "c_fc"] if family == "gpt2" else ["q_proj", "up_proj"]
    for i in range(count):
        config = peft.LoraConfig(**{"r": 2, "lora_alpha": 6, "target_modules": targets, **options})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.get_peft_model(base(family), config)
        generator = torch.Generator().manual_seed(i)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
        paths.append(folder / f"adapter{i}")
        model.save_pretrained(paths[-1], save_embedding_layers=False)
    return paths


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(12)[None]).logits


def dense_mean(paths: list[Path], weights: list[float], family: str = "llama") -> Any:
    """The definition: merge each adapter into the base, average the changes of the weights in float64."""
    start = {k: v.double() for k, v in base(family).state_dict().items()}
    total = {k: v.clone() for k, v in start.items()}
    for path, w in zip(paths, weights, strict=True):
        merged = peft.PeftModel.from_pretrained(base(family), path).merge_and_unload().state_dict()
        for name in total:
            total[name] += w * (merged[name].double() - start[name])
    model = base(family)
    model.load_state_dict({k: v.float() for k, v in total.items()})
    return model


@given(
    m=st.integers(1, 9),
    n=st.integers(1, 9),
    ranks=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    k=st.integers(1, 9),
)
def test_mean_delta_is_the_best_approximation_of_the_mean(m: int, n: int, ranks: list[int], k: int) -> None:
    generator = torch.Generator().manual_seed(m * 100 + n * 10 + k)
    A = [torch.randn(r, n, generator=generator) for r in ranks]
    B = [torch.randn(m, r, generator=generator) for r in ranks]
    weights = [1 / len(ranks)] * len(ranks)
    mean = sum(w * b.double() @ a.double() for a, b, w in zip(A, B, weights, strict=True))
    new_A, new_B, lost = mean_delta(A, B, weights, k)
    assert new_A.shape == (k, n)
    assert new_B.shape == (m, k)
    S = torch.linalg.svdvals(mean)
    error = float((new_B.double() @ new_A.double() - mean).norm())
    assert error == pytest.approx(float(S[k:].norm()), abs=1e-5)
    assert lost == pytest.approx(float(S[k:].norm() / S.norm()), abs=1e-5)


def test_the_mean_of_factors_is_not_the_factor_of_the_mean(tmp_path: Path) -> None:
    paths = save_adapters(tmp_path)
    exact = logits(dense_mean(paths, [1 / 3] * 3))
    full = average_checkpoints(paths, tmp_path / "full", space="delta", rank=6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        factors = average_checkpoints(paths, tmp_path / "factors")
    right, wrong = (logits(peft.PeftModel.from_pretrained(base(), p)) for p in (full, factors))
    torch.testing.assert_close(right, exact, rtol=1e-4, atol=1e-4)
    assert float((wrong - exact).abs().max()) > 100 * float((right - exact).abs().max())
    config = json.loads((full / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (6, 18), "the scale of B A stays"


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"modules_to_save": ["lm_head"]}])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_merged_into_the_base_it_is_the_dense_mean(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    if family == "gpt2" and "modules_to_save" in options:
        pytest.skip("GPT-2's head is its embedding")
    paths = save_adapters(tmp_path, family=family, **options)
    base(family).save_pretrained(tmp_path / "base")
    weights = [0.5, 0.25, 0.25]
    out = average_checkpoints(paths, tmp_path / "out", weights, space="delta", base=str(tmp_path / "base"))
    expected = dense_mean(paths, weights, family)
    torch.testing.assert_close(logits(load_model(out)), logits(expected), rtol=1e-4, atol=1e-4)
    assert not (out / "adapter_config.json").exists()


def test_rslora_keeps_its_scale_at_another_rank(tmp_path: Path) -> None:
    paths = save_adapters(tmp_path, use_rslora=True)
    out = average_checkpoints(paths, tmp_path / "out", space="delta", rank=8)
    found = logits(peft.PeftModel.from_pretrained(base(), out))
    torch.testing.assert_close(found, logits(dense_mean(paths, [1 / 3] * 3)), rtol=1e-4, atol=1e-4)


def test_embedding_factors_are_averaged_too(tmp_path: Path) -> None:
    paths = save_adapters(tmp_path, target_modules=["embed_tokens", "q_proj"])
    base().save_pretrained(tmp_path / "base")
    expected = logits(dense_mean(paths, [1 / 3] * 3))
    adapter = average_checkpoints(paths, tmp_path / "a", space="delta", rank=6)
    torch.testing.assert_close(logits(peft.PeftModel.from_pretrained(base(), adapter)), expected, rtol=1e-4, atol=1e-4)
    merged = average_checkpoints(paths, tmp_path / "b", space="delta", base=str(tmp_path / "base"))
    torch.testing.assert_close(logits(load_model(merged)), expected, rtol=1e-4, atol=1e-4)


def test_it_agrees_with_pefts_merge_in_memory(tmp_path: Path) -> None:
    paths = save_adapters(tmp_path, 2)
    model = peft.PeftModel.from_pretrained(base(), paths[0], adapter_name="a")
    model.load_adapter(paths[1], "b")
    model.add_weighted_adapter(["a", "b"], [0.3, 0.7], "mean", combination_type="svd", svd_rank=2)
    model.set_adapter("mean")
    with pytest.warns(GnomonWarning, match="loses .* of the mean delta's norm .*Raise it: rank=4 loses nothing"):
        out = average_checkpoints(paths, tmp_path / "out", [0.3, 0.7], space="delta")
    found = peft.PeftModel.from_pretrained(base(), out)
    torch.testing.assert_close(logits(found), logits(model), rtol=1e-3, atol=1e-4)
    assert json.loads((out / "averaging.json").read_text())["lost_norm"] > 0.1


def test_equal_adapters_lose_nothing(tmp_path: Path) -> None:
    path = save_adapters(tmp_path, 1)[0]
    shutil.copytree(path, tmp_path / "twin")
    with warnings.catch_warnings():
        warnings.simplefilter("error", GnomonWarning)
        out = average_checkpoints([path, tmp_path / "twin"], tmp_path / "out", space="delta")
    found, expected = (logits(peft.PeftModel.from_pretrained(base(), p)) for p in (out, path))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_factors_are_averaged_bit_for_bit_by_default(tmp_path: Path) -> None:
    paths = save_adapters(tmp_path, 2)
    out = average_checkpoints(paths, tmp_path / "out")
    a, b, mean = (load_file(p / "adapter_model.safetensors") for p in (*paths, out))
    assert all(torch.equal(mean[k], a[k].lerp(b[k], 0.5)) for k in a)
    assert (out / "adapter_config.json").is_file()


def test_adapters_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    paths = save_adapters(tmp_path)
    base().save_pretrained(tmp_path / "base")
    tiny("gpt2", **SIZES).save_pretrained(tmp_path / "other")
    other = save_adapters(tmp_path / "alpha", 1, lora_alpha=8)[0]
    dora = save_adapters(tmp_path / "dora", 2, use_dora=True)
    pattern = save_adapters(tmp_path / "pattern", 2, rank_pattern={"up_proj": 3})
    bad = save_adapters(tmp_path / "bad", 2)
    state = load_file(bad[1] / "adapter_model.safetensors")
    name = next(k for k in state if "lora_B" in k)
    state[name][0, 0] = torch.inf
    save_file(state, bad[1] / "adapter_model.safetensors")
    out, delta = tmp_path / "out", {"space": "delta"}
    for error, inputs, options, message in (
        (ModelError, [paths[0], tmp_path / "base"], {}, "is an adapter, .*base a whole model. Average adapters with"),
        (ModelError, [paths[0], other], delta, "lora_alpha is 6 in .* and 8 in .*scaled differently"),
        (ModelError, dora, delta, "is a DoRA adapter; its delta is no product"),
        (MethodError, pattern, {**delta, "rank": 4}, "ranks or scales of its own per layer"),
        (ModelError, bad, delta, f"{name!r} holds values that are not finite"),
        (
            ModelError,
            paths,
            {**delta, "base": str(tmp_path / "other")},
            "has no 'model.layers.*which the adapters change",
        ),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", GnomonWarning)
            with pytest.raises(error, match=message):
                average_checkpoints(inputs, out, **options)  # type: ignore[arg-type]
        assert not out.exists()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GnomonWarning)
        found = average_checkpoints(pattern, out, space="delta")
    assert (
        load_file(found / "adapter_model.safetensors").keys()
        == load_file(pattern[0] / "adapter_model.safetensors").keys()
    )
