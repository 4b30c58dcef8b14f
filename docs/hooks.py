"""Makes one page per method from its card and its module's docstring, and the index of methods."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from mkdocs.structure.files import File, Files

from gnomon import catalog
from gnomon.catalog import Card


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages."""
    cards = catalog.methods()
    for name, text in [("index", _index(cards)), *((card.slug, _page(card)) for card in cards)]:
        files.append(File.generated(config, f"methods/{name}.md", content=text))
    return files


def _index(cards: list[Card]) -> str:
    rows = "\n".join(f"| [{c.title}]({c.slug}.md) | {c.pillar} | {c.plugs} | {c.lets_you} |" for c in cards)
    return f"# Methods\n\n| method | pillar | kind | lets you |\n|---|---|---|---|\n{rows}\n"


def _page(card: Card) -> str:
    module_name, _, name = card.entry.partition(":")
    module = importlib.import_module(module_name)
    entry = getattr(module, name)
    paper = card.paper
    link = f" ([arXiv {paper.arxiv}](https://arxiv.org/abs/{paper.arxiv}))" if paper.arxiv else ""
    claims = "\n".join(
        f"| `{c.id}` | {c.says} | {c.paper} | `gnomon claims run {card.slug} --claim {c.id}` |" for c in card.claims
    )
    conflicts = "\n".join(f"- not together with `{other}`: {why}" for other, why in card.conflicts.items())
    return f"""# {card.title}

{card.lets_you[0].upper() + card.lets_you[1:]}.

| | |
|---|---|
| kind | {card.plugs} |
| call | `from gnomon.{card.pillar} import {name}` |
| paper | {paper.title}{link}{", " + paper.venue if paper.venue else ""} |

{inspect.cleandoc(module.__doc__ or "")}

{conflicts}

## Claims

| claim | says | in the paper | measure it |
|---|---|---|---|
{claims}

## `{name}`

```text
{name}{inspect.signature(entry)}

{inspect.getdoc(entry) or ""}
```
"""
