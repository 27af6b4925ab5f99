"""Run with `python -m pytest examples/backend` after installing the package."""

from llmrs_counting import CountingBackend, operations

from llmrs.backends.base import load_backend
from llmrs.backends.testing import BackendSuite, RandomModel, core_on, request, run


class TestCounting(BackendSuite):
    backend = "counting"


def test_it_counts():
    model, backend = RandomModel.of("llama"), load_backend("counting")("cpu", "f32", "f32")
    assert isinstance(backend, CountingBackend)
    operations.clear()
    run(core_on(model.on(backend)), [request([1, 2, 3], max_tokens=1)])
    assert operations["lm_head"] == 2 * 211 * 64
    assert operations["fused_add_rms_norm"] == 3 * 3 * 64  # three layers, three tokens
