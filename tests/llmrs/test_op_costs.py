"""Costs of equations by hand, and their kernels."""

import paper
import pytest

from llmrs.backends.base import KernelEvent
from llmrs.backends.fusion import FUSED_OPS, fuse_graph
from llmrs.backends.testing import RandomModel
from llmrs.backends.torch.profiler import outermost, ran
from llmrs.bench.op_costs import KernelStats, OpCost, kernel_stats, merge_add_norms, op_costs, ops_of
from llmrs.bench.profile import Profile
from llmrs.bench.report import profiles
from llmrs.bench.roofline import Device, ModelCost

DEVICE = Device("synthetic", 1e9, 1e12)


def test_events_of_a_profiler_keep_their_nanoseconds():
    start = 1_795_563_793_445_759_710
    found = ran([("inner", start + 1002, 3), ("outer", start + 1000, 10), ("next", start + 1010, 1), ("a", start, 1)])
    assert [r.name for r in found] == ["a", "outer", "inner", "next"]
    assert found[1].end - found[1].begin == pytest.approx(10e-9)
    assert [r.name for r in outermost(found)] == ["a", "outer", "next"]


def test_op_costs_add_up_to_the_model_cost():
    """The sums of weights, KV cache and FLOPs are those of `ModelCost`; activations are extra."""
    for fused in ((), FUSED_OPS):
        plain = paper.graph("Qwen3-0.6B")
        found, cost = op_costs(fuse_graph(plain, fused), ("bf16", "bf16"), 4, 100), ModelCost.of(plain)
        by_op = {op: [c for c in found if c.op == op] for op in {c.op for c in found}}
        matrices = [c for c in found if c.op in ("linear", "merged_linear", "lm_head")]
        assert sum(c.flops for c in matrices) == 4 * 2 * (cost.num_weights - norms())
        assert sum(c.flops for c in by_op["attend"]) == 4 * 100 * cost.attention_flops
        queries = 28 * 2 * 4 * 16 * 128 * 2  # queries read, outputs written
        assert sum(c.bytes for c in by_op["attend"]) == 4 * 100 * cost.kv_bytes_per_token + queries
        assert sum(c.bytes for c in matrices) > 2 * (cost.num_weights - norms())
        assert found[-1] == OpCost("sample", "sample", 4 * 151_936 * 2)
        assert by_op["embed"][0].bytes == 4 * (4 + 2 * 1024 * 2)  # ids, rows read and written


@pytest.mark.parametrize(("batch", "part"), [(1, 1 / 3), (2, 5 / 9), (200, 1.0)])
def test_op_cost_of_moe(batch: int, part: float):
    """Six experts of 3 x 24 x 64, two activated per token; a router of 6 x 64."""
    found = op_costs(RandomModel.of("qwen3-moe", num_hidden_layers=1).graph, ("f32", "f32"), batch, 9)
    (moe,) = (c for c in found if c.op == "moe")
    router, experts = 6 * 64, 6 * 3 * 24 * 64
    assert moe.flops == pytest.approx(2 * batch * (router + experts / 3))
    assert moe.bytes == pytest.approx(4 * (2 * batch * 64 + router + experts * part))


def norms() -> int:
    return 28 * (2 * 1024 + 2 * 128) + 1024


def test_kernels_get_the_roofline_time_of_their_ops():
    found = [
        OpCost("linear", "linear 4x4", 1000),
        OpCost("attend", "attend", 500),
        OpCost("linear", "linear 8x4", 4000),
    ]
    step = [("gemm_a", 2e-6), ("paged_attention_kernel", 1e-6), ("combine_splits_kernel", 1e-7), ("gemm_a", 5e-6)]
    seen, at = [], 0.0
    for name, seconds in step * 2:
        seen.append(KernelEvent(name, at, at + seconds))
        at += seconds
    rows = {(k.name, k.what): k for k in kernel_stats(seen, 2, found, DEVICE)}
    assert rows["gemm_a", "linear 4x4"].roofline_time == pytest.approx(1e-6)
    assert rows["gemm_a", "linear 8x4"].seconds == pytest.approx(5e-6)
    assert rows["gemm_a", "linear 8x4"].roofline_time == pytest.approx(4e-6)
    assert rows["paged_attention_kernel", "attend"].count == 1
    assert rows["combine_splits_kernel", ""].roofline_time is None
    assert [k.seconds for k in rows.values()] == sorted((k.seconds for k in rows.values()), reverse=True)


def test_unpaired_kernels_share_a_row():
    found = [OpCost("linear", "linear 4x4", 1000), OpCost("linear", "linear 8x4", 4000)]
    seen = [KernelEvent("gemm_a", 0.0, 1e-6), KernelEvent("gemm_b", 1e-6, 2e-6), KernelEvent("gemm_a", 2e-6, 8e-6)]
    (row,) = kernel_stats(seen, 1, found, DEVICE)
    assert (row.name, row.what, row.count) == ("gemm_a and 1 more", "linear", 3)
    assert row.seconds == pytest.approx(8e-6)
    assert row.roofline_time == pytest.approx(5e-6)


def test_ops_of_kernel_names():
    assert (
        ops_of("nvjet_tst_64x8_64x16_4x1_v_bz_TNT") == ops_of("gemv_kernel") == ("linear", "merged_linear", "lm_head")
    )
    assert ops_of("paged_attention_kernel") == ("attend",)
    assert ops_of("qk_norm_rope_write_kv_kernel") == ("qk_norm_rope_write_kv", "rope_write_kv")
    assert ops_of("fused_add_rms_norm_kernel") == ("rms_norm", "fused_add_rms_norm")
    assert ops_of("sample_gumbel_kernel") == ("sample",)
    assert ops_of("void cublasLt::splitKreduce_kernel<32, 16>") == ops_of("Memcpy HtoD (Pinned -> Device)") == ()
    assert ops_of("aten::add") == ops_of("reduce_argmax_kernel") == ()


def test_merge_add_norms():
    found = merge_add_norms(
        [OpCost("add", "add", 300), OpCost("rms_norm", "rms_norm 8", 216), OpCost("add", "add", 300)]
    )
    assert [(c.op, c.label, c.bytes) for c in found] == [
        ("fused_add_rms_norm", "fused_add_rms_norm 8", 400),
        ("add", "add", 300),
    ]


def test_profile_table():
    rows = [
        KernelStats("gemm", "lm_head 8x4", 1, 90e-6, 45e-6),
        KernelStats("copy", "", 2, 9.8e-6),
        KernelStats("x", "", 9, 0.2e-6),
    ]
    head, _, first, second, rest = profiles([Profile(2, 16, 200e-6, 100e-6, 40e-6, rows)])
    assert head == "step of 2 x 16: 200 us, roofline 40, 50.0 % of it in kernels"
    assert first.split() == ["1.0", "90.0", "90.0", "%", "45.0", "50.0", "%", "gemm,", "lm_head", "8x4"]
    assert second.split() == ["2.0", "9.8", "9.8", "%", "-", "-", "copy"]
    assert rest.endswith("the rest, of 1 names")
