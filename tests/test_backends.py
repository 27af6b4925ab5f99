"""Every backend of this repository through the suite that backends of others run too."""

from importlib.util import find_spec

import pytest
import torch

from llmrs.backends.testing import BackendSuite


class TestReference(BackendSuite):
    backend = "reference"


class TestTorch(BackendSuite):
    backend, device = "torch", "cpu"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
class TestTorchOnCuda(BackendSuite):
    backend, device = "torch", "cuda"


@pytest.mark.skipif(find_spec("mlx") is None, reason="needs mlx")
class TestMlx(BackendSuite):
    backend, device = "mlx", "auto"
