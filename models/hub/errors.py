"""Turns errors of the Hugging Face Hub into ModelError with a hint."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from llmrs.core.errors import ModelError
from llmrs.models.hub.download import AGAIN, http_error

DISK_HINT = "free some space, or set HF_HOME to a folder on another disk"
TOKEN_HINT = "set HF_TOKEN, or log in with `hf auth login`"
OFFLINE_HINT = "is there a network? `offline: true` uses what is in the cache"


@contextmanager
def explained(name: str, revision: str | None, endpoint: str) -> Iterator[None]:
    """Converts errors of huggingface_hub, the network and the disk."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except HfHubHTTPError as error:
        raise _refused(error, name, revision, endpoint) from error
    except http_error() as error:
        raise ModelError(f"{endpoint} can't be reached: {str(error) or type(error).__name__}", OFFLINE_HINT) from error
    except OSError as error:
        what = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else str(error)
        raise ModelError(f"{name} can't be stored: {what}", f"{DISK_HINT}; {AGAIN}") from error


def _refused(error: Exception, name: str, revision: str | None, endpoint: str) -> ModelError:
    """An HTTP error of the Hub."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    status: int = error.response.status_code  # type: ignore[attr-defined]
    if isinstance(error, GatedRepoError):
        return ModelError(f"{name} is gated", f"accept its terms at {endpoint}/{name}, then {TOKEN_HINT}")
    if isinstance(error, RevisionNotFoundError):
        return ModelError(f"{name} has no revision {revision!r}", f"{endpoint}/{name}/tree/main lists them")
    if isinstance(error, RepositoryNotFoundError):
        hint = f"check the spelling; for a private one {TOKEN_HINT}; or give an existing folder"
        return ModelError(f"there is no model {name} at {endpoint}, or it is private", hint)
    if status in (401, 403):
        hint = f"check the token: {TOKEN_HINT}"
        return ModelError(f"{endpoint} refuses access to {name} (HTTP status {status})", hint)
    if status == 429:
        return ModelError(f"{endpoint} asks for fewer requests (HTTP status 429)", f"wait a while; {TOKEN_HINT}")
    return ModelError(f"{endpoint} answered for {name} with HTTP status {status}", AGAIN)
