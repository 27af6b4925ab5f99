"""The models on this machine: bundled, in the Hugging Face cache, in folders. Only their small files are read."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from llmrs.core.errors import LlmrsError
from llmrs.models.arch.config import architecture
from llmrs.models.arch.families import graph_of, read_config
from llmrs.models.files.json_reader import read_json
from llmrs.models.files.safetensors import NAMES, SafetensorsSource
from llmrs.models.hub.locate import BUNDLED
from llmrs.models.hub.resolve import CONFIG, TOKENIZER


@dataclass(frozen=True)
class Entry:
    """A model as a list shows it. What could not be read is empty, and `problem` says why it can't run."""

    name: str  # what `model:` takes
    revision: str  # of a Hugging Face id; "" for others
    where: str  # bundled | cache | folder
    path: str
    bytes: int  # of the weights' files
    architecture: str
    dtype: str  # that most of the weights have
    problem: str


def catalog(cache: Path, folders: Iterable[Path]) -> Iterator[Entry]:
    """Every model of this machine; one that is broken is one entry that says so. Raises nothing."""
    for name, folder in BUNDLED.items():
        yield entry(name, "", "bundled", folder)
    for repository in subfolders(cache):
        if repository.name.startswith("models--"):
            yield from _snapshots(repository)
    for folder in folders:
        yield entry(str(folder), "", "folder", folder)


def local_models(folder: Path) -> list[Path]:
    """The folder itself where it holds a model, else those of its subfolders that do."""
    return [f for f in (folder, *subfolders(folder)) if holds_model(f)]


def holds_model(folder: Path) -> bool:
    try:
        return (folder / CONFIG).is_file() and any(folder.glob("*.safetensors"))
    except OSError:  # no right to look into it
        return False


def subfolders(folder: Path) -> list[Path]:
    """Sorted; none of a folder that can't be read."""
    try:
        return sorted(f for f in folder.iterdir() if f.is_dir())
    except OSError:
        return []


def _snapshots(repository: Path) -> Iterator[Entry]:
    """The revisions of a repository of the cache: by the names that lead to them, else by their commit."""
    name = repository.name.removeprefix("models--").replace("--", "/", 1)
    named: dict[str, list[str]] = {}
    try:
        for file in sorted(p for p in (repository / "refs").rglob("*") if p.is_file()):
            commit = file.read_bytes()[:100].decode("ascii", "replace").strip()
            named.setdefault(commit, []).append(file.relative_to(repository / "refs").as_posix())
    except OSError as error:
        yield Entry(name, "", "cache", str(repository), 0, "", "", f"can't be read: {error.strerror}")
        return
    for folder in subfolders(repository / "snapshots"):
        for revision in named.get(folder.name, [folder.name]):
            yield entry(name, revision, "cache", folder)


def entry(name: str, revision: str, where: str, folder: Path) -> Entry:
    """What a folder holds. Raises nothing."""
    kind, dtype, size, problem = "", "", 0, ""
    try:
        kind = architecture(folder / CONFIG, read_json(folder / CONFIG))
        dtype, size = _weights(folder)
        graph_of(read_config(folder))
        problem = "" if (folder / TOKENIZER).exists() else f"it lacks {TOKENIZER}"
    except LlmrsError as error:
        problem = error.message.replace(f"{folder}/", "").replace(f"{folder}: ", "").replace(f"{folder} ", "it ")
    except OSError as error:
        problem = f"can't be read: {error.strerror}"
    return Entry(name, revision, where, str(folder), size, kind, dtype, problem)


def _weights(folder: Path) -> tuple[str, int]:
    """The type that most of the weights have, and the bytes of their files. Raises ModelError."""
    source = SafetensorsSource(folder)
    elements: Counter[str] = Counter()
    for e in source.entries.values():
        elements[e.dtype] += math.prod(e.shape)
    most = max(elements, key=elements.__getitem__, default="")
    return NAMES.get(most, most.lower()), sum(f.path.stat().st_size for f in source.files)
