"""Output files and folders that appear only when they are complete."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from llmrs.core.errors import ConfigError, ModelError
from llmrs.models.files.untrusted import error_text

FORCE = "give another path, or --force to replace it"
SPACE = "delete something, or give a path on another disk"
HINTS = {errno.ENOSPC: SPACE, errno.EDQUOT: SPACE, errno.EFBIG: "a size limit is reached (`ulimit -f`)"}


@contextmanager
def new_file(path: Path, size: int, *, force: bool = False) -> Iterator[BinaryIO]:
    """A file that replaces `path` at the end of the block, and is deleted if the block fails.

    `size`: its bytes, checked against the free space first. Raises ConfigError for a path that can't be used, and
    ModelError where the file can't be written.
    """
    if path.is_dir():
        raise ConfigError(f"output: {path} is a folder", "give the path of a file")
    check_output(path, size, force=force)
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = Path(file.name)
            yield file  # type: ignore[misc]
            file.flush()
            os.fsync(file.fileno())  # a full disk shows up here at the latest
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        raise _write_error(path, error) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path, size: int, *, force: bool = False) -> Iterator[Path]:
    """A folder that is renamed to `path` at the end of the block, and is deleted if the block fails.

    With `force` it replaces a model folder, no other. Raises as `new_file`.
    """
    if force and path.exists() and not (path / "config.json").is_file():
        raise ConfigError(f"output: {path} is no model folder, and is not replaced", "give another path")
    check_output(path, size, force=force)
    temporary = None
    try:
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        if path.exists():
            replaced = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
            os.replace(path, replaced)
            os.replace(temporary, path)
            shutil.rmtree(replaced)
        else:
            os.replace(temporary, path)
    except OSError as error:
        raise _write_error(path, error) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def check_output(path: Path, size: int = 0, *, force: bool = False) -> None:
    """Raises ConfigError for a path that exists or has no folder, ModelError where `size` bytes do not fit."""
    if not path.parent.is_dir():
        raise ConfigError(f"output: there is no folder {path.parent}", "create it first")
    if path.exists() and not force:
        raise ConfigError(f"output: {path} exists", FORCE)
    if size > (free := shutil.disk_usage(path.parent).free):
        raise ModelError(f"{path} needs {size:,} bytes on the disk, and {free:,} are free", SPACE)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _write_error(path: Path, error: OSError) -> ModelError:
    hint = HINTS.get(error.errno or 0, "give another path")
    return ModelError(f"{path} can't be written: {error_text(error)}", hint)
