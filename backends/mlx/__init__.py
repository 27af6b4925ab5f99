"""The MLX backend for Apple GPUs. Importing it raises BackendError if MLX is missing or too old."""

import platform
import sys

from llmrs.core.errors import BackendError

MIN_MLX = (0, 32)  # the first with `new_thread_unsafe_stream`
MIN_MACOS = 14  # of MLX's wheels


def check_mlx() -> None:
    """Raises BackendError if MLX is missing or too old."""
    try:
        import mlx.core as mx
    except ImportError as error:
        raise BackendError(f"backend mlx: MLX can't be loaded: {error}", _hint()) from error
    version = str(mx.__version__)  # type: ignore[attr-defined]  # not in MLX's stubs
    if tuple(map(int, version.split(".")[:2])) < MIN_MLX:
        needed = ".".join(map(str, MIN_MLX))
        raise BackendError(f"MLX {version} is too old; {needed} or later is needed", "pip install -U mlx")


def _hint() -> str:
    """How to install MLX, or which backend to use instead."""
    other = "; backend: torch runs here"
    if sys.platform == "darwin" and platform.machine() != "arm64":
        return f"MLX needs Apple silicon, and a Python that is built for it{other}"
    if sys.platform == "darwin" and int(platform.mac_ver()[0].split(".")[0]) < MIN_MACOS:
        return f"MLX needs macOS {MIN_MACOS} or later, and this is {platform.mac_ver()[0]}{other}"
    return "pip install 'llmrs[mlx]'" if sys.platform in ("darwin", "linux") else f"MLX needs macOS or Linux{other}"


check_mlx()
