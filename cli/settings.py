"""From a config file and flags to checked options. Flags win over the file, the file over the defaults."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmrs.cli.options import SECTIONS, LaterOptions, RunOptions
from llmrs.cli.prompts import expand
from llmrs.cli.yaml_file import read_yaml
from llmrs.core.config import EngineConfig, SamplingParams, build
from llmrs.core.errors import ConfigError

DEFAULT_FILE = Path("config.yaml")


@dataclass(frozen=True)
class Settings:
    """All that a command is told."""

    engine: EngineConfig
    sampling: SamplingParams
    run: RunOptions


def load_settings(config: str | None, flags: Mapping[str, Any]) -> Settings:
    """Reads the file, if there is one, and puts the flags over it. Raises ConfigError."""
    path = Path(config) if config is not None else DEFAULT_FILE if DEFAULT_FILE.is_file() else None
    parts = from_file(path) if path is not None else build({}, *SECTIONS.values())
    over = dict(flags)
    if "prompts" in over:
        over["prompts"] = [prompt for text in over["prompts"] for prompt in expand(text)]
    parts = [replace(p, **{name: over[name] for name in vars(p) if name in over}) for p in parts]
    by_type = {type(p): p for p in parts}
    by_type[LaterOptions].refuse()
    settings = Settings(
        _with_flash(by_type[EngineConfig], by_type[RunOptions].flash), by_type[SamplingParams], by_type[RunOptions]
    )
    if settings.run.system is not None and not settings.run.chat:
        raise ConfigError("system: a system message needs the chat template", "leave out system, or chat: false")
    return settings


def _with_flash(config: EngineConfig, flash: bool | None) -> EngineConfig:
    """`flash` is another word for one choice of `attention`. Raises ConfigError where both are set and differ."""
    if flash is None or (not flash and config.attention != "flash"):
        return config
    if not flash or config.attention not in ("auto", "flash"):
        raise ConfigError(f"flash: {str(flash).lower()} does not go with attention: {config.attention}", "keep one")
    return replace(config, attention="flash")


def from_file(path: Path) -> list[Any]:
    """One instance of each option class. Raises ConfigError that names the file."""
    values = read_yaml(path)
    try:
        if isinstance(values.get("prompts"), str):
            values["prompts"] = expand(values["prompts"], path.parent)
        parts = build(values, *SECTIONS.values())
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.message}", error.hint) from error
    return [_beside(p, path.parent) if isinstance(p, EngineConfig) else p for p in parts]


def _beside(config: EngineConfig, folder: Path) -> EngineConfig:
    """A relative model path means the current directory first, then the config file's."""
    name = config.model_path
    there = folder / name
    found = name != "demo" and not Path(name).expanduser().exists() and there.exists()
    return replace(config, model_path=str(there)) if found else config
