"""Every backend of this repository through the suite that backends of others run too."""

from importlib.util import find_spec

import pytest
import torch

from llmrs.backends.base import Backend, find, pick_device
from llmrs.backends.testing import BackendSuite, RandomModel

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")


class TestReference(BackendSuite):
    backend = "reference"


class TestTorch(BackendSuite):
    backend, device = "torch", "cpu"


class Kernels(BackendSuite):
    """Triton's kernels: on a GPU, or in Triton's interpreter, where bfloat16 is silently wrong."""

    backend, device = "torch", "auto"
    graphs = True

    def make(self, dtype: str = "f32") -> Backend:
        if dtype == "bf16" and not torch.cuda.is_available():
            pytest.skip("bfloat16 in the interpreter")
        kind = find(self.backend)
        backend = kind(pick_device(kind, self.device), dtype, dtype)
        backend.use_kernels("triton", graphs=self.graphs)
        return backend


@needs_triton
class TestKernels(Kernels):
    """The quick part of the suite."""

    graphs = False
    test_tokens_do_not_depend_on_how_steps_are_cut = None
    test_sampling_options_in_a_running_engine = None
    test_half_precision_follows_float32 = None

    @pytest.fixture(params=["llama", "mistral", "qwen3"])
    def model(self, request: pytest.FixtureRequest) -> RandomModel:
        return RandomModel.of(request.param, num_hidden_layers=2)


@needs_triton
@pytest.mark.slow
class TestKernelsOnAll(Kernels):
    """All of it, with steps in the shapes of graphs."""


@needs_triton
@pytest.mark.slow
class TestKernelsWithoutGraphs(Kernels):
    graphs = False


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
class TestTorchOnCuda(BackendSuite):
    backend, device = "torch", "cuda"


@pytest.mark.skipif(find_spec("mlx") is None, reason="needs mlx")
class TestMlx(BackendSuite):
    backend, device = "mlx", "auto"
