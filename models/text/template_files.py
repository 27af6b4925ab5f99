"""Finds chat templates: chat_template.jinja, additional_chat_templates/, else tokenizer_config.json."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmrs.models.files.json_reader import read_json
from llmrs.models.files.untrusted import inside, read_text

MAX_TEMPLATE_CHARS = 200_000  # today's models use less than a tenth
DEFAULT, TOOL_USE = "default", "tool_use"  # names; TOOL_USE is for conversations with tools
GGUF_KEY = "tokenizer.chat_template"
MORE = "additional_chat_templates"  # as transformers writes them
FILES = {DEFAULT: (f"{MORE}/{DEFAULT}.jinja", "chat_template.jinja"), TOOL_USE: (f"{MORE}/{TOOL_USE}.jinja",)}


def sources(folder: Path) -> dict[str, tuple[Any, Path]]:
    """Name -> template and its file. Raises ModelError for an unreadable file."""
    templates: dict[str, tuple[Any, Path]] = {}
    for name, files in FILES.items():
        for path in (inside(folder, file) for file in files):  # the last one wins
            if path.exists():
                templates[name] = read_text(path, 4 * MAX_TEMPLATE_CHARS), path
    if DEFAULT in templates:
        return templates  # newer than the settings
    settings = inside(folder, "tokenizer_config.json")
    given = _by_name(read_json(settings).get("chat_template")) if settings.exists() else {}
    return {**{name: (source, settings) for name, source in given.items()}, **templates}


def gguf_sources(path: Path, metadata: Mapping[str, Any]) -> dict[str, tuple[Any, Path]]:
    """Those of a GGUF file: `tokenizer.chat_template`, others with their name behind it."""
    keys = {name: GGUF_KEY if name == DEFAULT else f"{GGUF_KEY}.{name}" for name in FILES}
    return {name: (metadata[key], path) for name, key in keys.items() if key in metadata}


def _by_name(setting: Any) -> dict[str, Any]:
    """The setting is one template, or a list of objects with names."""
    named = setting if isinstance(setting, list) else [{"name": DEFAULT, "template": setting}]
    given = {str(t.get("name")): t.get("template") for t in named if isinstance(t, dict)}
    return {name: given[name] for name in FILES if given.get(name) is not None}
