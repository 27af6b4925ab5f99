"""Resolves the name of a model to its folder or GGUF file.

demo                          bundled
FOLDER  FILE.gguf             on this machine; a folder of safetensors, or with one GGUF model
FOLDER:Q4_K_M                 one of a folder's GGUF models
OWNER/NAME  OWNER/NAME:Q4_K_M  OWNER/NAME/FILE.gguf     a repository of the Hugging Face Hub
"""

from collections.abc import Callable
from pathlib import Path

from llmrs.core.errors import ModelError, did_you_mean
from llmrs.models import demo
from llmrs.models.files.gguf import SUFFIX
from llmrs.models.hub.gguf_names import choose, folder_models, split_tag
from llmrs.models.hub.snapshot import CONFIG, looks_like_id, resolve_snapshot

BUNDLED = {"demo": demo.FILES}


def resolve_model(
    name: str, revision: str | None = None, *, offline: bool = False, weights: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:  # fmt: skip
    """The folder or GGUF file of a model. Downloads missing files of a Hub id; without `weights` config.json only.

    `progress` receives bytes done and total bytes. Raises ModelError.
    """
    path = Path(name).expanduser()
    bundled = name in BUNDLED and not path.is_dir()
    if not bundled and not path.exists() and (hub := _on_hub(name, path)):
        return resolve_snapshot(hub[0], revision, hub[1], offline=offline, weights=weights, progress=progress)
    if revision is not None:
        raise ModelError(f"revision: {name} is no Hugging Face id, and has none", "leave it out")
    return BUNDLED[name] if bundled else _local(name, path)


def local_path(name: str) -> Path:
    """The folder or file that a name on this machine begins with, without its tag."""
    path = Path(name).expanduser()
    return path if path.exists() else Path(split_tag(name)[0]).expanduser()


def _on_hub(name: str, path: Path) -> tuple[str, str | None] | None:
    """A repository, and the tag or file in it, where the name was meant as one."""
    if name.endswith(SUFFIX):
        owner, *rest = name.split("/", 2)
        repository = "/".join([owner, *rest[:1]])
        known = len(rest) == 2 and looks_like_id(repository) and not path.parent.is_dir()
        return (repository, rest[1]) if known else None
    base, tag = split_tag(name)
    return (base, tag) if looks_like_id(base) and not Path(base).is_dir() else None


def _local(name: str, path: Path) -> Path:
    base, tag = (name, None) if path.exists() else split_tag(name)
    folder = Path(base).expanduser()
    if tag is not None and folder.is_dir():
        return folder / choose(folder_models(folder), base, tag).files[0]
    if path.is_file():
        if path.suffix == SUFFIX:
            return path
        raise ModelError(f"{name} is a file", f"give the folder that holds it: {path.parent}")
    if not path.is_dir():
        raise _nothing_there(name, path)
    if (path / CONFIG).exists() and any(path.glob("*.safetensors")):
        return path
    if models := folder_models(path):
        return path / choose(models, name, None).files[0]
    if not (path / CONFIG).exists():
        hint = "give a model folder as Hugging Face's libraries write it, or a .gguf file"
        raise ModelError(f"{name} holds no {CONFIG}", hint)
    return path


def _nothing_there(name: str, path: Path) -> ModelError:
    if path.suffix == SUFFIX:
        beside = [p.name for p in path.parent.glob(f"*{SUFFIX}")] if path.parent.is_dir() else []
        hint = did_you_mean(path.name, beside) if beside else "give a GGUF file, or OWNER/NAME/FILE.gguf of the Hub"
        return ModelError(f"there is no file {name}", hint)
    hint = did_you_mean(name, BUNDLED) + "; or give a folder, a .gguf file, or a Hugging Face id: owner/name"
    return ModelError(f"there is no model {name!r} here", hint)
