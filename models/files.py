"""The files of a model folder, none of which is trusted."""

from pathlib import Path

from llmrs.core.errors import ModelError


def inside(folder: Path, name: str) -> Path:
    """The path of a file of the folder. Raises ModelError for a name or link that leads out of it.

    Links from a snapshot of the Hugging Face cache to the blobs beside it, or to those that all repositories share,
    are how that cache is made.
    """
    root, path = folder.resolve(), (folder / name).resolve()
    roots = [root]
    if root.parent.name == "snapshots":
        roots += [root.parents[1] / "blobs", root.parents[2] / "blobs"]
    if "\0" in name or not any(path.is_relative_to(r) for r in roots):
        raise ModelError(f"{folder}: {name!r} leads out of the folder", "copy the file into the folder")
    return folder / name
