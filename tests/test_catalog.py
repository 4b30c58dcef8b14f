"""The catalog, and a walk over all cards: each names things that exist."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gnomon import catalog
from gnomon.claims.experiment import Experiment
from gnomon.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
CARDS = catalog.methods()


def _name(card: catalog.Card) -> str:
    return card.slug.replace("-", "_")


@pytest.mark.parametrize("card", CARDS, ids=lambda c: c.slug)
class TestEveryCard:
    def test_names_itself_after_its_file(self, card):
        pillar = ROOT / "src" / "gnomon" / card.pillar
        assert (pillar / f"{_name(card)}.toml").is_file()
        assert (pillar / f"{_name(card)}.py").is_file() or (pillar / _name(card) / "__init__.py").is_file()

    def test_entry_resolves_and_is_public(self, card):
        entry = catalog.load(card.slug)
        assert callable(entry)
        package = __import__(f"gnomon.{card.pillar}", fromlist=["x"])
        assert getattr(package, card.entry.partition(":")[2]) is entry

    def test_entry_is_documented(self, card):
        doc = catalog.load(card.slug).__doc__ or ""
        assert "Parameters\n" in doc, "numpy-style docstring"
        assert ">>>" in doc or "Examples\n" in doc, "one example"

    def test_recipe_hooks_resolve(self, card):
        for hook in ("groups", "fold", "check"):
            if hook in card.recipe:
                assert callable(catalog.resolve(card.recipe[hook]))

    def test_has_claims_that_resolve(self, card):
        assert card.claims, "a method without a claim"
        for claim in card.claims:
            assert claim.run.startswith(f"gnomon.claims.{_name(card)}:")
            assert isinstance(catalog.resolve(claim.run), Experiment)

    def test_has_a_test_and_a_changelog_line(self, card):
        assert list((ROOT / "tests" / card.pillar).glob(f"test_{_name(card)}*.py"))
        assert f"`{card.slug}`" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")

    def test_conflicts_are_symmetric(self, card):
        for other, reason in card.conflicts.items():
            assert reason
            assert card.slug in catalog.get(other).conflicts


def test_methods_filters_by_pillar_and_kind():
    assert {c.slug for c in catalog.methods(plugs="optimizer")} >= {"fira"}
    assert all(c.pillar == "compress" for c in catalog.methods(pillar="compress"))
    with pytest.raises(ConfigError, match=r"no pillar 'optm'.*Did you mean 'optim'"):
        catalog.methods(pillar="optm")
    with pytest.raises(ConfigError, match=r"no kind 'optimiser'.*Did you mean 'optimizer'"):
        catalog.methods(plugs="optimiser")


def test_search_needs_every_word_and_puts_names_first():
    assert catalog.search("fira")[0].slug == "fira"
    assert [c.slug for c in catalog.search("LOW-RANK fira")] == ["fira"]
    assert catalog.search("fira nosuchword") == []


def test_unknown_slug_names_the_nearest():
    with pytest.raises(ConfigError, match=r"no method 'fria'.*Did you mean 'fira'"):
        catalog.get("fria")


GOOD = """
slug = "x"
title = "X"
lets_you = "do x"
pillar = "optim"
plugs = "optimizer"
entry = "math:sqrt"
[paper]
title = "X"
"""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slug = ", "not valid TOML"),
        (GOOD.replace('plugs = "optimizer"', 'plugs = "optimiser"'), "Did you mean 'optimizer'"),
        (GOOD.replace('pillar = "optim"', 'pillar = "opt"'), "Did you mean 'optim'"),
        (GOOD.replace('title = "X"\nlets', "lets"), "'title' is missing"),
        ("slugg = 1\n" + GOOD, "unknown key 'slugg'.*Did you mean 'slug'"),
        (GOOD + "pages = 3", "missing or unknown key"),
        (GOOD + "[recipe]\nstage = []", "unknown key 'recipe.stage'"),
    ],
)
def test_a_bad_card_is_refused_with_the_reason(tmp_path, text, message):
    path = tmp_path / "x.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        catalog.read_card(path)


def test_a_good_card_is_read(tmp_path):
    path = tmp_path / "x.toml"
    path.write_text(GOOD)
    assert catalog.read_card(path).entry == "math:sqrt"


@pytest.mark.parametrize("target", ["math", "math:nothing", ":sqrt"])
def test_resolve_refuses_what_is_no_entry(target):
    with pytest.raises(ConfigError):
        catalog.resolve(target)


def test_neither_the_library_nor_its_catalog_imports_torch():
    heavy = "('torch', 'numpy', 'transformers')"
    code = f"import gnomon, sys; gnomon.catalog.methods(); print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_lazy_names():
    import gnomon

    assert gnomon.load_model.__name__ == "load_model"
    assert {"load_model", "save_model", "run", "catalog"} <= set(dir(gnomon))
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = gnomon.nothing_like_it
