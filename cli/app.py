"""The command `llmrs`: its subcommands, and how wrong usage is reported."""

import difflib
import sys
from collections.abc import Sequence

import typer

import llmrs
from llmrs.cli import flags, later, streams
from llmrs.cli.bench import SECTIONS as BENCH
from llmrs.cli.bench import bench
from llmrs.cli.chat import chat
from llmrs.cli.graph import graph
from llmrs.cli.list import list_models
from llmrs.cli.run import run
from llmrs.cli.signals import INTERRUPTED, termination
from llmrs.cli.terminal import guarded
from llmrs.core.errors import ConfigError

# typer's public names hold only a subclass of the error that its parser raises for all wrong usage
UsageError: type[Exception] = typer.BadParameter.__mro__[1]

app = typer.Typer(
    add_completion=False, pretty_exceptions_enable=False, help="A small, fast engine for language models."
)


@app.callback(invoke_without_command=True)
def root(version: bool = typer.Option(False, "--version", "-V", help="print the version", is_eager=True)) -> None:
    if version:
        print(f"llmrs {llmrs.__version__}")
        raise typer.Exit


app.command("run", help=run.__doc__, context_settings=flags.CONTEXT)(flags.command(run))
app.command("chat", help=chat.__doc__, context_settings=flags.CONTEXT)(flags.command(chat))
app.command("graph")(graph)
app.command("bench", help=bench.__doc__, context_settings=flags.CONTEXT)(flags.command(bench, BENCH))
app.command("list")(list_models)
later.register(app)


def main(args: Sequence[str] | None = None) -> int:
    """Runs a command line; the exit status, as docs/config.md lists it. Errors are one line each on stderr."""
    streams.set_up()
    given = list(sys.argv[1:] if args is None else args)  # as it is: typer would expand wildcards on Windows
    with termination() as stopped:
        status = guarded(lambda: dispatched(given or ["--help"]))
    return stopped.status or status


def dispatched(args: Sequence[str]) -> int:
    """Raises WriteError where what was printed can't be written."""
    command = typer.main.get_command(app)
    try:
        status = command.main(args, prog_name="llmrs", standalone_mode=False)
    except UsageError as error:
        raise explained(error) from error
    except typer.Abort:
        return INTERRUPTED
    sys.stdout.flush()
    return status if isinstance(status, int) else 0


def explained(error: Exception) -> ConfigError:
    """The parser's error in our words, with what the user may have meant."""
    context = getattr(error, "ctx", None)
    path = context.command_path if context else "llmrs"
    hint = f"`{path} --help` shows what there is"
    wrong = getattr(error, "option_name", None)
    if wrong is None or not type(error).__name__.startswith("NoSuch"):
        message, _, guess = error.format_message().partition(" Did you mean ")  # type: ignore[attr-defined]
        return ConfigError(message.rstrip("."), f"did you mean {guess}" if guess else hint)
    known = [o for p in context.command.params for o in (*p.opts, *p.secondary_opts)] if context else []
    close = difflib.get_close_matches(wrong.replace("_", "-"), known, n=2)
    return ConfigError(f"there is no flag {wrong}", f"did you mean {' or '.join(close)}?" if close else hint)
