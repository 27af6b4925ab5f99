"""`llmrs bench`: its arithmetic by hand and on devices that are made up, and all of it once on the demo model."""

import json
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import paper
import pytest
import random_checkpoint

from llmrs import ConfigError, Engine, EngineConfig
from llmrs.backends.base import Ran
from llmrs.backends.fusion import FUSED_OPS, fuse
from llmrs.backends.testing import RandomModel
from llmrs.backends.torch.profiler import outermost, ran
from llmrs.bench import startup
from llmrs.bench.op_costs import Cost, Kernel, costs, joined, kernels, ops_of
from llmrs.bench.plot import Axis, Curve, svg
from llmrs.bench.profile import Profile
from llmrs.bench.report import picture, profiles
from llmrs.bench.roofline import Device, Work
from llmrs.bench.serving import idle, measure, over_time
from llmrs.bench.startup import failed
from llmrs.bench.sweep import Cell, busy, decode_batch, grid, measured
from llmrs.bench.workloads import WORKLOADS, Answered, Asked, Outcome, Workload, arrivals, named, percentiles, run
from llmrs.cli import main

DEVICE = Device("made up", 1e9, 1e12)
H200 = Device("H200", 4.66e12, 803e12)


# Workloads and their ceilings


def asked(name: str) -> list[tuple[int, int]]:
    return [(len(a.prompt), a.new) for a in WORKLOADS[name].requests_of(151_936)]


def test_the_workloads_are_those_that_other_engines_were_measured_with():
    assert sum(new for _, new in asked("mixed")) == 133_966
    assert asked("seed") == [(16, 1008)] * 256
    assert asked("single") == [(128, 512)]
    assert asked("prefill") == [(4096, 1)] * 16
    first = WORKLOADS["mixed"].requests_of(50)
    assert first == WORKLOADS["mixed"].requests_of(50)
    assert max(t for a in first for t in a.prompt) == 49


def test_their_ceilings_on_an_h200():
    """Tokens per second as counted by hand for Qwen3-0.6B: prompts by arithmetic, answers by memory reads."""
    work = Work.of(paper.graph("Qwen3-0.6B"))

    def limit(name: str) -> float:
        requests = asked(name)
        tokens = sum(prompt if new == 1 else new for prompt, new in requests)
        return tokens / work.answers(H200, "bf16", requests)

    assert limit("seed") == pytest.approx(72_500, rel=0.01)
    assert limit("mixed") == pytest.approx(38_500, rel=0.03)  # there with the head for every token of a prompt
    assert limit("single") == pytest.approx(3_900, rel=0.05)
    assert limit("prefill") == pytest.approx(596_000, rel=0.01)


def test_the_floor_of_answers_is_that_of_their_steps():
    work = Work(weights=1000, token=10, attention=0, head=100)
    one = work.answers(DEVICE, "bf16", [(7, 3)])
    steps = work.step(DEVICE, "bf16", 1, 8) + work.step(DEVICE, "bf16", 1, 9)
    assert one == work.prefill(DEVICE, "bf16", 7) + steps
    both = work.answers(DEVICE, "bf16", [(7, 3), (5, 2)])  # the second has ended when the last step begins
    steps = work.step(DEVICE, "bf16", 2, 8 + 6) + work.step(DEVICE, "bf16", 1, 9)
    assert both == work.prefill(DEVICE, "bf16", 7, 5) + steps
    assert work.step(DEVICE, "bf16", 2, 14) == (2 * 1000 + 14 * 10) / 1e9


def test_only_the_last_token_of_a_prompt_goes_through_the_head():
    work, slow = Work(weights=1000, token=10, attention=4, head=100), Device("slow", 1e30, 1.0)
    assert work.prefill(slow, "bf16", 6) == 2 * 900 * 6 + 2 * 100 + 6 * 6 / 2 * 4
    assert work.prefill(slow, "bf16", 6, 6) == 2 * work.prefill(slow, "bf16", 6)


def test_layers_with_a_window_see_no_more_than_it():
    work = Work(weights=1000, token=10, attention=4, windows=((0, 0.25), (8, 0.75)))
    assert work.seen(6) == 6
    assert work.seen(20) == 0.25 * 20 + 0.75 * 8
    assert work.decode(DEVICE, "bf16", 3, 20) == work.step(DEVICE, "bf16", 3, 3 * work.seen(20))
    assert work.pairs(6) == 6 * 6 / 2
    assert work.pairs(20) == 0.25 * 20 * 20 / 2 + 0.75 * (8 * 8 / 2 + 12 * 8)
    plain = paper.graph("Qwen3-0.6B")
    assert Work.of(plain).windows == ((0, 1.0),)
    assert Work.of(with_window(plain, 8)).windows == ((8, 1.0),)


def with_window(graph, window):
    """The graph with a window in every layer's attention."""
    layer = graph.functions["layer"]
    more = {"attend": {"window": window}}
    equations = tuple(replace(e, params={**e.params, **more.get(e.op, {})}) for e in layer.equations)
    return replace(graph, functions={"layer": replace(layer, equations=equations)})


def test_scaled_workloads_keep_their_form():
    assert WORKLOADS["mixed"].scaled(0.05) == Workload("mixed", 13, (5, 51), (5, 51))
    assert WORKLOADS["seed"].scaled(0.001) == Workload("seed", 1, (1, 1), (2, 2))
    assert WORKLOADS["prefill"].scaled(0.01) == Workload("prefill", 1, (41, 41), (1, 1))
    assert all(w.scaled(1.0) == w for w in WORKLOADS.values())
    assert [w.name for w in named("mixed, seed,mixed")] == ["mixed", "seed"]
    with pytest.raises(ConfigError, match="did you mean mixed"):
        named("seed,mixd")


def test_percentiles_and_latencies():
    assert percentiles(range(1, 101)) == {"p50": 50, "p90": 90, "p99": 99}
    assert percentiles([3.0]) == {"p50": 3.0, "p90": 3.0, "p99": 3.0}
    outcome = Outcome([Answered(10.0, [11.0, 11.5, 12.5]), Answered(10.5, [13.5])])
    assert (outcome.seconds, outcome.tokens) == (3.5, 4)
    found = outcome.latencies()
    assert found["first_token"] == {"p50": 1.0, "p90": 3.0, "p99": 3.0}
    assert found["between_tokens"] == {"p50": 0.5, "p90": 1.0, "p99": 1.0}
    assert "between_tokens" not in Outcome([Answered(0.0, [1.0])]).latencies()


def test_arrivals_are_a_poisson_process():
    due = arrivals(20_000, 4.0)
    gaps = np.diff(due)
    assert due[0] == 0
    assert due == arrivals(20_000, 4.0)
    assert gaps.mean() == pytest.approx(1 / 4, rel=0.03)
    assert gaps.std() == pytest.approx(1 / 4, rel=0.05)  # of the exponential distribution, as the mean
    assert (gaps > 0.25).mean() == pytest.approx(np.exp(-1), rel=0.05)


@pytest.fixture(scope="module")
def engine():
    config = EngineConfig("demo", device="cpu", max_num_seqs=4, max_model_len=64, prefix_cache=False)
    with Engine(config) as made:
        yield made


def test_a_workload_on_the_demo_model(engine):
    w = Workload("small", 3, (4, 9), (5, 8))
    requests = w.requests_of(engine.model.config.vocab_size)
    (found,) = measure(engine, DEVICE, [w])
    assert (found.name, found.requests, found.idle) == ("small", 3, None)
    assert found.tokens == sum(a.new for a in requests)
    work = Work.of(engine.model.graph)
    assert found.floor == work.answers(DEVICE, "bf16", [(len(a.prompt), a.new) for a in requests])
    assert found.share == found.floor / found.seconds
    assert 0 < found.latencies["first_token"]["p50"] <= found.seconds
    outcome = run(engine, requests)
    assert [len(a.times) for a in outcome.answers] == [a.new for a in requests]
    assert all(a.submitted < a.times[0] and a.times == sorted(a.times) for a in outcome.answers)
    with pytest.raises(ConfigError, match="workload long needs 100 tokens, more than the context of 64"):
        next(measure(engine, DEVICE, [Workload("long", 1, (90, 90), (10, 10))]))


def test_prompt_tokens_count_where_there_is_one_new_one(engine):
    (found,) = measure(engine, DEVICE, [Workload("prompts", 2, (20, 20), (1, 1))])
    assert found.tokens == 40
    assert list(found.latencies) == ["first_token"]


class Busy:
    """A profiler of a device that works a tenth of a second between start and stop."""

    asynchronous = True

    def __init__(self):
        self.calls = []

    def start(self):
        self.calls.append("start")

    def stop(self):
        self.calls.append("stop")
        return [Ran("kernel", 0.0, 0.1), Ran("kernel", 0.05, 0.1)]


def test_the_idle_share_of_a_workload(engine, monkeypatch):
    profiler, core = Busy(), engine._worker.core
    monkeypatch.setattr("llmrs.bench.serving.PIECE", 3)
    monkeypatch.setattr(core.backend, "profiler", lambda: profiler)
    before = core.span
    assert idle(engine, [Asked([5, 6, 7], 7)], 1.0) == pytest.approx(0.7)  # 7 steps: pieces of 2, 3 and 2
    assert profiler.calls == ["start", "stop"] * 3
    assert core.span is before
    assert idle(engine, [Asked([5], 2)], 0.05) == 0.0  # a profiler that slows kernels down


def test_arrivals_on_the_demo_model(engine):
    w = Workload("small", 3, (4, 4), (3, 3))
    closed = replace(next(measure(engine, DEVICE, [w])), seconds=0.03)
    slow, fast = over_time(engine, DEVICE, w, [0.5, 1.0], closed)
    assert (slow.name, slow.rate_of_requests) == ("small at 0.5", pytest.approx(50))
    assert fast.rate_of_requests == pytest.approx(100)
    assert slow.seconds > arrivals(3, 50)[-1]
    assert slow.tokens == fast.tokens == 9


# Steps


class MadeUp:
    """A backend whose steps take 2 ms of a clock that it turns itself, 0.5 of which its kernels run."""

    def __init__(self, max_in_flight=2):
        self.block_size, self.max_in_flight, self.now, self.unread, self.shapes = 16, max_in_flight, 0.0, 0, Counter()
        self.deepest = 0
        self.profiling = None
        self.asynchronous = True

    def idle(self):
        return False

    def launch(self, batch):
        self.shapes[len(batch.input_ids), int(batch.seq_lens[0])] += 1
        self.unread += 1
        self.deepest = max(self.deepest, self.unread)
        if self.profiling is not None:
            self.profiling.append(Ran("kernel", self.now, self.now + 0.0005))
        self.now += 0.002
        return self

    def tokens(self):
        self.unread -= 1

    def profiler(self):
        return self

    def start(self):
        self.profiling = []

    def stop(self):
        found, self.profiling = self.profiling, None
        return found


def test_a_step_is_timed_as_far_ahead_as_the_engine_runs():
    backend = MadeUp()
    seconds, share = measured(backend, 3, 40, lambda: backend.now)
    assert seconds == pytest.approx(0.002)
    assert share == pytest.approx(0.75)
    assert (backend.deepest, backend.unread) == (2, 0)
    assert set(backend.shapes) == {(3, 40)}
    backend.asynchronous = False
    assert measured(backend, 3, 40, lambda: backend.now)[1] is None


def test_a_made_up_batch_is_one_that_the_pool_can_hold():
    batch = decode_batch(16, 5, 33)
    assert batch.block_tables.shape == (5, 3)
    assert sorted(batch.block_tables.reshape(-1)) == list(range(15))
    assert set(batch.seq_lens) == {33}
    assert set(batch.positions) == {32}
    assert batch.query_start_loc.tolist() == list(range(6))


def test_a_grid_says_what_does_not_fit(engine):
    small, long = grid(engine, DEVICE, [2], [30, 65])
    (many,) = grid(engine, DEVICE, [5], [30])
    assert small.seconds > 0
    assert small.floor == Work.of(engine.model.graph).decode(DEVICE, "bf16", 2, 30)
    assert small.rate == 2 / small.seconds
    assert small.ceiling == 2 / small.floor
    assert small.idle is None
    assert long.skipped == "the context has at most 64 tokens"
    assert many.skipped == "at most 4 sequences run at once"
    cramped = EngineConfig(
        "demo", device="cpu", max_num_seqs=4, max_model_len=64, kv_cache_memory=engine.fit.token * 64
    )
    with Engine(cramped) as other:
        (cell,) = grid(other, DEVICE, [4], [17])
    assert cell.skipped == "needs 8 blocks of KV cache, and there are 4"


def test_a_step_that_fails_is_named_and_the_engine_goes_on(engine, monkeypatch):
    def full(batch):
        raise RuntimeError("out of memory\nand more about it")

    monkeypatch.setattr(engine._worker.core.backend, "launch", full)
    (cell,) = grid(engine, DEVICE, [2], [30])
    assert cell.skipped == "the device failed: out of memory"
    monkeypatch.undo()
    (cell,) = grid(engine, DEVICE, [2], [30])
    assert cell.seconds > 0


# Profiles


def test_time_in_which_something_runs():
    apart = [Ran("a", 0.0, 1.0), Ran("b", 2.0, 3.0)]
    assert busy(apart) == 2
    assert busy([Ran("a", 0.0, 2.0), Ran("b", 1.0, 1.5), Ran("c", 1.0, 3.0)]) == 3  # they overlap
    assert busy([]) == 0


def test_events_of_a_profiler_keep_their_nanoseconds():
    start = 1_795_563_793_445_759_710
    found = ran([("inner", start + 1002, 3), ("outer", start + 1000, 10), ("next", start + 1010, 1), ("a", start, 1)])
    assert [r.name for r in found] == ["a", "outer", "inner", "next"]
    assert found[1].end - found[1].begin == pytest.approx(10e-9)
    assert [r.name for r in outermost(found)] == ["a", "outer", "next"]


def test_costs_add_up_to_the_work_of_a_step():
    """Weights, KV cache and operations of all equations are those of `Work`; what passes between them comes on top."""
    for fused in ((), FUSED_OPS):
        plain = paper.graph("Qwen3-0.6B")
        found, work = costs(fuse(plain, fused), ("bf16", "bf16"), 4, 100), Work.of(plain)
        by_op = {op: [c for c in found if c.op == op] for op in {c.op for c in found}}
        matrices = [c for c in found if c.op in ("linear", "merged_linear", "lm_head")]
        assert sum(c.operations for c in matrices) == 4 * 2 * (work.weights - norms())
        assert sum(c.operations for c in by_op["attend"]) == 4 * 100 * work.attention
        queries = 28 * 2 * 4 * 16 * 128 * 2  # read, and the answers written
        assert sum(c.bytes for c in by_op["attend"]) == 4 * 100 * work.token + queries
        assert sum(c.bytes for c in matrices) > 2 * (work.weights - norms())
        assert found[-1] == Cost("sample", "sample", 4 * 151_936 * 2)
        assert by_op["embed"][0].bytes == 4 * (4 + 2 * 1024 * 2)  # ids, rows read and written


@pytest.mark.parametrize(("batch", "part"), [(1, 1 / 3), (2, 5 / 9), (200, 1.0)])
def test_costs_of_a_mixture_are_those_of_the_experts_that_are_met(batch: int, part: float):
    """Six experts of 3 x 24 x 64, two of them for each token; the router of 6 x 64 is for all."""
    found = costs(RandomModel.of("qwen3-moe", num_hidden_layers=1).graph, ("f32", "f32"), batch, 9)
    (cost,) = (c for c in found if c.op == "moe")
    router, experts = 6 * 64, 6 * 3 * 24 * 64
    assert cost.operations == pytest.approx(2 * batch * (router + experts / 3))
    assert cost.bytes == pytest.approx(4 * (2 * batch * 64 + router + experts * part))


def norms() -> int:
    return 28 * (2 * 1024 + 2 * 128) + 1024


def test_windows_bound_what_attention_reads():
    graph = paper.graph("Qwen3-0.6B")
    cases = (with_window(graph, 8), 99), (graph, 8)
    found = [next(c for c in costs(g, ("bf16", "f32"), 1, n) if c.op == "attend") for g, n in cases]
    assert found[0] == found[1]


def test_kernels_get_the_floors_of_what_they_compute():
    found = [Cost("linear", "linear 4x4", 1000), Cost("attend", "attend", 500), Cost("linear", "linear 8x4", 4000)]
    step = [("gemm_a", 2e-6), ("_attend", 1e-6), ("_combine", 1e-7), ("gemm_a", 5e-6)]
    seen, at = [], 0.0
    for name, seconds in step * 2:
        seen.append(Ran(name, at, at + seconds))
        at += seconds
    rows = {(k.name, k.what): k for k in kernels(seen, 2, found, DEVICE)}
    assert rows["gemm_a", "linear 4x4"].floor == pytest.approx(1e-6)
    assert rows["gemm_a", "linear 8x4"].seconds == pytest.approx(5e-6)
    assert rows["gemm_a", "linear 8x4"].floor == pytest.approx(4e-6)
    assert rows["_attend", "attend"].count == 1
    assert rows["_combine", ""].floor is None
    assert [k.seconds for k in rows.values()] == sorted((k.seconds for k in rows.values()), reverse=True)


def test_kernels_that_can_not_be_told_apart_share_a_row():
    found = [Cost("linear", "linear 4x4", 1000), Cost("linear", "linear 8x4", 4000)]
    seen = [Ran("gemm_a", 0.0, 1e-6), Ran("gemm_b", 1e-6, 2e-6), Ran("gemm_a", 2e-6, 8e-6)]
    (row,) = kernels(seen, 1, found, DEVICE)
    assert (row.name, row.what, row.count) == ("gemm_a and 1 more", "linear", 3)
    assert row.seconds == pytest.approx(8e-6)
    assert row.floor == pytest.approx(5e-6)


def test_names_of_kernels():
    assert ops_of("nvjet_tst_64x8_64x16_4x1_v_bz_TNT") == ops_of("_matvec") == ("linear", "merged_linear", "lm_head")
    assert ops_of("_attend") == ("attend",)
    assert ops_of("_qk_norm_rope_write_kv") == ("qk_norm_rope_write_kv", "rope_write_kv")
    assert ops_of("_norm") == ("rms_norm", "fused_add_rms_norm")
    assert ops_of("_score") == ops_of("_search") == ("sample",)
    assert ops_of("void cublasLt::splitKreduce_kernel<32, 16>") == ops_of("Memcpy HtoD (Pinned -> Device)") == ()
    assert ops_of("aten::add") == ops_of("_pick") == ()


def test_an_addition_and_the_norm_after_it_are_one():
    found = joined([Cost("add", "add", 300), Cost("rms_norm", "rms_norm 8", 216), Cost("add", "add", 300)])
    assert [(c.op, c.label, c.bytes) for c in found] == [
        ("fused_add_rms_norm", "fused_add_rms_norm 8", 400),
        ("add", "add", 300),
    ]


# The picture


def test_a_picture_is_xml_and_its_points_are_where_they_belong():
    curves = [Curve("a <b>", [(1, 10.0), (4, 100.0), (16, 1000.0)]), Curve("top", [(1, 20.0), (16, 900.0)], True)]
    root = ElementTree.fromstring(svg("speed & more", "batch", "tokens/s", curves))
    name = "{http://www.w3.org/2000/svg}"
    lines = root.findall(f"{name}polyline")
    points = [[tuple(map(float, p.split(","))) for p in line.get("points").split()] for line in lines]
    assert [len(p) for p in points] == [3, 2]
    (x1, y1), (x2, y2), (x3, y3) = points[0]
    assert x1 < x2 < x3
    assert y1 > y2 > y3  # up is less
    assert (x2 - x1, y2 - y1) == pytest.approx((x3 - x2, y3 - y2), abs=0.2)  # logarithmic: equal factors, equal ways
    assert points[1][0][0] == x1
    assert y2 < points[1][0][1] < y1
    assert lines[1].get("stroke-dasharray")
    assert lines[1].get("stroke") == lines[0].get("stroke")
    assert {t.text for t in root.iter(f"{name}text")} >= {"a <b>", "top", "speed & more", "1", "16", "10", "1000"}


def test_one_point_is_a_picture_too():
    assert Axis(5, 5, 10, 20).at(5) == 10
    assert ElementTree.fromstring(svg("t", "x", "y", [Curve("c", [(8, 1000.0)])])) is not None


def test_the_curves_of_a_grid():
    cells = [Cell(4, 9, 2.0, 1.0), Cell(1, 9, 1.0, 0.5), Cell(1, 90, skipped="no")]
    texts = [t.text for t in ElementTree.fromstring(picture(cells)).iter("{http://www.w3.org/2000/svg}text")]
    assert [t for t in texts if t.startswith(("context", "ceiling"))] == ["context 9", "ceiling at 9"]
    with pytest.raises(ConfigError, match="no step"):
        picture(cells[2:])


# As a command


@pytest.fixture
def call(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def bench(*args: str) -> tuple[int, str, str]:
        status = main(["bench", "--device", "cpu", *args])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return bench


def test_all_of_it_in_one_command(call, tmp_path):
    shapes = ["--batches", "1,2", "--contexts", "16", "--contexts", "9999"]
    status, out, _ = call(
        "--workloads", "mixed,prefill", "--arrivals", "2", "--scale", "0.01", "--plot", "a.svg", *shapes
    )
    assert status == 0
    for words in ("GB/s read", "scaled: 0.01 of", "ms to first token p50", "mixed at 2", "not run: the context has"):
        assert words in out
    assert re.search(r"^mixed +3 +\d+ +[\d.]+ +[\d.]+ +[\d.]+ % +-$", out, re.M)
    assert (tmp_path / "a.svg").exists()


def test_a_profile_of_a_step(call):
    (found,) = json.loads(call("--profile", "--batches", "2", "--contexts", "16", "--json")[1])["profiles"]
    head = next(k for k in found["kernels"] if k["what"].startswith("lm_head"))
    assert head["count"] == 1
    assert head["floor"] > 0
    assert found["busy"] > 0
    assert any(k["floor"] is None for k in found["kernels"])


def test_a_profile_as_a_table():
    rows = [Kernel("gemm", "head 8x4", 1, 90e-6, 45e-6), Kernel("copy", "", 2, 9.8e-6), Kernel("x", "", 9, 0.2e-6)]
    head, _, first, second, rest = profiles([Profile(2, 16, 200e-6, 100e-6, 40e-6, rows)])
    assert head == "step of 2 x 16: 200 us, floor 40, 50.0 % of it in kernels"
    assert first.split() == ["1.0", "90.0", "90.0", "%", "45.0", "50.0", "%", "gemm,", "lm_head", "8x4"]
    assert second.split() == ["2.0", "9.8", "9.8", "%", "-", "-", "copy"]
    assert rest.endswith("the rest, of 1 names")


def test_workloads_as_json(call):
    found = json.loads(call("--workloads", "single", "--scale", "0.02", "--json")[1])
    assert found["scale"] == 0.02
    (single,) = found["workloads"]
    assert single["tokens"] == 10
    assert single["tokens_per_second"] == pytest.approx(10 / single["seconds"])
    assert single["share_of_ceiling"] == pytest.approx(single["floor"] / single["seconds"])
    assert single["idle"] is None


def test_a_backend_that_does_not_say_what_runs(call):
    status, out, err = call("--backend", "reference", "--profile", "--batches", "1", "--contexts", "8")
    assert (status, out) == (2, "")
    assert "reference does not say" in err
    with Engine(EngineConfig("demo", backend="reference", max_num_seqs=1, max_model_len=8)) as reference:
        assert idle(reference, [], 1.0) is None
        (cell,) = grid(reference, DEVICE, [1], [8])
    assert (cell.idle, cell.skipped) == (None, "")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--workloads", "sead"], "did you mean seed"),
        (["--workloads", ""], "'' is not there"),
        (["--workloads", "seed", "--batches", "3"], "batches has no effect"),
        (["--scale", "0.5"], "scale has no effect"),
        (["--contexts", "8", "--new-tokens", "9"], "new_tokens has no effect"),
        (["--host", "--profile"], "measurements: profile"),
        (["--arrivals", "0"], "arrivals: 0.0"),
        (["--arrivals", "1,x"], "'x'"),
        (["--batches", "1,,2"], "''"),
        (["--plot", "/nowhere/a.svg"], "/nowhere/a.svg can't be written"),
        (["--workloads", "seed", "--max-model-len", "100"], "1024 tokens of prompt and answer are more than"),
        (["--workloads", "prefill"], "4097 tokens of prompt and answer are more than the context of 4096"),
        (["--profile", "--batches", "1", "--contexts", "5000"], "a step of 1 x 5000"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_what_is_wrong_is_said(call, args, words):
    status, out, err = call(*args)
    assert (status, out) == (2, "")
    assert words in err
    assert "\nhint: " in err


def test_the_start_of_processes(monkeypatch, call):
    monkeypatch.setattr("llmrs.bench.startup.measure", partial(startup.measure, rounds=1))
    (found,) = json.loads(call("--start", "--json", "--backend", "reference", "--max-model-len", "64")[1])["start"]
    assert min(found["first_token"], found["imported"], found["loaded"], found["answered"]) > 0
    assert "it was this" in failed(2, b"noise\nerror: it was this\nhint: no\n").message


@pytest.mark.parametrize("name", [n for n in random_checkpoint.SHAPES if n.endswith("-tiny")])
def test_shapes_of_other_models(tmp_path, name):
    folder = random_checkpoint.write(name, tmp_path / "model")
    with Engine(EngineConfig(str(folder), device="cpu", max_num_seqs=2, max_model_len=64)) as engine:
        (found,) = measure(engine, DEVICE, [Workload("small", 2, (4, 4), (3, 3))])
    assert found.tokens == 6
    assert found.floor > 0
