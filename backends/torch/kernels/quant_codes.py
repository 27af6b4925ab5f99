# mypy: disable-error-code="assignment"
# ruff: noqa: RUF005 - Triton adds tuples, and can't unpack them
"""Device functions of quantized weights: codes, dp2a, unpacking; `quant_scales.py` has the scales.

`triton_rows.py` has the layout: units of 32 columns, their words, quads (o, w), and the parts of 8 columns.
"""

import triton
import triton.language as tl

from llmrs.backends.torch.kernels.launch import interpreted
from llmrs.backends.torch.kernels.quant_scales import e4m3

ASM: tl.constexpr = tl.constexpr(not interpreted())  # else the same in plain Triton


@triton.jit
def load_unit(low, high, row, unit, mask, K: tl.constexpr, LOW_BITS: tl.constexpr, HIGH_BITS: tl.constexpr):
    """The words of units, for `quads`: int32 (U,) each. `row` int64, `unit`, `mask` (U,)."""
    at = row * (K // 32) + unit
    if LOW_BITS == 8:
        words = _load_words(low + at * 8, mask) + _load_words(low + at * 8 + 4, mask)
    elif LOW_BITS == 4:
        words = _load_words(low + at * 4, mask)
    else:
        words = _load_pair(low + at * 2, mask)
    if HIGH_BITS == 2:
        words = words + _load_pair(high + at * 2, mask)
    if HIGH_BITS == 1:
        words = words + (tl.load(high + at, mask=mask, other=0),)
    return words


@triton.jit
def load_x(x, x_scales, m, K: tl.constexpr, BLOCK_U: tl.constexpr):
    """A row of quantized activations: for each tile of units 16 words, scale, and both sums, (BLOCK_U,) each."""
    tiles = ()
    for t in tl.static_range((K // 32 + BLOCK_U - 1) // BLOCK_U):
        unit = t * BLOCK_U + tl.arange(0, BLOCK_U)
        mask, words = unit < K // 32, ()
        for p in tl.static_range(4):
            words = words + _load_words(x + m * (K // 2) + unit * 16 + 4 * p, mask)
        scale_ptrs = x_scales + m * (3 * (K // 32)) + unit
        for p in tl.static_range(3):
            words = words + (tl.load(scale_ptrs + p * (K // 32), mask=mask, other=0.0),)
        tiles = tiles + (words,)
    return tiles


@triton.jit
def _load_words(ptrs, mask):
    """Four words at each address."""
    words = tl.load(ptrs[:, None] + tl.arange(0, 4)[None, :], mask=mask[:, None], other=0)
    even, odd = tl.split(tl.reshape(words, [words.shape[0], 2, 2]))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return a, b, c, d


@triton.jit
def _load_pair(ptrs, mask):
    return tl.split(tl.load(ptrs[:, None] + tl.arange(0, 2)[None, :], mask=mask[:, None], other=0))


@triton.jit
def quads(words, W: tl.constexpr, LOW_BITS: tl.constexpr, HIGH_BITS: tl.constexpr, TABLE: tl.constexpr):
    """The codes of the quads (0, W) and (1, W), a byte each; of 4-bit integers the second ones times 16."""
    LOW: tl.constexpr = 8 if LOW_BITS == 8 else LOW_BITS  # words
    if LOW_BITS == 8:
        first, second = words[W], words[4 + W]
    elif TABLE != "":
        even, odd = look_up(words[W], TABLE), look_up(words[W] >> 16, TABLE)  # of h = 0 and 1: bytes (i, o)
        first, second = select(even, odd, False), select(even, odd, True)
    elif LOW_BITS == 4:
        first, second = words[W] & 0x0F0F0F0F, words[W] & -0x0F0F0F10
        if HIGH_BITS:
            second = (second >> 4) & 0x0F0F0F0F
    else:
        word = words[W // 2] >> (W % 2 * 4)
        first, second = word & 0x03030303, (word >> 2) & 0x03030303
    if HIGH_BITS:
        MASK: tl.constexpr = 0x03030303 if HIGH_BITS == 2 else 0x01010101
        top = words[LOW + W // 2] >> (W % 2 * 4) if HIGH_BITS == 2 else words[LOW] >> (2 * W)
        first, second = first | (top & MASK) << LOW_BITS, second | ((top >> HIGH_BITS) & MASK) << LOW_BITS
    return first, second


@triton.jit
def dot_unit(words, x, LOW_BITS: tl.constexpr, HIGH_BITS: tl.constexpr, TABLE: tl.constexpr, SIGNED: tl.constexpr):
    """Sums of code times x, int32 (U,), of either half. `x`: 16 words, of `quantize_activations`."""
    first, second = quads(words, 0, LOW_BITS, HIGH_BITS, TABLE)
    a, b = first * 0, second * 0
    for w in tl.static_range(4):
        first, second = quads(words, w, LOW_BITS, HIGH_BITS, TABLE)
        a = dp2a(x[4 + w], first, dp2a(x[w], first, a, False, SIGNED), True, SIGNED)
        b = dp2a(x[12 + w], second, dp2a(x[8 + w], second, b, False, SIGNED), True, SIGNED)
    if LOW_BITS == 4 and HIGH_BITS == 0 and TABLE == "":
        b = b >> 4
    return a, b


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
def load_codes(
    low, high, row, octet, mask, K: tl.constexpr, LOW_BITS: tl.constexpr, HIGH_BITS: tl.constexpr,
    TABLE: tl.constexpr, SIGNED: tl.constexpr,
):  # fmt: skip
    """The codes of eight columns each, float32 (N, O, 8). `row` int64 (N, 1, 1), `octet` (1, O, 1)."""
    low16, unit, part = low.to(tl.pointer_type(tl.int16)), octet // 4, octet % 4
    lane = tl.arange(0, 8)[None, None, :]
    at, w, eight, half_of = row * (K // 32) + unit, lane // 2, part % 2 * 8, part // 2
    if LOW_BITS == 8:
        code = tl.load(low16 + at * 16 + half_of * 8 + lane, mask=mask, other=0).to(tl.int32) >> eight
    elif LOW_BITS == 4:
        code = tl.load(low16 + at * 8 + lane, mask=mask, other=0).to(tl.int32) >> (eight + half_of * 4)
    else:
        code = tl.load(low16 + at * 4 + lane // 4 * 2 + lane % 2, mask=mask, other=0).to(tl.int32)
        code = code >> (eight + half_of * 2 + w % 2 * 4)
    code &= (1 << LOW_BITS) - 1
    if HIGH_BITS:
        high16 = high.to(tl.pointer_type(tl.int16))
        if HIGH_BITS == 2:
            top = tl.load(high16 + at * 4 + lane // 4 * 2 + lane % 2, mask=mask, other=0).to(tl.int32)
            top = top >> (eight + half_of * 2 + w % 2 * 4)
        else:
            top = tl.load(high16 + at * 2 + lane % 2, mask=mask, other=0).to(tl.int32) >> (eight + half_of + w * 2)
        code |= (top & ((1 << HIGH_BITS) - 1)) << LOW_BITS
    if TABLE == "e4m3":
        values = e4m3(code)
    else:
        if TABLE != "":
            code = look_up(code, TABLE)
        if SIGNED:
            code = (code << 24) >> 24
        values = code.to(tl.float32)
    return values


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
    if ASM and (TABLE == "" or TABLE == "e4m3") and dtype != tl.float32:
        base = offset if SIGNED or TABLE == "e4m3" else (1 << (LOW_BITS + HIGH_BITS - 1)) * scale + offset
        factor = scale.to(dtype)
        return tl.inline_asm_elementwise(
            unpack_asm(PART, LOW_BITS, HIGH_BITS, SIGNED, TABLE == "e4m3", dtype == tl.float16), "=r,r,r,r,r,r,r,r",
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
    if TABLE == "e4m3":
        values = e4m3(code)
    else:
        if TABLE != "":
            code = (look_up(code, TABLE) << 24) >> 24
        values = code.to(tl.float32)
    return (values * (scale * FACTOR) + offset).to(dtype)


@triton.jit
def _lane_shift(w, BITS: tl.constexpr):
    """How far the bits of w lie from those of the first w in its word, int16."""
    if BITS == 1:
        return (w * 2).to(tl.int16)
    if BITS == 2:
        return (w % 2 * 4).to(tl.int16)
    return (w * 0).to(tl.int16)


@triton.constexpr_function
def unpack_asm(part: int, low_bits: int, high_bits: int, signed: bool, e4m3: bool, f16: bool) -> str:
    """PTX for two weights: words of the low bits, of the second half, of the high bits, shifts of both, scale, base.

    Integers become floats by their lowest bits: 128 + n is 0x4300 | n in bf16, 1024 + n is 0x6400 | n in f16. With
    their middle subtracted codes are exact, so that a weight is rounded once, but for its scale. The bits of e4m3 are
    those of a float of more exponent bits, times a power of 2; NaN, which no weight is, becomes 480.
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
        if e4m3:
            shift, power = (7, 0x5C00) if f16 else (4, 0x7B80)  # 2^8, 2^120
            asm += f"and.b32 t, q, 0x00800080; shl.b32 t, t, 8; and.b32 q, q, 0x007F007F; shl.b32 q, q, {shift};"
            asm += f"or.b32 q, q, t; mov.b32 c, {pair(power)}; mov.b32 t, {pair(0x8000)}; fma.rn.{kind} q, q, c, t;"
            return asm + f"fma.rn.{kind} $0, q, $6, $7;}}"
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
