"""Recorded steps: shapes, padding, the arrays that are sent; a stand-in for a CUDA graph runs them on the CPU."""

import dataclasses
import sys

import numpy as np
import pytest
import torch

import llmrs.backends.torch
from llmrs.backends.base import load_backend
from llmrs.backends.testing import BLOCK, RandomModel, core_on, prefill_batch, prompts, request, run, sampling_batch
from llmrs.backends.torch.lowering import Program
from llmrs.core.config import EngineConfig
from llmrs.core.errors import BackendError, ConfigError
from llmrs.core.sampling import SamplingArrays

pytest.importorskip("triton")
from llmrs.backends.torch.attn_metadata import (
    LESS,
    MOST,
    SHORT,
    Shape,
    StepInputs,
    programs,
    shape_of,
    split_of,
    splits,
)
from llmrs.backends.torch.cuda_graphs import (
    DECODE,
    MIXED,
    ROWS,
    Recorded,
    Recorder,
    Recording,
    bucket,
    covering_shapes,
    decode_shapes,
    kernel_shapes,
)  # fmt: skip
from llmrs.backends.torch.model_runner import CAPTURE_SHARE, COMMON
from llmrs.backends.torch.workspace import LIBRARIES

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
    batch = dataclasses.replace(batch, req_slots=np.array([2, 0, 5], np.int32), do_sample=np.array([True, False, True]))
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


@pytest.fixture
def captured(monkeypatch):
    """What was captured so far."""
    found = []
    record = Recorder.record
    monkeypatch.setattr(Recorder, "record", lambda self, run: (found.append(run), record(self, run))[1])
    return found


def ask():
    return [request(p, max_tokens=n, temperature=t) for p, n, t in zip(prompts(3, 5), (5, 3), (0.0, 0.9), strict=True)]


def core_without_graphs_yet(ours, captured):
    """On a GPU some are captured at load."""
    core = core_on(ours, prefix_cache=False)  # which would make a prompt a single token
    ours.kernels.recorded, ours.kernels.uncaptured = {}, []
    captured.clear()
    return core


@pytest.fixture(scope="module")
def answers():
    """Of the requests of `ask`, without graphs."""
    return run(core_on(backend(graphs=False)), ask())


def test_a_shape_is_captured_when_it_comes_again(captured, answers):
    """Three shapes: two prompts, two tokens, and one, which the graph of two can run; each has two graphs."""
    ours = backend()
    ours.kernels.clock = lambda: 0.0
    core = core_without_graphs_yet(ours, captured)
    counts = []
    for _ in range(2):
        assert run(core, ask()) == answers
        counts.append(len(captured))
    assert counts == [2, 6]  # two tokens; then the prompts, and one token, which has come COMMON times


def test_captures_of_shapes_that_a_graph_holds_take_a_share_of_the_time(captured):
    ours = backend()
    core_without_graphs_yet(ours, captured)
    k, now = ours.kernels, iter(range(1000))
    small, large = Shape(1, 1, 1, 0, 1), Shape(8, 8, 8, 0, 1)
    k.clock = lambda: next(now)  # whatever is done takes a second
    k._capture(k._static(large))
    assert [k._ready(small).inputs.shape for _ in range(COMMON)] == [large] * (COMMON - 1) + [small]
    assert k.next_capture == COMMON + 1 / CAPTURE_SHARE
    other = Shape(2, 2, 2, 0, 1)
    assert {k._ready(other).inputs.shape for _ in range(2 * COMMON)} == {large}  # it must wait
    k.next_capture = 0
    assert k._ready(other).inputs.shape == other


def test_a_step_runs_in_the_graph_of_a_larger_shape_until_its_own_is_captured(captured, answers):
    ours = backend()
    core = core_without_graphs_yet(ours, captured)
    ours.kernels.next_capture = float("inf")
    for shape in covering_shapes(4, 64, ours.kernels.tile, ours.kernels.programs):
        ours.kernels._capture(ours.kernels._static(shape))
    ours.kernels._capture(ours.kernels._static(Shape(128, 16, 16, 18, 1)))
    count = len(captured)
    ready, found = ours.kernels._ready, []
    ours.kernels._ready = lambda shape: (found.append((shape, ready(shape))), found[-1][1])[1]
    assert run(core, ask()) == answers
    assert all(graph.forward and graph.inputs.shape != shape for shape, graph in found[:2])
    assert len(captured) == count


def test_idle_time_captures_what_came(captured, answers):
    ours = backend()
    core = core_without_graphs_yet(ours, captured)
    ours.kernels.next_capture = float("inf")
    for shape in Shape(128, 16, 16, 18), Shape(4, 4, 4, 0):
        ours.kernels._capture(ours.kernels._static(shape))
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
    """Every kernel: the numbers of splits and rows, and the sizes, that steps may have. Graphs: one for every step."""
    shapes = kernel_shapes(256, 8192, 64, 62.7)
    assert {s.split for s in shapes if s.plain} == {1 << n for n in range(MOST.bit_length())}
    assert {s.sequences for s in shapes if s.plain} == {n for n in DECODE if n <= 256}
    mixed = [s for s in shapes if not s.plain]
    assert {s.sequences for s in mixed} == {n for n in ROWS if n <= 256}
    assert {s.singles > 0 for s in mixed} == {True, False}
    assert any(s.long for s in mixed)
    assert max(s.tokens for s in kernel_shapes(4, 300, 64, 62.7)) <= 300
    assert decode_shapes(9, 62.7)[-1] == Shape(1, 1, 1, 0, MOST)  # the smallest is captured first
    rng = np.random.default_rng(0)
    cover = [Recorded(StepInputs(s, 0, torch.device("cpu")), forward=Recording(int, torch.zeros(0)))
             for s in covering_shapes(200, 8192, 64, 62.7)]  # fmt: skip
    assert len(cover) < 12
    for _ in range(200):
        counts = rng.choice([1, 1, 1, 2, 7, 64, 65, 200], rng.integers(1, 40))
        shape = bucket(shape_of(prefill_batch([[0] * n for n in counts]), 64, 8), 64, 8)
        assert any(c.holds(shape) for c in cover) or shape.tokens > 2048
        assert any(c.holds(Shape(n := rng.integers(1, 201), n, n, 0)) for c in cover)


def test_calls_that_are_alike_are_made_once():
    """Of a model's layers, to load their kernels."""
    made = load_backend("torch")(DEVICE, "f32", "f32")
    made.use_kernels("triton")
    ours = RandomModel.of("qwen3", num_hidden_layers=3).on(made)
    ours.allocate(4, BLOCK, 2, 16)
    calls = []

    def counted(rule, op):
        return lambda *inputs, **params: (calls.append(op), rule(*inputs, **params))[1]

    for name in ("program", "few", "one"):
        program = getattr(ours.kernels, name)
        rules = {c.rule: counted(c.rule, c.op) for c in program.calls}
        alike = [dataclasses.replace(c, rule=rules[c.rule]) for c in program.calls]
        setattr(ours.kernels, name, Program(alike, program.count, program.results))
    inputs = StepInputs(Shape(4, 4, 4, 0), 4, ours.at)
    inputs.rest(0)
    logits = ours.kernels._run(inputs, once=True)
    once = len(calls)
    calls.clear()
    assert ours.kernels._run(inputs).shape == logits.shape
    assert once < len(calls) / 2
    assert len(set(calls)) <= once


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
    ours.kernels._capture(ours.kernels._static(Shape(4, 4, 4, 0)))
    assert ours.slots.last_token.tolist() == [123] * 8
    step = sampling_batch(SamplingArrays.zeros(3))
    step = dataclasses.replace(step, req_slots=np.array([6, 1, 3], np.int32), do_sample=np.array([True, False, True]))
    tokens = ours.launch(step).tokens()
    assert ours.slots.last_token.tolist() == [123, 123, 123, tokens[2], 123, 123, tokens[0], 123]


def test_models_whose_rules_ask_the_device_are_not_recorded():
    moe = backend(name="qwen3-moe")
    moe.allocate(10, BLOCK, 2, 40)
    assert moe.kernels.recorders is None
    assert backend().kernels is not None


def test_without_triton_auto_warns_and_triton_is_an_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "llmrs.backends.torch.model_runner", None)
    monkeypatch.delattr(llmrs.backends.torch, "model_runner", raising=False)
    made = load_backend("torch")("cpu", "f32", "f32")
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
        load_backend("reference")("cpu", "f32", "f32").configure(EngineConfig(kernels="triton"))


def test_memory_for_steps_is_reserved_before_the_cache():
    graph = RandomModel.of("qwen3").graph
    made = load_backend("torch")("cpu", "f32", "f32")
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
    made = load_backend("torch")("cpu", dtype, kv_dtype)
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
