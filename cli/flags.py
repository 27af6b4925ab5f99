"""Command-line flags, made from the options: `max_num_seqs` becomes --max-num-seqs (and --max_num_seqs)."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import typer

from llmrs.cli.options import SECTIONS
from llmrs.cli.terminal import guarded
from llmrs.core.errors import ConfigError
from llmrs.core.options import Option, options

Values = dict[str, Any]  # option name -> value, for the flags that were given
Body = Callable[[str | None, Values], int]  # config file, flags -> exit status

PREFIX = "alias_"  # parameters that hold the further flags of an option
TYPES = {
    bool: bool | None,
    list: list[str] | None,
    dict: list[str] | None,
}  # of the parameter; other kinds are read as text
CONTEXT = {"token_normalize_func": lambda name: name.replace("_", "-"), "help_option_names": ["-h", "--help"]}


def spelled(name: str) -> str:
    """The flag for a name: --max-num-seqs."""
    return "--" + name.replace("_", "-")


def visible(o: Option) -> list[str]:
    """The flags that help shows: the option's name, and its one-letter aliases as people write them."""
    letters = [f"-{a}" for a in o.aliases if len(a) == 1]
    if o.kind is bool:
        return [f"{spelled(o.name)}/--no-{spelled(o.name)[2:]}", *letters]
    return [spelled(o.name), *letters]


def hidden(o: Option) -> list[str]:
    """Further flags: every alias with two dashes (vllm.rs writes --w)."""
    return [spelled(a) for a in o.aliases]


def command(body: Body, sections: Mapping[str, type] = SECTIONS) -> Callable[..., int]:
    """A function for typer with a parameter for the config file and one for each flag."""

    def run(config: str | None, **values: Any) -> int:
        return guarded(lambda: body(config, given(values, sections)))

    parameters = [_config_argument(), *(p for title, cls in sections.items() for p in _parameters(title, cls))]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


def given(values: Mapping[str, Any], sections: Mapping[str, type] = SECTIONS) -> Values:
    """The options that flags set, as the types that the config classes check; unset flags are left out."""
    found: Values = {}
    for o in (o for cls in sections.values() for o in options(cls)):
        for key in (o.name, PREFIX + o.name):
            value = values.get(key)
            if value is None or value == [] or value == ():
                continue
            if o.name in found:
                raise ConfigError(f"two flags set {o.name!r}", "keep one: " + ", ".join([*visible(o), *hidden(o)]))
            found[o.name] = read_any(o, value)
    return found


def read_any(o: Option, value: Any) -> Any:
    return read_table(o, value) if o.kind is dict else read_list(o, value) if o.kind is list else read(o, value)


def read_list(o: Option, texts: list[str]) -> list[Any]:
    """Numbers may also stand in one text, with commas between."""
    if o.element in (int, float):
        texts = [part for text in texts for part in text.split(",")]
    return [read(o, text) for text in texts]


def read_table(o: Option, texts: list[str]) -> Any:
    """TOKEN=VALUE, each; the first that has another form as it is, for the option's own error."""
    pairs = [text.partition("=") for text in texts]
    wrong = next((text for text, (key, _, _) in zip(texts, pairs, strict=True) if not key.isdecimal()), None)
    return {int(key): read(o, value) for key, _, value in pairs} if wrong is None else wrong


def read(o: Option, text: str | bool) -> Any:
    """A flag's text as the option's type, where it has that form; else as it is, for the option's own error."""
    if isinstance(text, bool) or o.element not in (int, float):
        return text
    if o.optional and text in ("null", "none"):
        return None
    try:
        return o.element(text)
    except ValueError:
        return text


def _config_argument() -> inspect.Parameter:
    info = typer.Argument(None, metavar="[CONFIG]", help="YAML file; without it ./config.yaml, if there is one")
    return inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default=info, annotation=str | None)


def _parameters(title: str, cls: type) -> Iterator[inspect.Parameter]:
    for o in options(cls):
        yield _parameter(o.name, o, visible(o), title, hide=False)
        if o.aliases:
            yield _parameter(PREFIX + o.name, o, hidden(o), title, hide=True)


def _parameter(name: str, o: Option, flags: list[str], title: str, *, hide: bool) -> inspect.Parameter:
    metavars = {int: "INT", float: "TOKEN=NUMBER" if o.kind is dict else "NUMBER", str: "|".join(o.choices) or "TEXT"}
    info = typer.Option(
        None,
        *flags,
        help=_help(o),
        metavar=metavars.get(o.element),
        show_default=False,
        hidden=hide,
        rich_help_panel=title,
    )
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=info, annotation=TYPES.get(o.kind, str | None))


def _help(o: Option) -> str:
    longer = [spelled(a) for a in o.aliases if len(a) > 1]
    also = f"; also {', '.join(longer)}" if longer else ""
    default = f" (default: {o.default})" if o.default not in (None, False, True) else ""
    return f"{o.help}{also}{default}"
