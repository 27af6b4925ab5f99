"""y = x w^T (+ bias) on a CPU. 16-bit weights have four forms; `measured` picks by timing.

    gemv     our kernel for few rows, on the weight as it is (cpu/dense.cpp); where a library was compiled
    plain    torch's GEMM on the weight as it is
    upcast   float32 GEMMs on slices of the weight, each converted into the L2 or L3 cache
    packed   oneDNN's blocked layout, which replaces the weight

The fastest depends on the CPU's instructions, and capability flags don't tell: with AVX512 but without AVX512-BF16,
oneDNN emulates bf16 and reads a packed weight at a quarter of the memory bandwidth.
"""

import ctypes
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import NamedTuple

import torch

from llmrs.backends.base import bench
from llmrs.backends.torch.cpu.library import DTYPES, Kernels, fields
from llmrs.backends.torch.quant_matrix import Matrix, QuantMatrix

Linear = Callable[[torch.Tensor], torch.Tensor]

ONEDNN_MIN_M = 4  # rows from which a packed weight is read at full bandwidth
SLICE_BYTES = 4 * 2**20  # of a float32 slice
ALL_ROWS = 2**31
PREFILL_M = 64  # rows of a prefill chunk, for timing
GEMV_MAX_M = 16  # beyond that a GEMM is faster everywhere, so it is not tried
ROUNDS = 5  # per measurement; the fastest counts
SHAPE = (2048, 1024)  # of the measured weight
DECODE_SHAPE = (32768, 1024)  # the same for one row: larger than caches, as a model is


class Forms(NamedTuple):
    """The forms of 16-bit weights on this CPU."""

    packed: bool  # at every M; else gemv for the smallest M, then plain, then upcast
    plain_max_m: int
    gemv_max_m: int = 0


class CDense(ctypes.Structure):
    """`Dense` of cpu/dense.cpp."""

    _fields_ = fields("x w bias y", "m rows columns", "dtype")


def make_linear(weight: Matrix, bias: torch.Tensor | None = None, kernels: Kernels | None = None) -> Linear:
    """A function of x (n, K) for weight (N, K) and bias (N,) or None, all of one dtype on one device."""
    if isinstance(weight, QuantMatrix):
        return weight.linear if bias is None else lambda x: weight.linear(x) + bias
    if weight.device.type != "cpu" or weight.dtype == torch.float32:
        return lambda x: torch.nn.functional.linear(x, weight, bias)
    forms = measured(weight.dtype, torch.get_num_threads(), kernels)
    return packed(weight, bias) if forms.packed else unpacked(weight, bias, forms, kernels)


def unpacked(weight: torch.Tensor, bias: torch.Tensor | None, forms: Forms, kernels: Kernels | None = None) -> Linear:
    """By the rows of x: gemv, plain or upcast."""

    def run(x: torch.Tensor) -> torch.Tensor:
        if kernels and len(x) <= forms.gemv_max_m:
            return gemv(x, weight, bias, kernels)
        if len(x) <= forms.plain_max_m:
            return torch.nn.functional.linear(x, weight, bias)
        return upcast(x, weight, bias)

    return run


def gemv(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, kernels: Kernels) -> torch.Tensor:
    """Few rows. Products and sums are in float32."""
    x, y = x.contiguous(), torch.empty(len(x), len(weight), dtype=x.dtype)
    pointers = x.data_ptr(), weight.data_ptr(), None if bias is None else bias.data_ptr(), y.data_ptr()
    kernels.run("dense", CDense(*pointers, len(x), *weight.shape, DTYPES[x.dtype]), x, y)
    return y


def upcast(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """In float32, slice by slice: the whole weight in float32 would not fit into a cache."""
    count, width = weight.shape
    rows = max(SLICE_BYTES // (4 * width), 64)
    columns, wide = x.float().t(), torch.empty(min(rows, count), width)
    y = torch.empty(count, len(x))  # transposed, so that a slice's part lies together
    for begin in range(0, count, rows):
        part = weight[begin : begin + rows]
        torch.mm(wide[: len(part)].copy_(part), columns, out=y[begin : begin + rows])
    return (y.t() if bias is None else y.t() + bias.float()).to(x.dtype, memory_format=torch.contiguous_format)


def packed(weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
    """A hint of 8 rows gives a layout that suits 1 to 32. Raises RuntimeError if oneDNN has none.

    M = 1 reads the weight a tenth slower than M = 4, so the row is repeated.
    """
    blocked = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 8)

    def run(x: torch.Tensor) -> torch.Tensor:
        rows = len(x)
        if rows == 1:
            x = x.expand(ONEDNN_MIN_M, -1).contiguous()
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, blocked, bias, "none", [], "")
        return y[:rows]

    return run


@cache
def measured(dtype: torch.dtype, threads: int, kernels: Kernels | None = None) -> Forms:
    """The fastest forms on this CPU with this number of threads. Takes 0.2 s on an idle machine."""
    sizes = {"decode": candidates(DECODE_SHAPE, dtype, kernels), "prefill": candidates(SHAPE, dtype, kernels)}

    def seconds(form: str, rows: int) -> float | None:
        if (run := sizes["decode" if rows == 1 else "prefill"].get(form)) is None:
            return None
        x = torch.ones(rows, SHAPE[1], dtype=dtype)
        return bench(lambda: run(x), lambda: None, ROUNDS)

    return fastest(seconds)


def candidates(shape: tuple[int, int], dtype: torch.dtype, kernels: Kernels | None) -> dict[str, Linear]:
    """The forms of a weight that exist here."""
    weight = torch.ones(shape, dtype=dtype)
    found: dict[str, Linear] = {
        "plain": lambda x: torch.nn.functional.linear(x, weight),
        "upcast": lambda x: upcast(x, weight, None),
    }
    if kernels:
        found["gemv"] = lambda x: gemv(x, weight, None, kernels)
    if torch.backends.mkldnn.is_available():
        with suppress(RuntimeError):  # no layout for this type and CPU
            found["packed"] = packed(weight, None)
    return found


def fastest(seconds: Callable[[str, int], float | None]) -> Forms:
    """By `seconds(form, rows)`, None for a form that is unavailable. M = 1 is never upcast: that reads as much, and
    writes too."""

    @cache
    def time_of(form: str, rows: int) -> float:
        found = seconds(form, rows)
        return float("inf") if found is None else found

    plain = largest_m(lambda rows: time_of("plain", rows) <= time_of("upcast", rows))
    many = "plain" if plain == ALL_ROWS else "upcast"
    gemv = largest_m(
        lambda rows: (
            rows <= GEMV_MAX_M and time_of("gemv", rows) < time_of("plain" if rows <= plain else "upcast", rows)
        )
    )
    one = "gemv" if gemv > 1 or time_of("gemv", 1) < time_of("plain", 1) else "plain"
    decode, prefill = (time_of("packed", n) / time_of(f, n) for n, f in ((1, one), (PREFILL_M, many)))
    return Forms(packed=decode * prefill < 1, plain_max_m=plain, gemv_max_m=gemv if one == "gemv" else 0)


def largest_m(faster: Callable[[int], bool]) -> int:
    """The largest power of 2 up to which `faster(rows)` holds, from 2 rows on; else 1."""
    rows = 2
    while rows <= PREFILL_M and faster(rows):
        rows *= 2
    return rows // 2 if rows <= PREFILL_M else ALL_ROWS
