"""The command `llmrs`: its subcommands and its usage errors."""

import difflib
import sys
import warnings
from collections.abc import Sequence

import typer

import llmrs
from llmrs.cli import flags, streams
from llmrs.cli.bench import SECTIONS as BENCH_SECTIONS
from llmrs.cli.bench import bench
from llmrs.cli.chat import chat
from llmrs.cli.graph import graph
from llmrs.cli.list import list_models
from llmrs.cli.quantize import measure_imatrix, quantize
from llmrs.cli.run import run
from llmrs.cli.signals import INTERRUPTED, termination
from llmrs.cli.terminal import exit_status, note
from llmrs.core.errors import ConfigError

# base class of the parser's usage errors; typer exports only a subclass of it
UsageError: type[Exception] = typer.BadParameter.__mro__[1]

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="A small, fast inference engine for language models.",
    context_settings=flags.CONTEXT,
)


@app.callback(invoke_without_command=True)
def root(version: bool = typer.Option(False, "--version", "-V", help="print the version", is_eager=True)) -> None:
    if version:
        print(f"llmrs {llmrs.__version__}")
        raise typer.Exit


app.command("run")(flags.command(run))
app.command("chat")(flags.command(chat))
app.command("graph")(graph)
app.command("bench")(flags.command(bench, BENCH_SECTIONS))
app.command("list")(list_models)
app.command("quantize")(quantize)
app.command("imatrix")(measure_imatrix)


def main(args: Sequence[str] | None = None) -> int:
    """Runs a command line; returns the exit status, as docs/config.md lists it. Errors go to stderr."""
    streams.set_up()
    given = list(sys.argv[1:] if args is None else args)  # explicit: typer would expand wildcards on Windows
    with termination() as stop, warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: note(str(message))
        status = exit_status(lambda: dispatch(given or ["--help"]))
    return stop.status or status


def dispatch(args: Sequence[str]) -> int:
    """Raises LlmrsError; WriteError where stdout can't be written."""
    command = typer.main.get_command(app)
    try:
        status = command.main(args, prog_name="llmrs", standalone_mode=False)
    except UsageError as error:
        raise usage_error(error) from error
    except typer.Abort:
        return INTERRUPTED
    sys.stdout.flush()
    return status if isinstance(status, int) else 0


def usage_error(error: Exception) -> ConfigError:
    """The parser's error in our format, with the closest flags or commands as the hint."""
    context = getattr(error, "ctx", None)
    path = context.command_path if context else "llmrs"
    hint = f"see `{path} --help`"
    unknown = getattr(error, "option_name", None)
    if unknown is None or not type(error).__name__.startswith("NoSuch"):
        message, _, guess = error.format_message().partition(" Did you mean ")  # type: ignore[attr-defined]
        return ConfigError(message.rstrip("."), f"did you mean {guess}" if guess else hint)
    known = [o for p in context.command.params for o in (*p.opts, *p.secondary_opts)] if context else []
    close = difflib.get_close_matches(unknown.replace("_", "-"), known, n=2)
    return ConfigError(f"unknown flag {unknown}", f"did you mean {' or '.join(close)}?" if close else hint)
