"""From what the user calls a model to the folder that holds it."""

from pathlib import Path

from llmrs.core.errors import ModelError, did_you_mean
from llmrs.models import demo

BUNDLED = {"demo": demo.FILES}


def locate(name: str) -> Path:
    """The folder of a bundled model or a path. Raises ModelError that says what is wrong with the name."""
    path = Path(name).expanduser()
    if name in BUNDLED and not path.is_dir():
        return BUNDLED[name]
    if path.suffix == ".gguf" or (path.is_dir() and not (path / "config.json").exists() and any(path.glob("*.gguf"))):
        raise ModelError(f"{name}: GGUF files can't be read yet", "use a folder with safetensors files")
    if path.is_file():
        raise ModelError(f"{name} is a file", f"give the folder that holds it: {path.parent}")
    if not path.is_dir():
        raise ModelError(f"there is no model {name!r} here", _advice(name))
    if not (path / "config.json").exists():
        raise ModelError(f"{name} holds no config.json", "give a model folder as Hugging Face's libraries write it")
    return path


def _advice(name: str) -> str:
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return "Hugging Face ids are not resolved yet: download the model and give its folder"
    return did_you_mean(name, BUNDLED) + "; or give a folder"
