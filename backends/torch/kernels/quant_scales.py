"""Device functions of quantized weights: scales and offsets of groups, as `triton_rows.py` lays them out."""

import triton
import triton.language as tl


@triton.jit
def load_scales(
    scales, offsets, supers, row_scales, row, unit, half_of, mask, K: tl.constexpr, GROUP: tl.constexpr,
    SCALE: tl.constexpr, OFFSET: tl.constexpr, SUPER: tl.constexpr, ROW_SCALE: tl.constexpr,
):  # fmt: skip
    """Scale, and what OFFSET names (0 else), float32 in the shape of `unit`, of a half of each unit.

    OFFSET: "bias" and "zero" are planes, "min" is in the scales. SUPER: columns of a super-scale.
    """
    bits = load_scale_bits(scales, offsets, supers, row_scales, row, unit, half_of, mask, K, GROUP, OFFSET,
                           SUPER, ROW_SCALE)  # fmt: skip
    return scale_of(bits, SCALE, OFFSET, SUPER, ROW_SCALE)


@triton.jit
def load_scale_bits(
    scales, offsets, supers, row_scales, row, unit, half_of, mask, K: tl.constexpr, GROUP: tl.constexpr,
    OFFSET: tl.constexpr, SUPER: tl.constexpr, ROW_SCALE: tl.constexpr,
):  # fmt: skip
    """What `scale_of` needs, as it is in memory."""
    at = row * (K // 16) + unit * 2 + half_of if GROUP == 16 else row * (K // GROUP) + unit // (GROUP // 32)
    raw = tl.load(scales + at, mask=mask, other=0)
    above, offset, factor = raw, raw, raw
    if SUPER:
        above = tl.load(supers + row * (K // SUPER) + unit // (SUPER // 32), mask=mask, other=0)
    if OFFSET == "bias" or OFFSET == "zero":
        offset = tl.load(offsets + at, mask=mask, other=0)
    if ROW_SCALE:
        factor = tl.load(row_scales + row)
    return raw, above, offset, factor


@triton.jit
def scale_of(bits, SCALE: tl.constexpr, OFFSET: tl.constexpr, SUPER: tl.constexpr, ROW_SCALE: tl.constexpr):
    """Scale and offset of `load_scales`."""
    raw, offset = bits[0], 0.0
    if SCALE == "u8_pair":
        scale, offset = (raw & 255).to(tl.float32), ((raw >> 8) & 255).to(tl.float32)
    elif SCALE == "u4_pair":
        scale, offset = (raw & 15).to(tl.float32), (raw >> 4).to(tl.float32)
    elif SCALE == "e8m0" or SCALE == "half_e8m0":
        scale = power_of_2(raw.to(tl.int32), SCALE == "half_e8m0")
    elif SCALE == "e4m3":
        scale = e4m3(raw.to(tl.int32))
    else:
        scale = raw.to(tl.float32)
    if SUPER:
        scale = half(bits[1]) * scale
        if OFFSET == "min":
            offset = half(bits[1] >> 16) * offset
    if ROW_SCALE:
        scale = scale * bits[3]
    if OFFSET == "bias" or OFFSET == "zero":
        offset = bits[2].to(tl.float32)
    return scale, offset


@triton.jit
def half(bits):
    """float32 of an f16 in the low 16 bits of an int."""
    return (bits.to(tl.int32) & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def power_of_2(exponent, HALVED: tl.constexpr):
    """2^(exponent - 127), or half of it, of 0 to 255, exactly."""
    if HALVED:
        bits = tl.where(exponent > 1, (exponent - 1) << 23, 0x00200000 << exponent)
    else:
        bits = tl.where(exponent > 0, exponent << 23, 0x00400000)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def e4m3(byte):
    """float32 of float8_e4m3fn in the low 8 bits of an int32."""
    bits = ((byte & 0x80) << 8) | ((byte & 0x7F) << 7)
    return tl.where((byte & 0x7F) == 0x7F, float("nan"), half(bits) * 256)


@triton.jit
def line_of(
    bits, SCALE: tl.constexpr, OFFSET: tl.constexpr, SUPER: tl.constexpr, ROW_SCALE: tl.constexpr, ZERO: tl.constexpr
):
    """`scale_of` as w = code * scale + offset, for each of eight columns of a unit: (N, 8 U)."""
    scale, offset = scale_of(bits, SCALE, OFFSET, SUPER, ROW_SCALE)
    if OFFSET == "zero":
        offset = -offset * scale
    if OFFSET == "min":
        offset = -offset
    if OFFSET == "":
        offset = scale * 0
    if ZERO:
        offset -= ZERO * scale
    return _repeated(scale), _repeated(offset)


@triton.jit
def _repeated(x):
    """(N, U) -> (N, 8 U)."""
    return tl.reshape(tl.broadcast_to(x[:, :, None], [x.shape[0], x.shape[1], 8]), [x.shape[0], x.shape[1] * 8])
