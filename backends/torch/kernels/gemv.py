# mypy: disable-error-code="assignment"
# ruff: noqa: RUF005 - Triton adds tuples, and knows no stars in them
"""One to four rows through a matrix in registers, each warp by itself: the kernel; `rows.py` says what it computes.

    x (M, K), norm (K,), w (N, K) or with a gate (2 N, K), bias, more (M, N) -> y (M, N)

A program has EACH * WARPS results. Its first AHEAD parts of w are under way before x is there. A warp reads whole rows
of w, PART columns at a time, and all of x, which its cache holds: no warp waits for another.
"""

import triton
import triton.language as tl

from llmrs.backends.torch.kernels.act_and_mul import gate_times


@triton.jit
def finish(a, b, n, bias, more, y, there, N, GATE: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr):
    """Stores sums `a` (with a gate, silu 1 or gelu 2: of gate, and `b` of up) of results `n` at `y`, with `more` added.

    Rounded wherever the equations by themselves would.
    """
    kind = y.dtype.element_ty
    if BIAS:
        a += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    a = a.to(kind)
    if GATE:
        if BIAS:
            b += tl.load(bias + N + n, mask=n < N, other=0.0).to(tl.float32)
        a = gate_times(a.to(tl.float32), b.to(kind).to(tl.float32), GATE == 2).to(kind)
    if ADD:
        a = (more.to(tl.float32) + a.to(tl.float32)).to(kind)
    tl.store(y, a, mask=there)


@triton.jit
def fetch(at):
    """Asks for what is at some addresses, to be in the L2 cache when it is read: 128 bytes a request."""
    tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at.to(tl.int64)], tl.int32, False, 1)


@triton.jit
def lines(row, first, K, LINES: tl.constexpr):
    """Addresses 128 bytes apart in rows of K at `row` (n, 1), from column `first` on: (n, LINES)."""
    LINE: tl.constexpr = 1024 // row.dtype.element_ty.primitive_bitwidth
    return row + tl.minimum(first + tl.arange(0, LINES) * LINE, K - 1)[None, :]


@triton.jit
def columns(row, there, begin, k, K: tl.constexpr, PART: tl.constexpr):
    """Columns `begin` + k of rows at `row`, which points at k; 0 beyond the end. PART: how many `begin` steps over."""
    if K % PART == 0:
        return tl.load(row + begin, mask=there, other=0.0)
    return tl.load(row + begin, mask=there & (begin + k < K), other=0.0)


@triton.jit
def _inverse_rms(row, k, eps, K: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr, AGAIN: tl.constexpr):
    """(1, WARPS, 1) of one row at `row` (1, WARPS, PART). AGAIN: read so that the compiler must read it again later,
    and cannot keep it in registers."""
    squares = tl.zeros(row.shape, tl.float32)
    for part in tl.static_range(PARTS):
        if AGAIN:
            x = tl.load(row + part * PART, mask=part * PART + k < K, other=0.0, cache_modifier=".ca").to(tl.float32)
        else:
            x = columns(row, k >= 0, part * PART, k, K, PART).to(tl.float32)
        squares += x * x
    return tl.rsqrt(tl.sum(squares, 2) / K + eps)[:, :, None]


@triton.jit(do_not_specialize=["M"])
def few(
    x, w, bias, more, y, norm, M, N, x_row, w_row, more_row, y_row, eps, offset,
    K: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr, AHEAD: tl.constexpr,
    EACH: tl.constexpr, WARPS: tl.constexpr, COUNT: tl.constexpr, NORM: tl.constexpr, GATE: tl.constexpr,
    BIAS: tl.constexpr, ADD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    n = (tl.program_id(0) * EACH + tl.arange(0, EACH)[:, None]) * WARPS + tl.arange(0, WARPS)[None, :]
    k, there = tl.arange(0, PART)[None, None, :], (n < N)[:, :, None]
    gate_rows = w + n.to(tl.int64)[:, :, None] * w_row + k  # (EACH, WARPS, PART)
    up_rows = w + (n + N).to(tl.int64)[:, :, None] * w_row + k
    all_k = k + tl.zeros([1, WARPS, 1], tl.int32)  # as a part of w lies in the warps, so that none is moved
    gates, ups, norms = (), (), ()
    for part in tl.static_range(AHEAD):
        gates = gates + (columns(gate_rows, there, part * PART, k, K, PART),)
        if GATE:
            ups = ups + (columns(up_rows, there, part * PART, k, K, PART),)
        if NORM:
            norms = norms + (columns(norm + all_k, all_k >= 0, part * PART, all_k, K, PART),)
    if PDL:
        if BIAS:
            fetch(bias + tl.minimum(n, N - 1))
        tl.extra.cuda.gdc_wait()  # nothing that another kernel makes is read before
        tl.extra.cuda.gdc_launch_dependents()
    k = all_k
    rows, scales, added, a, b = (), (), (), (), ()
    for m in tl.static_range(COUNT):
        place = tl.minimum(m, M - 1).to(tl.int64)
        rows = rows + (x + place * x_row + k,)
        if ADD:
            added = added + (tl.load(more + place * more_row + n, mask=n < N, other=0.0),)
        if NORM:
            scales = scales + (_inverse_rms(rows[m], k, eps, K, PARTS, PART, COUNT * K > 2048),)
        a = a + (tl.zeros([EACH, WARPS, PART], tl.float32),)
        b = b + (tl.zeros([EACH, WARPS, PART], tl.float32),)
    for part in tl.static_range(PARTS):
        gate = gates[part] if part < AHEAD else columns(gate_rows, there, part * PART, k, K, PART)
        if GATE:
            up = ups[part] if part < AHEAD else columns(up_rows, there, part * PART, k, K, PART)
        if NORM:
            weight = norms[part] if part < AHEAD else columns(norm + k, k >= 0, part * PART, k, K, PART)
        sums, others = (), ()
        for m in tl.static_range(COUNT):
            value = columns(rows[m], k >= 0, part * PART, k, K, PART)
            if NORM:
                value = (value.to(tl.float32) * scales[m] * (weight.to(tl.float32) + offset)).to(value.dtype)
            sums = sums + (a[m] + gate.to(tl.float32) * value.to(tl.float32),)
            others = others + (b[m] + up.to(tl.float32) * value.to(tl.float32) if GATE else b[m],)
        a, b = sums, others
    for m in tl.static_range(COUNT):
        to, other = y + tl.minimum(m, M - 1).to(tl.int64) * y_row + n, added[m] if ADD else 0.0
        finish(tl.sum(a[m], 2), tl.sum(b[m], 2), n, bias, other, to, (n < N) & (m < M), N, GATE, BIAS, ADD)
