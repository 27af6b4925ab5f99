"""Untrusted model folders: checks file names, links, file kinds and sizes before reading."""

import re
import stat
from pathlib import Path

from llmrs.core.errors import ModelError

MIB = 2**20
JSON_LIMIT = 32 * MIB  # the largest index of today's models has 15
HASH = re.compile(r"\b[0-9a-f]{40}([0-9a-f]{24})?\b")
COMPLETE = "is the file complete?"


def inside(folder: Path, name: str) -> Path:
    """folder / name. Raises ModelError if it leads out of the folder.

    A link out of the folder must point to a file of the same name (models split over disks) or to a blob of the
    Hugging Face cache. A folder from an archive or from git may link to any file of the user.
    """
    try:
        root, path = folder.resolve(), (folder / name).resolve()
        roots = [root, *(b.resolve() for b in _blobs(root))]
    except (OSError, RuntimeError, ValueError) as error:  # a link loop, an invalid name
        raise ModelError(f"{folder}: {name[:100]!r} can't be the name of a file: {error}", COMPLETE) from error
    given = Path(name)
    local = not given.is_absolute() and not given.drive and ".." not in given.parts  # links aside
    same_file = path.name == given.name or "blobs" in path.parts or HASH.search(path.name) is not None
    if not any(path.is_relative_to(r) for r in roots) and not (local and same_file):
        raise ModelError(f"{folder}: {name[:100]!r} leads out of the folder", "copy the file into the folder")
    return folder / name


def _blobs(root: Path) -> list[Path]:
    """The blob folders of a Hugging Face cache snapshot (or a folder in one); they may link to another disk."""
    snapshot = next((p for p in (root, root.parent) if p.parent.name == "snapshots"), None)
    return [snapshot.parents[1] / "blobs", snapshot.parents[2] / "blobs"] if snapshot else []


def regular_size(path: Path) -> int:
    """The size of a regular file. Raises ModelError for others: opening a pipe or a device may block forever."""
    try:
        status = path.stat()
    except FileNotFoundError as error:
        raise ModelError(f"there is no file {path}", COMPLETE) from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} can't be read: {error_text(error)}", "is this a model folder?") from error
    if not stat.S_ISREG(status.st_mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        kind = kinds.get(stat.S_IFMT(status.st_mode), "a device")
        raise ModelError(f"{path} is not a file but {kind}", "put the model's own file there")
    return status.st_size


def read_text(path: Path, limit: int) -> str:
    """The text of a file, without a byte order mark. Raises ModelError, also for more than `limit` bytes."""
    inside(path.parent, path.name)
    size = regular_size(path)
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
        if len(data) > limit:
            raise ModelError(f"{path} has {max(size, len(data))} bytes, over {limit}", "is it the model's own file?")
        return data.decode("utf-8-sig")
    except OSError as error:
        raise ModelError(f"{path} can't be read: {error_text(error)}", "is this a model folder?") from error
    except UnicodeDecodeError as error:
        raise ModelError(f"{path} is not text: {error}", COMPLETE) from error


def error_text(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
