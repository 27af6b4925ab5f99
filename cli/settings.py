"""From a config file and flags to checked options. Flags win over the file, the file over the defaults."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from llmrs.cli.options import SECTIONS, LaterOptions, RunOptions
from llmrs.cli.prompts import expand
from llmrs.cli.terminal import note
from llmrs.cli.yaml_file import read_yaml
from llmrs.config import EngineConfig
from llmrs.core.errors import ConfigError
from llmrs.core.options import Option, SamplingParams, build, options

DEFAULT_FILE = Path("config.yaml")
Part = TypeVar("Part", EngineConfig, SamplingParams, RunOptions)
OPTIONS = [o for cls in SECTIONS.values() for o in options(cls)]


@dataclass(frozen=True)
class Settings:
    """All that a command is told."""

    engine: EngineConfig
    sampling: SamplingParams
    run: RunOptions
    flags: frozenset[str] = frozenset()  # the options that flags set; the others come from a file or are defaults
    inputs: Mapping[str, str] = field(default_factory=dict)  # files that were read: what each is, and its path

    def without(self, hints: Mapping[str, str], reason: str) -> "Settings":
        """The settings with these options (name -> what to do instead) at their defaults, where they change nothing.

        Raises ConfigError for the first that a flag sets; those of a file, which other commands may use, are noted.
        """
        unused = [o for o in OPTIONS if o.name in hints and self.value(o) != o.default]
        for o in unused:
            if o.name in self.flags:
                raise ConfigError(f"{o.name}: {reason}", hints[o.name])
        if unused:
            note(f"{', '.join(o.name for o in unused)}: {reason}")
        defaults = {o.name: o.default for o in unused}
        return replace(
            self,
            engine=_with(self.engine, defaults),
            sampling=_with(self.sampling, defaults),
            run=_with(self.run, defaults),
        )

    def value(self, o: Option) -> Any:
        return {**vars(self.engine), **vars(self.sampling), **vars(self.run)}[o.name]


def _with(part: Part, values: Mapping[str, Any]) -> Part:
    """The options with those of the values that are among them."""
    return replace(part, **{name: value for name, value in values.items() if name in vars(part)})


def load_settings(config: str | None, flags: Mapping[str, Any]) -> Settings:
    """Reads the file, if there is one, and puts the flags over it. Raises ConfigError."""
    path = Path(config) if config is not None else DEFAULT_FILE if DEFAULT_FILE.is_file() else None
    inputs: dict[str, str] = {}
    parts = from_file(path, inputs) if path is not None else build({}, *SECTIONS.values())
    over = dict(flags)
    if "prompts" in over:
        over["prompts"] = [prompt for text in over["prompts"] for prompt in expand(text, inputs)]
    parts = [_with(p, over) for p in parts]
    by_type = {type(p): p for p in parts}
    by_type[LaterOptions].refuse()
    engine, run = by_type[EngineConfig], by_type[RunOptions]
    if run.system is not None and not run.chat:
        raise ConfigError("system: a system message needs the chat template", "leave out system, or chat: false")
    return Settings(engine, by_type[SamplingParams], run, frozenset(flags), inputs)


def from_file(path: Path, inputs: dict[str, str]) -> list[Any]:
    """One instance of each option class. Raises ConfigError that names the file, and the line of a wrong value.

    What is read is added to `inputs`.
    """
    lines = read_yaml(path, {name for o in OPTIONS if o.kind is bool for name in (o.name, *o.aliases)})
    values: dict[Any, Any] = {}
    inputs["the config file"] = str(path)
    for key, (value, line) in lines.items():
        try:
            values[key] = expand(value, inputs, path.parent) if key == "prompts" and isinstance(value, str) else value
            build({key: values[key]}, *SECTIONS.values())
        except ConfigError as error:
            hint = _quotes(key, value) or error.hint
            raise ConfigError(f"{path}, line {line}: {error.message}", hint) from error
    try:
        parts = build(values, *SECTIONS.values())
    except ConfigError as error:  # two names of one option
        raise ConfigError(f"{path}: {error.message}", error.hint) from error
    return [_beside(p, path.parent) if isinstance(p, EngineConfig) else p for p in parts]


def _quotes(key: Any, value: Any) -> str:
    """A hint where YAML reads a number, null, true or false, and text is wanted."""
    texts = {name for o in OPTIONS if o.element is str for name in (o.name, *o.aliases)}
    wrong = [v for v in (value if isinstance(value, list) else [value]) if not isinstance(v, str | list | dict)]
    return f'for text put quotes around it: "{json.dumps(wrong[0], default=str)}"' if wrong and key in texts else ""


def _beside(config: EngineConfig, folder: Path) -> EngineConfig:
    """A relative model path means the current directory first, then the config file's."""
    name = config.model_path
    there = folder / name
    found = name != "demo" and not Path(name).expanduser().exists() and there.exists()
    return replace(config, model_path=str(there)) if found else config
