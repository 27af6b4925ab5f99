"""Lists local models: bundled, in the Hugging Face cache, in folders. Reads configs and safetensors headers only."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from llmrs.core.errors import LlmrsError
from llmrs.models.arch.config import architecture
from llmrs.models.arch.families import graph_of, read_config
from llmrs.models.files.json_reader import read_json
from llmrs.models.files.safetensors import DTYPES, SafetensorsSource
from llmrs.models.hub.resolve import BUNDLED
from llmrs.models.hub.snapshot import CONFIG, TOKENIZER


@dataclass(frozen=True)
class LocalModel:
    """One model. Unreadable fields are empty; `problem` says why the model can't run."""

    name: str  # value of the option `model`
    revision: str  # "" unless a Hugging Face id
    where: str  # bundled | cache | folder
    path: str
    bytes: int  # of the safetensors files
    architecture: str
    dtype: str  # of most weights
    problem: str


def list_local(cache: Path, folders: Iterable[Path]) -> Iterator[LocalModel]:
    """Every local model, including unusable ones. Raises nothing."""
    for name, folder in BUNDLED.items():
        yield describe(name, "", "bundled", folder)
    for repository in subfolders(cache):
        if repository.name.startswith("models--"):
            yield from _snapshots(repository)
    for folder in folders:
        yield describe(str(folder), "", "folder", folder)


def find_models(folder: Path) -> list[Path]:
    """The folder itself if it holds a model, and its subfolders that do."""
    return [f for f in (folder, *subfolders(folder)) if holds_model(f)]


def holds_model(folder: Path) -> bool:
    try:
        return (folder / CONFIG).is_file() and any(folder.glob("*.safetensors"))
    except OSError:  # no permission
        return False


def subfolders(folder: Path) -> list[Path]:
    """Sorted; empty for an unreadable folder."""
    try:
        return sorted(f for f in folder.iterdir() if f.is_dir())
    except OSError:
        return []


def _snapshots(repository: Path) -> Iterator[LocalModel]:
    """The cached revisions of a repository, by branch or tag, else by commit."""
    name = repository.name.removeprefix("models--").replace("--", "/", 1)
    refs: dict[str, list[str]] = {}
    try:
        for file in sorted(p for p in (repository / "refs").rglob("*") if p.is_file()):
            commit = file.read_bytes()[:100].decode("ascii", "replace").strip()
            refs.setdefault(commit, []).append(file.relative_to(repository / "refs").as_posix())
    except OSError as error:
        yield LocalModel(name, "", "cache", str(repository), 0, "", "", f"can't be read: {error.strerror}")
        return
    for folder in subfolders(repository / "snapshots"):
        for revision in refs.get(folder.name, [folder.name]):
            yield describe(name, revision, "cache", folder)


def describe(name: str, revision: str, where: str, folder: Path) -> LocalModel:
    """Raises nothing."""
    arch, dtype, size, problem = "", "", 0, ""
    try:
        arch = architecture(folder / CONFIG, read_json(folder / CONFIG))
        dtype, size = _weights(folder)
        graph_of(read_config(folder))
        problem = "" if (folder / TOKENIZER).exists() else f"it lacks {TOKENIZER}"
    except LlmrsError as error:
        problem = error.message.replace(f"{folder}/", "").replace(f"{folder}: ", "").replace(f"{folder} ", "it ")
    except OSError as error:
        problem = f"can't be read: {error.strerror}"
    return LocalModel(name, revision, where, str(folder), size, arch, dtype, problem)


def _weights(folder: Path) -> tuple[str, int]:
    """The dtype of most weights, and the bytes of their files. Raises ModelError."""
    source = SafetensorsSource(folder)
    elements: Counter[str] = Counter()
    for t in source.tensors.values():
        elements[t.dtype] += math.prod(t.shape)
    most = max(elements, key=elements.__getitem__, default="")
    return DTYPES.get(most, most.lower()), sum(f.path.stat().st_size for f in source.files)
