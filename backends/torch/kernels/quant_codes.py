"""Device functions that the kernels of quantized weights share: codes, scales, dp2a.

`triton_rows.py` has the layout. Tiles are (..., U, 4): units of 32 columns, and the four quads of a half.
"""

import triton
import triton.language as tl

from llmrs.backends.torch.kernels.launch import interpreted

ASM: tl.constexpr = tl.constexpr(not interpreted())  # else the same in plain Triton


@triton.jit
def load_quads(
    low, high, row, unit, mask, K: tl.constexpr, LOW_BITS: tl.constexpr, HIGH_BITS: tl.constexpr, TABLE: tl.constexpr
):
    """Codes of the first and of the second half, int32 (..., U, 4) each: a byte a code. `row` int64 (..., 1, 1),
    `unit` (..., U, 1), `mask` their shape; masked codes are 0."""
    w = tl.arange(0, 4)
    UNITS: tl.constexpr = K // 32
    at = row * UNITS + unit
    first = tl.zeros([1], tl.int32)
    second = tl.zeros([1], tl.int32)
    if LOW_BITS == 8:
        first = tl.load(low + at * 8 + w, mask=mask, other=0)
        second = tl.load(low + at * 8 + 4 + w, mask=mask, other=0)
    if LOW_BITS == 4:
        word = tl.load(low + at * 4 + w, mask=mask, other=0)
        if TABLE != "":
            even, odd = look_up(word, TABLE), look_up(word >> 16, TABLE)  # of h = 0 and 1: bytes (i, o)
            first, second = select(even, odd, False), select(even, odd, True)
        else:
            first, second = word & 0x0F0F0F0F, (word >> 4) & 0x0F0F0F0F
    if LOW_BITS == 2:
        word = tl.load(low + at * 2 + w // 2, mask=mask, other=0) >> (w % 2 * 4)
        first, second = word & 0x03030303, (word >> 2) & 0x03030303
    if HIGH_BITS == 2:
        word = tl.load(high + at * 2 + w // 2, mask=mask, other=0) >> (w % 2 * 4)
        first, second = first | (word & 0x03030303) << LOW_BITS, second | ((word >> 2) & 0x03030303) << LOW_BITS
    if HIGH_BITS == 1:
        word = tl.load(high + at + w * 0, mask=mask, other=0) >> (w * 2)
        first, second = first | (word & 0x01010101) << LOW_BITS, second | ((word >> 1) & 0x01010101) << LOW_BITS
    return first, second


@triton.jit
def look_up(word, TABLE: tl.constexpr):
    """The bytes of the table for the four nibbles of the low half of `word`."""
    if TABLE == "iq4":
        a, b, c, d = 0xBFAD9881, 0xF6EADDCF, 0x26190D01, 0x71594535
    else:  # e2m1, doubled
        a, b, c, d = 0x03020100, 0x0C080604, 0xFDFEFF00, 0xF4F8FAFC
    if ASM:
        return tl.inline_asm_elementwise(
            "{.reg .b32 s, x, y, m; and.b32 s, $1, 0x7777; shr.u32 m, $1, 1; and.b32 m, m, 0x4444; or.b32 m, m, 0x3210;"
            " prmt.b32 x, $2, $3, s; prmt.b32 y, $4, $5, s; prmt.b32 $0, x, y, m;}",
            "=r,r,r,r,r,r", [word, a, b, c, d], tl.int32, True, 1,
        )  # fmt: skip
    quad = word * 0
    for n in tl.static_range(4):
        code = (word >> (4 * n)) & 15
        entries = tl.where(code < 8, tl.where(code < 4, a, b), tl.where(code < 12, c, d)).to(tl.uint32)
        quad |= ((entries >> (code % 4 * 8)) & 255).to(tl.int32) << (8 * n)
    return quad


@triton.jit
def select(a, b, ODD: tl.constexpr):
    """The two even, or odd, bytes of a, then those of b."""
    if ASM:
        if ODD:
            return tl.inline_asm_elementwise("prmt.b32 $0, $1, $2, 0x7531;", "=r,r,r", [a, b], tl.int32, True, 1)
        return tl.inline_asm_elementwise("prmt.b32 $0, $1, $2, 0x6420;", "=r,r,r", [a, b], tl.int32, True, 1)
    a, b = a >> (8 * ODD), b >> (8 * ODD)
    return (a & 255) | ((a >> 8) & 0xFF00) | (((b & 255) | ((b >> 8) & 0xFF00)) << 16)


@triton.jit
def byte_of(quad, N: tl.constexpr, SIGNED: tl.constexpr):
    """Byte N of each quad, float32."""
    if SIGNED:
        return ((quad << (24 - 8 * N)) >> 24).to(tl.float32)
    return ((quad >> (8 * N)) & 255).to(tl.float32)


@triton.jit
def dot_halves(first, second, x_ptrs, mask, SIGNED: tl.constexpr):
    """Sums of code times x over each quad, int32, of either half. `x_ptrs`: words of the first pair."""
    a = dp2a(tl.load(x_ptrs, mask=mask, other=0), first, first * 0, False, SIGNED)
    a = dp2a(tl.load(x_ptrs + 4, mask=mask, other=0), first, a, True, SIGNED)
    b = dp2a(tl.load(x_ptrs + 8, mask=mask, other=0), second, second * 0, False, SIGNED)
    b = dp2a(tl.load(x_ptrs + 12, mask=mask, other=0), second, b, True, SIGNED)
    return a, b


@triton.jit
def dp2a(pair, quad, acc, HIGH: tl.constexpr, SIGNED: tl.constexpr):
    """acc + the two int16 of `pair` times the two low or high bytes of `quad`."""
    if ASM:
        asm: tl.constexpr = (
            ("dp2a.hi.s32." if HIGH else "dp2a.lo.s32.") + ("s32" if SIGNED else "u32") + " $0, $1, $2, $3;"
        )
        return tl.inline_asm_elementwise(asm, "=r,r,r,r", [pair, quad, acc], tl.int32, True, 1)
    for n in tl.static_range(2):
        byte = quad >> (8 * (n + 2 * HIGH))
        code = (byte << 24) >> 24 if SIGNED else byte & 255
        acc += ((pair << (16 - 16 * n)) >> 16) * code
    return acc


@triton.jit
def load_scales(
    scales, offsets, supers, row_scales, row, unit, HALF: tl.constexpr, mask, K: tl.constexpr, GROUP: tl.constexpr,
    SCALE: tl.constexpr, OFFSET: tl.constexpr, SUPER: tl.constexpr, ROW_SCALE: tl.constexpr,
):  # fmt: skip
    """Scale, and what OFFSET names (0 else), float32 in the shape of `unit`, of a half of each unit.

    OFFSET: "bias" and "zero" are planes, "min" is in the scales. SUPER: columns of a super-scale.
    """
    at = row * (K // 16) + unit * 2 + HALF if GROUP == 16 else row * (K // GROUP) + unit // (GROUP // 32)
    raw = tl.load(scales + at, mask=mask, other=0)
    offset = 0.0
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
        pair = tl.load(supers + row * (K // SUPER) + unit // (SUPER // 32), mask=mask, other=0)
        scale = half(pair) * scale
        if OFFSET == "min":
            offset = half(pair >> 16) * offset
    if ROW_SCALE:
        scale = scale * tl.load(row_scales + row)
    if OFFSET == "bias" or OFFSET == "zero":
        offset = tl.load(offsets + at, mask=mask, other=0).to(tl.float32)
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
def load_words(
    low, high, row, start, K: tl.constexpr, UNITS: tl.constexpr, LOW_BITS: tl.constexpr, HIGH_BITS: tl.constexpr
):
    """The planes for `unpack_part`, int16 (N, 8 UNITS), unit by unit [w][h]: the low bits, those of the second half of
    8-bit units, and the high bits, where there are any. `row` int64 (N, 1), `start`: the first unit; 0 from K on."""
    low16, column = low.to(tl.pointer_type(tl.int16)), tl.arange(0, 8 * UNITS)[None, :]
    if LOW_BITS == 8:
        at = row * (K // 2) + start * 16 + (column // 8 * 16 + column % 8)
        first = tl.load(low16 + at, mask=start * 8 + column < K // 4, other=0)
        second = tl.load(low16 + at + 8, mask=start * 8 + column < K // 4, other=0)
    elif LOW_BITS == 4:
        column = start * 8 + column
        first = tl.load(low16 + row * (K // 4) + column, mask=column < K // 4, other=0)
    else:
        first = _load_shared(low16, row, start, K, UNITS, 2)
    second, top = second if LOW_BITS == 8 else first, first
    if HIGH_BITS:
        top = _load_shared(high.to(tl.pointer_type(tl.int16)), row, start, K, UNITS, HIGH_BITS)
    return first, second, top


@triton.jit
def _load_shared(plane, row, start, K: tl.constexpr, UNITS: tl.constexpr, BITS: tl.constexpr):
    """A plane of 1 or 2 bits, whose words several w share."""
    column = start * (2 * BITS) + tl.arange(0, 2 * BITS * UNITS)[None, :]
    words = tl.load(plane + row * (K * BITS // 16) + column, mask=column < K * BITS // 16, other=0)
    words = tl.reshape(words, [words.shape[0], UNITS, BITS, 1, 2])
    words = tl.broadcast_to(words, [words.shape[0], UNITS, BITS, 4 // BITS, 2])
    return tl.reshape(words, [words.shape[0], 8 * UNITS])


@triton.jit
def unpack_part(
    words, scale, offset, PART: tl.constexpr, dtype: tl.constexpr, LOW_BITS: tl.constexpr, HIGH_BITS: tl.constexpr,
    TABLE: tl.constexpr, SIGNED: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    """Weights of `dtype` in columns 8 PART to 8 PART + 8 of each unit, (N, 8 U): code * scale + offset.

    `words`: of `load_words`; `scale`, `offset`: float32 in their shape. No data moves between threads.
    """
    HALF: tl.constexpr = PART // 2
    EIGHT: tl.constexpr = PART % 2  # of the 16 columns of a half
    w = tl.arange(0, words[0].shape[1])[None, :] // 2 % 4
    if ASM and TABLE == "" and dtype != tl.float32:
        base = offset if SIGNED else (1 << (LOW_BITS + HIGH_BITS - 1)) * scale + offset
        factor = scale.to(dtype)
        return tl.inline_asm_elementwise(
            unpack_asm(PART, LOW_BITS, HIGH_BITS, SIGNED, dtype == tl.float16), "=r,r,r,r,r,r,r,r",
            [words[0], words[1], words[2], _lane_shift(w, LOW_BITS), _lane_shift(w, HIGH_BITS), factor, base.to(dtype)],
            factor.dtype, True, 2,
        )  # fmt: skip
    if LOW_BITS == 8:
        code = ((words[1] if HALF == 1 else words[0]).to(tl.int32) >> (8 * EIGHT)) & 255
        if SIGNED:
            code = (code << 24) >> 24
    else:
        shift = _lane_shift(w, LOW_BITS).to(tl.int32) + (8 * EIGHT + LOW_BITS * HALF)
        code = (words[0].to(tl.int32) >> shift) & ((1 << LOW_BITS) - 1)
    if HIGH_BITS:
        shift = _lane_shift(w, HIGH_BITS).to(tl.int32) + (8 * EIGHT + HIGH_BITS * HALF)
        code |= ((words[2].to(tl.int32) >> shift) & ((1 << HIGH_BITS) - 1)) << LOW_BITS
    if TABLE != "":
        code = (look_up(code, TABLE) << 24) >> 24
    return (code.to(tl.float32) * (scale * FACTOR) + offset).to(dtype)


@triton.jit
def _lane_shift(w, BITS: tl.constexpr):
    """How far the bits of w lie from those of the first w in its word, int16."""
    if BITS == 1:
        return (w * 2).to(tl.int16)
    if BITS == 2:
        return (w % 2 * 4).to(tl.int16)
    return (w * 0).to(tl.int16)


@triton.constexpr_function
def unpack_asm(part: int, low_bits: int, high_bits: int, signed: bool, f16: bool) -> str:
    """PTX for two weights: words of the low bits, of the second half, of the high bits, shifts of both, scale, base.

    Integers become floats by their lowest bits: 128 + n is 0x4300 | n in bf16, 1024 + n is 0x6400 | n in f16. With
    their middle subtracted codes are exact, so that a weight is rounded once, but for its scale.
    """
    half, i, bits = part // 2, part % 2, low_bits + high_bits
    kind, magic, one = ("f16x2", 0x6400, 0x3C00) if f16 else ("bf16x2", 0x4300, 0x3F80)

    def pair(n: int) -> str:
        return hex(n << 16 | n)

    def shifted(source: str, lane: str, width: int, to: str) -> str:
        by = 8 * i + width * half
        if width > 2:
            return f"shr.u32 {to}, {source}, {by};"
        return f"and.b32 s, {lane}, 0xFFFF; add.u32 s, s, {by}; shr.u32 {to}, {source}, s;"

    asm = f"{{.reg .b32 q, t, s, c; mov.b32 c, {pair(one)};"
    if low_bits == 8:
        asm += f"shr.u32 q, {'$2' if half else '$1'}, {8 * i}; and.b32 q, q, 0x00FF00FF;"
        if signed == f16:  # the middle of unsigned codes is 128; bf16 takes signed ones
            asm += "xor.b32 q, q, 0x00800080;"
        if f16:
            asm += f"or.b32 q, q, {pair(magic)}; mov.b32 t, {pair(magic | 0x8000 | 128)}; fma.rn.{kind} q, q, c, t;"
        else:
            asm += f"lop3.b32 t, q, 0x007F007F, {pair(magic)}, 0xEA; lop3.b32 q, q, 0x00800080, {pair(magic)}, 0xEA;"
            asm += f"mov.b32 c, 0xBF80BF80; fma.rn.{kind} q, q, c, t;"
    else:
        asm += shifted("$1", "$4", low_bits, "q")
        asm += f"lop3.b32 q, q, {pair((1 << low_bits) - 1)}, {pair(magic)}, 0xEA;"
        if high_bits:
            asm += shifted("$3", "$5", high_bits, "t") + f"shl.b32 t, t, {low_bits};"
            asm += f"lop3.b32 q, t, {pair(((1 << high_bits) - 1) << low_bits)}, q, 0xEA;"
        asm += f"mov.b32 t, {pair(magic | 0x8000 | 1 << (bits - 1))}; fma.rn.{kind} q, q, c, t;"  # - middle
    return asm + f"fma.rn.{kind} $0, q, $6, $7;}}"


@triton.jit
def load_line(
    scales, offsets, supers, row_scales, row, unit, HALF: tl.constexpr, mask, K: tl.constexpr, GROUP: tl.constexpr,
    SCALE: tl.constexpr, OFFSET: tl.constexpr, SUPER: tl.constexpr, ROW_SCALE: tl.constexpr, ZERO: tl.constexpr,
):  # fmt: skip
    """`load_scales` as w = code * scale + offset, for each of eight columns of a unit: (N, 8 U)."""
    scale, offset = load_scales(scales, offsets, supers, row_scales, row, unit, HALF, mask, K, GROUP, SCALE, OFFSET,
                                SUPER, ROW_SCALE)  # fmt: skip
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
