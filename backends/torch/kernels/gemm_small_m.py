"""Rows through a matrix with few results, on the tensor cores: the kernel; `rows.py` says what it computes.

    x (M, K), w (N, K) or with a gate (2 N, K), bias, more (M, N) -> y (M, N)

A program has EACH results for all rows of x, COUNT with what is padded. Each warp multiplies PART of every WARPS * PART
columns, (WARPS, EACH, PART) x (WARPS, PART, COUNT), and the warps' sums are added at the end: that cuts the chain of
products that wait for each other, and needs no second kernel.
"""

import triton
import triton.language as tl

from llmrs.backends.torch.kernels.gemv import columns, fetch, finish, lines


@triton.jit(do_not_specialize=["M"])
def some(
    x, w, bias, more, y, M, N, x_row, w_row, more_row, y_row,
    K: tl.constexpr, PART: tl.constexpr, EACH: tl.constexpr, WARPS: tl.constexpr, COUNT: tl.constexpr,
    LINES: tl.constexpr, GATE: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr, PDL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    STEP: tl.constexpr = WARPS * PART
    n, m = tl.program_id(0) * EACH + tl.arange(0, EACH), tl.arange(0, COUNT)
    k = (tl.arange(0, WARPS)[:, None] * PART + tl.arange(0, PART)[None, :])[:, None, :]  # (WARPS, 1, PART)
    gate_rows = w + tl.minimum(n, N - 1).to(tl.int64) * w_row
    up_rows = w + (tl.minimum(n, N - 1) + N).to(tl.int64) * w_row
    if PDL:
        fetch(lines(gate_rows[:, None], 0, K, LINES))
        if GATE:
            fetch(lines(up_rows[:, None], 0, K, LINES))
        if BIAS:
            fetch(bias + tl.minimum(n, N - 1))
        tl.extra.cuda.gdc_wait()  # nothing that another kernel makes is read before
        tl.extra.cuda.gdc_launch_dependents()
    x_rows = x + tl.minimum(m, M - 1).to(tl.int64) * x_row
    gate_at, up_at, x_at = gate_rows[None, :, None] + k, up_rows[None, :, None] + k, x_rows[None, :, None] + k
    n, place = n[:, None], tl.minimum(m, M - 1).to(tl.int64)[None, :]
    there, added = (n < N) & (m < M)[None, :], 0.0
    if ADD:
        added = tl.load(more + place * more_row + n, mask=there, other=0.0)
    a = tl.zeros([WARPS, EACH, COUNT], tl.float32)
    b = tl.zeros([WARPS, EACH, COUNT], tl.float32)
    for begin in range(0, K, STEP):
        value = tl.permute(columns(x_at, k >= 0, begin, k, K, STEP), (0, 2, 1))  # (WARPS, PART, COUNT)
        a = tl.dot(columns(gate_at, k >= 0, begin, k, K, STEP), value, a, input_precision=PRECISION)
        if GATE:
            b = tl.dot(columns(up_at, k >= 0, begin, k, K, STEP), value, b, input_precision=PRECISION)
    finish(tl.sum(a, 0), tl.sum(b, 0), n, bias, added, y + place * y_row + n, there, N, GATE, BIAS, ADD)
