"""Commands that are not there yet. They are known, so that asking for one gets a straight answer.

A command moves from here to a file of its own and a line in app.py.
"""

from collections.abc import Callable

import typer

from llmrs.cli.terminal import guarded
from llmrs.core.errors import ConfigError

COMMANDS = {
    "quantize": "run the safetensors model as it is",
    "serve": "use `llmrs run` or `llmrs chat`, or Engine from Python",
    "doctor": "`llmrs run` says what is missing when something is",
}


def register(app: typer.Typer) -> None:
    anything = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}
    for name in COMMANDS:
        app.command(name, hidden=True, context_settings=anything)(_refusal(name))


def _refusal(name: str) -> Callable[..., int]:
    def fail() -> int:
        raise ConfigError(f"`llmrs {name}` is not there yet", COMMANDS[name])

    return lambda: guarded(fail)
