"""PDL: where it is used, and the protocol that every CTA follows. tools/triton_compile.py checks the code."""

import importlib
import pkgutil

import pytest
import torch

pytest.importorskip("triton")
import triton.language as tl

from llmrs.backends.base import load_backend
from llmrs.backends.testing import RandomModel, core_on, prompts, run
from llmrs.backends.testing import request as asked_for
from llmrs.backends.torch import kernels, model_runner
from llmrs.backends.torch.kernels import launch
from llmrs.backends.torch.kernels.launch import supports_pdl
from llmrs.backends.torch.program import Program

GPU = torch.device("cuda:0")


@pytest.mark.parametrize(
    ("capability", "supported"), [((8, 0), False), ((8, 9), False), ((9, 0), True), ((10, 0), True)]
)
def test_only_on_sm_90_and_later(monkeypatch, capability, supported: bool):
    monkeypatch.setattr(launch, "interpreted", lambda: False)
    monkeypatch.setattr(launch, "_capability", lambda device: capability)
    assert supports_pdl(GPU) == supported
    assert not supports_pdl(torch.device("cpu"))


def test_not_in_the_interpreter(monkeypatch):
    monkeypatch.setattr(launch, "interpreted", lambda: True)
    assert not supports_pdl(GPU)


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The runner uses PDL in the interpreter; the calls of its two instructions."""
    made: list[str] = []
    monkeypatch.setattr(model_runner, "supports_pdl", lambda device: True)
    for module in pkgutil.iter_modules(kernels.__path__, kernels.__name__ + "."):
        monkeypatch.setattr(
            importlib.import_module(module.name), "prefetch_l2", lambda ptrs: None, raising=False
        )  # PTX
    monkeypatch.setattr(tl.extra.cuda, "gdc_wait", lambda: made.append("wait"))
    monkeypatch.setattr(tl.extra.cuda, "gdc_launch_dependents", lambda: made.append("launch"))
    return made


def answers(dtype: str) -> list[list[int]]:
    """Of greedy, sampled and filtered requests, prefill and decode."""
    backend = load_backend("torch")("cpu", dtype, dtype)
    backend.use_kernels("triton", graphs=False)
    model = RandomModel.of("qwen3", num_hidden_layers=1).on(backend)
    asked = [asked_for(p, n, max_tokens=2, temperature=0.9, top_k=5 * n) for n, p in enumerate(prompts(3, 5))]
    return run(core_on(model), asked)


@pytest.mark.skipif(not launch.interpreted(), reason="compiled kernels call nothing of ours")
@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_every_cta_waits_once_and_then_launches_dependents(dtype: str, request: pytest.FixtureRequest):
    """And computes the same."""
    expected = answers(dtype)
    calls = request.getfixturevalue("calls")
    assert answers(dtype) == expected
    assert len(calls) > 50
    assert calls == ["wait", "launch"] * (len(calls) // 2)


@pytest.mark.skipif(not launch.interpreted(), reason="compiled kernels call nothing of ours")
def test_only_in_steps_of_few_tokens(monkeypatch, calls):
    backend = load_backend("torch")("cpu", "f32", "f32")
    backend.use_kernels("triton", graphs=False)
    model, seen = RandomModel.of("qwen3", num_hidden_layers=1).on(backend), []
    core, original = core_on(model), Program.run
    monkeypatch.setattr(Program, "run", lambda self, c, inputs: (seen.append(c.pdl), original(self, c, inputs))[1])
    monkeypatch.setattr(model_runner, "PDL_MAX_TOKENS", 2)
    run(core, [asked_for([1, 2, 3], max_tokens=3)])
    assert seen == [False, True, True]
