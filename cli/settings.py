"""Checked options from a config file and flags. Flags override the file, the file overrides the defaults."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from llmrs.cli.options import SECTIONS, RunOptions
from llmrs.cli.prompts import expand
from llmrs.cli.terminal import note
from llmrs.cli.yaml_file import read_yaml
from llmrs.config import EngineConfig
from llmrs.core.errors import ConfigError
from llmrs.core.options import Option, SamplingParams, build, options

DEFAULT_FILE = Path("config.yaml")
OPTIONS = [o for cls in SECTIONS.values() for o in options(cls)]
Section = TypeVar("Section")


@dataclass(frozen=True)
class Settings:
    """The options of a command."""

    engine: EngineConfig
    sampling: SamplingParams
    run: RunOptions
    flags: frozenset[str] = frozenset()  # names of the options that flags set
    inputs: Mapping[str, str] = field(default_factory=dict)  # files that were read: description -> path

    def without(self, hints: Mapping[str, str], reason: str) -> "Settings":
        """Resets the options in `hints` (name -> alternative), which have no effect here.

        Raises ConfigError for one that a flag sets; prints a note for those of a file, which other commands may use.
        """
        values = {**vars(self.engine), **vars(self.sampling), **vars(self.run)}
        unused = [o for o in OPTIONS if o.name in hints and values[o.name] != o.default]
        for o in unused:
            if o.name in self.flags:
                raise ConfigError(f"{o.name}: {reason}", hints[o.name])
        if unused:
            note(f"{', '.join(o.name for o in unused)}: {reason}")
        defaults = {o.name: o.default for o in unused}
        engine, sampling = _override(self.engine, defaults), _override(self.sampling, defaults)
        return replace(self, engine=engine, sampling=sampling, run=_override(self.run, defaults))


def load_settings(config: str | None, flags: Mapping[str, Any]) -> Settings:
    """Reads the config file, if there is one, and applies the flags. Raises ConfigError."""
    path = Path(config) if config is not None else DEFAULT_FILE if DEFAULT_FILE.is_file() else None
    inputs: dict[str, str] = {}
    sections = _read_file(path, inputs) if path is not None else build({}, *SECTIONS.values())
    values = dict(flags)
    if "prompts" in values:
        values["prompts"] = [prompt for text in values["prompts"] for prompt in expand(text, inputs)]
    run, engine, sampling, _ignored, unimplemented = (_override(s, values) for s in sections)  # as in SECTIONS
    unimplemented.refuse()
    if run.system is not None and not run.chat:
        raise ConfigError("system: a system message needs the chat template", "leave out system, or chat: false")
    return Settings(engine, sampling, run, frozenset(flags), inputs)


def _override(section: Section, values: Mapping[str, Any]) -> Section:
    return replace(section, **{name: v for name, v in values.items() if name in vars(section)})  # type: ignore[type-var]


def _read_file(path: Path, inputs: dict[str, str]) -> list[Any]:
    """One instance per section. Raises ConfigError with the file, and the line of a wrong value.

    Adds the files that it reads to `inputs`.
    """
    switches = {name for o in OPTIONS if o.kind is bool for name in _names(o)}
    values: dict[Any, Any] = {}
    inputs["the config file"] = str(path)
    for key, (value, line) in read_yaml(path, switches).items():
        try:
            values[key] = expand(value, inputs, path.parent) if key == "prompts" and isinstance(value, str) else value
            build({key: values[key]}, *SECTIONS.values())
        except ConfigError as error:
            hint = _quoting_hint(key, value) or error.hint
            raise ConfigError(f"{path}, line {line}: {error.message}", hint) from error
    try:
        sections = build(values, *SECTIONS.values())
    except ConfigError as error:  # two names of one option
        raise ConfigError(f"{path}: {error.message}", error.hint) from error
    return [_resolve_model(s, path.parent) if isinstance(s, EngineConfig) else s for s in sections]


def _names(o: Option) -> tuple[str, ...]:
    return o.name, *o.aliases


def _quoting_hint(key: Any, value: Any) -> str:
    """A hint where YAML reads a number, null, true or false, and the option is text."""
    texts = {name for o in OPTIONS if o.element is str for name in _names(o)}
    wrong = [v for v in (value if isinstance(value, list) else [value]) if not isinstance(v, str | list | dict)]
    return f'for text put quotes around it: "{json.dumps(wrong[0], default=str)}"' if wrong and key in texts else ""


def _resolve_model(config: EngineConfig, folder: Path) -> EngineConfig:
    """Looks for a relative model path in the current folder, then in the config file's."""
    from llmrs.models.hub.resolve import local_path  # imported here to keep `llmrs --help` fast

    name, beside = config.model_path, folder / config.model_path
    found_beside = name != "demo" and not local_path(name).exists() and local_path(str(beside)).exists()
    return replace(config, model_path=str(beside)) if found_beside else config
