"""What runs on Apple GPUs, through MLX. Importing it raises BackendError where MLX is missing or too old."""

import platform
import sys

from llmrs.core.errors import BackendError

NEEDED = (0, 32)  # the first with streams that any thread may use (`new_thread_unsafe_stream`)
MACOS = 14  # the first that MLX is built for


def check_mlx() -> None:
    """Raises BackendError where MLX can't be used."""
    try:
        import mlx.core as mx
    except ImportError as error:
        raise BackendError(f"backend mlx: MLX can't be loaded: {error}", _what_helps()) from error
    version = str(mx.__version__)  # type: ignore[attr-defined]  # which MLX's stubs lack
    if tuple(map(int, version.split(".")[:2])) < NEEDED:
        needed = ".".join(map(str, NEEDED))
        raise BackendError(f"MLX {version} is too old; {needed} or later is needed", "pip install -U mlx")


def _what_helps() -> str:
    """Where MLX is made for this system: installing it; elsewhere another backend."""
    other = "; backend: torch runs here"
    if sys.platform == "darwin" and platform.machine() != "arm64":
        return f"MLX needs Apple silicon, and a Python that is built for it{other}"
    if sys.platform == "darwin" and int(platform.mac_ver()[0].split(".")[0]) < MACOS:
        return f"MLX needs macOS {MACOS} or later, and this is {platform.mac_ver()[0]}{other}"
    return "pip install 'llmrs[mlx]'" if sys.platform in ("darwin", "linux") else f"MLX needs macOS or Linux{other}"


check_mlx()
