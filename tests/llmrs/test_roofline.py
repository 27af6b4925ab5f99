"""The speed on paper, and the tables that are made of it."""

import math

import paper
import pytest
from measure import ROOT

from llmrs import Engine, EngineConfig
from llmrs.backends.testing import RandomModel
from llmrs.bench.decode import measure
from llmrs.bench.roofline import Device, Work
from llmrs.models.files.weights import num_parameters


def test_the_work_of_qwen3():
    """As counted by hand: 28 layers of 2 x 8 x 128 x 2 bytes of KV; the head is the embedding table, read once."""
    graph = paper.graph("Qwen3-0.6B")
    work = Work.of(graph)
    assert work.token == 114_688
    assert work.weights == num_parameters(graph) == 596_049_920
    assert work.attention == 28 * 4 * 16 * 128
    untied = paper.graph("Qwen3-8B")
    assert Work.of(untied).weights == num_parameters(untied) - 151_936 * 4096  # embeddings are only looked up


def test_floors():
    work, fast = Work.of(paper.graph("Qwen3-0.6B")), Device("fast", 4.66e12, math.inf)
    assert work.decode(fast, "bf16", 1, 0) == pytest.approx(0.256e-3, rel=0.01)
    step = work.decode(fast, "bf16", 256, 520)
    assert 256 / step == pytest.approx(256 * 4.66e12 / (1.192e9 + 256 * 520 * 114_688), rel=0.001)
    slow = Device("slow", math.inf, 1e12)
    assert work.prefill(slow, "bf16", 1) == pytest.approx(2 * 596_049_920 / 1e12, rel=0.001)
    assert work.decode(fast, "q4k", 1, 0) == pytest.approx(0.256e-3 * 4.5 / 16, rel=0.01)


def test_of_a_mixture_only_the_experts_count_that_tokens_meet():
    """Six experts a layer, of which each token goes through two."""
    model = RandomModel.of("qwen3-moe", num_hidden_layers=3)
    work, slow, fast = Work.of(model.graph), Device("slow", math.inf, 1.0), Device("fast", 1.0, math.inf)
    experts = 3 * 6 * 3 * 24 * 64  # layers, experts, matrices of 24 x 64
    assert (work.experts, work.chosen) == (experts, pytest.approx(1 / 3))
    rest = work.weights - experts
    assert work.step(fast, "bf16", 1, 0) == pytest.approx(2 * (rest + experts / 3))
    assert work.step(fast, "bf16", 2, 0) == pytest.approx(2 * (rest + experts * (1 - (2 / 3) ** 2)))
    assert work.step(fast, "bf16", 100, 0) == pytest.approx(2 * work.weights)
    assert work.step(slow, "bf16", 5, 0) == pytest.approx(5 * 2 * (rest + experts / 3))
    through = rest - work.head + experts / 3
    keys = work.pairs(7) * work.attention
    assert work.prefill(slow, "bf16", 7) == pytest.approx(7 * 2 * through + 2 * work.head + keys)


def test_the_tables_of_the_docs():
    page = (ROOT / "docs" / "apple.md").read_text("utf-8")
    assert paper.renewed(page) == page, "run: python tests/tools/paper.py docs/apple.md"


def test_measuring_the_demo_model():
    config = EngineConfig("demo", device="cpu", prefix_cache=False, max_num_seqs=2, max_model_len=256)
    with Engine(config) as engine:
        ceilings = Device.of(engine)
        found = list(measure(engine, ceilings, (1, 2), 16, 8))
    assert ceilings.bandwidth > 1e8
    assert ceilings.operations > 1e8
    assert [m.what for m in found] == ["decode, batch 1", "decode, batch 2", "prefill of 255"]
    assert [m.tokens for m in found] == [7, 14, 255]
    assert all(m.seconds > 0 and m.floor > 0 for m in found)
