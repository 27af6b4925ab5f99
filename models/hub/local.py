"""Lists local models: bundled, in the Hugging Face cache, in folders. Reads configs and headers only."""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from llmrs.core.errors import LlmrsError
from llmrs.models.arch.config import architecture
from llmrs.models.arch.families import graph_of, read_config
from llmrs.models.arch.gguf import GGUF_FAMILIES, config_from_metadata
from llmrs.models.files.formats import bits_per_weight, formats_of, gguf_type
from llmrs.models.files.gguf import GGUFSource
from llmrs.models.files.json_reader import read_json
from llmrs.models.files.quantized import with_quantization
from llmrs.models.files.safetensors import SafetensorsSource
from llmrs.models.hub.gguf_names import folder_models, gguf_models
from llmrs.models.hub.resolve import BUNDLED
from llmrs.models.hub.snapshot import CONFIG, TOKENIZER, snapshot_files
from llmrs.models.text.gguf_tokenizer import check_tokenizer


@dataclass
class LocalModel:
    """One model. Unreadable fields are empty; `problem` says why the model can't run."""

    name: str  # value of the option `model`
    revision: str  # "" unless a Hugging Face id
    where: str  # bundled | cache | folder
    path: str  # folder, or GGUF file
    bytes: int = 0  # of the files of its weights
    architecture: str = ""
    dtype: str = ""  # format of most weights; of GGUF files their mix, such as Q4_K_M
    bits_per_weight: float | None = None
    problem: str = ""


def list_local(cache: Path, paths: Iterable[Path]) -> Iterator[LocalModel]:
    """Every local model, including unusable ones. Raises nothing."""
    for name, folder in BUNDLED.items():
        yield describe(name, "", "bundled", folder)
    for repository in subfolders(cache):
        if repository.name.startswith("models--"):
            yield from _snapshots(repository)
    for path in paths:
        yield describe(str(path), "", "folder", path)


def find_models(folder: Path) -> list[Path]:
    """The folder itself if it holds a model of safetensors, its GGUF files, and the same of its subfolders."""
    return [path for f in (folder, *subfolders(folder)) for path in models_in(f)]


def models_in(folder: Path) -> list[Path]:
    """The folder if it holds a model of safetensors, and its GGUF files."""
    try:
        whole = [folder] if (folder / CONFIG).is_file() and any(folder.glob("*.safetensors")) else []
        return [*whole, *(folder / m.files[0] for m in folder_models(folder, nested=False))]
    except OSError:  # no permission
        return []


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
        yield LocalModel(name, "", "cache", str(repository), problem=f"can't be read: {error.strerror}")
        return
    for folder in subfolders(repository / "snapshots"):
        for revision in refs.get(folder.name, [folder.name]):
            yield from _snapshot(name, revision, folder)


def _snapshot(name: str, revision: str, folder: Path) -> Iterator[LocalModel]:
    """The GGUF models of a snapshot, and that of safetensors; without GGUF models what it has, if anything."""
    files = snapshot_files(folder)
    models = gguf_models(files)
    if (files and not models) or any(f.endswith(".safetensors") for f in files):
        yield describe(name, revision, "cache", folder)
    tags = Counter(m.tag.lower() for m in models)
    for m in models:
        unique = m.tag and tags[m.tag.lower()] == 1
        yield describe(f"{name}:{m.tag}" if unique else f"{name}/{m.files[0]}", revision, "cache", folder / m.files[0])


def describe(name: str, revision: str, where: str, path: Path) -> LocalModel:
    """Raises nothing."""
    model = LocalModel(name, revision, where, str(path))
    try:
        (_read_gguf if path.suffix == ".gguf" and not path.is_dir() else _read_folder)(model, path)
    except LlmrsError as error:
        short = error.message.replace(f"{path}/", "").replace(f"{path}: ", "").replace(f"{path} ", "it ")
        model.problem = short.replace(f"{path.parent}/", "") if path.suffix == ".gguf" else short
    except OSError as error:
        model.problem = f"can't be read: {error.strerror}"
    return model


def _read_folder(model: LocalModel, folder: Path) -> None:
    """Raises ModelError."""
    model.architecture = architecture(folder / CONFIG, read_json(folder / CONFIG))
    with closing(SafetensorsSource(folder)) as source:
        model.bytes = sum(f.path.stat().st_size for f in source.files)
        formats = formats_of(source)
        model.dtype = formats[0].format if formats else ""
        formats = formats_of(with_quantization(source, folder))
        model.dtype, model.bits_per_weight = formats[0].format if formats else "", bits_per_weight(formats)
    graph_of(read_config(folder))
    if not (folder / TOKENIZER).exists():
        model.problem = f"it lacks {TOKENIZER}"


def _read_gguf(model: LocalModel, path: Path) -> None:
    """Raises ModelError."""
    with closing(GGUFSource(path)) as source:
        model.bytes = sum(f.stat().st_size for f in source.files)
        formats = formats_of(source)
        model.dtype, model.bits_per_weight = gguf_type(source.metadata, formats), bits_per_weight(formats)
        known = GGUF_FAMILIES.get(source.architecture)
        model.architecture = known.architecture if known else source.architecture
        graph_of(config_from_metadata(path, source.metadata, source))
        check_tokenizer(path, source.metadata)
