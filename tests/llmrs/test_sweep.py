"""Timed decode steps on synthetic devices and the demo model, and the plot of a sweep."""

import xml.etree.ElementTree as ElementTree
from collections import Counter

import pytest

from llmrs import ConfigError, Engine, EngineConfig
from llmrs.backends.base import KernelEvent
from llmrs.bench.plot import Axis, Curve, svg
from llmrs.bench.report import picture
from llmrs.bench.roofline import Device, ModelCost
from llmrs.bench.sweep import SweepPoint, decode_batch, device_busy, measure_step, sweep

DEVICE = Device("synthetic", 1e9, 1e12)


@pytest.fixture(scope="module")
def engine():
    config = EngineConfig("demo", device="cpu", max_num_seqs=4, max_model_len=64, prefix_cache=False)
    with Engine(config) as made:
        yield made


class FakeBackend:
    """A backend with steps of 2 ms on its own clock, 0.5 ms of them in kernels."""

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
            self.profiling.append(KernelEvent("kernel", self.now, self.now + 0.0005))
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


def test_steps_are_timed_with_max_in_flight():
    backend = FakeBackend()
    seconds, idle = measure_step(backend, 3, 40, lambda: backend.now)
    assert seconds == pytest.approx(0.002)
    assert idle == pytest.approx(0.75)
    assert (backend.deepest, backend.unread) == (2, 0)
    assert set(backend.shapes) == {(3, 40)}
    backend.asynchronous = False
    assert measure_step(backend, 3, 40, lambda: backend.now)[1] is None


def test_decode_batch():
    batch = decode_batch(16, 5, 33)
    assert batch.block_tables.shape == (5, 3)
    assert sorted(batch.block_tables.reshape(-1)) == list(range(15))
    assert set(batch.seq_lens) == {33}
    assert set(batch.positions) == {32}
    assert batch.query_start_loc.tolist() == list(range(6))


def test_a_sweep_skips_what_does_not_fit(engine):
    small, long = sweep(engine, DEVICE, [2], [30, 65])
    (many,) = sweep(engine, DEVICE, [5], [30])
    assert small.seconds > 0
    assert small.roofline_time == ModelCost.of(engine.model.graph).decode_time(DEVICE, "bf16", 2, 30)
    assert small.tokens_per_second == 2 / small.seconds
    assert small.roofline_tokens_per_second == 2 / small.roofline_time
    assert small.idle is None
    assert long.skipped == "the context has at most 64 tokens"
    assert many.skipped == "at most 4 sequences run at once"
    cramped = EngineConfig(
        "demo",
        device="cpu",
        max_num_seqs=4,
        max_model_len=64,
        kv_cache_memory=engine.memory_plan.kv_bytes_per_token * 64,
    )
    with Engine(cramped) as other:
        (cell,) = sweep(other, DEVICE, [4], [17])
    assert cell.skipped == "needs 8 blocks of KV cache, and there are 4"


def test_a_failed_step_is_skipped(engine, monkeypatch):
    def full(batch):
        raise RuntimeError("out of memory\nand more about it")

    monkeypatch.setattr(engine._worker.core.backend, "launch", full)
    (cell,) = sweep(engine, DEVICE, [2], [30])
    assert cell.skipped == "the device failed: out of memory"
    monkeypatch.undo()
    (cell,) = sweep(engine, DEVICE, [2], [30])
    assert cell.seconds > 0


def test_device_busy():
    apart = [KernelEvent("a", 0.0, 1.0), KernelEvent("b", 2.0, 3.0)]
    assert device_busy(apart) == 2
    assert device_busy([KernelEvent("a", 0.0, 2.0), KernelEvent("b", 1.0, 1.5), KernelEvent("c", 1.0, 3.0)]) == 3
    assert device_busy([]) == 0


def test_plot():
    curves = [Curve("a <b>", [(1, 10.0), (4, 100.0), (16, 1000.0)]), Curve("top", [(1, 20.0), (16, 900.0)], True)]
    root = ElementTree.fromstring(svg("speed & more", "batch", "tokens/s", curves))
    name = "{http://www.w3.org/2000/svg}"
    lines = root.findall(f"{name}polyline")
    points = [[tuple(map(float, p.split(","))) for p in line.get("points").split()] for line in lines]
    assert [len(p) for p in points] == [3, 2]
    (x1, y1), (x2, y2), (x3, y3) = points[0]
    assert x1 < x2 < x3
    assert y1 > y2 > y3  # up is less
    assert (x2 - x1, y2 - y1) == pytest.approx((x3 - x2, y3 - y2), abs=0.2)  # logarithmic
    assert points[1][0][0] == x1
    assert y2 < points[1][0][1] < y1
    assert lines[1].get("stroke-dasharray")
    assert lines[1].get("stroke") == lines[0].get("stroke")
    assert {t.text for t in root.iter(f"{name}text")} >= {"a <b>", "top", "speed & more", "1", "16", "10", "1000"}


def test_plot_of_one_point():
    assert Axis(5, 5, 10, 20).at(5) == 10
    assert ElementTree.fromstring(svg("t", "x", "y", [Curve("c", [(8, 1000.0)])])) is not None


def test_plot_of_a_sweep():
    cells = [SweepPoint(4, 9, 2.0, 1.0), SweepPoint(1, 9, 1.0, 0.5), SweepPoint(1, 90, skipped="no")]
    texts = [t.text for t in ElementTree.fromstring(picture(cells)).iter("{http://www.w3.org/2000/svg}text")]
    assert [t for t in texts if t.startswith(("context", "roofline"))] == ["context 9", "roofline at 9"]
    with pytest.raises(ConfigError, match="no step"):
        picture(cells[2:])
