"""What every merger owes, tested over all members the catalog finds; an exception is a line with its reason."""

from __future__ import annotations

import inspect
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gnomon import catalog
from gnomon.common.models import load_model, save_model, tiny
from gnomon.errors import GnomonError, ModelError
from gnomon.recipes.options import call_of

SLUGS = [card.slug for card in catalog.methods(plugs="merger")]
FAMILIES = ["llama", "qwen", "gpt2"]
SIZES: dict[str, Any] = {"hidden_size": 32, "num_layers": 2, "vocab_size": 64}

OPTIONS: dict[str, dict[str, Any]] = {}  # arguments without a default, or small ones for speed

EXCEPTIONS: dict[tuple[str, str], str] = {}  # (slug, test) -> why it cannot hold


def excused(slug: str, test: str) -> None:
    if (slug, test) in EXCEPTIONS:
        pytest.skip(EXCEPTIONS[slug, test])


def model_of(family: str = "llama", *, move: int = 0, **sizes: Any) -> Any:
    """A small model; `move` changes it a little, differently for each number, as further training does."""
    model = tiny(family, **{**SIZES, **sizes}).eval()
    generator = torch.Generator().manual_seed(move)
    with torch.no_grad():
        for parameter in model.parameters() if move else ():
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
    return model


def saved(folder: Path, *models: nn.Module) -> list[Path]:
    return [save_model(model, folder / f"input{i}") for i, model in enumerate(models)]


def merge(slug: str, paths: list[Path], out: Path) -> Any:
    """Call a merger as the merge stage of a recipe does; return the model it made."""
    out.mkdir(exist_ok=True)
    call = call_of(slug, "merge")
    offered = {"model": load_model(paths[0]), "models": [load_model(p) for p in paths[1:]], "paths": paths, "out": out}
    offered |= {"seed": 0, "calibration": torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(0))}
    offered |= OPTIONS.get(slug, {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = call(**{k: v for k, v in offered.items() if k in inspect.signature(call).parameters})
    return load_model(out) if (out / "config.json").is_file() else result


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(24)[None] % 64).logits


@pytest.mark.parametrize("slug", SLUGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_copies_of_one_model_merge_to_that_model(slug: str, family: str, tmp_path: Path) -> None:
    model = model_of(family)
    found = merge(slug, saved(tmp_path, model, model, model), tmp_path / "out")
    torch.testing.assert_close(logits(found), logits(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("slug", SLUGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_result_is_a_whole_model_of_the_same_kind(slug: str, family: str, tmp_path: Path) -> None:
    first = model_of(family)
    found = merge(slug, saved(tmp_path, first, model_of(family, move=1)), tmp_path / "out")
    assert type(found) is type(first)
    expected = {k: (v.shape, v.dtype) for k, v in first.state_dict().items()}
    assert {k: (v.shape, v.dtype) for k, v in found.state_dict().items()} == expected
    assert all(bool(v.isfinite().all()) for v in found.state_dict().values())
    assert not torch.equal(logits(found), logits(first)), "nothing was done"
    tied = first.get_input_embeddings().weight is first.get_output_embeddings().weight
    assert (found.get_input_embeddings().weight is found.get_output_embeddings().weight) == tied
    again = load_model(save_model(found, tmp_path / "again"))
    assert torch.equal(logits(again), logits(found))


@pytest.mark.parametrize("slug", SLUGS)
def test_bfloat16_models_stay_bfloat16(slug: str, tmp_path: Path) -> None:
    paths = saved(tmp_path, *(model_of(move=i).to(torch.bfloat16) for i in (0, 1)))
    found = merge(slug, paths, tmp_path / "out")
    assert {p.dtype for p in found.parameters()} == {torch.bfloat16}
    assert bool(logits(found).isfinite().all())


@pytest.mark.parametrize("slug", SLUGS)
def test_inputs_and_global_randomness_are_left_alone_and_the_result_is_reproducible(slug: str, tmp_path: Path) -> None:
    paths = saved(tmp_path, model_of(), model_of(move=1))
    before = [{f.name: f.read_bytes() for f in sorted(path.iterdir())} for path in paths]
    states = torch.random.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    first = merge(slug, paths, tmp_path / "a")
    assert [{f.name: f.read_bytes() for f in sorted(path.iterdir())} for path in paths] == before
    assert torch.equal(states[0], torch.random.get_rng_state())
    assert np.array_equal(states[1], np.random.get_state()[1])  # noqa: NPY002
    assert states[2] == random.getstate()
    torch.rand(5, generator=torch.Generator().manual_seed(1))
    assert torch.equal(logits(first), logits(merge(slug, paths, tmp_path / "b")))


@pytest.mark.parametrize("slug", SLUGS)
@pytest.mark.parametrize(
    ("other", "word"),
    [
        ({"hidden_size": 64}, "shape|hidden"),
        ({"num_layers": 3}, "missing|unexpected|layers"),
        ({"vocab_size": 80}, "vocab"),
    ],
)
def test_models_of_another_shape_are_refused(slug: str, other: dict[str, Any], word: str, tmp_path: Path) -> None:
    with pytest.raises(GnomonError, match=word):
        merge(slug, saved(tmp_path, model_of(), model_of(**other)), tmp_path / "out")


@pytest.mark.parametrize("slug", SLUGS)
def test_models_of_another_family_are_refused(slug: str, tmp_path: Path) -> None:
    with pytest.raises(GnomonError):
        merge(slug, saved(tmp_path, model_of(), model_of("gpt2")), tmp_path / "out")


@pytest.mark.parametrize("slug", SLUGS)
def test_values_that_are_not_finite_name_the_tensor(slug: str, tmp_path: Path) -> None:
    excused(slug, "finite")
    bad = model_of(move=1)
    with torch.no_grad():
        bad.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(GnomonError, match=r"layers\.1\.mlp\.up_proj\.weight.*finite"):
        merge(slug, saved(tmp_path, model_of(), bad), tmp_path / "out")


@pytest.mark.parametrize("slug", SLUGS)
def test_quantised_models_are_refused(slug: str, tmp_path: Path) -> None:
    excused(slug, "quantised")
    first, second = model_of(), model_of(move=1)
    paths = saved(tmp_path, first, second)
    call = call_of(slug, "merge")
    second.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    offered = {"model": first, "models": [second], "paths": paths, "out": tmp_path / "out", "seed": 0}
    text = (paths[1] / "config.json").read_text()
    (paths[1] / "config.json").write_text(text.rstrip()[:-1] + ', "quantization_config": {"quant_method": "gptq"}}')
    with pytest.raises(ModelError, match="quantised"):
        call(**{k: v for k, v in offered.items() if k in inspect.signature(call).parameters} | OPTIONS.get(slug, {}))


@pytest.mark.parametrize("slug", SLUGS)
def test_every_option_has_a_plain_type_and_a_default_or_a_row_here(slug: str) -> None:
    offered = {
        "model",
        "models",
        "paths",
        "out",
        "seed",
        "calibration",
        "tokenizer",
        "texts",
        "on_progress",
        "on_layer",
    }
    for name, parameter in inspect.signature(call_of(slug, "merge")).parameters.items():
        if name in offered:
            continue
        assert parameter.annotation is not inspect.Parameter.empty, name
        assert parameter.default is not inspect.Parameter.empty or name in OPTIONS.get(slug, {}), name


@pytest.mark.slow
@pytest.mark.parametrize("slug", SLUGS)
def test_a_merge_stage_of_a_recipe_runs_it(slug: str, tmp_path: Path) -> None:
    from gnomon.common.text import byte_tokenizer
    from gnomon.recipes.runner import run_recipe
    from gnomon.recipes.schema import load_recipe

    paths = [
        save_model(model_of(vocab_size=257, move=i), tmp_path / f"checkpoint-{i + 1}", byte_tokenizer()) for i in (0, 1)
    ]
    (tmp_path / "corpus.txt").write_text("the shadow of the gnomon tells the hour\n\n" * 200)
    recipe = {
        "name": "merging", "model": str(paths[0]), "data": {"corpus": str(tmp_path / "corpus.txt"), "context": 32},
        "stages": [{"merge": {"models": [str(paths[1])], "methods": [{"uses": slug, "with": OPTIONS.get(slug, {})}]}}],
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run_recipe(load_recipe(recipe), out=tmp_path / "run")
    found, first = load_model(tmp_path / "run" / "model"), load_model(paths[0])
    assert not torch.equal(found.lm_head.weight, first.lm_head.weight)


def test_unknown_exceptions_are_removed() -> None:
    known = set(SLUGS) | {"weight-matching"}
    assert {slug for slug, _ in EXCEPTIONS} | set(OPTIONS) <= known
