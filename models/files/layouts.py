"""The layouts of a quantized module: which tensors it has in a safetensors file, what they must be, how they are read.

quant/{affine,fp8,fp4}.py describe the formats.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from llmrs.core.errors import ModelError
from llmrs.models.files.quant_config import WeightScheme
from llmrs.models.files.safetensors import SafetensorsSource
from llmrs.quant.affine import as_bytes, awq, gptq, mlx_affine, pack_quantized
from llmrs.quant.fp4 import MLX_GLOBAL, mxfp4, nvfp4
from llmrs.quant.fp8 import fp8
from llmrs.quant.tensor import QuantTensor, Tensor

FLOATS = ("f32", "f16", "bf16")
POWERS = ("u8", "e8m0")  # a byte e8m0
HINT = "do config.json and the weights belong together?"


@dataclass(frozen=True)
class Parts:
    """The tensors of a module, or of one expert in a stack, by what follows the module's name."""

    module: str
    names: Mapping[str, str]  # part -> tensor of the file
    source: SafetensorsSource
    expert: int | None = None

    def format(self, part: str) -> str:
        return self.source.format(self.names[part])

    def shape(self, part: str) -> tuple[int, ...]:
        shape = self.source.shape(self.names[part])
        return shape if self.expert is None else shape[1:]

    def raw(self, part: str) -> Tensor:
        whole = self.source.raw(self.names[part])
        return whole if self.expert is None else Tensor(whole.format, whole.shape[1:], whole.data[self.expert])

    def error(self, part: str, allowed: str) -> ModelError:
        found = f"{self.format(part)} {list(self.shape(part))}"
        return ModelError(f"{self.names[part]} is {found}; it must be {allowed}", HINT)

    def check(self, part: str, formats: tuple[str, ...], *shapes: tuple[int, ...]) -> None:
        """Raises ModelError unless the part has one of these dtypes and shapes."""
        if self.format(part) not in formats or self.shape(part) not in shapes:
            raise self.error(part, f"{' or '.join(formats)} {' or '.join(str(list(s)) for s in shapes)}")

    def matrix(self, part: str, *formats: str) -> tuple[int, int]:
        """The shape of a part that must be a matrix, and not empty."""
        shape = self.shape(part)
        if self.format(part) not in formats or len(shape) != 2 or 0 in shape:
            raise self.error(part, f"a matrix of {' or '.join(formats)}")
        return shape[0], shape[1]


@dataclass(frozen=True)
class Layout:
    """A way to store a quantized module."""

    needs: tuple[str, ...]  # parts that a module has
    may: tuple[str, ...]  # and may have
    shape: Callable[[Parts, WeightScheme], tuple[int, int]]  # of the weight; raises ModelError for parts that don't fit
    read: Callable[[Parts, WeightScheme], QuantTensor]


def _divided(p: Parts, part: str, columns: int, group: int) -> int:
    """Groups of a row. Raises ModelError if the group does not divide the columns."""
    group = group or columns
    if columns % group:
        raise p.error(part, f"of a multiple of {group} columns, the group; it has {columns}")
    return columns // group


def _columns(p: Parts, part: str, words: int, bits: int) -> int:
    if 32 * words % bits:
        raise p.error(part, f"whole codes of {bits} bits")
    return 32 * words // bits


# MLX


def _mlx_shape(p: Parts, s: WeightScheme) -> tuple[int, int]:
    rows, words = p.matrix("weight", "u32")
    columns = _columns(p, "weight", words, s.bits)
    scales = rows, _divided(p, "weight", columns, s.group)
    p.check("scales", FLOATS if s.layout == "mlx_affine" else ("u8",), scales)
    if "biases" in p.names:
        p.check("biases", (p.format("scales"),), scales)
    if "global_scale" in p.names:
        p.check("global_scale", ("f32",), (), (1,))
    return rows, columns


def _read_mlx(p: Parts, s: WeightScheme) -> QuantTensor:
    weight, scales = p.raw("weight"), p.raw("scales")
    if s.layout == "mlx_affine":
        return mlx_affine(weight, scales, p.raw("biases"), s.bits, s.group)
    codes = as_bytes(weight.data)
    if s.layout == "mlx_mxfp4":
        return mxfp4(codes, scales)
    if s.layout == "mlx_mxfp8":
        return fp8("mxfp8", codes, replace(scales, format="e8m0"), (1, s.group))
    return nvfp4(codes, scales, _scalar(p, "global_scale") / MLX_GLOBAL if "global_scale" in p.names else None)


def _scalar(p: Parts, part: str) -> np.float32:
    return np.float32(p.raw(part).data.reshape(-1)[0])


# compressed-tensors' integers, GPTQ, AWQ


def _packed_shape(p: Parts, s: WeightScheme) -> tuple[int, int]:
    rows, words = p.matrix("weight_packed", "i32")
    p.check("weight_shape", ("i64", "i32"), (2,))
    n, columns = p.raw("weight_shape").data.tolist()
    if n != rows or not 0 < columns < 2**31 or -(-columns * s.bits // 32) != words:
        raise p.error("weight_packed", f"of the shape {[n, columns]} that weight_shape gives, {s.bits} bits each")
    if columns % 8:
        raise p.error("weight_packed", f"of a multiple of 8 columns; it has {columns}")
    groups = _divided(p, "weight_packed", columns, s.group)
    p.check("weight_scale", FLOATS, (rows, groups))
    if "weight_g_idx" in p.names:
        _check_order(p, "weight_g_idx", columns, columns // groups)
    if s.symmetric == ("weight_zero_point" in p.names):
        state = "holds" if s.symmetric else "lacks"
        raise ModelError(f"{p.module} {state} weight_zero_point, and symmetric is {str(s.symmetric).lower()}", HINT)
    if not s.symmetric:
        p.check("weight_zero_point", ("i32",), (-(-rows * s.bits // 32), groups))
    return rows, columns


def _read_packed(p: Parts, s: WeightScheme) -> QuantTensor:
    zeros = None if s.symmetric else p.raw("weight_zero_point")
    return pack_quantized(p.raw("weight_packed"), p.raw("weight_scale"), zeros, s.bits, _packed_shape(p, s)[1])


def _check_order(p: Parts, part: str, columns: int, group: int) -> None:
    """Refuses activation order."""
    p.check(part, ("i32", "i64"), (columns,))
    if not np.array_equal(p.raw(part).data, np.arange(columns) // group):
        problem = f"{p.names[part]} reorders the columns: weights with activation order are not supported"
        raise ModelError(problem, "use a version without it (desc_act false)")


def _gptq_shape(p: Parts, s: WeightScheme) -> tuple[int, int]:
    words, rows = p.matrix("qweight", "i32")
    columns = _columns(p, "qweight", words, s.bits)
    groups = _divided(p, "qweight", columns, s.group)
    p.check("scales", FLOATS, (groups, rows))
    p.check("qzeros", ("i32",), (groups, -(-rows * s.bits // 32)))
    if "g_idx" in p.names:
        _check_order(p, "g_idx", columns, columns // groups)
    return rows, columns


def _read_gptq(p: Parts, s: WeightScheme) -> QuantTensor:
    group = s.group or _gptq_shape(p, s)[1]
    if s.version == 1 and s.bits == 8 and as_bytes(p.raw("qzeros").data).max() == 255:
        raise ModelError(f"{p.names['qzeros']} holds a zero point of 256, above all codes", "use another version")
    return gptq(p.raw("qweight"), p.raw("scales"), p.raw("qzeros"), s.bits, group, s.version)


def _awq_shape(p: Parts, s: WeightScheme) -> tuple[int, int]:
    columns, words = p.matrix("qweight", "i32")
    groups = _divided(p, "qweight", columns, s.group)
    if columns % 2:
        raise p.error("qweight", "of an even number of columns")
    p.check("scales", FLOATS, (groups, 8 * words))
    p.check("qzeros", ("i32",), (groups, words))
    return 8 * words, columns


def _read_awq(p: Parts, s: WeightScheme) -> QuantTensor:
    return awq(p.raw("qweight"), p.raw("scales"), p.raw("qzeros"), s.group or _awq_shape(p, s)[1])


# FP8


def fp8_scale(p: Parts, s: WeightScheme) -> tuple[str, str, tuple[int, int]]:
    """The part that holds the scales, the format's name, and the block. Raises ModelError."""
    rows, columns = p.matrix("weight", "e4m3")
    part = next(n for n in FP8_SCALES if n in p.names)
    if s.block is not None:
        n, k = s.block
        p.check(part, (*FLOATS, *POWERS), (-(-rows // n), -(-columns // k)))
        return part, "mxfp8" if s.block == (1, 32) else f"fp8_{n}x{k}", s.block
    p.check(part, (*FLOATS, *POWERS), (), (1,), (1, 1), (rows,), (rows, 1))
    if int(np.prod(p.shape(part), dtype=np.int64)) == 1:
        return part, "fp8_tensor", (rows, columns)
    return part, "fp8_channel", (1, columns)


FP8_SCALES = ("weight_scale_inv", "weight_scale", "scale_inv")


def _fp8_shape(p: Parts, s: WeightScheme) -> tuple[int, int]:
    if not any(n in p.names for n in FP8_SCALES):
        raise ModelError(f"{p.names['weight']} is {p.format('weight')} and has no weight_scale_inv", HINT)
    fp8_scale(p, s)
    return p.matrix("weight", "e4m3")


def _read_fp8(p: Parts, s: WeightScheme) -> QuantTensor:
    (part, name, block), codes = fp8_scale(p, s), p.raw("weight").data
    raw = p.raw(part)
    scales = raw.data.reshape(-(-codes.shape[0] // block[0]), -1)
    return fp8(name, codes, Tensor("e8m0" if raw.format in POWERS else raw.format, scales.shape, scales), block)


# FP4


def _fp4_shape(
    codes: str, scales: str, factor: str | None, group: int
) -> Callable[[Parts, WeightScheme], tuple[int, int]]:
    """Codes u8 (N, K / 2), scales (N, K / group), and f32 `factor`."""

    def shape(p: Parts, s: WeightScheme) -> tuple[int, int]:
        rows, half = p.matrix(codes, "u8")
        p.check(scales, ("e4m3",) if factor else POWERS, (rows, _divided(p, codes, 2 * half, group)))
        if factor:
            p.check(factor, ("f32",), (), (1,))
        return rows, 2 * half

    return shape


def _read_ct_nvfp4(p: Parts, s: WeightScheme) -> QuantTensor:
    factor = _scalar(p, "weight_global_scale")
    if not np.isfinite(factor) or factor == 0:
        raise ModelError(f"{p.names['weight_global_scale']} is {factor}, and scales are divided by it", HINT)
    return nvfp4(p.raw("weight_packed").data, p.raw("weight_scale"), 1 / factor)


def _read_modelopt_nvfp4(p: Parts, s: WeightScheme) -> QuantTensor:
    return nvfp4(p.raw("weight").data, p.raw("weight_scale"), _scalar(p, "weight_scale_2"))


def _blocks_shape(p: Parts, s: WeightScheme) -> tuple[int, int]:
    shape = p.shape("blocks")
    if p.format("blocks") != "u8" or len(shape) != 3 or shape[2] != 16 or 0 in shape:
        raise p.error("blocks", "u8 [experts, rows, columns / 32, 16]")
    p.check("scales", POWERS, shape[:2])
    return shape[0], 32 * shape[1]


def _read_blocks(p: Parts, s: WeightScheme) -> QuantTensor:
    blocks = p.raw("blocks").data
    return mxfp4(blocks.reshape(len(blocks), -1), p.raw("scales"))


PACKED = ("weight_packed", "weight_scale", "weight_shape")
CT_NVFP4 = ("weight_packed", "weight_scale", "weight_global_scale")
MODELOPT_NVFP4 = ("weight", "weight_scale", "weight_scale_2")
GPTQ = ("qweight", "qzeros", "scales")
LAYOUTS: dict[str, Layout] = {
    "mlx_affine": Layout(("weight", "scales", "biases"), (), _mlx_shape, _read_mlx),
    "mlx_mxfp4": Layout(("weight", "scales"), (), _mlx_shape, _read_mlx),
    "mlx_mxfp8": Layout(("weight", "scales"), (), _mlx_shape, _read_mlx),
    "mlx_nvfp4": Layout(("weight", "scales"), ("global_scale",), _mlx_shape, _read_mlx),
    "ct_packed": Layout(PACKED, ("weight_zero_point", "weight_g_idx"), _packed_shape, _read_packed),
    "gptq": Layout(GPTQ, ("g_idx",), _gptq_shape, _read_gptq),
    "awq": Layout(GPTQ, (), _awq_shape, _read_awq),
    "fp8": Layout(("weight",), FP8_SCALES, _fp8_shape, _read_fp8),
    "ct_nvfp4": Layout(CT_NVFP4, (), _fp4_shape(*CT_NVFP4, 16), _read_ct_nvfp4),
    "modelopt_nvfp4": Layout(MODELOPT_NVFP4, (), _fp4_shape(*MODELOPT_NVFP4, 16), _read_modelopt_nvfp4),
    "ct_mxfp4": Layout(
        CT_NVFP4[:2], (), _fp4_shape(*CT_NVFP4[:2], None, 32),
        lambda p, s: mxfp4(p.raw("weight_packed").data, p.raw("weight_scale")),
    ),
    "mxfp4": Layout(("blocks", "scales"), (), _blocks_shape, _read_blocks),
}  # fmt: skip
