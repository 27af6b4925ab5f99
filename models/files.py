"""The files of a model folder, none of which is trusted."""

from pathlib import Path

from llmrs.core.errors import ModelError


def inside(folder: Path, name: str) -> Path:
    """The path of a file of the folder. Raises ModelError for a name or link that leads out of it.

    Links from a snapshot of the Hugging Face cache to the blobs beside it are how that cache is made.
    """
    root, path = folder.resolve(), (folder / name).resolve()
    roots = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    if "\0" in name or not any(path.is_relative_to(r) for r in roots):
        raise ModelError(f"{folder}: {name!r} leads out of the folder", "copy the file into the folder")
    return folder / name
