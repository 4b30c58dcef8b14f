"""The command ``gnomon``: few verbs; results on stdout, progress and messages on stderr.

Exit codes: 0 done, 2 the user's mistake (one clear message), 1 a fault of gnomon, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from gnomon.errors import GnomonError

app = typer.Typer(
    name="gnomon",
    help="The published methods that shape a language model: list them, run them, re-measure their claims.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
claims_app = typer.Typer(no_args_is_help=True, help="Re-measure the papers' claims.", rich_markup_mode=None)
app.add_typer(claims_app, name="claims")

EngineOption = Annotated[
    str, typer.Option("--engine", help="local, or ray: spread independent work over a Ray cluster (RAY_ADDRESS).")
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


def _version(value: bool) -> None:
    if value:
        from gnomon import __version__

        print(f"gnomon {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    pass


@app.command()
def methods(
    text: Annotated[str, typer.Argument(help="Words to look for.")] = "",
    pillar: Annotated[str | None, typer.Option(help="Only this pillar: data, nn, optim, ...")] = None,
    plugs: Annotated[str | None, typer.Option(help="Only this kind: optimizer, compressor, ...")] = None,
    as_json: JsonFlag = False,
) -> None:
    """List the methods, or those in which TEXT occurs."""
    from gnomon.cli import listing

    listing.print_methods(text, pillar, plugs, as_json)


@app.command()
def show(slug: Annotated[str, typer.Argument(help="Slug of a method.")], as_json: JsonFlag = False) -> None:
    """Show the card of one method."""
    from gnomon.cli import listing

    listing.print_card(slug, as_json)


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="Name of a built-in recipe, or a YAML file.")] = "",
    out: Annotated[Path | None, typer.Option(help="The run folder, exactly. Default runs/<name>-<hash>.")] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", help="key=value: model=DIR, data=FILE, fira.rank=16, train.tokens=9000."),
    ] = None,
    ablate: Annotated[bool, typer.Option("--ablate", help="Also run every method's arm without it.")] = False,
    seeds: Annotated[int | None, typer.Option(help="Repeat with this many seeds.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan, sizes and expected memory; run nothing.")
    ] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of recipes, for editors.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
    engine: EngineOption = "local",
    as_json: JsonFlag = False,
) -> None:
    """Run a recipe, or go on with one that was interrupted."""
    from gnomon.cli import running

    running.run_command(
        recipe,
        out=out,
        assignments=assignments or [],
        ablate=ablate,
        seeds=seeds,
        dry_run=dry_run,
        schema=schema,
        quiet=quiet,
        engine=engine,
        as_json=as_json,
    )


@app.command()
def plan(
    model: Annotated[
        str,
        typer.Argument(help="Non-embedding parameters (7e9, 7B), architecture:size (llama:130m), a folder or hub id."),
    ] = "",
    tokens: Annotated[str | None, typer.Option(help="Training tokens: 1.4T, 100e9.")] = None,
    seq_len: Annotated[int, typer.Option(help="Tokens in one sequence.")] = 2048,
    batch: Annotated[str | None, typer.Option(help="A batch you choose, in tokens, in place of the best.")] = None,
    micro_batch: Annotated[int | None, typer.Option(help="Sequences in one pass of one device.")] = None,
    devices: Annotated[int | None, typer.Option(help="Number of devices; the batch is fitted to them.")] = None,
    law: Annotated[str, typer.Option(help="step-law; all, or another law's name, to see it beside.")] = "step-law",
    loss: Annotated[float | None, typer.Option(help="Expected final loss, for laws that need it.")] = None,
    fit: Annotated[Path | None, typer.Option(help="Refit on a table of runs: N, D, lr, bs, smooth loss.")] = None,
    compare: Annotated[Path | None, typer.Option(help="What each law's choice costs on a table of runs.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Plan a pre-training run: learning rate, batch and steps for MODEL and --tokens."""
    from gnomon.cli import planning

    planning.plan_command(
        model,
        tokens=tokens,
        seq_len=seq_len,
        batch=batch,
        micro_batch=micro_batch,
        devices=devices,
        law=law,
        loss=loss,
        fit=fit,
        compare=compare,
        as_json=as_json,
    )


@app.command()
def evaluate(
    task: Annotated[str, typer.Argument(help="A task; without one, the tasks are listed.")] = "",
    model: Annotated[str, typer.Option(help="Inspect name (openai-api/local/NAME, hf/ID, ...) or a folder.")] = "",
    data: Annotated[list[str] | None, typer.Option(help="The task's data: a file, or several.")] = None,
    run: Annotated[Path | None, typer.Option(help="Score this file of predictions; no model is run.")] = None,
    model_args: Annotated[list[str] | None, typer.Option("--model-arg", help="key=value for the provider.")] = None,
    base_url: Annotated[str | None, typer.Option("--model-base-url", help="Where the server is.")] = None,
    options: Annotated[list[str] | None, typer.Option("-T", help="key=value: an option of the task.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first samples.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Ask this many times; scores are averaged per sample.")] = None,
    out: Annotated[Path | None, typer.Option(help="The run folder. Default runs/evaluate-<task>-<hash>.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Run a task on a model through Inspect, or score a file of predictions."""
    from gnomon.cli.evaluating import Request, run_command

    run_command(
        Request(
            task=task,
            model=model,
            data=data or [],
            run=run,
            model_args=model_args or [],
            base_url=base_url,
            options=options or [],
            limit=limit,
            epochs=epochs,
            out=out,
            quiet=quiet,
            as_json=as_json,
        )
    )


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="A run folder.")]) -> None:
    """Write report.html of a run folder again."""
    from gnomon.reports import write_report

    print(write_report(folder))


@claims_app.command("run")
def claims_run(
    slugs: Annotated[list[str] | None, typer.Argument(help="Methods.")] = None,
    every: Annotated[bool, typer.Option("--all", help="The claims of all methods.")] = False,
    claim: Annotated[str | None, typer.Option(help="Only the claim of this id.")] = None,
    scale: Annotated[str, typer.Option(help="small, medium or large.")] = "small",
    seeds: Annotated[int | None, typer.Option(help="Number of seeds, at least 3.")] = None,
    ledger: Annotated[Path, typer.Option(help="Ledger to update; its page is written beside it.")] = Path(
        "claims/ledger.json"
    ),
    engine: EngineOption = "local",
    as_json: JsonFlag = False,
) -> None:
    """Measure claims: the paper's figure beside ours, the spread over seeds, a computed verdict."""
    from gnomon.cli import claiming

    claiming.run_command(slugs or [], every, claim, scale, seeds, ledger, as_json, engine)


@claims_app.command("table")
def claims_table(
    ledger: Annotated[Path, typer.Option(help="The ledger.")] = Path("claims/ledger.json"), as_json: JsonFlag = False
) -> None:
    """Print the ledger of claims and write its page."""
    from gnomon.cli import claiming

    claiming.table_command(ledger, as_json)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; the user's mistakes become one message and exit code 2."""
    try:
        code: Any = app(arguments, standalone_mode=False)
    except KeyboardInterrupt:
        code = 130
    except GnomonError as error:
        _fail(f"gnomon: {error}", 2)
    except Exception as error:  # the last place that can turn a fault into a message
        _fail(*_explain(error))
    else:
        if code != 130:
            _leave_group(code if isinstance(code, int) else 0)
    if code == 130:  # typer turns an interrupt into this code
        _fail("Interrupted. What was finished is kept; run the same command again to go on.", 130)
    sys.exit(code if isinstance(code, int) else 0)


def _leave_group(code: int) -> None:
    """Leave the process group that a run under torchrun joined, and the process with it.

    Threads of the group that a wrapped model still refers to can abort an ordinary exit after all work is done.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _explain(error: Exception) -> tuple[str, int]:
    """Return message and exit code for everything that is not one of our own errors."""
    import errno
    import traceback

    if hasattr(error, "format_message"):  # click's own usage errors
        return f"gnomon: {error.format_message()}\nSee gnomon --help.", 2
    text = str(error)
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if full or any(f"os error {code}" in text for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)):
        where = f" ({error.filename})" if isinstance(error, OSError) and error.filename else ""
        return f"gnomon: the disk is full{where}: {text}. Free some space and run the same command again to go on.", 2
    if isinstance(error, PermissionError):
        return f"gnomon: no permission to write {error.filename}. Give another folder with --out.", 2
    return f"{traceback.format_exc()}\ngnomon: a fault of gnomon itself; please report it with the lines above.", 1


def _fail(message: str, code: int) -> None:
    print(message, file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
