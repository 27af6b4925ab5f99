"""Command-line flags, derived from the options: `max_num_seqs` becomes --max-num-seqs (and --max_num_seqs)."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import typer

from llmrs.cli.options import SECTIONS
from llmrs.core.errors import ConfigError
from llmrs.core.options import Option, options

Flags = dict[str, Any]  # option name -> value, for the flags on the command line
Body = Callable[[str | None, Flags], int]  # (config file, flags) -> exit status

CONTEXT = {"token_normalize_func": lambda name: name.replace("_", "-"), "help_option_names": ["-h", "--help"]}
ALIASES = "alias_"  # prefix of the parameter for an option's hidden flags
ANNOTATIONS = {bool: bool | None, list: list[str] | None, dict: list[str] | None}  # other kinds are read as text


def visible_flags(o: Option) -> list[str]:
    """The flags in the help: the option's name and its one-letter aliases."""
    name, letters = _long(o.name), [f"-{a}" for a in o.aliases if len(a) == 1]
    return [f"{name}/--no-{name[2:]}" if o.kind is bool else name, *letters]


def hidden_flags(o: Option) -> list[str]:
    """Every alias with two dashes (vllm.rs writes --w)."""
    return [_long(a) for a in o.aliases]


def command(body: Body, sections: Mapping[str, type] = SECTIONS) -> Callable[..., int]:
    """A typer function with a parameter for the config file and one for each flag."""

    def run(config: str | None, **values: Any) -> int:
        return body(config, parse_flags(values, sections))

    config_file = typer.Argument(None, metavar="CONFIG", help="YAML file (default: ./config.yaml, if it exists)")
    parameters = [_parameter("config", config_file)]
    parameters += [p for title, cls in sections.items() for p in _parameters(title, cls)]
    run.__doc__ = body.__doc__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


def parse_flags(values: Mapping[str, Any], sections: Mapping[str, type]) -> Flags:
    """The flags that were given, as the types that the option classes check."""
    flags: Flags = {}
    for o in (o for cls in sections.values() for o in options(cls)):
        for key in (o.name, ALIASES + o.name):
            value = values.get(key)
            if value is None or value == [] or value == ():
                continue
            if o.name in flags:
                names = ", ".join([*visible_flags(o), *hidden_flags(o)])
                raise ConfigError(f"two flags set {o.name!r}", f"keep one: {names}")
            flags[o.name] = _parse(o, value)
    return flags


def _parse(o: Option, value: Any) -> Any:
    """Text as the option's type. Text of another form stays as it is: the option itself refuses it."""
    if o.kind is dict:  # TOKEN=NUMBER
        pairs = [text.partition("=") for text in value]
        wrong = [key + equals + number for key, equals, number in pairs if not key.isdecimal()]
        return wrong[0] if wrong else {int(key): _parse_scalar(o, number) for key, _, number in pairs}
    if o.kind is list:
        texts = [t for text in value for t in text.split(",")] if o.element in (int, float) else value
        return [_parse_scalar(o, text) for text in texts]
    return _parse_scalar(o, value)


def _parse_scalar(o: Option, text: str | bool) -> Any:
    if isinstance(text, bool) or o.element not in (int, float):
        return text
    if o.optional and text in ("null", "none"):
        return None
    try:
        return o.element(text)
    except ValueError:
        return text


def _long(name: str) -> str:
    return "--" + name.replace("_", "-")


def _parameter(name: str, info: Any, annotation: Any = str | None) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=info, annotation=annotation)


def _parameters(title: str, cls: type) -> Iterator[inspect.Parameter]:
    """The parameter of each option, and a hidden one for its aliases."""
    for o in options(cls):
        number = "TOKEN=NUMBER" if o.kind is dict else "NUMBER"
        metavar = {int: "INT", float: number, str: "|".join(o.choices) or "TEXT"}.get(o.element)
        annotation = ANNOTATIONS.get(o.kind, str | None)
        for name, flags in ((o.name, visible_flags(o)), (ALIASES + o.name, hidden_flags(o))):
            if flags:
                info = typer.Option(None, *flags, help=_help(o), metavar=metavar, show_default=False,
                                    hidden=name != o.name, rich_help_panel=title)  # fmt: skip
                yield _parameter(name, info, annotation)


def _help(o: Option) -> str:
    long_aliases = [_long(a) for a in o.aliases if len(a) > 1]
    also = f"; also {', '.join(long_aliases)}" if long_aliases else ""
    default = f" (default: {o.default})" if o.default not in (None, False, True) else ""
    return f"{o.help}{also}{default}"
