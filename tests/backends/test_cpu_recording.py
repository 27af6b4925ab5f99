"""Recorded decode steps on the CPU: what is recorded, and that a replay gives what the ops give."""

import pytest

from llmrs.backends.base import load_backend
from llmrs.backends.testing import FORMS, RandomModel, core_on, prompts, request, run
from llmrs.backends.torch import cpu_linear
from llmrs.backends.torch.backend import TorchBackend
from llmrs.backends.torch.cpu.library import libraries
from llmrs.backends.torch.cpu.recording import MAX_ROWS
from llmrs.backends.torch.cpu_linear import ALL_ROWS, Forms

pytestmark = pytest.mark.skipif(not libraries(), reason="no C++ compiler built the CPU kernels")


def backend_of(model: RandomModel, dtype: str, kv_dtype: str | None = None) -> TorchBackend:
    backend = load_backend("torch")("cpu", dtype, kv_dtype or dtype)
    assert isinstance(backend, TorchBackend)
    backend.use_kernels("auto")
    model.on(backend)
    return backend


def recorded(backend: TorchBackend) -> list[int]:
    """Numbers of sequences whose steps are replayed."""
    assert backend.recorder
    return sorted(n for n, recording in backend.recorder.recordings.items() if recording)


def tokens(backend: TorchBackend, replay: bool = True) -> list[list[int]]:
    """Of sequences that begin and end at different steps, and whose blocks lie in disorder."""
    core = core_on(backend, max_num_seqs=MAX_ROWS + 2)  # with a recorder of its own
    assert backend.recorder
    backend.recorder.possible &= replay
    lengths = [3, 20, 9, 14, 5, 8, 30, 2, 11, 6]
    return run(core, [request(p, max_tokens=n) for p, n in zip(prompts(*range(3, 13)), lengths, strict=True)])


@pytest.mark.parametrize("name", ["qwen3", "llama", "mistral", "gemma3"])
@pytest.mark.parametrize("quantized", [False, True])
def test_replays_give_the_same_tokens(name: str, quantized: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_linear, "measured", lambda *_: Forms(False, ALL_ROWS, MAX_ROWS))
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_hidden_layers": 2}
    model = RandomModel.of(name, **sizes)
    if quantized:
        model = model.quantized(*FORMS[1])
    backend = backend_of(model, "bf16")
    replayed = tokens(backend)
    assert recorded(backend) == sorted(backend.recorder.recordings)
    assert {1, MAX_ROWS} <= set(recorded(backend))
    assert tokens(backend, replay=False) == replayed


def test_steps_with_ops_of_torch_are_not_recorded() -> None:
    """float32 weights are multiplied by torch; an fp8 cache is read by it."""
    for dtype, kv_dtype in (("f32", "f32"), ("bf16", "fp8")):
        backend = backend_of(RandomModel.of("qwen3", num_hidden_layers=1), dtype, kv_dtype)
        expected = tokens(backend, replay=False)
        assert tokens(backend) == expected
        assert recorded(backend) == []


def test_the_first_step_is_recorded_and_others_are_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_linear, "measured", lambda *_: Forms(False, ALL_ROWS, MAX_ROWS))
    backend = backend_of(RandomModel.of("qwen3", num_hidden_layers=1), "bf16")
    core = core_on(backend)
    assert backend.recorder
    kernels, replays = backend.recorder.kernels, []
    original = kernels.replay
    monkeypatch.setattr(kernels, "replay", lambda calls: replays.append(calls) or original(calls))
    run(core, [request(prompts(5)[0], max_tokens=5)])
    assert recorded(backend) == [1]
    assert len(replays) == 3  # of a prompt's step and four more, of which the first is recorded
    run(core, [request(prompts(6)[0], max_tokens=5)])
    assert len(replays) == 7
