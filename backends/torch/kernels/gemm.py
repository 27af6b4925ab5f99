"""Fused skinny GEMM: y = [residual +] act(rms_norm(x) @ w^T + bias).

Defined by `linear`, `rms_norm`, `silu_and_mul`, `gelu_and_mul` and `add` in backends/reference/ops.py. Rounded to the
type of the computation wherever the equations by themselves would; sums are float32.

    x (M, K), any row stride   norm (K,), of one row   w (N, K), or (2 N, K) with a gate: rows i and i + N make result i
    bias as long as w   more (M, N), any row stride   -> y (M, N)

Three kernels: `rows_few.py` in registers, for a row or two; `rows_many.py` by the copy engine, on Hopper and later,
which leaves norms and sums to others; `rows_some.py` for up to 16 rows elsewhere, where the results are few. `cut_of`
says which one, or that the library is faster. Moved: the weight once, and x from the caches for each program. Chained
kernels (see `launch.py`) ask for their weights before they wait for what makes x.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton

from llmrs.backends.torch.kernels.gemm_small_m import some
from llmrs.backends.torch.kernels.gemm_tma import MANY, Tiles, cut_many, launch_many, loadable
from llmrs.backends.torch.kernels.gemv import few
from llmrs.backends.torch.kernels.launch import chained, check_rows, hopper, power, precision, require

NAME = "rows"
FEW, SOME = 4, 16  # rows
NARROW = 2048  # results that are few: of `o` and `down` of a small model
TOGETHER = 12288  # elements of all rows of x that registers have room for; one row may be longer
NORMED = 1  # rows up to which every program can norm them by itself; for two the norm's own launch is cheaper
GATES = {"": 0, "silu_and_mul": 1, "gelu_and_mul": 2}
SHARED = 110 * 1024  # bytes of a program of `some`, so that two fit
LARGE = 32 * 2**20  # bytes of w
HEAD = 2**15  # results, more than which only a head has
HELD = 192  # bytes of w that a thread holds before x is there


@dataclass(frozen=True)
class Cut:
    """How the work of `few` and `some` is cut: results of a warp (few) or program (some), columns at a time, warps,
    tiles on their way (some)."""

    each: int
    part: int
    warps: int = 4
    stages: int = 1


def cut_few(rows: int, count: int, width: int, size: int, gate: bool) -> Cut:
    """For w of `width` columns of `size` bytes: about 16 KB a program, of which a multiprocessor holds a few.

    More than one result of a warp only where they are short: Triton 3.6 would move parts of w between warps. For one
    row that is better even so, up to 4 KB a result.
    """
    if rows == 1 and not gate and (count >= HEAD or 3072 < width <= 4096) and width >= 1024:  # measured on an H200
        return Cut(1 if count >= HEAD else 2, 1024 * 2 // size)
    part = min((256 if width <= 1024 else 512 if width <= 4096 or gate else 1024) * 2 // size, power(width))
    short = power(width) * size * (1 + gate) * (1 + (rows > 2)) <= 2048
    each = min(1024 // power(width), 16) // (power(rows) * (1 + gate))
    least = 2 if rows == 1 and power(width) * size <= 4096 else 1
    return Cut(max(each, least), part, warps=8 if short else 4)


def cut_some(rows: int, width: int, size: int, gate: bool) -> Cut:
    """Small tiles of results, and as many columns on their way as fit."""
    padded, part = power(rows, 8), min(max(power(width) // 4, 16), 128 // size)
    stage = 4 * part * size * (16 * (1 + gate) + padded)
    return Cut(16, part, stages=min(max(SHARED // stage, 3), 6))


def cut_of(rows: int, w: torch.Tensor, gate: bool, summed: bool, shared: int) -> Cut | Tiles | None:
    """The cut by which a product is done, which says by which kernel; None: the library is faster.

    `summed`: a norm of the sum with something else follows. `shared`: bytes that a program may have.
    """
    count, width, size = len(w) // (1 + gate), w.shape[1], w.element_size()
    if rows == 1:
        return cut_few(rows, count, width, size, gate)
    if hopper(w.device) and loadable(w):
        if rows == 2 and not summed and w.nbytes <= LARGE // 2 and vectors(rows, width, gate):
            return cut_few(rows, count, width, size, gate)
        return cut_many(rows, count, width, gate, summed, shared) if worthwhile(rows, w, summed) else None
    if rows > SOME or count > NARROW or w.nbytes > LARGE:
        return None
    if vectors(rows, width, gate):
        return cut_few(rows, count, width, size, gate)
    return cut_some(rows, width, size, gate)


def worthwhile(rows: int, w: torch.Tensor, summed: bool) -> bool:
    """Whether `many` is faster than the library, in whole steps of an H100: docs/log.md has the times."""
    if rows <= 64:
        return True
    if rows <= 128:  # between, the library's tiles are full and ours are not
        return rows > 104 or not (summed and w.shape[1] <= 2 * len(w))
    if min(w.shape) <= NARROW and len(w) <= HEAD:
        return rows <= (MANY if summed else 256)
    return summed and 224 < rows <= 256  # of large matrices the library's large tiles fill the device


def vectors(rows: int, width: int, gate: bool) -> bool:
    """Whether `few` runs, and not `some`: for a few short rows, or one."""
    return rows == 1 or (rows <= FEW and power(rows) * width * (1 + gate) <= TOGETHER)


def most_rows(dtype: torch.dtype, device: torch.device) -> int:
    """Rows up to which `cut_of` may give a cut."""
    return MANY if dtype.itemsize == 2 and hopper(device) else SOME


def normed(w: torch.Tensor) -> bool:
    """Whether programs may norm a row by themselves: of a large matrix so many would that a launch costs less."""
    return w.nbytes <= LARGE


def product(
    x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None, more: torch.Tensor | None = None,
    norm: torch.Tensor | None = None, eps: float = 0.0, offset: float = 0.0, gate: str = "",
    *, cut: Cut | Tiles | None = None,
) -> torch.Tensor:  # fmt: skip
    """(M, N) of x's type; with a cut in ranges float32 (S, M, N), which are to be added up.

    Without a cut it is `few` or `some`. Tiles take neither `more` nor a norm. Raises BackendError for shapes and types
    that it can't do.
    """
    (rows, width), count = x.shape, len(w) // (2 if gate else 1)
    _check(x, w, bias, more, norm, count, gate)
    if isinstance(cut, Tiles):
        require(NAME, more is None and norm is None, "tiles with a sum or a norm")
        return launch_many(x, w, bias, GATES[gate], cut)
    in_registers = vectors(rows, width, bool(gate))
    if cut is None:
        size = x.element_size()
        cut = cut_few(rows, count, width, size, bool(gate)) if in_registers else cut_some(rows, width, size, bool(gate))
    pdl, y = chained(x.device), torch.empty(rows, count, dtype=x.dtype, device=x.device)
    tensors = [x, w, _or(bias, x), _or(more, y), y]  # what is not there is not read
    sizes = [rows, count, x.stride(0), w.stride(0), _or(more, y).stride(0), y.stride(0)]
    shared = {
        "K": width, "PART": cut.part, "EACH": cut.each, "GATE": GATES[gate], "BIAS": bias is not None,
        "ADD": more is not None, "PDL": pdl, "num_warps": cut.warps, "launch_pdl": pdl,
    }  # fmt: skip
    if in_registers:
        own = of_few(cut, rows, width, x.element_size(), gate) | {"NORM": norm is not None}
        grid = (triton.cdiv(count, cut.each * cut.warps),)
        few[grid](*tensors, _or(norm, x), *sizes, float(eps), float(offset), **shared, **own)
    else:
        require(NAME, rows <= SOME, f"{rows} rows, not in tiles")
        some[(triton.cdiv(count, cut.each),)](*tensors, *sizes, **shared, **of_some(cut, rows, width, x.dtype))
    return y


def of_few(cut: Cut, rows: int, width: int, size: int, gate: str) -> dict[str, int]:
    """The kernel's constants that follow from a cut."""
    parts = triton.cdiv(width, cut.part)
    held = cut.each * cut.part * size * (2 if gate else 1) // 32  # bytes of a thread for each part
    ahead = min(parts, max(HELD // max(held, 1), 1))
    return {"PARTS": parts, "AHEAD": ahead, "COUNT": power(rows), "WARPS": cut.warps}


def of_some(cut: Cut, rows: int, width: int, dtype: torch.dtype) -> dict[str, Any]:
    """The same, and the number of stages."""
    lines = power(triton.cdiv(width * dtype.itemsize, 128))
    return {
        "LINES": lines, "COUNT": power(rows, 8), "WARPS": cut.warps, "PRECISION": precision(dtype),
        "num_stages": cut.stages,
    }  # fmt: skip


def _or(tensor: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    return other if tensor is None else tensor


def _check(
    x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, more: torch.Tensor | None,
    norm: torch.Tensor | None, count: int, gate: str,
) -> None:  # fmt: skip
    check_rows(NAME, x)
    check_rows(NAME, w)
    require(NAME, x.ndim == w.ndim == 2 and x.shape[1] == w.shape[1], f"x {tuple(x.shape)}, w {tuple(w.shape)}")
    most = MANY if norm is None else NORMED
    require(NAME, 0 < len(x) <= most and x.dtype == w.dtype, f"{len(x)} rows of {x.dtype}, w of {w.dtype}")
    require(NAME, not gate or (gate in GATES and len(w) == 2 * count), f"gate {gate!r} of {len(w)} rows")
    for name, t, shape in (("bias", bias, w.shape[:1]), ("more", more, (len(x), count)), ("norm", norm, x.shape[1:])):
        fits = t is None or (t.dtype == x.dtype and t.shape == shape and t.stride(-1) == 1)
        require(NAME, fits, f"{name} does not fit x {tuple(x.shape)} and w {tuple(w.shape)}")
