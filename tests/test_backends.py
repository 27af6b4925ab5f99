"""Every backend of this repository through the suite that backends of others run too."""

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
