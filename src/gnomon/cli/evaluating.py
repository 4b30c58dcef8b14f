"""``gnomon evaluate``: the catalog's tasks on a model through Inspect, or on a file of predictions."""

from __future__ import annotations

import contextlib
import inspect
import json
import re
import sys
import time
import typing
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gnomon import catalog
from gnomon.catalog import Card
from gnomon.cli.evaluation_results import Result, counts_of, facts_of, log_facts, remarks_on, show
from gnomon.errors import ConfigError, GnomonWarning, ModelError, nearest

__all__ = ["Request", "run_command"]

RETRIES = 6
"""Of one request to a server, with waits of 3, 6, 12 ... seconds, before the evaluation stops."""


@dataclass
class Request:
    """What the command line asks for."""

    task: str = ""
    model: str = ""
    data: Sequence[str] = ()
    run: Path | None = None
    model_args: Sequence[str] = ()
    base_url: str | None = None
    options: Sequence[str] = ()
    limit: int | None = None
    epochs: int | None = None
    out: Path | None = None
    quiet: bool = False
    as_json: bool = False


def run_command(request: Request) -> None:
    """Carry out ``gnomon evaluate``."""
    if not request.task:
        _list(request.as_json)
        return
    card = _card(request.task)
    if bool(request.model) == bool(request.run):
        offline = f", or --run FILE to score predictions of {card.slug}" if "score" in card.verbs else ""
        raise ConfigError(
            f"{'Give either --model or --run, not both' if request.model else 'What is to be evaluated'}? "
            f"--model NAME runs {card.slug} on a model{offline}."
        )
    if request.run is not None:
        _score(card, request, request.run)
    elif card.plugs != "task":
        raise ConfigError(f"{card.slug} scores files of predictions only; it runs no model. Give --run FILE.")
    else:
        _evaluate(card, request)


def _tasks() -> list[Card]:
    return [card for card in catalog.methods() if card.plugs == "task" or "score" in card.verbs]


def _list(as_json: bool) -> None:
    cards = _tasks()
    if as_json:
        print(json.dumps([{"slug": c.slug, "lets_you": c.lets_you, "offline": "score" in c.verbs} for c in cards]))
        return
    width = max((len(card.slug) for card in cards), default=0)
    for card in cards:
        print(f"{card.slug:<{width}}  {card.lets_you}")
    print("\ngnomon evaluate TASK --model NAME --data FILE   or   gnomon evaluate TASK --run PREDICTIONS --data FILE")


def _card(name: str) -> Card:
    slugs = {card.slug: card for card in _tasks()}
    slug = name.replace("_", "-")
    if slug not in slugs:
        raise ConfigError(f"There is no task {name!r}. {nearest(slug, slugs, noun='task')}")
    return slugs[slug]


def _pairs(texts: Sequence[str], flag: str) -> dict[str, Any]:
    import yaml

    found: dict[str, Any] = {}
    for text in texts:
        key, sign, value = text.partition("=")
        if not sign or not key.strip():
            raise ConfigError(f"{flag} {text!r}: write it as key=value.")
        try:
            found[key.strip().replace("-", "_")] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"{flag} {text!r}: the value is no YAML ({error}).") from error
    return found


def _options(call: Callable[..., Any], request: Request, taken: Sequence[str]) -> dict[str, Any]:
    """Read ``-T key=value`` and --data into the arguments of a task or a scorer, checked against its signature."""
    from pydantic import TypeAdapter, ValidationError

    parameters = inspect.signature(call).parameters
    hints = typing.get_type_hints(inspect.unwrap(call))
    options = _pairs(request.options, "-T")
    if request.data:
        options["data"] = request.data[0] if len(request.data) == 1 else list(request.data)
    allowed = [name for name in parameters if name not in taken]
    for name, value in options.items():
        if name not in allowed:
            shown = [n for n in allowed if n != "data"]
            raise ConfigError(f"-T {name}: there is no such option. {nearest(name, shown, noun='option')}")
        several = re.search(r"\b(list|Sequence|tuple)\[", str(hints.get(name)))
        if several and isinstance(value, str) and name != "data":
            options[name] = value = [part.strip() for part in value.split(",")]
        with contextlib.suppress(NameError, TypeError):
            try:
                TypeAdapter(hints.get(name, Any)).validate_python(value)
            except ValidationError as error:
                reasons = "; ".join(dict.fromkeys(e["msg"] for e in error.errors()))
                raise ConfigError(f"-T {name}={value}: {reasons}.") from error
    missing = [n for n in allowed if n not in options and parameters[n].default is inspect.Parameter.empty]
    if missing:
        flag = "--data FILE" if missing[0] == "data" else f"-T {missing[0]}=..."
        raise ConfigError(f"{flag} is missing, which this task needs.")
    return options


@contextlib.contextmanager
def _noted(notes: list[str]) -> Iterator[None]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", GnomonWarning)
        yield
    for warning in caught:
        if issubclass(warning.category, GnomonWarning):
            notes.append(str(warning.message))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


# -- a file of predictions ---------------------------------------------------------------------------------------------


def _score(card: Card, request: Request, run: Path) -> None:
    if "score" not in card.verbs:
        raise ConfigError(f"{card.slug} cannot score a file of predictions; it has no offline scorer. Give --model.")
    for name in ("limit", "epochs", "base_url", "model_args"):
        if getattr(request, name):
            flag = "--model-" + name.removeprefix("model_").replace("_", "-") if "_" in name else f"--{name}"
            flag = {"args": "--model-arg"}.get(name.removeprefix("model_"), flag)
            raise ConfigError(f"{flag} goes with --model; a file of predictions is scored as a whole.")
    call = catalog.resolve(card.verbs["score"])
    options = _options(call, request, ("run",))
    started, notes = time.monotonic(), list[str]()
    with _noted(notes):
        report = call(run, **options)
    result = Result(report.figures, report.counts, report.baselines, [*notes, *report.notes])
    facts = facts_of(card, options, result, started)
    facts["predictions"] = {"file": str(run), "sha256": _sha256([run])}
    facts["data"] = {"source": ", ".join(_files(options)), "sha256": _sha256(_files(options))}
    if request.out is not None:
        with _folder(request.out, card.slug, facts["task"] | {"run": facts["predictions"]["sha256"]}) as store:
            store.write_run(facts)
    show(card, result, facts, str(run), as_json=request.as_json)


def _files(options: Mapping[str, Any]) -> list[str]:
    data = options.get("data") or []
    return [data] if isinstance(data, str) else [str(item) for item in data]


def _sha256(files: Sequence[str | Path]) -> str:
    from gnomon.common.rows import file_sha256

    present = [file for file in files if Path(file).is_file()]
    return file_sha256(*present) if present else ""


# -- a model -----------------------------------------------------------------------------------------------------------


def _evaluate(card: Card, request: Request) -> None:
    from gnomon.common.inspect_models import open_model
    from gnomon.common.tasks import INSTALL, failure_of, inspect_installed, log_figures, read_log

    if not inspect_installed():
        raise ConfigError(f"{card.slug} runs on Inspect: {INSTALL}")
    for name, value in (("--limit", request.limit), ("--epochs", request.epochs)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} {value}: allowed is 1 or more.")
    from gnomon.cli.running import quiet_libraries

    quiet_libraries()
    entry = catalog.load(card.slug)
    options = _options(entry, request, ())
    arguments = _pairs(request.model_args, "--model-arg")
    notes: list[str] = []
    with _noted(notes):
        task = entry(**options)
    model = open_model(request.model, base_url=request.base_url, args=arguments)
    identity = {
        "task": {"slug": card.slug, "options": options, "version": task.version},
        "data_sha256": (task.metadata or {}).get("data_sha256", ""),
        "model": {
            "name": request.model,
            "args": _without_secrets(arguments),
            "base_url": request.base_url,
            "files": _state_of(request.model),
        },
        "limit": request.limit,
        "epochs": request.epochs,
    }
    started = time.monotonic()
    with _folder(request.out, card.slug, identity) as store:
        header = _run(task, model, store.path / "logs", request)
        if header is None or header.status == "cancelled":
            raise KeyboardInterrupt
        path = Path(re.sub(r"^file://", "", header.location)).resolve()
        log = read_log(path)
        if log.status != "success":
            raise ModelError(
                f"the evaluation stopped: {failure_of(log)} What was finished is kept in {path}; mend the cause and "
                "run the same command again to go on."
            )
        metadata = task.metadata or {}
        baselines = metadata.get("baselines", {}) if request.limit is None else {}  # they are of all samples
        remarks = [*notes, *remarks_on(log), *metadata.get("notes", [])]
        result = Result(log_figures(log), counts_of(log), baselines, remarks)
        facts = facts_of(card, options, result, started) | log_facts(
            log, identity, path.relative_to(store.path.resolve())
        )
        store.write_run(facts)
    show(card, result, facts | {"folder": str(store.path)}, request.model, as_json=request.as_json)
    if not request.as_json:
        print(f"log     {path}   inspect view --log-dir {path.parent}")
        print(f"run     {store.path / 'run.json'}")


def _run(task: Any, model: Any, logs: Path, request: Request) -> Any:
    """Run Inspect's own evaluation; a log that was interrupted is gone on with. Its display goes to stderr."""
    from inspect_ai import eval_set

    live = sys.stderr.isatty() and not request.as_json
    with contextlib.redirect_stdout(sys.stderr):
        _, found = eval_set(
            task,
            model=model,
            log_dir=str(logs),
            limit=request.limit,
            epochs=request.epochs,
            retry_attempts=0,
            retry_immediate=False,
            display="none" if request.quiet else ("rich" if live else "plain"),
            max_retries=RETRIES,
            ctl_server=False,
            log_level="error",
        )
    return found[0] if found else None  # Inspect catches an interrupt and returns no log


@contextlib.contextmanager
def _folder(out: Path | None, slug: str, identity: Mapping[str, Any]) -> Iterator[Any]:
    """Open the run folder: new, empty, or of the same evaluation."""
    import yaml

    from gnomon import __version__
    from gnomon.common.files import content_hash
    from gnomon.recipes.store import RunFolder

    plain = json.loads(json.dumps(dict(identity), default=str))
    mark = content_hash([plain, __version__])
    path = out if out is not None else Path("runs") / f"evaluate-{slug}-{mark}"
    store = RunFolder(path, mark, plain)
    try:
        store.begin(plain, yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))
        yield store
    finally:
        store.release()


def _state_of(model: str) -> str:
    """Return a hash of the names, sizes and times of a model folder's files; empty for a model by name."""
    from gnomon.common.files import content_hash

    folder = Path(model).expanduser()
    if not folder.is_dir():
        return ""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return content_hash([(str(f.relative_to(folder)), f.stat().st_size, f.stat().st_mtime_ns) for f in files])


def _without_secrets(arguments: Mapping[str, Any]) -> dict[str, Any]:
    secret = re.compile(r"key|token$|secret|password", re.IGNORECASE)
    return {name: "..." if secret.search(name) else value for name, value in arguments.items()}
