"""One file from the Hugging Face Hub into the cache that Hugging Face's libraries share.

The cache holds `blobs/HASH`, and `snapshots/COMMIT/NAME` that link to them (source: "Understand caching" in
huggingface_hub's documentation). HASH is the file's SHA-256, or git's SHA-1 of small files; it is checked here, for
the library compares sizes only. Nor does the library resume: since version 2 it throws away what an interrupted
download has got. Here that stays as `blobs/HASH.incomplete`, and the next try asks for the rest.
"""

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmrs.core.errors import ModelError

CHUNK = 2**20  # bytes that are hashed at once
RETRIES, PAUSE = 3, 1.0  # after broken connections that brought nothing new; seconds in between
TIMEOUT = 15.0  # seconds without a sign of life
PAST_THE_END = 416  # HTTP: range not satisfiable
AGAIN = "try again: what is there already is not downloaded twice"
Report = Callable[[int], None]  # bytes of the file that are there


@dataclass(frozen=True)
class RemoteFile:
    """What the Hub promises. `hash` is hexadecimal: 64 digits are SHA-256 of the bytes, 40 are git's blob id."""

    name: str
    url: str
    size: int
    hash: str


class Broken(Exception):
    """The connection could not be made, or ended before the file did."""


def fetch(file: RemoteFile, repository: Path, snapshot: Path, report: Report) -> None:
    """Has the file in the snapshot, a folder of the cache's `repository`.

    Raises ModelError, and what hub_errors.explained turns into one.
    """
    from huggingface_hub.utils import WeakFileLock

    pointer, blob = snapshot / file.name, repository / "blobs" / file.hash
    if not has_size(pointer, file.size):
        lock = repository.parent / ".locks" / repository.name / f"{file.hash}.lock"  # where the library has it
        for folder in (pointer.parent, blob.parent, lock.parent):
            folder.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):
            if not has_size(blob, file.size):
                _download(file, blob.with_name(f"{file.hash}.incomplete"), report)
                os.replace(blob.with_name(f"{file.hash}.incomplete"), blob)
            _link(pointer, blob)
    report(file.size)


def bytes_missing(file: RemoteFile, repository: Path, snapshot: Path) -> int:
    """What is still to be downloaded of a file."""
    blob = repository / "blobs" / file.hash
    if has_size(snapshot / file.name, file.size) or has_size(blob, file.size):
        return 0
    return max(file.size - _size(blob.with_name(f"{file.hash}.incomplete")), 0)


def has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _download(file: RemoteFile, part: Path, report: Report) -> None:
    """Goes on with `part` until it is the whole file, and checks it. Only a file that is wrong is thrown away."""
    if _size(part) > file.size:
        part.unlink()
    part.touch()
    failures = 0
    while (before := _size(part)) < file.size:
        try:
            _stream(file, part, before, report)
            break  # that was all
        except Broken as error:
            failures = 0 if _size(part) > before else failures + 1
            if failures > RETRIES:
                raise ModelError(f"the download of {file.name} broke off: {error}", AGAIN) from error
            time.sleep(PAUSE)
    _check(file, part)


def _stream(file: RemoteFile, part: Path, start: int, report: Report) -> None:
    """Appends what the server sends from byte `start` on; all of it where the server can't start there."""
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    headers = {**build_hf_headers(), "Accept-Encoding": "identity", **({"Range": f"bytes={start}-"} if start else {})}
    try:
        with get_session().stream("GET", file.url, headers=headers, timeout=TIMEOUT) as response:
            if response.status_code == PAST_THE_END:
                return  # the file is shorter than was promised; the check says so
            if response.is_error:
                response.read()  # the error quotes it
            hf_raise_for_status(response)
            resumed = response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
            # as they come: chunks of a fixed size would lose the last one when the connection breaks
            _append(response.iter_bytes(), file, part, "ab" if start and resumed else "wb", report)
    except HfHubHTTPError:
        raise
    except http_error() as error:
        raise Broken(str(error) or type(error).__name__) from error


def _append(chunks: Iterator[bytes], file: RemoteFile, part: Path, mode: str, report: Report) -> None:
    with part.open(mode) as out:
        for chunk in chunks:
            out.write(chunk)
            report(min(out.tell(), file.size))
            if out.tell() > file.size:
                return  # longer than was promised; the check says so


def http_error() -> Any:
    """The base of the HTTP client's errors. huggingface_hub 1 has httpx and 2 has httpx2; both call it HTTPError."""
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError.__mro__[1]


def _check(file: RemoteFile, part: Path) -> None:
    """Raises ModelError for a file that is not what was promised."""
    found = _size(part)
    wrong = f"has {found} bytes, not {file.size}" if found != file.size else "has the wrong hash"
    if found != file.size or _hash(part, file) != file.hash:
        part.unlink()
        raise ModelError(f"{file.name} {wrong} after its download", "try again; is there a proxy that changes files?")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _hash(path: Path, file: RemoteFile) -> str:
    """The hash of the kind that the Hub gives for this file."""
    digest = hashlib.sha256() if len(file.hash) == 64 else hashlib.sha1(b"blob %d\0" % file.size)
    with path.open("rb") as data:
        while chunk := data.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _link(pointer: Path, blob: Path) -> None:
    """A relative link, or where the system allows none the file itself, as the library does."""
    pointer.unlink(missing_ok=True)
    try:
        pointer.symlink_to(os.path.relpath(blob, pointer.parent))
    except OSError:
        shutil.move(blob, pointer)
