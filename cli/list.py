"""`llmrs list`: the models on this machine."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmrs.cli.terminal import note, one_line
from llmrs.core.errors import ConfigError

if TYPE_CHECKING:
    from llmrs.models.hub.local import LocalModel

HEADINGS = ("model", "weights", "architecture", "dtype", "bits", "location")


def list_models(
    folders: Annotated[
        list[str] | None,
        typer.Argument(help="model folders, .gguf files, or folders of both (default: . and ./models)"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object per model")] = False,
) -> int:
    """List bundled models, models in the Hugging Face cache, and models in folders. Loads and downloads nothing."""
    # imported here to keep `llmrs --help` fast
    from llmrs.models.hub.local import list_local
    from llmrs.models.hub.snapshot import cache_folder

    entries = list(list_local(cache_folder(), model_paths(folders or [])))
    for line in (json.dumps(asdict(e), ensure_ascii=False) for e in entries) if as_json else table(entries):
        print(line)
    return 0


def model_paths(paths: Sequence[str]) -> list[Path]:
    """The models in `paths`, or in . and ./models: folders and GGUF files. Raises ConfigError for missing ones."""
    from llmrs.models.hub.local import find_models, models_in, subfolders

    if not paths:
        parents = [Path(), Path("models")]
        return [
            m for p in parents for f in (p, *subfolders(p)) for m in models_in(f) if m not in parents
        ]  # . itself is no model here
    models = []
    for path in (Path(f).expanduser() for f in paths):
        if path.suffix == ".gguf" and path.is_file():
            models.append(path)
            continue
        if not path.is_dir():
            raise ConfigError(f"there is no folder {path}", "give model folders, .gguf files, or folders of both")
        in_folder = find_models(path)
        if not in_folder:
            note(f"{path} holds no models with safetensors, and no GGUF files")
        models += in_folder
    return models


def table(entries: Sequence["LocalModel"]) -> list[str]:
    """Aligned lines; a problem of a model stands at the end of its line."""
    rows = [HEADINGS, *map(cells, entries)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    problems = ["", *(f"  can't run: {one_line(e.problem)}" if e.problem else "" for e in entries)]
    lines = ("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows)
    return [f"{line}{problem}".rstrip() for line, problem in zip(lines, problems, strict=True)]


def cells(entry: "LocalModel") -> tuple[str, ...]:
    from llmrs.memory import format_bytes

    location = "Hugging Face cache" if entry.where == "cache" else entry.where
    if entry.revision not in ("", "main"):
        location += f", revision {entry.revision}"
    family = entry.architecture.removesuffix("ForCausalLM")
    bits = "" if entry.bits_per_weight is None else f"{entry.bits_per_weight:.2f}"
    texts = (entry.name, format_bytes(entry.bytes) if entry.bytes else "", family, entry.dtype, bits, location)
    return tuple(one_line(text) for text in texts)
