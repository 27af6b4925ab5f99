"""CapturedStep steps: shapes, padding, the arrays that are sent; a stand-in for a CUDA graph runs them on the CPU."""

import dataclasses
import sys

import numpy as np
import pytest
import torch

import llmrs.backends.torch
from llmrs.backends.base import load_backend
from llmrs.backends.testing import BLOCK, RandomModel, core_on, prefill_batch, prompts, request, run, sampling_batch
from llmrs.backends.torch.program import Program, Programs
from llmrs.config import EngineConfig
from llmrs.core.errors import BackendError, ConfigError
from llmrs.core.sampling import SamplingArrays

pytest.importorskip("triton")
from llmrs.backends.torch.attn_metadata import (
    MAX_KV_SPLITS,
    SHORT_CONTEXT,
    SHORT_MAX_KV_SPLITS,
    StepBuffers,
    StepShape,
    kv_splits,
    kv_splits_of,
    shape_of,
    target_ctas,
)  # fmt: skip
from llmrs.backends.torch.cuda_graphs import (
    CAPTURE_AFTER,
    CAPTURE_TIME_SHARE,
    CapturedGraph,
    CapturedStep,
    GraphCapturer,
)  # fmt: skip
from llmrs.backends.torch.step_shapes import (
    DECODE_BATCH_SIZES,
    SEQ_BUCKETS,
    TOKEN_BUCKETS,
    bucket,
    covering_shapes,
    decode_shapes,
    kernel_shapes,
)  # fmt: skip
from llmrs.backends.torch.workspace import LIBRARY_BYTES

DEVICE = "cuda:0" if torch.cuda.is_available() else "cpu"


def backend(graphs: bool = True, name: str = "qwen3"):
    made = load_backend("torch")(DEVICE, "f32", "f32")
    made.use_kernels("triton", graphs=graphs)
    return RandomModel.of(name, num_hidden_layers=1).on(made)


def test_every_step_fits_into_its_bucket():
    rng = np.random.default_rng(0)
    for _ in range(300):
        counts = rng.choice([1, 1, 1, 2, 7, 64, 65, 200], rng.integers(1, 40))
        exact = shape_of(prefill_batch([[0] * n for n in counts]), 64, 8)
        found = bucket(exact, 64, 8)
        if found is None:
            assert exact.num_tokens > TOKEN_BUCKETS[-1]
        else:
            room = {f.name for f in dataclasses.fields(StepShape)} - {"num_kv_splits"}
            assert all(getattr(found, name) >= getattr(exact, name) for name in room)
            assert found.is_decode_only == exact.is_decode_only


def test_buckets_are_the_next_larger():
    assert [bucket(StepShape(n, n, n, 0), 64, 8).num_tokens for n in (1, 3, 4, 9, 250, 257)] == [1, 4, 4, 16, 256, 288]
    assert bucket(StepShape(513, 513, 513, 0), 64, 8) is None
    assert bucket(StepShape(100, 9, 5, 4, 4), 64, 32) == StepShape(128, 16, 16, 2 + 16, 2)  # by rows alone
    assert bucket(StepShape(8190, 2, 0, 128), 64, 8) == StepShape(8192, 4, 0, 128 + 4, 1)
    assert bucket(StepShape(9, 9, 9, 0, 4), 64, 8) == StepShape(16, 16, 16, 0, 4)
    assert list(DECODE_BATCH_SIZES) == sorted(set(DECODE_BATCH_SIZES))
    assert list(SEQ_BUCKETS) == sorted(set(SEQ_BUCKETS))


def test_programs_that_share_the_keys_of_a_token():
    same = [np.full(n, 999) for n in (1, 2, 4, 16, 31, 32, 256)]
    assert [kv_splits_of(p, 62.7) for p in same] == [32, 16, 8, 2, 2, 1, 1]
    assert [kv_splits(n, 62.7) for n in (0, 1, 16, 32)] == [1, 32, 2, 1]
    assert kv_splits_of(np.array([SHORT_CONTEXT - 1]), 62.7) == SHORT_MAX_KV_SPLITS
    assert kv_splits_of(np.array([SHORT_CONTEXT]), 62.7) == MAX_KV_SPLITS
    uneven = [np.arange(300, 2000, 1700 / n) for n in (40, 56, 72)]
    assert [kv_splits_of(p.astype(int), 62.7) for p in uneven] == [2, 2, 1]
    assert kv_splits_of(np.zeros(1), 0.5) == 1


def test_smaller_heads_need_more_programs():
    one = target_ctas(torch.device("cpu"), 8, 128)
    assert target_ctas(torch.device("cpu"), 8, 64) == 2 * one == target_ctas(torch.device("cpu"), 4, 128)


def test_what_is_sent():
    """Fields of a padded step; padding belongs to no sequence."""
    batch = prefill_batch([[7] * 3, [9], [8] * 5], 4)
    batch = dataclasses.replace(batch, req_slots=np.array([2, 0, 5], np.int32), do_sample=np.array([True, False, True]))
    buffers = StepBuffers(StepShape(16, 4, 4, 8), 40, torch.device(DEVICE), copies=2)
    for _ in range(3):
        buffers.fill(batch, 4, null_block=50, block_m_tokens=2)
        f = {k: v.tolist() for k, v in vars(buffers.fields).items()}
        assert f["input_ids"] == [7] * 3 + [9] + [8] * 5 + [0] * 7
        assert f["slot_mapping"] == [0, 1, 2, 8, 16, 17, 18, 19, 20, *(200 + n % 4 for n in range(7))]
        assert f["decode_tiles"] == [[2, 3, 1, 0], *[[0] * 4] * 3]
        assert f["prefill_tiles"] == [
            [4, 8, 1, 4],
            [0, 2, 1, 2],
            [4, 6, 2, 2],
            [0, 0, 2, 0],
            [4, 4, 2, 0],
            *[[0] * 4] * 3,
        ]
        assert f["logits_indices"] == [2, 3, 8, 0]
        assert f["req_slots"] == [2, -1, 5, -1]
        assert f["top_p"] == [1, 1, 1, 0]
        assert f["block_tables"][:6] == [0, 1, 2, 3, 4, 5]


@pytest.fixture
def captured(monkeypatch):
    """What was captured so far."""
    found = []
    capture = GraphCapturer.capture
    monkeypatch.setattr(GraphCapturer, "capture", lambda self, run: (found.append(run), capture(self, run))[1])
    return found


def ask():
    return [request(p, max_tokens=n, temperature=t) for p, n, t in zip(prompts(3, 5), (5, 3), (0.0, 0.9), strict=True)]


def core_without_graphs_yet(ours, captured):
    """On a GPU some are captured at load."""
    core = core_on(ours, prefix_cache=False)  # which would make a prompt a single token
    ours.runner.graphs.steps, ours.runner.graphs.uncaptured = {}, []
    captured.clear()
    return core


@pytest.fixture(scope="module")
def answers():
    """Of the requests of `ask`, without graphs."""
    return run(core_on(backend(graphs=False)), ask())


def test_a_shape_is_captured_when_it_comes_again(captured, answers):
    """Three shapes: two prompts, two tokens, and one, which the graph of two can run; each has two graphs."""
    ours = backend()
    core = core_without_graphs_yet(ours, captured)
    ours.runner.graphs.clock = lambda: 0.0
    counts = []
    for _ in range(2):
        assert run(core, ask()) == answers
        counts.append(len(captured))
    assert counts == [2, 6]  # two tokens; then the prompts, and one token, which has come CAPTURE_AFTER times


def test_captures_of_shapes_that_a_graph_holds_take_a_share_of_the_time(captured):
    ours = backend()
    core_without_graphs_yet(ours, captured)
    k, now = ours.runner.graphs, iter(range(1000))
    small, large = StepShape(1, 1, 1, 0, 1), StepShape(8, 8, 8, 0, 1)
    k.clock = lambda: next(now)  # whatever is done takes a second
    k.capture(k.step(large))
    assert [k.find(small).buffers.shape for _ in range(CAPTURE_AFTER)] == [large] * (CAPTURE_AFTER - 1) + [small]
    assert k.next_capture == CAPTURE_AFTER + 1 / CAPTURE_TIME_SHARE
    other = StepShape(2, 2, 2, 0, 1)
    assert {k.find(other).buffers.shape for _ in range(2 * CAPTURE_AFTER)} == {large}  # it must wait
    k.next_capture = 0
    assert k.find(other).buffers.shape == other


def test_a_step_runs_in_the_graph_of_a_larger_shape_until_its_own_is_captured(captured, answers):
    ours = backend()
    core = core_without_graphs_yet(ours, captured)
    ours.runner.graphs.next_capture = float("inf")
    for shape in covering_shapes(4, 64, ours.runner.block_m_tokens, ours.runner.ctas):
        ours.runner.graphs.capture(ours.runner.graphs.step(shape))
    ours.runner.graphs.capture(ours.runner.graphs.step(StepShape(128, 16, 16, 18, 1)))
    count = len(captured)
    graphs, found = ours.runner.graphs, []
    find_step = graphs.find
    graphs.find = lambda shape: (found.append((shape, find_step(shape))), found[-1][1])[1]
    assert run(core, ask()) == answers
    assert all(graph.forward and graph.buffers.shape != shape for shape, graph in found[:2])
    assert len(captured) == count


def test_idle_time_captures_what_came(captured, answers):
    ours = backend()
    core = core_without_graphs_yet(ours, captured)
    ours.runner.graphs.next_capture = float("inf")
    for shape in StepShape(128, 16, 16, 18), StepShape(4, 4, 4, 0):
        ours.runner.graphs.capture(ours.runner.graphs.step(shape))
    count = len(captured)
    assert run(core, ask()) == answers
    assert len(captured) == count
    before = [kv.keys[:-1].clone() for kv in ours.kv], ours.slots.last_token.clone()
    assert [ours.idle() for _ in range(4)] == [True, True, False, False]
    assert len(captured) == count + 6
    assert all(map(torch.equal, before[0], [kv.keys[:-1] for kv in ours.kv]))  # a capture changes nothing
    assert torch.equal(before[1], ours.slots.last_token)


def test_a_backend_without_graphs_has_nothing_to_do_in_idle_time():
    ours = backend(graphs=False)
    run(core_on(ours), ask()[:1])
    assert not ours.idle()


def test_shapes_that_are_run_and_captured_at_load():
    """Every kernel: all KV splits, batch sizes and token buckets. Graphs: one for every step."""
    shapes = kernel_shapes(256, 8192, 64, 62.7)
    assert {s.num_kv_splits for s in shapes if s.is_decode_only} == {1 << n for n in range(MAX_KV_SPLITS.bit_length())}
    assert {s.num_seqs for s in shapes if s.is_decode_only} == {n for n in DECODE_BATCH_SIZES if n <= 256}
    mixed = [s for s in shapes if not s.is_decode_only]
    assert {s.num_seqs for s in mixed} == {n for n in SEQ_BUCKETS if n <= 256}
    assert {s.num_decode_tiles > 0 for s in mixed} == {True, False}
    assert any(s.is_long_prefill for s in mixed)
    assert max(s.num_tokens for s in kernel_shapes(4, 300, 64, 62.7)) <= 300
    assert decode_shapes(9, 62.7)[-1] == StepShape(1, 1, 1, 0, MAX_KV_SPLITS)  # the smallest is captured first
    rng = np.random.default_rng(0)
    cover = [CapturedStep(StepBuffers(s, 0, torch.device("cpu")), forward=CapturedGraph(int, torch.zeros(0)))
             for s in covering_shapes(200, 8192, 64, 62.7)]  # fmt: skip
    assert len(cover) < 12
    for _ in range(200):
        counts = rng.choice([1, 1, 1, 2, 7, 64, 65, 200], rng.integers(1, 40))
        shape = bucket(shape_of(prefill_batch([[0] * n for n in counts]), 64, 8), 64, 8)
        assert any(c.holds(shape) for c in cover) or shape.num_tokens > 2048
        assert any(c.holds(StepShape(n := rng.integers(1, 201), n, n, 0)) for c in cover)


def test_calls_that_are_alike_are_made_once():
    """Of a model's layers, to load their kernels."""
    made = load_backend("torch")(DEVICE, "f32", "f32")
    made.use_kernels("triton")
    ours = RandomModel.of("qwen3", num_hidden_layers=3).on(made)
    ours.allocate(4, BLOCK, 2, 16)
    calls = []

    def counted(rule, op):
        return lambda *inputs, **params: (calls.append(op), rule(*inputs, **params))[1]

    programs = []
    for program in ours.runner.programs:
        fns = {c.fn: counted(c.fn, c.op) for c in program.calls}
        alike = [dataclasses.replace(c, fn=fns[c.fn]) for c in program.calls]
        programs.append(Program(alike, program.count, program.results))
    ours.runner.programs = Programs(*programs)
    buffers = StepBuffers(StepShape(4, 4, 4, 0), 4, ours.torch_device)
    buffers.fill_null(0)
    logits = ours.runner._run(buffers, once=True)
    once = len(calls)
    calls.clear()
    assert ours.runner._run(buffers).shape == logits.shape
    assert once < len(calls) / 2
    assert len(set(calls)) <= once


def test_padding_writes_to_the_null_block_only():
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
    ours.runner.graphs.capture(ours.runner.graphs.step(StepShape(4, 4, 4, 0)))
    assert ours.slots.last_token.tolist() == [123] * 8
    step = sampling_batch(SamplingArrays.zeros(3))
    step = dataclasses.replace(step, req_slots=np.array([6, 1, 3], np.int32), do_sample=np.array([True, False, True]))
    tokens = ours.launch(step).tokens()
    assert ours.slots.last_token.tolist() == [123, 123, 123, tokens[2], 123, 123, tokens[0], 123]


def test_models_whose_rules_ask_the_device_are_not_recorded():
    moe = backend(name="qwen3-moe")
    moe.allocate(10, BLOCK, 2, 40)
    assert moe.runner.graphs is None
    assert backend().runner is not None


def test_without_triton_auto_warns_and_triton_is_an_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "llmrs.backends.torch.model_runner", None)
    monkeypatch.delattr(llmrs.backends.torch, "model_runner", raising=False)
    made = load_backend("torch")("cpu", "f32", "f32")
    with pytest.raises(BackendError, match="Triton can't be loaded"):
        made.use_kernels("triton")
    made.torch_device = torch.device("cuda:0")
    with pytest.warns(UserWarning, match="plain torch"):
        made.use_kernels("auto")
    assert made.runner is None


def test_a_backend_without_a_choice_refuses_one():
    with pytest.raises(ConfigError, match="no choice of kernels"):
        load_backend("reference")("cpu", "f32", "f32").configure(EngineConfig(kernels="triton"))


def test_memory_for_steps_is_reserved_before_the_cache():
    graph = RandomModel.of("qwen3").graph
    made = load_backend("torch")("cpu", "f32", "f32")
    assert made.workspace_bytes(graph, 256, 2048) == 0
    made.torch_device = torch.device("cuda:0")
    small, large = made.workspace_bytes(graph, 8, 64), made.workspace_bytes(graph, 256, 2048)
    assert 256 * 211 * 4 < large - small < 2**30
    assert large > LIBRARY_BYTES


@pytest.mark.parametrize(
    ("dtype", "kv_dtype", "option"), [("bf16", "bf16", "dtype"), ("f32", "bf16", "kv_cache_dtype"), ("f16", "f16", "")]
)
def test_a_gpu_without_bf16(monkeypatch, dtype, kv_dtype, option):
    """Older than Ampere: its kernels can't be compiled for bf16."""
    made = load_backend("torch")("cpu", dtype, kv_dtype)
    made.torch_device = torch.device("cuda:0")
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
    assert made.runner is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda at: (8, 0))
    made._check_bf16()
