"""Roofline times by hand, and the tables of the docs."""

import math
from dataclasses import replace

import paper
import pytest
from measure import ROOT

from llmrs import Engine, EngineConfig
from llmrs.backends.testing import RandomModel
from llmrs.bench.decode import measure
from llmrs.bench.op_costs import op_costs
from llmrs.bench.roofline import Device, ModelCost
from llmrs.bench.workloads import WORKLOADS
from llmrs.models.files.weights import num_parameters

DEVICE = Device("synthetic", 1e9, 1e12)
H200 = Device("H200", 4.66e12, 803e12)


def test_the_cost_of_qwen3():
    """By hand: 28 layers of 2 x 8 x 128 x 2 bytes of KV; the lm_head is the embedding table, read once."""
    graph = paper.graph("Qwen3-0.6B")
    cost = ModelCost.of(graph)
    assert cost.kv_bytes_per_token == 114_688
    assert cost.num_weights == num_parameters(graph) == 596_049_920
    assert cost.attention_flops == 28 * 4 * 16 * 128
    untied = paper.graph("Qwen3-8B")
    assert ModelCost.of(untied).num_weights == num_parameters(untied) - 151_936 * 4096  # embeddings are only looked up


def test_roofline_times():
    cost, fast = ModelCost.of(paper.graph("Qwen3-0.6B")), Device("fast", 4.66e12, math.inf)
    assert cost.decode_time(fast, "bf16", 1, 0) == pytest.approx(0.256e-3, rel=0.01)
    step = cost.decode_time(fast, "bf16", 256, 520)
    assert 256 / step == pytest.approx(256 * 4.66e12 / (1.192e9 + 256 * 520 * 114_688), rel=0.001)
    slow = Device("slow", math.inf, 1e12)
    assert cost.prefill_time(slow, "bf16", 1) == pytest.approx(2 * 596_049_920 / 1e12, rel=0.001)
    assert cost.decode_time(fast, "q4k", 1, 0) == pytest.approx(0.256e-3 * 4.5 / 16, rel=0.01)


def test_moe_counts_activated_experts():
    """Six experts per layer, two activated per token."""
    model = RandomModel.of("qwen3-moe", num_hidden_layers=3)
    cost, slow, fast = ModelCost.of(model.graph), Device("slow", math.inf, 1.0), Device("fast", 1.0, math.inf)
    experts = 3 * 6 * 3 * 24 * 64  # layers, experts, matrices of 24 x 64
    assert (cost.expert_weights, cost.active_fraction) == (experts, pytest.approx(1 / 3))
    rest = cost.num_weights - experts
    assert cost.step_time(fast, "bf16", 1, 0) == pytest.approx(2 * (rest + experts / 3))
    assert cost.step_time(fast, "bf16", 2, 0) == pytest.approx(2 * (rest + experts * (1 - (2 / 3) ** 2)))
    assert cost.step_time(fast, "bf16", 100, 0) == pytest.approx(2 * cost.num_weights)
    assert cost.step_time(slow, "bf16", 5, 0) == pytest.approx(5 * 2 * (rest + experts / 3))
    active = rest - cost.lm_head_weights + experts / 3
    keys = cost.causal_pairs(7) * cost.attention_flops
    assert cost.prefill_time(slow, "bf16", 7) == pytest.approx(7 * 2 * active + 2 * cost.lm_head_weights + keys)


def test_the_tables_of_the_docs():
    page = (ROOT / "docs" / "apple.md").read_text("utf-8")
    assert paper.renewed(page) == page, "run: python tests/tools/paper.py docs/apple.md"


def test_measuring_the_demo_model():
    config = EngineConfig("demo", device="cpu", prefix_cache=False, max_num_seqs=2, max_model_len=256)
    with Engine(config) as engine:
        device = Device.of(engine)
        found = list(measure(engine, device, (1, 2), 16, 8))
    assert device.bandwidth > 1e8
    assert device.flops > 1e8
    assert [m.name for m in found] == ["decode, batch 1", "decode, batch 2", "prefill of 255"]
    assert [m.tokens for m in found] == [7, 14, 255]
    assert all(m.seconds > 0 and m.roofline_time > 0 for m in found)


def lengths(name: str) -> list[tuple[int, int]]:
    return [(len(a.prompt), a.output_len) for a in WORKLOADS[name].make_requests(151_936)]


def test_rooflines_of_the_workloads_on_an_h200():
    """Tokens/s by hand for Qwen3-0.6B: prefill is compute-bound, decode memory-bound."""
    cost = ModelCost.of(paper.graph("Qwen3-0.6B"))

    def roofline(name: str) -> float:
        requests = lengths(name)
        tokens = sum(prompt if new == 1 else new for prompt, new in requests)
        return tokens / cost.workload_time(H200, "bf16", requests)

    assert roofline("seed") == pytest.approx(72_500, rel=0.01)
    assert roofline("mixed") == pytest.approx(38_500, rel=0.03)  # by hand with the lm_head for every prompt token
    assert roofline("single") == pytest.approx(3_900, rel=0.05)
    assert roofline("prefill") == pytest.approx(596_000, rel=0.01)


def test_the_roofline_of_a_workload_is_the_sum_of_its_steps():
    cost = ModelCost(num_weights=1000, kv_bytes_per_token=10, attention_flops=0, lm_head_weights=100)
    one = cost.workload_time(DEVICE, "bf16", [(7, 3)])
    steps = cost.step_time(DEVICE, "bf16", 1, 8) + cost.step_time(DEVICE, "bf16", 1, 9)
    assert one == cost.prefill_time(DEVICE, "bf16", 7) + steps
    both = cost.workload_time(DEVICE, "bf16", [(7, 3), (5, 2)])  # the second has ended when the last step begins
    steps = cost.step_time(DEVICE, "bf16", 2, 8 + 6) + cost.step_time(DEVICE, "bf16", 1, 9)
    assert both == cost.prefill_time(DEVICE, "bf16", 7, 5) + steps
    assert cost.step_time(DEVICE, "bf16", 2, 14) == (2 * 1000 + 14 * 10) / 1e9


def test_prefill_runs_the_lm_head_for_the_last_token():
    slow = Device("slow", 1e30, 1.0)
    cost = ModelCost(num_weights=1000, kv_bytes_per_token=10, attention_flops=4, lm_head_weights=100)
    assert cost.prefill_time(slow, "bf16", 6) == 2 * 900 * 6 + 2 * 100 + 6 * 6 / 2 * 4
    assert cost.prefill_time(slow, "bf16", 6, 6) == 2 * cost.prefill_time(slow, "bf16", 6)


def test_sliding_windows_bound_the_keys_seen():
    cost = ModelCost(num_weights=1000, kv_bytes_per_token=10, attention_flops=4, windows=((0, 0.25), (8, 0.75)))
    assert cost.keys_seen(6) == 6
    assert cost.keys_seen(20) == 0.25 * 20 + 0.75 * 8
    assert cost.decode_time(DEVICE, "bf16", 3, 20) == cost.step_time(DEVICE, "bf16", 3, 3 * cost.keys_seen(20))
    assert cost.causal_pairs(6) == 6 * 6 / 2
    assert cost.causal_pairs(20) == 0.25 * 20 * 20 / 2 + 0.75 * (8 * 8 / 2 + 12 * 8)
    plain = paper.graph("Qwen3-0.6B")
    assert ModelCost.of(plain).windows == ((0, 1.0),)
    assert ModelCost.of(with_window(plain, 8)).windows == ((8, 1.0),)


def with_window(graph, window):
    """The graph with a window in every layer's attention."""
    layer = graph.functions["layer"]
    more = {"attend": {"window": window}}
    equations = tuple(replace(e, params={**e.params, **more.get(e.op, {})}) for e in layer.equations)
    return replace(graph, functions={"layer": replace(layer, equations=equations)})


def test_sliding_windows_bound_attention_reads():
    graph = paper.graph("Qwen3-0.6B")
    cases = (with_window(graph, 8), 99), (graph, 8)
    found = [next(c for c in op_costs(g, ("bf16", "f32"), 1, n) if c.op == "attend") for g, n in cases]
    assert found[0] == found[1]
