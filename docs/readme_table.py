"""Writes the method table of README.md from the cards, or (--check) tells whether it is up to date."""

from __future__ import annotations

import sys
from pathlib import Path

from gnomon import catalog

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- methods: begin -->", "<!-- methods: end -->"


def table() -> str:
    """Return the Markdown table of all methods."""
    lines = ["| method | kind | lets you | paper |", "|---|---|---|---|"]
    for card in catalog.methods():
        link = f"[{card.paper.arxiv}](https://arxiv.org/abs/{card.paper.arxiv})" if card.paper.arxiv else ""
        paper = ", ".join(part for part in (link, card.paper.venue) if part)
        lines.append(f"| `{card.slug}` | {card.plugs} | {card.lets_you} | {paper} |")
    return "\n".join(lines)


def main() -> None:
    """Rewrite or check the table."""
    text = README.read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    wanted = f"{head}{BEGIN}\n{table()}\n{END}{tail}"
    if "--check" in sys.argv:
        if wanted != text:
            sys.exit("README.md: the method table differs from the cards. Run: make table")
    else:
        README.write_text(wanted, encoding="utf-8")


if __name__ == "__main__":
    main()
