"""Resolves a model name (bundled model, folder, or Hugging Face id) to its folder."""

from collections.abc import Callable
from pathlib import Path

from llmrs.core.errors import ModelError, did_you_mean
from llmrs.models import demo
from llmrs.models.hub.snapshot import looks_like_id, resolve_snapshot

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
    if not bundled and not path.exists() and path.suffix != ".gguf" and looks_like_id(name):
        return resolve_snapshot(name, revision, offline=offline, weights=weights, progress=progress)
    if revision is not None:
        raise ModelError(f"revision: {name} is no Hugging Face id, and has none", "leave it out")
    return BUNDLED[name] if bundled else _folder(name, path)


def _folder(name: str, path: Path) -> Path:
    if path.suffix == ".gguf" and path.is_file():
        return path
    if path.is_dir() and not (path / "config.json").exists() and (files := sorted(path.glob("*.gguf"))):
        raise ModelError(f"{name} is a folder of GGUF files", f"give one of them, such as {files[0]}")
    if path.is_file():
        raise ModelError(f"{name} is a file", f"give the folder that holds it: {path.parent}")
    if not path.is_dir():
        hint = did_you_mean(name, BUNDLED) + "; or give a folder, or a Hugging Face id: owner/name"
        raise ModelError(f"there is no model {name!r} here", hint)
    if not (path / "config.json").exists():
        raise ModelError(f"{name} holds no config.json", "give a model folder as Hugging Face's libraries write it")
    return path
