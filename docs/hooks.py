"""Makes one page per method from its card, its docstrings and the ledger of claims, and the index of methods."""

from __future__ import annotations

import importlib
import inspect
import logging
from functools import lru_cache
from pathlib import Path
from typing import Any

import docstring_parser
from mkdocs.structure.files import File, Files

from gnomon import catalog
from gnomon.catalog import Card
from gnomon.recipes.options import OFFERED, call_of, stages_of
from gnomon.reports.claim_pictures import claim_picture
from gnomon.reports.ledger import Entry, escaped, read_ledger

logging.getLogger("matplotlib").setLevel(logging.WARNING)
LEDGER = Path(__file__).resolve().parents[1] / "claims" / "ledger.json"
CONTRIBUTING = LEDGER.parents[1] / "CONTRIBUTING.md"


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages."""
    cards = catalog.methods()
    pages = {"methods/index": _index(cards), "guide/add-a-method": CONTRIBUTING.read_text(encoding="utf-8")}
    pages |= {f"methods/{card.slug}": _page(card) for card in cards}
    for name, text in pages.items():
        files.append(File.generated(config, f"{name}.md", content=text))
    return files


def _index(cards: list[Card]) -> str:
    lines = ["# Methods", ""]
    for pillar in catalog.PILLARS:
        rows = [c for c in cards if c.pillar == pillar]
        if rows:
            lines += [f"## {pillar}", "", "| method | kind | lets you |", "|---|---|---|"]
            lines += [f"| [{c.title}]({c.slug}.md) | {c.plugs} | {c.lets_you} |" for c in rows] + [""]
    return "\n".join(lines)


def _page(card: Card) -> str:
    module_name, _, name = card.entry.partition(":")
    module = importlib.import_module(module_name)
    parts = [
        f"# {card.title}",
        card.lets_you[0].upper() + card.lets_you[1:] + ".",
        _card_table(card, name),
        inspect.cleandoc(module.__doc__ or ""),
        "\n".join(f"- Not together with `{other}`: {why}" for other, why in card.conflicts.items()),
        _claims(card),
        f"## `{name}`",
        _object(getattr(module, name)),
        _in_recipes(card, getattr(module, name)),
        _other_names(module, name),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _card_table(card: Card, name: str) -> str:
    paper = card.paper
    link = f" ([arXiv {paper.arxiv}](https://arxiv.org/abs/{paper.arxiv}))" if paper.arxiv else ""
    code = f"[{paper.code}](https://github.com/{paper.code})" if paper.code.count("/") == 1 else paper.code
    rows = {
        "kind": card.plugs,
        "call": f"`from gnomon.{card.pillar} import {name}`",
        "in recipes": ", ".join(f"`{stage}`" for stage in stages_of(card)) or "no stage",
        "paper": f"{paper.title}{link}{', ' + paper.venue if paper.venue else ''}",
        "authors' code": code or "none released",
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())])


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _object(found: Any) -> str:
    """A signature, the description, a table of the parameters, and the rest of a numpy docstring."""
    try:
        signature = str(inspect.signature(found))
    except (TypeError, ValueError):
        signature = "(...)"
    parsed = docstring_parser.parse(inspect.getdoc(found) or "", style=docstring_parser.DocstringStyle.NUMPYDOC)
    parts = [f"```text\n{getattr(found, '__name__', found)}{signature}\n```", parsed.short_description or ""]
    parts.append(parsed.long_description or "")
    options = [p for p in parsed.params if p.args[0] in ("param", "attribute")]
    if options:
        rows = [
            f"| `{p.arg_name}` | {_cell(p.type_name or '')} | {_cell(p.description or '')} |" for p in options
        ]  # fmt: skip
        parts.append("\n".join(["| option | type and default | meaning |", "|---|---|---|", *rows]))
    if parsed.returns is not None:
        told = parsed.returns.description or ""
        parts.append(f"Returns {_cell(parsed.returns.type_name or '')}{': ' + _cell(told) if told else ''}")
    if parsed.raises:
        parts.append("\n".join(f"- Raises `{r.type_name}`: {_cell(r.description or '')}" for r in parsed.raises))
    parts += [f"```python\n{e.description or e.snippet or ''}\n```" for e in parsed.examples]
    return "\n\n".join(part for part in parts if part)


def _in_recipes(card: Card, entry: Any) -> str:
    """The options a recipe can give, where it calls something else than the entry."""
    parts = []
    for stage in stages_of(card):
        call = call_of(card.slug, stage)
        if call is not entry:
            names = [n for n in inspect.signature(call).parameters if n not in OFFERED and n != "kwargs"]
            parts.append(f"### In a `{stage}` stage\n\n{_object(call)}\n\nOptions of `with:`: "
                         + (", ".join(f"`{n}`" for n in names) or "none") + ".")  # fmt: skip
    return "\n\n".join(parts)


def _other_names(module: Any, name: str) -> str:
    rows = []
    for other in getattr(module, "__all__", ()):
        if other != name:
            doc = inspect.getdoc(getattr(module, other, None)) or ""
            rows.append(f"| `{other}` | {_cell(doc.splitlines()[0]) if doc else ''} |")
    return "\n".join(["## Also here", "", "| name | does |", "|---|---|", *rows]) if rows else ""


@lru_cache(maxsize=1)
def _entries() -> tuple[Entry, ...]:
    return read_ledger(LEDGER).entries if LEDGER.is_file() else ()


def _claims(card: Card) -> str:
    if not card.claims:
        return ""
    parts = ["## Claims", "| claim | in the paper | measured here | verdict |\n|---|---|---|---|"]
    pictures = []
    for claim in card.claims:
        found = [e for e in _entries() if (e.slug, e.id) == (card.slug, claim.id)]
        for entry in found or [None]:
            measured, verdict = "not yet", ""
            if entry is not None:
                arms = (
                    f"{escaped(a)} {mean}" + (f" ({span})" if span else "") for a, mean, span, _ in entry.measured()
                )
                measured = "<br>".join(arms) + f"<br>{escaped(entry.unit)}, scale {entry.scale}"
                verdict = f"**{entry.verdict}**"
                drawn = claim_picture(entry)
                if drawn is not None:
                    pictures.append(
                        f"![{escaped(drawn.alt)}]({drawn.uri})\n\n*{escaped(drawn.title)} (scale {entry.scale}). "
                        f"{drawn.caption}*"
                    )
            parts[1] += f"\n| {escaped(claim.says)} (`{claim.id}`) | {escaped(claim.paper)} | {measured} | {verdict} |"
    seeds = "In brackets: the range over the seeds. Measure it again: " + f"`gnomon claims run {card.slug}`."
    return "\n\n".join([*parts, seeds, *pictures])
