"""Puts the helpers of these tests on sys.path (importlib mode does not), and skips tests without a shim or GPU."""

import os
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
SHIM = sys.platform == "linux" and shutil.which(os.environ.get("CXX", "g++")) is not None


@pytest.fixture(autouse=True)
def _needs_the_shim(request: pytest.FixtureRequest) -> None:
    """With Metal, kernels are compared on the GPU; mutations and the shim's own tests need the shim."""
    on_gpu = sys.platform == "darwin" and "mutated" not in request.node.name and "shim" not in request.node.path.name
    if not SHIM and not on_gpu:
        pytest.skip("the Metal shim needs Linux and g++")
