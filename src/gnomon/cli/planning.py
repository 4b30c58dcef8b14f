"""``gnomon plan``: what every planner of the catalog says to one model, or to a table of runs.

A planner joins through the table ``[verbs]`` of its card: ``plan`` for a model, ``fit`` and ``compare`` for a table of
runs. Such a function is called with those of the offered values that it takes by name: ``model`` (non-embedding
parameters as a float, or a transformers model without memory for its weights), ``tokens``, ``seq_len``,
``batch_tokens``, ``micro_batch``, ``devices``, ``law``, ``loss``, ``runs``. A parameter without a default must be
given, or the planner is left out. It returns a section: ``title``; ``rows``, pairs of label and text; ``tables``,
each with ``title``, ``columns`` and ``rows``; ``notes``; ``data``, JSON-plain, which is what ``--json`` prints.
"""

from __future__ import annotations

import inspect
import json
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gnomon import catalog
from gnomon.errors import ConfigError, GnomonWarning, nearest

__all__ = ["parse_count", "parse_model", "plan_command"]

_FACTORS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}
_COUNT = re.compile(
    r"^(?P<number>[0-9][0-9_]*(?:\.[0-9]*)?(?:e[+-]?[0-9]+)?|\.[0-9]+)(?P<unit>[kmbgt]?)$", re.IGNORECASE
)
_OPTIONS = {"model": "MODEL", "tokens": "--tokens", "runs": "--fit", "devices": "--devices"}


def parse_count(text: str, name: str) -> float:
    """Read ``7e9``, ``7B``, ``1.4T``, ``500_000``.

    Raises
    ------
    ConfigError
        When it is no positive number.
    """
    found = _COUNT.match(text.strip())
    value = float(found["number"].replace("_", "")) * _FACTORS[found["unit"].lower()] if found else math.nan
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{name} {text!r} is no positive number. Write it as 7e9, 7B, 1.4T or 500_000.")
    return value


def parse_model(text: str) -> Any:
    """Read MODEL: a number of parameters, ``architecture:size`` as in recipes, or a folder or hub id.

    Returns
    -------
    float or PreTrainedModel
        The model is built without memory for its weights.

    Raises
    ------
    ConfigError, ModelError
        When there is no such architecture, size or model.
    """
    if _COUNT.match(text.strip()):
        return parse_count(text, "MODEL")
    if re.match(r"^[-+]?(?:[0-9.]|nan$|inf)", text.strip(), re.IGNORECASE) and not Path(text).exists():
        raise ConfigError(
            f"MODEL {text!r} is no positive number, nor a folder. Write the number as 7e9 or 7B, or give "
            "architecture:size, a folder or a hub id."
        )
    from gnomon.cli.running import quiet_libraries
    from gnomon.common.models import ARCHITECTURES
    from gnomon.recipes.prepare import build_model
    from gnomon.recipes.schema import SIZES, ModelSpec

    quiet_libraries()
    architecture, colon, size = text.partition(":")
    if colon and "/" not in text and not Path(text).exists():
        if architecture not in ARCHITECTURES:
            hint = nearest(architecture, ARCHITECTURES, noun="architecture")
            raise ConfigError(f"there is no architecture {architecture!r}. {hint}")
        if size not in SIZES:
            raise ConfigError(f"there is no size {size!r}. {nearest(size, SIZES, noun='size')}")
        spec = ModelSpec(architecture=architecture, size=size)
        return build_model(spec, vocab_size=spec.vocab_size, context=2, seed=0, meta=True)
    return build_model(ModelSpec(path=text), vocab_size=1, context=1, seed=0, meta=True)


def plan_command(
    model: str,
    *,
    tokens: str | None,
    batch: str | None,
    fit: Path | None,
    compare: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Carry out ``gnomon plan``.

    Parameters
    ----------
    model : str
        MODEL, or "" for a table of runs alone.
    tokens, batch : str or None
        Counts as `parse_count` reads them.
    fit, compare : Path or None
        Tables of runs.
    as_json : bool
        Print one object: verb -> slug -> data.
    **options
        Further values that planners may take by name; None where not given.

    Raises
    ------
    ConfigError
        When nothing was asked for, or no planner can answer with what was given.
    """
    if not model and fit is None and compare is None:
        raise ConfigError(
            "Plan what? Give a model and tokens (gnomon plan 7B --tokens 1.4T), or a table of runs (--fit RUNS.csv, "
            "--compare RUNS.csv)."
        )
    if not model and (tokens is not None or batch is not None):
        raise ConfigError("--tokens and --batch go with a model: gnomon plan 7B --tokens 1.4T.")
    common = {name: value for name, value in options.items() if value is not None}
    asked: list[tuple[str, dict[str, Any]]] = []
    if compare is not None:
        asked.append(("compare", {**common, "runs": compare}))
    if fit is not None:
        asked.append(("fit", {**common, "runs": fit}))
    if model:
        offered = {**common, "model": parse_model(model)}
        offered |= {} if tokens is None else {"tokens": parse_count(tokens, "--tokens")}
        offered |= {} if batch is None else {"batch_tokens": parse_count(batch, "--batch")}
        offered |= {} if fit is None else {"runs": fit}
        asked.append(("plan", offered))
    answers = {verb: _ask(verb, offered) for verb, offered in asked}
    if as_json:
        print(json.dumps({verb: {s: part["data"] for s, part in parts.items()} for verb, parts in answers.items()}))
        return
    sections = [section for parts in answers.values() for section in parts.values()]
    print("\n\n".join("\n".join(_lines(section)) for section in sections))


def _ask(verb: str, offered: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Call a verb of every planner that can answer; return slug -> section."""
    answers: dict[str, dict[str, Any]] = {}
    lacking: dict[str, str] = {}
    for card in catalog.methods(plugs="planner"):
        if verb not in card.verbs:
            continue
        function = catalog.resolve(card.verbs[verb])
        taken = inspect.signature(function).parameters
        missing = [n for n, p in taken.items() if p.default is inspect.Parameter.empty and n not in offered]
        if missing:
            lacking[card.slug] = ", ".join(_OPTIONS.get(n, f"--{n.replace('_', '-')}") for n in missing)
            continue
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            section = function(**{name: value for name, value in offered.items() if name in taken})
        told = [str(w.message) for w in caught if issubclass(w.category, GnomonWarning)]
        section["notes"] = list(dict.fromkeys([*told, *section["notes"]]))
        answers[card.slug] = section
    if not answers:
        needs = "; ".join(f"{slug} needs {what}" for slug, what in lacking.items()) or "no planner has this verb"
        raise ConfigError(f"gnomon plan cannot answer: {needs}. See gnomon plan --help.")
    return answers


def _lines(section: Mapping[str, Any]) -> list[str]:
    width = max((len(label) for label, _ in section["rows"]), default=0)
    lines = [section["title"], *(f"  {label:<{width}}  {text}" for label, text in section["rows"])]
    for table in section.get("tables", ()):
        lines += ["", f"  {table['title']}", *_table(table["columns"], table["rows"])]
    return lines + [f"note: {note}" for note in section["notes"]]


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Left-align the first column, right-align figures."""
    widths = [max(len(row[i]) for row in (columns, *rows)) for i in range(len(columns))]
    figures = [i > 0 and all(re.match(r"^[-+.0-9e,]+$", row[i]) for row in rows) for i in range(len(columns))]

    def line(row: Sequence[str]) -> str:
        cells = (
            f"{cell:>{w}}" if right else f"{cell:<{w}}" for cell, w, right in zip(row, widths, figures, strict=True)
        )
        return "    " + "  ".join(cells).rstrip()

    return [line(columns), *map(line, rows)]
