"""GEMV and small-M GEMM against float64, on awkward sizes, and the fused program against the unfused one."""

import numpy as np
import pytest
import torch

from llmrs.backends.base import load_backend
from llmrs.backends.testing import BLOCK, RandomModel, core_on, prefill_batch, prompts, request, run

pytest.importorskip("triton")
from gemm_cases import DEVICE, TYPES, check, check_linear

from llmrs.backends.torch.attn_metadata import StepShape
from llmrs.backends.torch.kernels import gemm
from llmrs.backends.torch.kernels.gemm import (
    MAX_FUSED_NORM_M,
    SMALL_M_MAX,
    SMALL_N,
    GemvConfig,
    SmallMConfig,
    fused_linear,
    gemv_config,
    max_fused_m,
    select_gemm,
)
from llmrs.backends.torch.kernels.gemm_tma import TMA_MAX_M, TmaConfig
from llmrs.backends.torch.program import Call
from llmrs.backends.torch.triton_ops import Linear
from llmrs.core.errors import BackendError

SHAPES = [(1, 3, 8), (1, 37, 264), (2, 211, 64), (3, 9, 1100), (4, 33, 3072), (5, 70, 80), (16, 33, 520)]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_fused_linear(m: int, n: int, k: int, dtype: torch.dtype):
    for act, residual, norm, bias in (
        ("", False, True, True), ("", True, False, False),
        ("silu_and_mul", False, True, False), ("gelu_and_mul", True, True, True),
    ):  # fmt: skip
        check(m, n, k, dtype, act, residual, norm and m <= MAX_FUSED_NORM_M, bias)


@pytest.mark.parametrize("m", [1, 3, 6])
def test_other_configs(m: int):
    """Also those that prefetch only the first k tiles."""
    for rows, block_k, warps in ((1, 64, 1), (2, 128, 4), (4, 1024, 2)):
        config = GemvConfig(rows, block_k, warps) if m < 5 else SmallMConfig(16 * rows, 16, warps)
        check(m, 19, 1300, torch.float32, "silu_and_mul", True, m <= MAX_FUSED_NORM_M, True, config=config)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("n", "k"), [(3, 8), (211, 64), (9, 1100), (33, 3072), (9, 4096)])
def test_linear(n: int, k: int, dtype: torch.dtype):
    check_linear(n, k, dtype)


def test_lm_head_and_wide_matrices_have_configs_of_their_own():
    assert gemv_config(1, 151936, 1024, 2, False) == GemvConfig(1, 1024)
    assert gemv_config(1, 128256, 2048, 2, False) == GemvConfig(1, 1024)
    assert gemv_config(1, 6144, 4096, 2, False) == GemvConfig(2, 1024)
    assert gemv_config(1, 4096, 4096, 4, False) == GemvConfig(2, 512)
    assert gemv_config(1, 12288, 4096, 2, True) == GemvConfig(1, 512)
    assert gemv_config(1, 4096, 1024, 2, False) == GemvConfig(2, 256, 8)


def test_many_outputs():
    check(2, 1100, 24, torch.float32, "", False, False, True)
    check(7, 2048, 24, torch.float16, "", True, False, False)


def test_what_does_not_fit_is_refused():
    x, w = torch.zeros(3, 8), torch.zeros(6, 8)
    for wrong in (
        lambda: fused_linear(x, w.half()),
        lambda: fused_linear(torch.zeros(TMA_MAX_M + 1, 8), w),
        lambda: fused_linear(x, w, norm_weight=w[0]),
        lambda: fused_linear(x, w[:, :6]),
        lambda: fused_linear(x, w, w[0]),
        lambda: fused_linear(x, w, residual=w),
        lambda: fused_linear(x[:1], w, norm_weight=w[0, :4]),
        lambda: fused_linear(x, w[:5], act="silu_and_mul"),
        lambda: fused_linear(x, w, act="tanh_mul"),
        lambda: fused_linear(x.T.contiguous().T, w),
    ):
        with pytest.raises(BackendError, match="kernel gemm"):
            wrong()


# The program


def test_only_a_small_m_is_fused():
    """Where it is asked for; float32 has no use for as many."""
    made = backend("qwen3")
    made.allocate(4, BLOCK, 1, 16)
    device = made.runner.device
    assert made.runner.small_batch_max_m == max_fused_m(torch.float32, device) == SMALL_M_MAX
    assert max_fused_m(torch.float16, device) == TMA_MAX_M
    made.runner.fuse_small_batches = False
    made.allocate(4, BLOCK, 1, 16)
    assert made.runner.small_batch_max_m == 0


def kinds(ms: tuple[int, ...], w: torch.Tensor, act: bool = False, reducible: bool = False) -> list[type]:
    return [type(select_gemm(m, w, act, reducible, 227 * 1024)) for m in ms]


def test_which_kernel_runs(monkeypatch: pytest.MonkeyPatch):
    gemv, small_m, tma, cublas = GemvConfig, SmallMConfig, TmaConfig, type(None)
    small, large = (torch.empty(n, n, dtype=torch.float16, device="meta") for n in (2048, 4096))
    assert kinds((1, 2, 3, 256, 257), small) == [gemv, gemv, tma, tma, cublas]
    assert kinds((1, 2, 128, 129, 256), large) == [gemv, tma, tma, cublas, cublas]
    assert kinds((128, 129, 256), large, act=True) == [tma, cublas, cublas]
    assert kinds((2, 64, 65, 104, 105, TMA_MAX_M, TMA_MAX_M + 1), small, reducible=True) == [
        tma, tma, cublas, cublas, tma, tma, cublas,
    ]  # fmt: skip
    assert kinds((128, 129, 224, 225, 256, 257), large, reducible=True) == [tma, *[cublas] * 2, *[tma] * 2, cublas]
    assert kinds((2, 3), large[:, 1:]) == [cublas] * 2, "rows that do not begin at multiples of 16 bytes"
    floats = small.float()
    assert kinds((1, 2, SMALL_M_MAX, SMALL_M_MAX + 1), floats[:SMALL_N]) == [gemv, gemv, small_m, cublas]
    assert kinds((1, 2), torch.cat([floats, floats])) == [gemv, cublas]
    monkeypatch.setattr(gemm, "has_tma", lambda device: False)
    assert kinds((1, 2, SMALL_M_MAX, SMALL_M_MAX + 1), small[:SMALL_N]) == [gemv, gemv, small_m, cublas]
    assert kinds((1, 2), large, reducible=True) == [gemv, cublas]


def backend(name: str, dtype: str = "f32", **changes):
    made = load_backend("torch")("cuda:0" if DEVICE == "cuda" else DEVICE, dtype, dtype)
    made.use_kernels("triton", graphs=False)
    return RandomModel.of(name, num_hidden_layers=2, **changes).on(made)


def ops(
    name: str, rows: int, rest: tuple[str, ...] = ("embed", "heads", "gather_logits_rows", "mul_scalar"), **changes
) -> list[str]:
    """The ops of a step with this M, without those that launch nothing or only once."""
    made = backend(name, **changes)
    made.allocate(4, BLOCK, 1, 16)
    calls = [c for c in made.runner._program(StepShape(rows, rows, rows, 0)).calls if c.op not in rest]
    return [described(c) if c.op == "fused_linear" else c.op for c in calls]


def described(call: Call) -> str:
    ((matrix, prologue, epilogue),) = call.weights
    assert isinstance(matrix, Linear)
    words = ("norm" if prologue else "", "gemm", call.params.get("activation", ""), "add" if call.inputs[1:] else "")
    return " ".join(w for w in (*words, "norm" if epilogue else "") if w)


def test_a_layer_of_few_rows_is_few_calls():
    for name, store in (("qwen3", "qk_norm_rope_write_kv"), ("llama", "rope_write_kv"), ("mistral", "rope_write_kv")):
        layer = ["norm gemm", store, "attend", "gemm add", "norm gemm silu_and_mul", "gemm add"]
        assert ops(name, 1) == [*layer, *layer, "rms_norm", "lm_head"], name
        layer = ["gemm", store, "attend", "gemm add norm", "gemm silu_and_mul", "gemm add norm"]
        assert ops(name, 2) == ["rms_norm", *layer, *layer, "gemm"], name


def test_what_does_not_match_stays():
    layer = ["gemm", "rms_norm", "fused_add_rms_norm", "gemm gelu_and_mul", "gemm", "rms_norm", "fused_add_rms_norm"]
    assert ops("gemma3", 2) == ["rms_norm", *["gemm", "qk_norm_rope_write_kv", "attend", *layer] * 2, "gemm"]
    layer = ["gemm", "qk_norm_rope_write_kv", "attend", "gemm add norm", "moe", "fused_add_rms_norm"]
    assert ops("qwen3-moe", 2) == ["rms_norm", *layer, *layer, "gemm"]
    layer = ["qk_norm_rope_write_kv", "attend", "gemm add", "rms_norm", "moe", "fused_add_rms_norm"]
    assert ops("qwen3-moe", 1) == ["norm gemm", *layer, "gemm", *layer, "lm_head"]


def test_no_norm_in_the_gemv_of_a_large_matrix(monkeypatch: pytest.MonkeyPatch):
    """Each of its many CTAs would do it again."""
    seen = []

    def watched(*args, act: str = "", **how):
        seen.append(len(args) > 4 and args[4] is not None)
        return fused_linear(*args, act=act, **how)

    monkeypatch.setattr(gemm, "fused_linear", watched)
    for size, fused in ((gemm.LARGE_WEIGHT_BYTES, True), (0, False)):
        monkeypatch.setattr(gemm, "LARGE_WEIGHT_BYTES", size)
        made = backend("qwen3")
        made.allocate(4, BLOCK, 1, 16)
        made.forward(prefill_batch(prompts(1)))
        assert seen[:-1] == [fused, False, fused, False] * 2  # the last is the LM head
        seen.clear()


@pytest.mark.parametrize("way", ["sm_90", "sm_80", "cuBLAS"])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("llama", "f32"), ("llama", "f16"), ("qwen3", "f16"), ("qwen2", "f16"), ("gemma3", "f32"), ("qwen3-moe", "f16")],
)
def test_the_fused_program_is_the_unfused_one(name: str, dtype: str, way: str, monkeypatch: pytest.MonkeyPatch):
    """Up to the order of float32 sums, for M = 1, small and larger M; also where cuBLAS does every GEMM from M = 2 on,
    with kernels for activation, residual and norm around it."""
    if way == "sm_80":
        monkeypatch.setattr(gemm, "has_tma", lambda device: False)
    if way == "cuBLAS":
        monkeypatch.setattr(gemm, "select_gemm", lambda m, *rest: select_gemm(m, *rest) if m == 1 else None)
    made, found = backend(name, dtype), []
    made.allocate(40, BLOCK, 8, 64)
    batches = [prefill_batch(prompts(*lengths)) for lengths in ((1,), (3,), (5, 1), (9, 20, 25))]
    for most in (max_fused_m(made.torch_dtype, made.runner.device), 0):
        made.runner.small_batch_max_m = most
        found.append([made.to_host(made.forward(b)).copy() for b in batches])
    for ours, expected in zip(*found, strict=True):
        assert np.abs(ours - expected).max() < (1e-4 if dtype == "f32" else 0.02) * np.abs(expected).max()


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "gemma3"])  # the suite of test_backends.py has the others
def test_greedy_tokens_are_the_reference_s(name: str):
    made = backend(name)
    reference = RandomModel.of(name, num_hidden_layers=2).on(load_backend("reference")("cpu", "f32", "f32"))
    answers = [run(core_on(b), [request(p, max_tokens=3) for p in prompts(1, 4)]) for b in (made, reference)]
    assert answers[0] == answers[1]


def test_one_token_with_two_wanted_rows():
    """A prompt that comes token by token, with its log probabilities: the last token's own row, and the answer's."""
    found = []
    for made in (load_backend("reference")("cpu", "f32", "f32"), None):
        model = RandomModel.of("qwen3", num_hidden_layers=2).on(made) if made else backend("qwen3")
        core = core_on(model, max_num_batched_tokens=1, max_num_seqs=1, prefix_cache=False)
        asked = request(prompts(5)[0], max_tokens=2, prompt_logprobs=1)
        found.append((run(core, [asked]), [likely and likely[0] for likely in asked.prompt_logprobs]))
    assert found[0] == found[1]
