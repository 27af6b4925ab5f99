"""The conformance suite on every backend of this repository."""

from importlib.util import find_spec

import pytest
import torch

from llmrs.backends.base import Backend, load_backend, pick_device
from llmrs.backends.testing import FORMS, BackendSuite, Forms, RandomModel, core_on, prompts, request, run
from llmrs.core.request import Request

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")


class TestReference(BackendSuite):
    backend = "reference"


class TestTorch(BackendSuite):
    backend, device = "torch", "cpu"


class Kernels(BackendSuite):
    """Triton kernels on a GPU or in Triton's interpreter, which is silently wrong in bfloat16."""

    backend, device = "torch", "auto"
    graphs = True

    def make(self, dtype: str = "f32", kv_dtype: str | None = None) -> Backend:
        if dtype == "bf16" and not torch.cuda.is_available():
            pytest.skip("bfloat16 in the interpreter")
        kind = load_backend(self.backend)
        backend = kind(pick_device(kind, self.device), dtype, kv_dtype or dtype)
        backend.use_kernels("triton", graphs=self.graphs)
        return backend


@needs_triton
class TestKernels(Kernels):
    """The fast tests of the suite."""

    graphs = False
    test_tokens_do_not_depend_on_batching = None
    test_sampling_options_in_a_running_engine = None
    test_half_precision_follows_float32 = None
    test_a_kv_cache_in_fp8 = None

    @pytest.fixture(params=["llama", "mistral", "qwen3"])
    def model(self, request: pytest.FixtureRequest) -> RandomModel:
        return RandomModel.of(request.param, num_hidden_layers=2)

    @pytest.mark.parametrize("forms", FORMS[:2])
    def test_quantized_weights(self, forms: Forms) -> None:
        """Torch alone unpacks them: other forms differ in nothing here."""
        super().test_quantized_weights(forms)

    def test_short_outputs_do_not_depend_on_batching(self) -> None:
        """Batched, with chunked prefill, preempted."""
        model = RandomModel.of("mistral", num_hidden_layers=1)

        def ask() -> list[Request]:
            drawn = {"temperature": 0.8, "top_p": 0.9, "top_k": 50}
            return [request(p, n, max_tokens=6, **(drawn if n else {})) for n, p in enumerate(prompts(1, 9, 14))]

        expected = run(core_on(model.on(load_backend("reference")("cpu", "f32", "f32"))), ask())
        backend = model.on(self.make())
        for options in ({}, {"max_num_batched_tokens": 8}, {"blocks": 9, "max_num_seqs": 3, "prefix_cache": False}):
            core = core_on(backend, **options)
            assert run(core, ask()) == expected, options
        assert core.scheduler.stats["preemptions"] > 0

    def test_a_short_output_with_a_kv_cache_in_fp8(self) -> None:
        """With chunked prefill, then from the prefix cache."""
        model = RandomModel.of("llama", num_hidden_layers=1)

        def ask() -> list[Request]:
            return [request(p, max_tokens=3) for p in prompts(2, 9)]

        expected = run(core_on(model.on(load_backend("reference")("cpu", "f32", "fp8"))), ask())
        core = core_on(model.on(self.make("f32", "fp8")), max_num_seqs=2, max_num_batched_tokens=6)
        assert run(core, ask()) == expected
        assert run(core, ask()) == expected


@needs_triton
@pytest.mark.slow
class TestKernelsWithGraphs(Kernels):
    """The whole suite in CUDA graph shapes; the slowest tests only on a GPU: the interpreter takes half an hour."""

    if not torch.cuda.is_available():
        test_tokens_do_not_depend_on_batching = None
        test_a_kv_cache_in_fp8 = None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
class TestTorchOnCuda(BackendSuite):
    backend, device = "torch", "cuda"


@pytest.mark.skipif(find_spec("mlx") is None, reason="needs mlx")
class TestMlx(BackendSuite):
    backend, device = "mlx", "auto"
