"""The ledger of claims as pages: what each paper says, what was measured here, and the verdict computed from both."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gnomon.common.files import write_text
from gnomon.reports import words
from gnomon.reports._fields import Fields, read_object
from gnomon.reports.page import Bar, bar, environment, machine_rows, reach

__all__ = ["VERDICTS", "Entry", "Ledger", "Relation", "read_ledger", "write_ledger"]

VERDICTS = {
    "reproduced": "the interval over the seeds clears the declared margin",
    "same direction": "the interval clears zero, but not the margin",
    "not visible at this scale": "the interval holds zero",
    "contradicted": "the interval lies on the other side of zero",
}


@dataclass(frozen=True)
class Relation:
    """One declared relation between arms; a positive `gap` lies in the direction of the claim."""

    text: str
    gap: float | None
    low: float | None
    high: float | None
    margin: float | None
    verdict: str

    @property
    def bar(self) -> Bar | None:
        """Where the interval stands, with the declared margin."""
        scale = reach([self.low, self.gap, self.high, self.margin])
        return bar(self.low, self.gap, self.high, scale, self.margin or None)


@dataclass(frozen=True)
class Entry:
    """One claim: what the paper says and what its experiment measured, arm -> seed -> value."""

    slug: str
    id: str
    says: str
    paper_figure: str
    paper: Mapping[str, float]
    unit: str
    scale: str
    arms: Mapping[str, Mapping[str, float]]
    relations: tuple[Relation, ...]
    verdict: str
    seconds: float | None
    environment: Mapping[str, Any]
    gnomon: str
    run_at: str

    def measured(self) -> list[tuple[str, str, str, str]]:
        """Return (arm, mean, range over the seeds, the paper's figure) as texts for each arm."""
        rows = []
        for arm, seeds in self.arms.items():
            values = list(seeds.values())
            mean = sum(values) / len(values) if values else None
            span = words.between(min(values), max(values)) if len(values) > 1 else ""
            rows.append((arm, words.figure(mean), span, words.figure(self.paper[arm]) if arm in self.paper else ""))
        return rows

    @property
    def seeds(self) -> list[str]:
        """The seeds of all arms, in order of appearance."""
        return list(dict.fromkeys(seed for seeds in self.arms.values() for seed in seeds))


@dataclass(frozen=True)
class Ledger:
    """All claims that were run, sorted by method."""

    entries: tuple[Entry, ...]
    odd: tuple[str, ...]

    @property
    def machines(self) -> list[tuple[list[tuple[str, str]], int]]:
        """The environments the claims were measured in, as rows of name and text, with the number of claims."""
        found: list[tuple[list[tuple[str, str]], int]] = []
        for entry in self.entries:
            rows = machine_rows(entry.environment)
            place = next((i for i, (known, _) in enumerate(found) if known == rows), None)
            if place is None:
                found.append((rows, 1))
            else:
                found[place] = (rows, found[place][1] + 1)
        return [(rows, number) for rows, number in found if rows]

    @property
    def counts(self) -> list[tuple[str, int]]:
        """How often each verdict was given: the four known ones first, then any other that occurs."""
        found = Counter(entry.verdict or "no verdict" for entry in self.entries)
        return [(verdict, found.pop(verdict, 0)) for verdict in VERDICTS] + list(found.items())


def read_ledger(ledger_json: str | Path) -> Ledger:
    """Read a ledger of claims.

    Parameters
    ----------
    ledger_json : str or Path
        The file that `gnomon claims run --all` wrote.

    Returns
    -------
    Ledger

    Raises
    ------
    DataError
        When the file is missing, is no JSON, or its format is unknown.
    """
    raw = read_object(
        Path(ledger_json),
        writer="gnomon claims run --all",
        again="Run `gnomon claims run --all` to write it anew.",
    )
    odd: list[str] = []
    fields = Fields(raw, "", odd)
    common = fields.child("environment").raw
    entries = sorted((_entry(entry, common) for entry in fields.children("entries")), key=lambda entry: entry.slug)
    return Ledger(tuple(entries), tuple(odd))


def _entry(fields: Fields, common: Mapping[str, Any]) -> Entry:
    own = fields.child("environment")
    arms = fields.child("arms")
    relations = [
        Relation(
            text=relation.text("text"),
            gap=relation.number("gap"),
            low=relation.number("low"),
            high=relation.number("high"),
            margin=relation.number("margin"),
            verdict=relation.text("verdict"),
        )
        for relation in fields.children("relations")
    ]
    return Entry(
        slug=fields.text("slug"),
        id=fields.text("id"),
        says=fields.text("says"),
        paper_figure=fields.text("paper_figure"),
        paper=fields.numbers("paper"),
        unit=fields.text("unit"),
        scale=fields.text("scale"),
        arms={arm: arms.numbers(arm) for arm in arms.raw},
        relations=tuple(relations),
        verdict=fields.text("verdict"),
        seconds=fields.number("seconds"),
        environment=own.raw or common,
        gnomon=fields.text("gnomon") or own.text("gnomon"),
        run_at=fields.text("run_at"),
    )


def write_ledger(ledger_json: str | Path, out_folder: str | Path) -> tuple[Path, Path]:
    """Write the ledger of claims as Markdown and as one self-contained HTML page.

    Parameters
    ----------
    ledger_json : str or Path
        The file that `gnomon claims run --all` wrote.
    out_folder : str or Path
        Where ``ledger.md`` and ``ledger.html`` go; created when missing.

    Returns
    -------
    tuple of Path
        The Markdown file, the HTML page.

    Raises
    ------
    DataError
        When the file is missing, is no JSON, or its format is unknown.

    Examples
    --------
    >>> write_ledger("claims/ledger.json", "claims")  # doctest: +SKIP
    (PosixPath('claims/ledger.md'), PosixPath('claims/ledger.html'))
    """
    ledger = read_ledger(ledger_json)
    folder = Path(out_folder)
    page = environment().get_template("ledger.html").render(
        ledger=ledger,
        summary=summary(ledger),
        verdicts=VERDICTS,
        source=Path(ledger_json).name,
    )  # fmt: skip
    texts = {folder / "ledger.md": markdown(ledger), folder / "ledger.html": page}
    for path, text in texts.items():
        write_text(path, text)
    markdown_path, html_path = texts
    return markdown_path, html_path


def summary(ledger: Ledger) -> str:
    """Say in one sentence how the claims came out."""
    total = len(ledger.entries)
    if not total:
        return "No claim was run yet."
    told = words.listing(f"{number} {verdict}" for verdict, number in ledger.counts if number)
    methods = len({entry.slug for entry in ledger.entries})
    claims, methods_ = ("claim" if total == 1 else "claims"), ("method" if methods == 1 else "methods")
    return f"{total} {claims} of {methods} {methods_} measured again: {told}."


def escaped(text: str) -> str:
    """Make a text from a ledger safe in a Markdown table: one line, nothing in it is markup."""
    line = " ".join(text.split())
    line = re.sub(r"([\\`*_\[\]|~$#])", r"\\\1", line)
    return line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def markdown(ledger: Ledger) -> str:
    """Write the ledger as Markdown: one row for each claim."""
    lines = [
        "# The ledger of claims",
        "",
        f"{escaped(summary(ledger))} Verdicts are computed from the seeds, never written by hand:",
        "",
        *(f"- **{verdict}**: {meaning}" for verdict, meaning in VERDICTS.items()),
        "",
        "A gap above zero lies in the direction of the claim. Figures in brackets: range over the seeds for an arm, "
        "bootstrap interval for a gap.",
        "",
        "| Method | Claim | Paper | Scale | Measured here | Gap | Verdict |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [_markdown_row(entry) for entry in ledger.entries]
    lines += [""]
    for rows, number in ledger.machines:
        claims = "" if len(ledger.machines) == 1 else f" ({number} claim{'' if number == 1 else 's'})"
        lines += [f"Measured with: {', '.join(f'{escaped(name)} {escaped(text)}' for name, text in rows)}{claims}.", ""]
    lines += [] if ledger.machines else ["The machine was not recorded.", ""]
    lines += [f"- Left out: {escaped(note)}" for note in ledger.odd]
    return "\n".join(lines).rstrip() + "\n"


def _markdown_row(entry: Entry) -> str:
    measured = [f"{escaped(arm)} {mean}" + (f" ({span})" if span else "") for arm, mean, span, _ in entry.measured()]
    unit = f"<br>{escaped(entry.unit)}" if entry.unit else ""
    gaps = [
        f"{escaped(relation.text)}: {words.signed(relation.gap)}"
        + (f" ({span})" if (span := words.between(relation.low, relation.high, sign=True)) else "")
        for relation in entry.relations
    ]
    cells: Sequence[str] = (
        escaped(entry.slug) or words.NOT_RECORDED,
        escaped(entry.says) or escaped(entry.id),
        escaped(entry.paper_figure),
        escaped(entry.scale),
        ("<br>".join(measured) or "not measured") + unit,
        "<br>".join(gaps) or words.NOT_RECORDED,
        f"**{escaped(entry.verdict)}**" if entry.verdict else "no verdict",
    )
    return f"| {' | '.join(cells)} |"
