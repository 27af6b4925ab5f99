"""Downloads one file from the Hugging Face Hub into the shared Hugging Face cache.

Cache layout: `snapshots/COMMIT/NAME` links to `blobs/HASH` (source: "Understand caching" in huggingface_hub's
documentation). HASH is SHA-256, or git's SHA-1 for small files. Unlike huggingface_hub 2, this checks the hash, and
keeps an interrupted download as `blobs/HASH.incomplete` to resume it.
"""

import hashlib
import os
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmrs.core.errors import ModelError

RETRIES, PAUSE = 3, 1.0  # consecutive failures without new bytes; seconds in between
TIMEOUT = 15.0  # seconds without data
RANGE_NOT_SATISFIABLE = 416
PART_SUFFIX = ".incomplete"
AGAIN = "try again: the download resumes where it stopped"
Report = Callable[[int], None]  # bytes of the file so far


@dataclass(frozen=True)
class RemoteFile:
    """A file as the Hub lists it. `hash`: 64 hex digits of SHA-256, or 40 of the git blob id."""

    name: str
    url: str
    size: int
    hash: str


class ConnectionBroken(Exception):
    """No connection, or it ended before the file did."""


def fetch(file: RemoteFile, repository: Path, snapshot: Path, report: Report) -> None:
    """Puts the file into the snapshot, a folder of the cache's `repository`, unless cached.

    Raises ModelError, and errors that `explained` turns into one.
    """
    pointer, blob = snapshot / file.name, repository / "blobs" / file.hash
    if not has_size(pointer, file.size):
        pointer.parent.mkdir(parents=True, exist_ok=True)
        with _locked(file, blob):
            if not has_size(blob, file.size):
                part = _part(blob)
                _download(file, part, report, file.size)
                _check(file, part)
                os.replace(part, blob)
            _link(pointer, blob)
    report(file.size)


def fetch_beginning(file: RemoteFile, repository: Path, size: int, report: Report) -> Path:
    """A file with at least the first `size` bytes, from which `fetch` goes on. Errors as there."""
    blob = repository / "blobs" / file.hash
    with _locked(file, blob):
        if has_size(blob, file.size):
            return blob
        _download(file, _part(blob), report, min(size, file.size))
    return _part(blob)


def _part(blob: Path) -> Path:
    return blob.with_name(blob.name + PART_SUFFIX)


def _locked(file: RemoteFile, blob: Path) -> AbstractContextManager[object]:
    """The lock of a blob, as huggingface_hub has it."""
    from huggingface_hub.utils import WeakFileLock

    repository = blob.parents[1]
    lock = repository.parent / ".locks" / repository.name / f"{file.hash}.lock"
    for folder in (blob.parent, lock.parent):
        folder.mkdir(parents=True, exist_ok=True)
    return WeakFileLock(lock)


def bytes_missing(file: RemoteFile, repository: Path, snapshot: Path) -> int:
    """Bytes still to download."""
    blob = repository / "blobs" / file.hash
    if has_size(snapshot / file.name, file.size) or has_size(blob, file.size):
        return 0
    return max(file.size - _size(_part(blob)), 0)


def has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _download(file: RemoteFile, part: Path, report: Report, stop: int) -> None:
    """Completes `part` up to the byte `stop`, with retries."""
    if _size(part) > file.size:
        part.unlink()
    part.touch()
    failures = 0
    while (before := _size(part)) < stop:
        try:
            _stream(file, part, before, report, stop)
            break
        except ConnectionBroken as error:
            failures = 0 if _size(part) > before else failures + 1
            if failures > RETRIES:
                raise ModelError(f"the download of {file.name} broke off: {error}", AGAIN) from error
            time.sleep(PAUSE)


def _stream(file: RemoteFile, part: Path, start: int, report: Report, stop: int) -> None:
    """Appends the bytes from `start` to `stop`; starts over if the server does not support ranges."""
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    if start or stop < file.size:
        headers["Range"] = f"bytes={start}-{stop - 1 if stop < file.size else ''}"
    try:
        with get_session().stream("GET", file.url, headers=headers, timeout=TIMEOUT) as response:
            if response.status_code == RANGE_NOT_SATISFIABLE:
                return  # shorter than listed: fails the check
            if response.is_error:
                response.read()  # for the error message
            hf_raise_for_status(response)
            resumed = response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
            with part.open("ab" if start and resumed else "wb") as out:
                for chunk in response.iter_bytes():  # of any size: a broken connection would lose the last chunk
                    out.write(chunk)
                    report(min(out.tell(), file.size))
                    if out.tell() > file.size or out.tell() >= stop < file.size:
                        return  # longer than listed: fails the check
    except HfHubHTTPError:
        raise
    except http_error() as error:
        raise ConnectionBroken(str(error) or type(error).__name__) from error


def http_error() -> Any:
    """The base of the HTTP client's errors: HTTPError of httpx (huggingface_hub 1) or httpx2 (2)."""
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError.__mro__[1]


def _check(file: RemoteFile, part: Path) -> None:
    """Raises ModelError for a wrong size or hash, and deletes the file."""
    size = _size(part)
    wrong = f"has {size} bytes, not {file.size}" if size != file.size else "has the wrong hash"
    if size != file.size or _hash(part, file) != file.hash:
        part.unlink()
        raise ModelError(f"{file.name} {wrong} after its download", "try again; is there a proxy that changes files?")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _hash(path: Path, file: RemoteFile) -> str:
    """The hash, of the kind that the Hub lists for the file."""
    digest = hashlib.sha256() if len(file.hash) == 64 else hashlib.sha1(b"blob %d\0" % file.size)
    with path.open("rb") as data:
        return hashlib.file_digest(data, lambda: digest).hexdigest()


def _link(pointer: Path, blob: Path) -> None:
    """A relative link, or the file itself where the system allows no links, as in huggingface_hub."""
    pointer.unlink(missing_ok=True)
    try:
        pointer.symlink_to(os.path.relpath(blob, pointer.parent))
    except OSError:
        shutil.move(blob, pointer)
