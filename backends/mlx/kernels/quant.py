"""Products and rows of quantized weights in the planes of quant_rows.metal."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx

from llmrs.backends.mlx.kernels.launch import FLOATS, Kernel, Kernels, Template, check, require

HEADERS = ("matrices", "quant_rows")
PLANES = ("codes", "high", "scales", "supers", "zeros", "row_scales", "table")
GEMV = Kernel("quant_gemv", ("x", *PLANES, "experts", "rows"), ("out",), HEADERS)
GEMM = Kernel("quant_gemm", ("x", *PLANES, "order", "starts", "rows"), ("out",), HEADERS)
EMBED = Kernel("quant_embed", ("index", *PLANES), ("out",), HEADERS)

MAX_GEMV_M = 8  # rows of x
SIMDS = 2  # simdgroups per threadgroup of quant_gemv
MIN_N_FOUR = (
    4096  # results from which a simdgroup takes four rows of w; with fewer there are too few simdgroups. A guess
)
BM, BN = 32, 64  # rows of x and of w per threadgroup of quant_gemm
MIN_SIZE = 8  # of each plane: MLX passes smaller arrays in another address space


@dataclass(frozen=True)
class Weight:
    """w (N, K): the planes, and LOW, HIGH, CODE, SCALE, GROUP ... of quant_rows.metal."""

    planes: Mapping[str, mx.array]
    template: Template
    columns: int

    @property
    def rows(self) -> int:
        return self.planes["codes"].shape[0]

    @cached_property
    def inputs(self) -> list[mx.array]:
        """The arrays of PLANES. Others stand in for those that the form lacks, and are not read."""
        stand_ins = {"high": self.planes["codes"]}
        return [self.planes.get(name, stand_ins.get(name, self.planes["scales"])) for name in PLANES]


def gemv(kernels: Kernels, x: mx.array, w: Weight) -> mx.array:
    """x w^T (M, N), from x (M, K) of up to MAX_GEMV_M rows. Raises BackendError for other shapes and dtypes."""
    check(GEMV, "x", x, (x.shape[0], w.columns), FLOATS)
    require(GEMV, 0 < len(x) <= MAX_GEMV_M, f"{len(x)} rows of x")
    template: Template = {"M": len(x), "GATHER": False, "SHARE": 1, **w.template}
    return _gemv(kernels, [x, *w.inputs, w.planes["scales"], w.rows], template, 1, (len(x), w.rows), x.dtype)


def gather_gemv(kernels: Kernels, x: mx.array, w: Weight, count: int, experts: mx.array) -> mx.array:
    """x w[expert]^T (T, k, N / count), from x (T, k or 1, K) and experts (T, k), for `count` experts stacked in w.

    Raises BackendError for other shapes and dtypes.
    """
    tokens, chosen = experts.shape
    check(GEMV, "x", x, (tokens, chosen if x.shape[1] > 1 else 1, w.columns), FLOATS)
    rows = w.rows // count
    template: Template = {"M": 1, "GATHER": True, "SHARE": chosen // x.shape[1], **w.template}
    return _gemv(kernels, [x, *w.inputs, experts, rows], template, experts.size, (tokens, chosen, rows), x.dtype)


def _gemv(
    kernels: Kernels, inputs: Sequence[mx.array | float], template: Template, z: int, shape: tuple[int, ...],
    dtype: mx.Dtype,
) -> mx.array:  # fmt: skip
    four = template["M"] == 1 and shape[-1] * z >= MIN_N_FOUR
    each = 4 if four else 2  # rows of w per simdgroup: a lane's registers hold 16 columns of each
    template = {"T": dtype, "ROWS": each, "SIMDS": SIMDS, **template}
    grid = (32 * SIMDS * -(-shape[-1] // (SIMDS * each)), 1, z)
    return kernels.run(GEMV, inputs, template, grid, (32 * SIMDS, 1, 1), [(shape, dtype)])[0]


def gemm(kernels: Kernels, x: mx.array, w: Weight) -> mx.array:
    """x w^T (M, N), from x (M, K). Raises BackendError for other shapes and dtypes."""
    check(GEMM, "x", x, (x.shape[0], w.columns), FLOATS)
    require(GEMM, len(x) > 0, "no rows of x")
    template: Template = {"GATHER": False, "SHARE": 1, **w.template}
    inputs: list[mx.array | float] = [x, *w.inputs, w.planes["scales"], w.planes["scales"], w.rows]
    return _gemm(kernels, inputs, template, -(-len(x) // BM), (len(x), w.rows), x.dtype)


def gather_gemm(kernels: Kernels, x: mx.array, w: Weight, count: int, experts: mx.array) -> mx.array:
    """`gather_gemv` for many rows of x per expert."""
    tokens, chosen = experts.shape
    check(GEMM, "x", x, (tokens, chosen if x.shape[1] > 1 else 1, w.columns), FLOATS)
    flat = mx.flatten(experts)
    starts = mx.sum(flat[None] < mx.arange(count + 1, dtype=flat.dtype)[:, None], axis=1)
    template: Template = {"GATHER": True, "SHARE": chosen // x.shape[1], **w.template}
    tiles, rows = flat.size // BM + min(count, flat.size), w.rows // count  # at most so many
    inputs: list[mx.array | float] = [x, *w.inputs, mx.argsort(flat), starts, rows]
    return _gemm(kernels, inputs, template, tiles, (tokens, chosen, rows), x.dtype)


def _gemm(
    kernels: Kernels, inputs: Sequence[mx.array | float], template: Template, tiles: int, shape: tuple[int, ...],
    dtype: mx.Dtype,
) -> mx.array:  # fmt: skip
    grid = (128 * tiles, -(-shape[-1] // BN), 1)
    return kernels.run(GEMM, inputs, {"T": dtype, **template}, grid, (128, 1, 1), [(shape, dtype)])[0]


def embed(kernels: Kernels, index: mx.array, w: Weight, dtype: mx.Dtype) -> mx.array:
    """The rows with these numbers, integers (T,): (T, K) of this dtype."""
    require(EMBED, index.ndim == 1 and index.size > 0, f"index is {tuple(index.shape)}")
    pieces, shape = w.columns // 16, (index.size, w.columns)
    template: Template = {"T": dtype, **w.template}
    grid, threadgroup = (pieces, index.size, 1), (min(pieces, 256), 1, 1)
    return kernels.run(EMBED, [index, *w.inputs], template, grid, threadgroup, [(shape, dtype)])[0]
