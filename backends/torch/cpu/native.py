"""Rows of quantized weights for the kernels (quantized.h): 16 of them interleaved.

Codes (N, K) of b bits become planes (N / 16, K / 32, b, 16 rows) of 32-bit words; N and K are padded with zeros. Word v
of a row holds two int16, and those 16 / b codes each: bits [b i, b i + b) of half h are column 32 / b v + 2 i + h.
3 bits are 2 + 1, 5 are 4 + 1, 6 are 4 + 2. Scales and the other planes of quant/form.py (N, G) become (N / 16, G, 16).
"""

import ctypes
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from itertools import accumulate

import torch

from llmrs.backends.base import bench
from llmrs.backends.torch import cpu_linear
from llmrs.backends.torch.cpu.library import DTYPES, Kernels, fields, libraries
from llmrs.backends.torch.cpu_linear import Linear as LinearMap
from llmrs.backends.torch.cpu_linear import measured
from llmrs.backends.torch.quant_matrix import TORCH, Matrix, Pack, PackedRows, QuantMatrix
from llmrs.quant.form import TABLES, Form, unpack_codes

BLOCK = 16  # rows
CHUNK, MAX_GROUP = 32, 256  # columns
SHAPE = (1024, 1024)  # of the measured weight
ROUNDS = 7  # per measurement; the fastest counts
SCALES = ("f32", "f16", "bf16", "u8", "i8", "u4", "e8m0", "half_e8m0", "e4m3")  # by their numbers
CODES = {name: n for n, name in enumerate(("u2", "u3", "u4", "u5", "u6", "u8", "table", "e4m3"))}
SPLIT = {2: (2, 0), 3: (2, 1), 4: (4, 0), 5: (4, 1), 6: (4, 2), 8: (8, 0)}  # bits -> those of codes, and of high
PLANES = ("scales", "biases", "zeros", "mins", "super_scales", "super_mins", "row_scales")


class Linear(ctypes.Structure):
    """`Linear` of quantized.cpp."""

    _fields_ = fields("w x bias y", "m columns stride", "x_dtype y_dtype")


class Unpacked(ctypes.Structure):
    """`Unpacked` of unpack.cpp."""

    _fields_ = fields("w index out", "count columns", "dtype")


class CRows(ctypes.Structure):
    """`Rows` of quantized.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("first", "rows", "columns", "group", "groups")),
        *((name, ctypes.c_int32) for name in ("code", "scale")),
        *((name, ctypes.c_void_p) for name in ("codes", "high")),
        *((name, ctypes.c_int64) for name in ("codes_stride", "high_stride")),
        *((name, ctypes.c_void_p) for name in PLANES),
        *((name, ctypes.c_float) for name in ("zero", "factor")),
        ("entries", ctypes.c_int8 * 16),
    ]


@cache
def kernels() -> Kernels | None:
    """The fastest library on this CPU, by timing. Takes 20 ms."""
    found = libraries()
    if len(found) < 2:
        return found[0] if found else None
    x = torch.ones(1, SHAPE[1], dtype=torch.bfloat16)
    times = [bench(partial(_sample(k).multiply, x), lambda: None, ROUNDS) for k in found]
    return found[times.index(min(times))]


@cache
def max_gemv_m(kernels: Kernels, dtype: torch.dtype, threads: int) -> int:
    """Rows of x up to which multiplying the codes is faster than unpacking slices for a GEMM; 4 to 32, by timing."""
    rows, m = _sample(kernels), 4
    while m < 32:
        x = torch.ones(2 * m, SHAPE[1], dtype=dtype)
        codes, unpacked = (bench(partial(run, x), lambda: None, ROUNDS) for run in (rows.multiply, rows.gemm))
        if codes > unpacked:
            break
        m *= 2
    return m


def _sample(kernels: Kernels) -> "NativeRows":
    n, k = SHAPE
    planes = {
        "codes": torch.ones(n, k // 2, dtype=torch.uint8), "scales": torch.ones(n, k // 32, dtype=torch.uint8),
        "mins": torch.ones(n, k // 32, dtype=torch.uint8),
        **{name: torch.ones(n, k // 256, dtype=torch.float16) for name in ("super_scales", "super_mins")},
    }  # fmt: skip
    return native_rows(PackedRows(Form("k_quant", "u4", 32, "u8"), k, planes), kernels)


def supports(form: Form, columns: int) -> bool:
    """Whether groups are half a chunk, or whole ones."""
    return form.group == CHUNK // 2 or form.group % CHUNK == 0 or form.group == columns


@dataclass(frozen=True)
class NativeRows(PackedRows):
    """`count` rows, from `first` on, in the order of the kernels, with at most MAX_GROUP columns per scale."""

    kernels: Kernels
    group: int
    first: int
    count: int

    def __len__(self) -> int:
        return self.count

    @cached_property
    def rows(self) -> CRows:
        form, planes = self.form, self.planes
        codes, high = planes["codes"], planes.get("high")
        factor = 0.5 if form.code == "e2m1" else 1.0  # its entries are halves
        entries = (TABLES[form.code] / factor).astype(int) if form.code in TABLES else ()
        return CRows(
            first=self.first, rows=self.count, columns=-(-self.columns // CHUNK) * CHUNK, group=self.group,
            groups=planes["scales"].shape[1], code=CODES["table" if form.code in TABLES else form.code],
            scale=SCALES.index(form.scale), codes=codes.data_ptr(), codes_stride=codes.shape[1],
            high=None if high is None else high.data_ptr(), high_stride=0 if high is None else high.shape[1],
            **{name: planes[name].data_ptr() for name in PLANES if name in planes}, zero=form.zero, factor=factor,
            entries=(ctypes.c_int8 * 16)(*entries),
        )  # fmt: skip

    def __getitem__(self, index: slice) -> "NativeRows":  # type: ignore[override]
        begin, end, _ = index.indices(self.count)
        return replace(self, first=self.first + begin, count=end - begin)

    def linear(self, x: torch.Tensor) -> torch.Tensor:
        return self.multiply(x) if self.few(x) else self.gemm(x)

    def few(self, x: torch.Tensor) -> bool:
        """Whether multiplying the codes is faster than unpacking them."""
        return len(x) <= max_gemv_m(self.kernels, x.dtype, torch.get_num_threads())

    def gemm(self, x: torch.Tensor) -> torch.Tensor:
        """x w^T of slices that are unpacked into the caches, in float32 where that is faster."""
        wide = (
            x.dtype != torch.float32 and len(x) > measured(x.dtype, torch.get_num_threads(), self.kernels).plain_max_m
        )
        return super().linear(x.float()).to(x.dtype) if wide else super().linear(x)

    def multiply(self, x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """x (M, K) w^T: (M, N) of a dtype, by default that of x; for a small M.

        x in bf16 or f16 is rounded to 16-bit integers, per group of columns.
        """
        x, y = x.contiguous(), torch.empty(len(x), len(self), dtype=dtype or x.dtype)
        self.multiply_to(x, y, 0)
        return y

    def multiply_to(self, x: torch.Tensor, y: torch.Tensor, at: int, bias: torch.Tensor | None = None) -> None:
        """The same plus bias (N,) of x's dtype, to columns of y (M, ...), from `at` on."""
        bias_at = None if bias is None else bias.data_ptr()
        pointers = ctypes.addressof(self.rows), x.data_ptr(), bias_at, y.data_ptr() + at * y.element_size()
        linear = Linear(*pointers, *x.shape, y.shape[1], DTYPES[x.dtype], DTYPES[y.dtype])
        self.kernels.run("linear", linear, x, y)

    def unpack(self, dtype: torch.dtype) -> torch.Tensor:
        return self._unpacked(dtype, len(self), None)

    def gather(self, index: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return self._unpacked(dtype, len(index), index.contiguous())

    def _unpacked(self, dtype: torch.dtype, count: int, index: torch.Tensor | None) -> torch.Tensor:
        out = torch.empty(count, self.columns, dtype=dtype)
        pointers = ctypes.addressof(self.rows), None if index is None else index.data_ptr(), out.data_ptr()
        self.kernels.run("unpack", Unpacked(*pointers, count, self.columns, DTYPES[dtype]))
        return out


def make_linear(weight: Matrix, bias: torch.Tensor | None = None, *, kernels: Kernels) -> LinearMap:
    """As `cpu_linear.make_linear`, with these kernels."""
    other = cpu_linear.make_linear(weight, bias, kernels)
    if not isinstance(weight, QuantMatrix):
        return other
    parts = [s for s in weight.segments if isinstance(s, NativeRows)]
    if len(parts) < len(weight.segments):
        return other
    ends = list(accumulate(map(len, parts)))

    def run(x: torch.Tensor) -> torch.Tensor:
        if not parts[0].few(x):
            return other(x)
        x, y = x.contiguous(), torch.empty(len(x), ends[-1], dtype=x.dtype)
        for part, end in zip(parts, ends, strict=True):
            begin = end - len(part)
            part.multiply_to(x, y, begin, None if bias is None else bias[begin:end])
        return y

    return run


def packer(chosen: Kernels) -> Pack:
    """Lays out rows for the kernels. Rows of forms that they lack are unpacked."""

    def pack(rows: PackedRows, dtype: torch.dtype) -> PackedRows | torch.Tensor:
        if not supports(rows.form, rows.columns):
            return rows.unpack(dtype)
        max_gemv_m(chosen, dtype, torch.get_num_threads())  # measured at load, not in the first step
        return native_rows(rows, chosen)

    return pack


def native_rows(packed: PackedRows, kernels: Kernels) -> NativeRows:
    """`supports` must hold."""
    low, high = SPLIT[packed.form.bits]
    parts: list[dict[str, torch.Tensor]] = []
    step = max(2**22 // packed.columns // BLOCK, 1) * BLOCK
    for begin in range(0, len(packed), step):
        codes = unpack_codes(TORCH, packed.planes["codes"][begin : begin + step], packed.form.bits, packed.columns)
        codes = torch.nn.functional.pad(codes, (0, -packed.columns % CHUNK, 0, -len(codes) % BLOCK))
        parts.append({"codes": _plane(codes & ((1 << low) - 1), low)})
        if high:
            parts[-1]["high"] = _plane(codes >> low, high)
    planes = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    group = packed.form.group
    if group > MAX_GROUP or (group != CHUNK // 2 and group % CHUNK):
        group = CHUNK  # with the scale of a larger one
    groups = -(-packed.columns // group)
    for name in packed.planes.keys() - {"codes"}:
        plane = packed.planes[name]
        if name in ("scales", "biases", "zeros") and plane.shape[1] != groups:
            plane = plane.repeat_interleave(-(-groups // plane.shape[1]), 1)[:, :groups]
        padded = torch.nn.functional.pad(plane.view(torch.uint8), (0, 0, 0, -len(plane) % BLOCK)).view(plane.dtype)
        planes[name] = padded.view(-1, BLOCK, plane.shape[1]).transpose(1, 2).contiguous()
    return NativeRows(packed.form, packed.columns, planes, kernels, group, 0, len(packed))


def _plane(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 (N, K) -> (N / 16, K * bits * 2)."""
    count = len(codes) // BLOCK
    words = codes.view(count, BLOCK, -1, bits, 2, 8 // bits, 2)  # block, row, chunk, word, byte of a half, field, half
    packed, *fields = words.unbind(5)
    for i, field in enumerate(fields, 1):
        packed = packed | field << (bits * i)
    return packed.permute(0, 2, 3, 1, 5, 4).reshape(count, -1)
