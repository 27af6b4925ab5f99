"""Chained kernels: when they are, and what each program of a step then does. tools/triton_compile.py reads the code."""

import importlib
import pkgutil

import pytest
import torch

pytest.importorskip("triton")
import triton.language as tl

from llmrs.backends.base import load_backend
from llmrs.backends.testing import RandomModel, core_on, prompts, request, run
from llmrs.backends.torch import kernels
from llmrs.backends.torch.kernels import launch
from llmrs.backends.torch.kernels.launch import chained, chaining
from llmrs.backends.torch.lowering import Program

GPU = torch.device("cuda:0")

DEVICE = "cuda:0" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(("capability", "chains"), [((8, 0), False), ((8, 9), False), ((9, 0), True), ((10, 0), True)])
def test_only_where_the_device_can_and_somebody_wants_it(monkeypatch, capability, chains: bool):
    monkeypatch.setattr(launch, "interpreted", lambda: False)
    monkeypatch.setattr(launch, "_capability", lambda device: capability)
    assert not chained(GPU)
    with chaining(True):
        assert chained(GPU) == chains
        assert not chained(torch.device("cpu"))
        with chaining(False):
            assert not chained(GPU)
    assert not chained(GPU)


def test_not_in_the_interpreter(monkeypatch):
    monkeypatch.setattr(launch, "interpreted", lambda: True)
    with chaining(True):
        assert not chained(GPU)


@pytest.mark.skipif(not launch.interpreted(), reason="compiled kernels call nothing of ours")
@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_every_program_of_a_step_waits_once_and_then_lets_the_next_one_start(monkeypatch, dtype: str):
    """And runs as if alone otherwise. Sampling by bounds, top-k and prompts are among the steps."""

    def answers() -> list[list[int]]:
        backend = load_backend("torch")("cpu", dtype, dtype)
        backend.use_kernels("triton", graphs=False)
        model = RandomModel.of("qwen3", num_hidden_layers=1).on(backend)
        asked = [request(p, n, max_tokens=2, temperature=0.9, top_k=5 * n) for n, p in enumerate(prompts(3, 5))]
        return run(core_on(model), asked)

    expected, calls = answers(), []
    for module in pkgutil.iter_modules(kernels.__path__, kernels.__name__ + "."):
        monkeypatch.setattr(importlib.import_module(module.name), "chained", lambda device: True, raising=False)
        monkeypatch.setattr(importlib.import_module(module.name), "fetch", lambda at: None, raising=False)  # PTX
    monkeypatch.setattr(tl.extra.cuda, "gdc_wait", lambda: calls.append("wait"))
    monkeypatch.setattr(tl.extra.cuda, "gdc_launch_dependents", lambda: calls.append("go"))
    assert answers() == expected
    assert len(calls) > 50
    assert calls == ["wait", "go"] * (len(calls) // 2)


def test_steps_of_few_tokens_are_chained(monkeypatch):
    backend = load_backend("torch")(DEVICE, "f32", "f32")
    backend.use_kernels("triton", graphs=False)
    model, seen = RandomModel.of("qwen3", num_hidden_layers=1).on(backend), []
    core = core_on(model)
    monkeypatch.setattr(Program, "run", watched(Program.run, seen))
    monkeypatch.setattr("llmrs.backends.torch.model_runner.CHAINED", 2)
    run(core, [request([1, 2, 3], max_tokens=3)])
    assert seen == [False, True, True]
    assert not launch.CHAIN.get()


def watched(function, seen: list[bool]):
    def call(*args):
        seen.append(launch.CHAIN.get())
        return function(*args)

    return call
