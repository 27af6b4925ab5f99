"""`llmrs list`: the models on this machine."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmrs.cli.terminal import guarded, note, one_line
from llmrs.core.errors import ConfigError

if TYPE_CHECKING:
    from llmrs.models.hub.local import LocalModel

HEADINGS = ("model", "weights", "architecture", "type", "where")


def list_models(
    folders: Annotated[
        list[str] | None, typer.Argument(help="model folders, or folders of them; without: . and ./models")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object per model")] = False,
) -> int:
    """Lists the models that are bundled, in the Hugging Face cache and in folders. Nothing is loaded or downloaded."""
    return guarded(lambda: show(folders or [], as_json))


def show(folders: Sequence[str], as_json: bool) -> int:
    # here, since `llmrs --help` should not wait for them
    from llmrs.models.hub.local import list_local
    from llmrs.models.hub.snapshot import cache_folder

    entries = list(list_local(cache_folder(), models_in(folders)))
    if as_json:
        for entry in entries:
            print(json.dumps(asdict(entry), ensure_ascii=False))
        return 0
    for line in table(entries):
        print(line)
    return 0


def models_in(folders: Sequence[str]) -> list[Path]:
    """The model folders that are meant. Raises ConfigError for a folder that is not there, or that holds none."""
    from llmrs.models.hub.local import find_models, holds_model, subfolders

    if not folders:
        return [f for place in (Path(), Path("models")) for f in subfolders(place) if holds_model(f)]
    found = []
    for folder in (Path(f).expanduser() for f in folders):
        if not folder.is_dir():
            raise ConfigError(f"there is no folder {folder}", "give model folders, or folders of them")
        models = find_models(folder)
        if not models:
            note(f"{folder} holds no models with safetensors")
        found += models
    return found


def table(entries: Sequence["LocalModel"]) -> list[str]:
    """Aligned lines; what is wrong with a model stands at the end of its line."""
    rows = [HEADINGS, *(cells(e) for e in entries)]
    widths = [max(len(row[n]) for row in rows) for n in range(len(HEADINGS))]
    problems = ["", *(f"  can't run: {one_line(e.problem)}" if e.problem else "" for e in entries)]
    lines = ("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows)
    return [f"{line}{problem}".rstrip() for line, problem in zip(lines, problems, strict=True)]


def cells(entry: "LocalModel") -> tuple[str, ...]:

    where = {"cache": "Hugging Face cache"}.get(entry.where, entry.where)
    if entry.revision not in ("", "main"):
        where += f", revision {entry.revision}"
    kind = entry.architecture.removesuffix("ForCausalLM")
    texts = (entry.name, format_bytes(entry.bytes) if entry.bytes else "", kind, entry.dtype, where)
    return tuple(one_line(text) for text in texts)
