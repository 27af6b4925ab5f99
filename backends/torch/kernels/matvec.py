"""One row through a matrix: y = x w^T (+ bias), where a library's matrix product leaves most of the bandwidth unused.

Defined by `linear` in backends/reference/ops.py. x (1, K), w (N, K), bias (N,) -> (1, N); sums in float32. A program
reads whole rows of w, `ROWS` of them, PART columns at a time. Moved: the weight once, N * K elements.
"""

import torch
import triton
import triton.language as tl

from llmrs.backends.torch.kernels.launch import chained, check_rows, power, require

PART = 1024  # columns at a time


@triton.jit
def _matvec(
    x, w, bias, y, N, w_row, K: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr, ROWS: tl.constexpr,
    BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    n, k = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, PART)
    rows = w + n.to(tl.int64)[:, None] * w_row
    total = tl.zeros([ROWS, PART], tl.float32)
    for part in tl.static_range(PARTS):
        at = part * PART + k
        there = (n < N)[:, None] & (at < K)[None, :]
        matrix = tl.load(rows + at[None, :], mask=there, other=0.0)
        if PDL and part == 0:  # the first part of the weight is on its way by now
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        total += matrix.to(tl.float32) * tl.load(x + at, mask=at < K, other=0.0).to(tl.float32)[None, :]
    found = tl.sum(total, 1)
    if BIAS:
        found += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(y + n, found.to(y.dtype.element_ty), mask=n < N)


def rows_together(count: int) -> int:
    """Rows of a program: few where the matrix is small, so that every multiprocessor has some."""
    return 4 if count <= 2048 else 8


def matvec(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None, rows: int = 0) -> torch.Tensor:
    """(1, N) of x's type; a program does `rows`, 0: as many as suit. Raises BackendError for what it can't do."""
    check_rows("matvec", x)
    check_rows("matvec", w)
    (count, width), together = w.shape, rows or rows_together(len(w))
    require("matvec", x.shape == (1, width) and x.dtype == w.dtype, f"x {x.shape} of {x.dtype}, w {w.shape}")
    y = torch.empty(1, count, dtype=x.dtype, device=x.device)
    part, pdl = min(PART, power(width)), chained(x.device)
    _matvec[(triton.cdiv(count, together),)](
        x, w, w if bias is None else bias, y, count, w.stride(0), K=width, PARTS=triton.cdiv(width, part), PART=part,
        ROWS=together, BIAS=bias is not None, PDL=pdl, num_warps=4, launch_pdl=pdl,
    )  # fmt: skip
    return y
