"""Workloads of `llmrs bench`: their requests, latencies by hand, and runs on the demo model."""

from dataclasses import replace

import numpy as np
import pytest
import random_checkpoint

from llmrs import ConfigError, Engine, EngineConfig
from llmrs.backends.base import KernelEvent
from llmrs.bench.roofline import Device, ModelCost
from llmrs.bench.serving import device_idle, measure, open_loop
from llmrs.bench.workloads import (
    WORKLOADS,
    RequestSpec,
    RequestTimes,
    RunResult,
    Workload,
    parse_workloads,
    percentiles,
    poisson_arrivals,
    run,
)

DEVICE = Device("synthetic", 1e9, 1e12)


def lengths(name: str) -> list[tuple[int, int]]:
    return [(len(a.prompt), a.output_len) for a in WORKLOADS[name].make_requests(151_936)]


def test_workloads_equal_those_of_other_engines():
    assert sum(new for _, new in lengths("mixed")) == 133_966
    assert lengths("seed") == [(16, 1008)] * 256
    assert lengths("single") == [(128, 512)]
    assert lengths("prefill") == [(4096, 1)] * 16
    first = WORKLOADS["mixed"].make_requests(50)
    assert first == WORKLOADS["mixed"].make_requests(50)
    assert max(t for a in first for t in a.prompt) == 49


def test_scaled_workloads_keep_their_form():
    assert WORKLOADS["mixed"].scaled(0.05) == Workload("mixed", 13, (5, 51), (5, 51))
    assert WORKLOADS["seed"].scaled(0.001) == Workload("seed", 1, (1, 1), (2, 2))
    assert WORKLOADS["prefill"].scaled(0.01) == Workload("prefill", 1, (41, 41), (1, 1))
    assert all(w.scaled(1.0) == w for w in WORKLOADS.values())
    assert [w.name for w in parse_workloads("mixed, seed,mixed")] == ["mixed", "seed"]
    with pytest.raises(ConfigError, match="did you mean mixed"):
        parse_workloads("seed,mixd")


def test_percentiles_and_latencies():
    assert percentiles(range(1, 101)) == {"p50": 50, "p90": 90, "p99": 99}
    assert percentiles([3.0]) == {"p50": 3.0, "p90": 3.0, "p99": 3.0}
    result = RunResult([RequestTimes(10.0, [11.0, 11.5, 12.5]), RequestTimes(10.5, [13.5])])
    assert (result.seconds, result.tokens) == (3.5, 4)
    found = result.latencies()
    assert found["ttft"] == {"p50": 1.0, "p90": 3.0, "p99": 3.0}
    assert found["itl"] == {"p50": 0.5, "p90": 1.0, "p99": 1.0}
    assert "itl" not in RunResult([RequestTimes(0.0, [1.0])]).latencies()


def test_poisson_arrivals():
    due = poisson_arrivals(20_000, 4.0)
    gaps = np.diff(due)
    assert due[0] == 0
    assert due == poisson_arrivals(20_000, 4.0)
    assert gaps.mean() == pytest.approx(1 / 4, rel=0.03)
    assert gaps.std() == pytest.approx(1 / 4, rel=0.05)  # of an exponential distribution
    assert (gaps > 0.25).mean() == pytest.approx(np.exp(-1), rel=0.05)


@pytest.fixture(scope="module")
def engine():
    config = EngineConfig("demo", device="cpu", max_num_seqs=4, max_model_len=64, prefix_cache=False)
    with Engine(config) as made:
        yield made


def test_a_workload_on_the_demo_model(engine):
    w = Workload("small", 3, (4, 9), (5, 8))
    requests = w.make_requests(engine.model.config.vocab_size)
    (found,) = measure(engine, DEVICE, [w])
    assert (found.name, found.requests, found.idle) == ("small", 3, None)
    assert found.tokens == sum(a.output_len for a in requests)
    cost = ModelCost.of(engine.model.graph)
    assert found.roofline_time == cost.workload_time(DEVICE, "bf16", [(len(a.prompt), a.output_len) for a in requests])
    assert found.fraction_of_roofline == found.roofline_time / found.seconds
    assert 0 < found.latencies["ttft"]["p50"] <= found.seconds
    result = run(engine, requests)
    assert [len(a.token_times) for a in result.requests] == [a.output_len for a in requests]
    assert all(a.arrival_time < a.token_times[0] and a.token_times == sorted(a.token_times) for a in result.requests)
    with pytest.raises(ConfigError, match="workload long needs 100 tokens, more than the context of 64"):
        next(measure(engine, DEVICE, [Workload("long", 1, (90, 90), (10, 10))]))


def test_prefill_counts_prompt_tokens(engine):
    (found,) = measure(engine, DEVICE, [Workload("prompts", 2, (20, 20), (1, 1))])
    assert found.tokens == 40
    assert list(found.latencies) == ["ttft"]


class Busy:
    """A profiler with 0.1 s of kernels between start and stop."""

    asynchronous = True

    def __init__(self):
        self.calls = []

    def start(self):
        self.calls.append("start")

    def stop(self):
        self.calls.append("stop")
        return [KernelEvent("kernel", 0.0, 0.1), KernelEvent("kernel", 0.05, 0.1)]


def test_device_idle_of_a_workload(engine, monkeypatch):
    profiler, core = Busy(), engine._worker.core
    monkeypatch.setattr("llmrs.bench.serving.FLUSH_EVERY_STEPS", 3)
    monkeypatch.setattr(core.backend, "profiler", lambda: profiler)
    before = core.span
    assert device_idle(engine, [RequestSpec([5, 6, 7], 7)], 1.0) == pytest.approx(0.7)  # flushed after 2, 3, 2
    assert profiler.calls == ["start", "stop"] * 3
    assert core.span is before
    assert device_idle(engine, [RequestSpec([5], 2)], 0.05) == 0.0  # a profiler that slows kernels down


def test_open_loop_on_the_demo_model(engine):
    w = Workload("small", 3, (4, 4), (3, 3))
    closed = replace(next(measure(engine, DEVICE, [w])), seconds=0.03)
    slow, fast = open_loop(engine, DEVICE, w, [0.5, 1.0], closed)
    assert (slow.name, slow.request_rate) == ("small at 0.5", pytest.approx(50))
    assert fast.request_rate == pytest.approx(100)
    assert slow.seconds > poisson_arrivals(3, 50)[-1]
    assert slow.tokens == fast.tokens == 9


@pytest.mark.parametrize("name", [n for n in random_checkpoint.SHAPES if n.endswith("-tiny")])
def test_shapes_of_other_models(tmp_path, name):
    folder = random_checkpoint.write(name, tmp_path / "model")
    with Engine(EngineConfig(str(folder), device="cpu", max_num_seqs=2, max_model_len=64)) as engine:
        (found,) = measure(engine, DEVICE, [Workload("small", 2, (4, 4), (3, 3))])
    assert found.tokens == 6
    assert found.roofline_time > 0
