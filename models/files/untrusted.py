"""The files of a model folder, none of which is trusted: their names, their kinds, their sizes."""

import re
import stat
from pathlib import Path

from llmrs.core.errors import ModelError

MIB = 2**20
JSON_LIMIT = 32 * MIB  # the largest index of today's models has 15
HASH = re.compile(r"\b[0-9a-f]{40}([0-9a-f]{24})?\b")
COMPLETE = "is the file complete?"


def inside(folder: Path, name: str) -> Path:
    """The path of a file of the folder. Raises ModelError for a name that leads out of it, or such a link.

    Files may lie elsewhere, as on another disk, behind a link to a file of the same name, or to a blob: so is the
    Hugging Face cache made. Any other link out of the folder is refused, as a folder from an archive or from git may
    hold one to a file of the user's that is no part of a model.
    """
    try:
        root, path = folder.resolve(), (folder / name).resolve()
        roots = [root, *(b.resolve() for b in _blobs(root))]
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a name that no file can have
        raise ModelError(f"{folder}: {name[:100]!r} can't be the name of a file: {error}", COMPLETE) from error
    if not any(path.is_relative_to(r) for r in roots) and not (_plain(name) and _same_file(path, name)):
        raise ModelError(f"{folder}: {name[:100]!r} leads out of the folder", "copy the file into the folder")
    return folder / name


def _blobs(root: Path) -> list[Path]:
    """Where the Hugging Face cache keeps the files of a snapshot or of a folder in it. They may be links to another
    disk themselves."""
    snapshot = next((p for p in (root, root.parent) if p.parent.name == "snapshots"), None)
    return [snapshot.parents[1] / "blobs", snapshot.parents[2] / "blobs"] if snapshot else []


def _plain(name: str) -> bool:
    """Whether a name itself stays in the folder, wherever links lead."""
    path = Path(name)
    return not path.is_absolute() and not path.drive and ".." not in path.parts


def _same_file(path: Path, name: str) -> bool:
    """Whether a link leads to a file of its own name, or to a blob, which is named by its hash."""
    return path.name == Path(name).name or "blobs" in path.parts or HASH.search(path.name) is not None


def regular(path: Path) -> int:
    """The size of a file. Raises ModelError for what is none: opening a pipe or a device may never end."""
    try:
        found = path.stat()
    except FileNotFoundError as error:
        raise ModelError(f"there is no file {path}", COMPLETE) from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} can't be read: {_reason(error)}", "is this a model folder?") from error
    if not stat.S_ISREG(found.st_mode):
        raise ModelError(f"{path} is not a file but {_kind(found.st_mode)}", "put the model's own file there")
    return found.st_size


def read_text(path: Path, limit: int) -> str:
    """The text of a file in its folder, without a byte order mark. Raises ModelError, also over `limit` bytes."""
    inside(path.parent, path.name)
    size = regular(path)
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
        if len(data) > limit:
            size = max(size, len(data))
            raise ModelError(f"{path} has {size} bytes, over {limit}", "that is more than such a file can need")
        return data.decode("utf-8-sig")
    except OSError as error:
        raise ModelError(f"{path} can't be read: {_reason(error)}", "is this a model folder?") from error
    except UnicodeDecodeError as error:
        raise ModelError(f"{path} is not text: {error}", COMPLETE) from error


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")
