"""Printing cards."""

from __future__ import annotations

import json
import shutil
import textwrap
from dataclasses import asdict

from gnomon import catalog
from gnomon.errors import ConfigError, nearest

__all__ = ["print_card", "print_methods"]


def print_methods(text: str, pillar: str | None, plugs: str | None, as_json: bool) -> None:
    """Print one line per method."""
    chosen = catalog.methods(pillar=pillar, plugs=plugs)
    if text:
        found = {card.slug for card in catalog.search(text)}
        chosen = [card for card in chosen if card.slug in found]
        if not chosen:
            hint = nearest(text, [c.slug for c in catalog.methods()], noun="method")
            raise ConfigError(f"No method matches {text!r}. {hint}")
    if as_json:
        print(json.dumps([asdict(card) for card in chosen], indent=1))
        return
    width = max((len(card.slug) for card in chosen), default=0)
    kind = max((len(card.plugs) for card in chosen), default=0)
    room = max(30, shutil.get_terminal_size().columns - width - kind - 4)
    for card in chosen:
        first, *rest = textwrap.wrap(card.lets_you, room) or [""]
        print(f"{card.slug:<{width}}  {card.plugs:<{kind}}  {first}")
        for line in rest:
            print(" " * (width + kind + 4) + line)


def print_card(slug: str, as_json: bool) -> None:
    """Print everything a card says."""
    card = catalog.get(slug)
    if as_json:
        print(json.dumps(asdict(card), indent=1))
        return
    module, _, name = card.entry.partition(":")
    paper = card.paper
    source = ", ".join(p for p in (f"arXiv {paper.arxiv}" if paper.arxiv else "", paper.venue) if p)
    print(f"{card.title} ({card.slug})")
    print(f"  lets you   {card.lets_you}")
    print(f"  kind       {card.plugs}, pillar {card.pillar}")
    print(f"  call       from {module} import {name}")
    if paper.title:
        print(f"  paper      {paper.title}{f' ({source})' if source else ''}")
    if paper.code:
        print(f"  code       {paper.code}")
    if card.recipe.get("from_scratch"):
        print("  recipes    only where training starts at random weights")
    for other, reason in card.conflicts.items():
        print(f"  not with   {other}: {reason}")
    if card.baselines:
        print(f"  baselines  {', '.join(card.baselines)} (recipes use them by these names)")
    for claim in card.claims:
        print(f"  claim      {claim.id}: {claim.says}")
        print(f"             paper: {claim.paper}")
        print(f"             gnomon claims run {card.slug} --claim {claim.id}")
