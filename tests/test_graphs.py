"""Recorded steps: shapes, padding, the arrays that are sent; a stand-in for a CUDA graph runs them on the CPU."""

import dataclasses
import sys

import numpy as np
import pytest
import torch

import llmrs.backends.torch
from llmrs.backends.base import find
from llmrs.backends.testing import BLOCK, RandomModel, core_on, prefill_batch, prompts, request, run, sampling_batch
from llmrs.core.config import EngineConfig
from llmrs.core.errors import BackendError, ConfigError
from llmrs.core.sampling import SamplingArrays

pytest.importorskip("triton")
from llmrs.backends.torch.graphs import DECODE, MIXED, ROWS, Recorder, bucket
from llmrs.backends.torch.reserve import LIBRARIES
from llmrs.backends.torch.step import LESS, MOST, SHORT, Shape, StepInputs, programs, shape_of, split_of, splits

DEVICE = "cuda:0" if torch.cuda.is_available() else "cpu"


def backend(graphs: bool = True, name: str = "qwen3"):
    made = find("torch")(DEVICE, "f32", "f32")
    made.use_kernels("triton", graphs=graphs)
    return RandomModel.of(name, num_hidden_layers=1).on(made)


def test_every_step_fits_into_its_bucket():
    rng = np.random.default_rng(0)
    for _ in range(300):
        counts = rng.choice([1, 1, 1, 2, 7, 64, 65, 200], rng.integers(1, 40))
        exact = shape_of(prefill_batch([[0] * n for n in counts]), 64, 8)
        found = bucket(exact, 64, 8)
        if found is None:
            assert exact.tokens > MIXED[-1]
        else:
            room = {f.name for f in dataclasses.fields(Shape)} - {"split"}
            assert all(getattr(found, name) >= getattr(exact, name) for name in room)
            assert found.plain == exact.plain


def test_buckets_are_the_next_larger():
    assert [bucket(Shape(n, n, n, 0), 64, 8).tokens for n in (1, 3, 4, 9, 250, 257)] == [1, 4, 4, 16, 256, 288]
    assert bucket(Shape(513, 513, 513, 0), 64, 8) is None
    assert bucket(Shape(100, 9, 5, 4, 4), 64, 32) == Shape(128, 16, 16, 2 + 16, 2)  # by rows alone
    assert bucket(Shape(8190, 2, 0, 128), 64, 8) == Shape(8192, 4, 0, 128 + 4, 1)
    assert bucket(Shape(9, 9, 9, 0, 4), 64, 8) == Shape(16, 16, 16, 0, 4)
    assert list(DECODE) == sorted(set(DECODE))
    assert list(ROWS) == sorted(set(ROWS))


def test_programs_that_share_the_keys_of_a_token():
    same = [np.full(n, 999) for n in (1, 2, 4, 16, 31, 32, 256)]
    assert [split_of(p, 62.7) for p in same] == [32, 16, 8, 2, 2, 1, 1]
    assert [splits(n, 62.7) for n in (0, 1, 16, 32)] == [1, 32, 2, 1]
    assert split_of(np.array([SHORT - 1]), 62.7) == LESS
    assert split_of(np.array([SHORT]), 62.7) == MOST
    uneven = [np.arange(300, 2000, 1700 / n) for n in (40, 56, 72)]
    assert [split_of(p.astype(int), 62.7) for p in uneven] == [2, 2, 1]
    assert split_of(np.zeros(1), 0.5) == 1


def test_smaller_heads_need_more_programs():
    one = programs(torch.device("cpu"), 8, 128)
    assert programs(torch.device("cpu"), 8, 64) == 2 * one == programs(torch.device("cpu"), 4, 128)


def test_what_is_sent():
    """Fields of a padded step; what is padded belongs to nobody."""
    batch = prefill_batch([[7] * 3, [9], [8] * 5], 4)
    batch = dataclasses.replace(batch, slots=np.array([2, 0, 5], np.int32), sampled=np.array([True, False, True]))
    inputs = StepInputs(Shape(16, 4, 4, 8), 40, torch.device(DEVICE), copies=2)
    for _ in range(3):
        inputs.fill(batch, 4, spare=50, tile=2)
        f = {k: v.tolist() for k, v in vars(inputs.fields).items()}
        assert f["tokens"] == [7] * 3 + [9] + [8] * 5 + [0] * 7
        assert f["cells"] == [0, 1, 2, 8, 16, 17, 18, 19, 20, *(200 + n % 4 for n in range(7))]
        assert f["singles"] == [[2, 3, 1, 0], *[[0] * 4] * 3]
        assert f["chunks"] == [[4, 8, 1, 4], [0, 2, 1, 2], [4, 6, 2, 2], [0, 0, 2, 0], [4, 4, 2, 0], *[[0] * 4] * 3]
        assert f["rows"] == [2, 3, 8, 0]
        assert f["slots"] == [2, -1, 5, -1]
        assert f["top_p"] == [1, 1, 1, 0]
        assert f["tables"][:6] == [0, 1, 2, 3, 4, 5]


def test_a_shape_is_recorded_once_and_run_again(monkeypatch):
    recorded = []
    record = Recorder.record
    monkeypatch.setattr(Recorder, "record", lambda self, run: (recorded.append(run), record(self, run))[1])
    ours = backend()
    core = core_on(ours, prefix_cache=False)  # which would make a prompt a single token

    def ask():
        return [
            request(p, max_tokens=n, temperature=t) for p, n, t in zip(prompts(3, 5), (5, 3), (0.0, 0.9), strict=True)
        ]

    first = run(core, ask())
    count = len(recorded)
    assert count == 6  # two prompts, two tokens, and one: forward and sample of each
    assert run(core, ask()) == first
    assert len(recorded) == count
    assert run(core_on(backend(graphs=False)), ask()) == first


def test_padding_writes_to_no_block_of_anybody():
    ours = backend()
    ours.allocate(40, BLOCK, 8, 64)
    for kv in ours.kv:
        kv.keys.fill_(77.0)
    ours.launch(prefill_batch(prompts(5)))  # 5 of 64 tokens, in blocks 0 and 1
    for kv in ours.kv:
        assert len(kv.keys) == 41
        assert (kv.keys[:2].flatten(0, 1)[:5] != 77).all()
        assert (kv.keys[1, 1:] == 77).all()
        assert (kv.keys[2:40] == 77).all()


def test_slots_beyond_the_step_keep_their_tokens():
    ours = backend()
    ours.allocate(40, BLOCK, 8, 64)
    ours.slots.last_token.fill_(123)
    ours.kernels.warm([3])
    assert ours.slots.last_token.tolist() == [123] * 8
    step = sampling_batch(SamplingArrays.zeros(3))
    step = dataclasses.replace(step, slots=np.array([6, 1, 3], np.int32), sampled=np.array([True, False, True]))
    tokens = ours.launch(step).tokens()
    assert ours.slots.last_token.tolist() == [123, 123, 123, tokens[2], 123, 123, tokens[0], 123]


def test_models_whose_rules_ask_the_device_are_not_recorded():
    moe = backend(name="qwen3-moe")
    moe.allocate(10, BLOCK, 2, 40)
    assert moe.kernels.recorders is None
    assert backend().kernels is not None


def test_without_triton_auto_warns_and_triton_is_an_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "llmrs.backends.torch.runner", None)
    monkeypatch.delattr(llmrs.backends.torch, "runner", raising=False)
    made = find("torch")("cpu", "f32", "f32")
    with pytest.raises(BackendError, match="Triton can't be loaded"):
        made.use_kernels("triton")
    made.at = torch.device("cuda:0")
    with pytest.raises(BackendError, match="Triton can't be loaded"):
        made.use_kernels("auto", attention="flash")
    with pytest.warns(UserWarning, match="plain torch"):
        made.use_kernels("auto")
    assert made.kernels is None


def test_a_backend_without_a_choice_refuses_one():
    with pytest.raises(ConfigError, match="no choice of kernels"):
        find("reference")("cpu", "f32", "f32").configure(EngineConfig(kernels="triton"))


def test_memory_for_steps_is_reserved_before_the_cache():
    graph = RandomModel.of("qwen3").graph
    made = find("torch")("cpu", "f32", "f32")
    assert made.reserve(graph, 256, 2048) == 0
    made.at = torch.device("cuda:0")
    small, large = made.reserve(graph, 8, 64), made.reserve(graph, 256, 2048)
    assert 256 * 211 * 4 < large - small < 2**30
    assert large > LIBRARIES


@pytest.mark.parametrize(
    ("dtype", "kv_dtype", "option"), [("bf16", "bf16", "dtype"), ("f32", "bf16", "kv_cache_dtype"), ("f16", "f16", "")]
)
def test_a_gpu_without_bf16(monkeypatch, dtype, kv_dtype, option):
    """Older than Ampere: its kernels can't be compiled for bf16."""
    made = find("torch")("cpu", dtype, kv_dtype)
    made.at = torch.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda at: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda at: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "set_device", lambda at: None)
    made.use_kernels("plain")
    if not option:
        made._check_bf16()
        return
    with pytest.raises(BackendError, match=rf"^{option}: bf16 needs .* 8\.0 .* Tesla T4, .* 7\.5") as caught:
        made.use_kernels("auto")
    assert caught.value.hint.startswith(f"{option}: f16 or f32")
    assert made.kernels is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda at: (8, 0))
    made._check_bf16()
