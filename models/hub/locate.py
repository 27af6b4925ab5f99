"""From what the user calls a model to the folder that holds it."""

from collections.abc import Callable
from pathlib import Path

from llmrs.core.errors import ModelError, did_you_mean
from llmrs.models import demo
from llmrs.models.hub import resolve as hub

BUNDLED = {"demo": demo.FILES}


def locate(
    name: str,
    revision: str | None = None,
    *,
    offline: bool = False,
    weights: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """The folder of a bundled model, a path, or a Hugging Face id, whose files are downloaded where they are missing.

    `weights` says whether they are needed; `progress` is given the bytes done and of all. Raises ModelError that says
    what is wrong with the name.
    """
    path = Path(name).expanduser()
    bundled = name in BUNDLED and not path.is_dir()
    if not bundled and not path.exists() and path.suffix != ".gguf" and hub.looks_like_id(name):
        return hub.resolve(name, revision, offline=offline, weights=weights, progress=progress)
    if revision is not None:
        raise ModelError(f"revision: {name} is no Hugging Face id, and has none", "leave it out")
    return BUNDLED[name] if bundled else _folder(name, path)


def _folder(name: str, path: Path) -> Path:
    if path.suffix == ".gguf" or (path.is_dir() and not (path / "config.json").exists() and any(path.glob("*.gguf"))):
        raise ModelError(f"{name}: GGUF files can't be read yet", "use a folder with safetensors files")
    if path.is_file():
        raise ModelError(f"{name} is a file", f"give the folder that holds it: {path.parent}")
    if not path.is_dir():
        raise ModelError(
            f"there is no model {name!r} here",
            did_you_mean(name, BUNDLED) + "; or give a folder, or a Hugging Face id: owner/name",
        )
    if not (path / "config.json").exists():
        raise ModelError(f"{name} holds no config.json", "give a model folder as Hugging Face's libraries write it")
    return path
