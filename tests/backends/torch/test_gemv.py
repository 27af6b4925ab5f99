"""The kernels for few rows against float64, on awkward sizes, and the fused program against the unfused one."""

import numpy as np
import pytest
import torch

from llmrs.backends.base import load_backend
from llmrs.backends.testing import BLOCK, RandomModel, core_on, prefill_batch, prompts, request, run

pytest.importorskip("triton")
from gemm_cases import DEVICE, TYPES, check

from llmrs.backends.torch.attn_metadata import Shape
from llmrs.backends.torch.kernels import gemm
from llmrs.backends.torch.kernels.gemm import (
    NARROW,
    NORMED,
    SOME,
    Cut,
    cut_of,
    most_rows,
    product,
)
from llmrs.backends.torch.kernels.gemm_tma import MANY, Tiles
from llmrs.backends.torch.lowering import Call
from llmrs.backends.torch.triton_ops import Matrix
from llmrs.core.errors import BackendError

SHAPES = [(1, 3, 8), (1, 37, 264), (2, 211, 64), (3, 9, 1100), (4, 33, 3072), (5, 70, 80), (16, 33, 520)]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("rows", "count", "width"), SHAPES)
def test_products(rows: int, count: int, width: int, dtype: torch.dtype):
    for gate, more, norm, bias in (
        ("", False, True, True), ("", True, False, False),
        ("silu_and_mul", False, True, False), ("gelu_and_mul", True, True, True),
    ):  # fmt: skip
        check(rows, count, width, dtype, gate, more, norm and rows <= NORMED, bias)


@pytest.mark.parametrize("rows", [1, 3, 6])
def test_other_cuts(rows: int):
    """Also those in which a program holds only the first part of its rows."""
    for each, part, warps in ((1, 64, 1), (2, 128, 4), (4, 1024, 2)):
        cut = Cut(each, part, warps) if rows < 5 else Cut(16 * each, 16, warps)
        check(rows, 19, 1300, torch.float32, "silu_and_mul", True, rows <= NORMED, True, cut=cut)


def test_many_results():
    check(2, 1100, 24, torch.float32, "", False, False, True)
    check(7, 2048, 24, torch.float16, "", True, False, False)


def test_what_does_not_fit_is_refused():
    x, w = torch.zeros(3, 8), torch.zeros(6, 8)
    for wrong in (
        lambda: product(x, w.half()),
        lambda: product(torch.zeros(MANY + 1, 8), w),
        lambda: product(x, w, norm=w[0]),
        lambda: product(x, w[:, :6]),
        lambda: product(x, w, w[0]),
        lambda: product(x, w, more=w),
        lambda: product(x[:1], w, norm=w[0, :4]),
        lambda: product(x, w[:5], gate="silu_and_mul"),
        lambda: product(x, w, gate="tanh_mul"),
        lambda: product(x.T.contiguous().T, w),
    ):
        with pytest.raises(BackendError, match="kernel rows"):
            wrong()


# The program


def test_only_few_rows_take_it():
    """Where it is asked for; float32 has no use for as many."""
    made = backend("qwen3")
    made.allocate(4, BLOCK, 1, 16)
    device = made.kernels.device
    assert made.kernels.few_rows == most_rows(torch.float32, device) == SOME
    assert most_rows(torch.float16, device) == MANY
    made.kernels.fused = False
    made.allocate(4, BLOCK, 1, 16)
    assert made.kernels.few_rows == 0


def kinds(rows: tuple[int, ...], w: torch.Tensor, gate: bool = False, summed: bool = False) -> list[type]:
    return [type(cut_of(n, w, gate, summed, 227 * 1024)) for n in rows]


def test_which_kernel_runs(monkeypatch: pytest.MonkeyPatch):
    library = type(None)
    small, large = (torch.empty(n, n, dtype=torch.float16, device="meta") for n in (2048, 4096))
    assert kinds((1, 2, 3, 256, 257), small) == [Cut, Cut, Tiles, Tiles, library]
    assert kinds((1, 2, 128, 129, 256), large) == [Cut, Tiles, Tiles, library, library]
    assert kinds((128, 129, 256), large, gate=True) == [Tiles, library, library]
    assert kinds((2, 64, 65, 104, 105, MANY, MANY + 1), small, summed=True) == [
        Tiles, Tiles, library, library, Tiles, Tiles, library,
    ]  # fmt: skip
    assert kinds((128, 129, 224, 225, 256, 257), large, summed=True) == [Tiles, *[library] * 2, *[Tiles] * 2, library]
    assert kinds((2, 3), large[:, 1:]) == [library] * 2, "rows that do not begin at multiples of 16 bytes"
    floats = small.float()
    assert kinds((1, 2, SOME, SOME + 1), floats[:NARROW]) == [Cut, Cut, Cut, library]
    assert kinds((1, 2), torch.cat([floats, floats])) == [Cut, library]
    monkeypatch.setattr(gemm, "hopper", lambda device: False)
    assert kinds((1, 2, SOME, SOME + 1), small[:NARROW]) == [Cut, Cut, Cut, library]
    assert kinds((1, 2), large, summed=True) == [Cut, library]


def backend(name: str, dtype: str = "f32", **changes):
    made = load_backend("torch")("cuda:0" if DEVICE == "cuda" else DEVICE, dtype, dtype)
    made.use_kernels("triton", graphs=False)
    return RandomModel.of(name, num_hidden_layers=2, **changes).on(made)


def ops(
    name: str, rows: int, rest: tuple[str, ...] = ("embed", "heads", "gather_logits_rows", "mul_scalar"), **changes
) -> list[str]:
    """What steps of so many rows run, but for what launches nothing or once only."""
    made = backend(name, **changes)
    made.allocate(4, BLOCK, 1, 16)
    calls = [c for c in made.kernels._program(Shape(rows, rows, rows, 0)).calls if c.op not in rest]
    return [described(c) if c.op == "rows" else c.op for c in calls]


def described(call: Call) -> str:
    ((matrix, before, after),) = call.weights
    assert isinstance(matrix, Matrix)
    words = ("norm" if before else "", "rows", call.params.get("gate") or "", "add" if len(call.inputs) > 1 else "")
    return " ".join(w for w in (*words, "norm" if after else "") if w)


def test_a_layer_of_few_rows_is_few_calls():
    for name, store in (("qwen3", "qk_norm_rope_write_kv"), ("llama", "rope_write_kv"), ("mistral", "rope_write_kv")):
        layer = ["norm rows", store, "attend", "rows add", "norm rows silu_and_mul", "rows add"]
        assert ops(name, 1) == [*layer, *layer, "rms_norm", "lm_head"], name
        layer = ["rows", store, "attend", "rows add norm", "rows silu_and_mul", "rows add norm"]
        assert ops(name, 2) == ["rms_norm", *layer, *layer, "rows"], name


def test_what_does_not_match_stays():
    layer = ["rows", "rms_norm", "fused_add_rms_norm", "rows gelu_and_mul", "rows", "rms_norm", "fused_add_rms_norm"]
    assert ops("gemma3", 2) == ["rms_norm", *["rows", "qk_norm_rope_write_kv", "attend", *layer] * 2, "rows"]
    layer = ["rows", "qk_norm_rope_write_kv", "attend", "rows add norm", "moe", "fused_add_rms_norm"]
    assert ops("qwen3-moe", 2) == ["rms_norm", *layer, *layer, "rows"]
    layer = ["qk_norm_rope_write_kv", "attend", "rows add", "rms_norm", "moe", "fused_add_rms_norm"]
    assert ops("qwen3-moe", 1) == ["norm rows", *layer, "rows", *layer, "lm_head"]


def test_no_norm_before_a_large_matrix(monkeypatch: pytest.MonkeyPatch):
    """Each of its many programs would do it again."""
    monkeypatch.setattr(gemm, "LARGE", 0)
    layer = [
        "rows",
        "qk_norm_rope_write_kv",
        "attend",
        "rows add",
        "rms_norm",
        "rows silu_and_mul",
        "rows add",
        "rms_norm",
    ]
    assert ops("qwen3", 1) == ["rms_norm", *layer, *layer, "lm_head"]


@pytest.mark.parametrize("way", ["as it is", "before Hopper", "library"])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("llama", "f32"), ("llama", "f16"), ("qwen3", "f16"), ("qwen2", "f16"), ("gemma3", "f32"), ("qwen3-moe", "f16")],
)
def test_the_fused_program_is_the_unfused_one(name: str, dtype: str, way: str, monkeypatch: pytest.MonkeyPatch):
    """Up to the order of float32 sums: on steps of one row, of a few, of many, and of more than it is for. Also where
    from two rows on all products are the library's, with a gate, a sum and a norm around them."""
    if way == "before Hopper":
        monkeypatch.setattr(gemm, "hopper", lambda device: False)
    if way == "library":
        monkeypatch.setattr(gemm, "cut_of", lambda n, *rest: cut_of(n, *rest) if n == 1 else None)
    made, found = backend(name, dtype), []
    made.allocate(40, BLOCK, 8, 64)
    batches = [prefill_batch(prompts(*lengths)) for lengths in ((1,), (3,), (5, 1), (9, 20, 25))]
    for most in (most_rows(made.type, made.kernels.device), 0):
        made.kernels.few_rows = most
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
