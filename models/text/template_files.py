"""The files of chat templates: chat_template.jinja, additional_chat_templates/, else tokenizer_config.json."""

from pathlib import Path
from typing import Any

from llmrs.models.files.json_reader import read_json
from llmrs.models.files.untrusted import inside, read_text

LARGEST = 200_000  # characters of a template; those of today's models have less than a tenth
DEFAULT, TOOL_USE = "default", "tool_use"  # names; the second is for conversations with tools
MORE = "additional_chat_templates"  # where transformers writes those that are not the default
FILES = {DEFAULT: (f"{MORE}/{DEFAULT}.jinja", "chat_template.jinja"), TOOL_USE: (f"{MORE}/{TOOL_USE}.jinja",)}


def sources(folder: Path) -> dict[str, tuple[Any, Path]]:
    """The templates by name, each with the file that it is from. Raises ModelError for a file that can't be read."""
    found: dict[str, tuple[Any, Path]] = {}
    for name, files in FILES.items():
        for path in (inside(folder, file) for file in files):  # of two that are there the last counts
            if path.exists():
                found[name] = read_text(path, 4 * LARGEST), path
    if DEFAULT in found:
        return found  # what the settings hold is older
    settings = inside(folder, "tokenizer_config.json")
    given = _by_name(read_json(settings).get("chat_template")) if settings.exists() else {}
    return {**{name: (source, settings) for name, source in given.items()}, **found}


def _by_name(setting: Any) -> dict[str, Any]:
    """The setting is one template, or a list of objects with names."""
    named = setting if isinstance(setting, list) else [{"name": DEFAULT, "template": setting}]
    given = {str(t.get("name")): t.get("template") for t in named if isinstance(t, dict)}
    return {name: given[name] for name in FILES if given.get(name) is not None}
