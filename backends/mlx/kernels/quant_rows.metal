// Header of the kernels on quantized weights: rows of codes become weights, 16 columns at a time. The file must end
// with a newline, or MLX would append to its last line.
//
// Planes (row-major), made by metal_rows.py from those of quant/form.py, which defines the values. G groups of GROUP
// columns a row (GROUP 0: one); a group has 16 columns or a multiple of 32, K is a multiple of 32:
//   codes       uint (N, K * LOW / 32)   the low LOW bits (2, 4, 8) of each code, a bit stream, lowest bits first
//   high        uint (N, K * HIGH / 32)  the HIGH bits above (0, 1, 2), in the order of `tops` below
//   scales      S (N, G), or pairs (N, G, 2) of scale and bias or min if PAIRS
//   supers      half (N, K / 256), or pairs of super-scale and super-min; SUPERS: 0 none, 1 scales, 2 pairs
//   zeros       uchar (N, G) if ZEROS, else all are ZERO
//   row_scales  float (N, 1) if ROW_SCALES
//   table       float (16,) if CODE is TABLE
enum { INTEGERS, TABLE, E4M3 };                         // CODE
enum { NUMBER, NIBBLES, E8M0, HALF_E8M0, E4M3_SCALE };  // SCALE; NIBBLES: scale in the low half of a byte, min above

// N words, in loads of up to 16 bytes.
template <int N>
inline void load_words(const device uint* from, thread uint* words) {
  if (N % 4 == 0) {
    UNROLLED (int i = 0; i < N / 4; i++) {
      const uint4 four = reinterpret_cast<const device uint4*>(from)[i];
      UNROLLED (int n = 0; n < 4; n++) words[4 * i + n] = four[n];
    }
  } else if (N == 2) {
    const uint2 two = *reinterpret_cast<const device uint2*>(from);
    words[0] = two.x;
    words[1] = two.y;
  } else if (N == 1) {
    words[0] = from[0];
  }
}

// Two e4m3, divided by 256, from bits 0-7 and 16-23. A half has one bit more of exponent, and a bias of 15.
// NaN becomes 480 / 256.
inline half2 e4m3_pair(uint bytes) { return as_type<half2>((bytes & 0x00800080u) << 8 | (bytes & 0x007f007fu) << 7); }

template <int SCALE, typename S>
inline float scale_value(S s) {
  if (SCALE == NIBBLES) return float(uint(s) & 15u);
  if (SCALE == E4M3_SCALE) return float(e4m3_pair(uint(s)).x) * 256.0f;
  if (SCALE == E8M0 || SCALE == HALF_E8M0) {
    const uint e = uint(s) + (SCALE == E8M0 ? 1u : 0u);  // 2^(e - 128); the least two are subnormal
    return as_type<float>(e < 2 ? 0x200000u << e : (e - 1) << 23);
  }
  return float(s);
}

// Scale and offset of a group: w = (code - zero) * scale + offset.
template <int SCALE, bool PAIRS, int SUPERS, typename S, typename P>
inline float2 scale_and_offset(const device S* scales, const device P* supers, size_t group, size_t super_block) {
  float scale, offset = 0.0f;
  if (PAIRS) {
    const vec<S, 2> pair = reinterpret_cast<const device vec<S, 2>*>(scales)[group];
    scale = scale_value<SCALE>(pair.x);
    offset = float(pair.y);
  } else {
    const S s = scales[group];
    scale = scale_value<SCALE>(s);
    if (SCALE == NIBBLES) offset = float(uint(s) >> 4);
  }
  if (SUPERS == 1) scale *= float(supers[super_block]);
  if (SUPERS == 2) {
    const vec<P, 2> pair = reinterpret_cast<const device vec<P, 2>*>(supers)[super_block];
    scale *= float(pair.x);
    offset *= -float(pair.y);
  }
  return float2(scale, offset);
}

// 16 weights from LOW / 2 words of codes and, in the low bits of `high`, the bits above them.
//
// Two codes at a time, without conversions: an integer q below 1,024 in the mantissa of a half of 1,024 is 1,024 + q.
// The two are 16 bits apart; those at bit LOW * j are 2^(LOW * j) times too large, and their scale is smaller by that.
template <int LOW, int HIGH, int CODE>
inline void decode(
    const thread uint* low, uint high, float zero, float2 group, const threadgroup float* table, thread float* w) {
  if (CODE == TABLE) {
    UNROLLED (int i = 0; i < 16; i++) w[i] = table[low[i / 8] >> (4 * (i % 8)) & 15u] * group.x;
    return;
  }
  constexpr int PER_BYTE = 8 / LOW, PER_SHIFT = HIGH ? LOW / HIGH : LOW;
  UNROLLED (int t = 0; t < LOW; t++) {
    const uint codes = low[t / 2] >> (8 * (t % 2));
    // the high bits of code j to bit LOW * (j + 1); they are stored from bit `at` on, LOW bits apart
    const int at = t % PER_SHIFT * HIGH + t / PER_SHIFT * 8;
    const uint tops = at < LOW ? high << (at < LOW ? LOW - at : 0) : high >> (at < LOW ? 0 : at - LOW);
    UNROLLED (int j = 0; j < PER_BYTE; j++) {
      const int i = t / 2 * 4 * PER_BYTE + t % 2 * PER_BYTE + j;
      half2 q;
      float scale = group.x;
      if (CODE == E4M3) {
        q = e4m3_pair(codes);
        scale *= 256.0f;
      } else {
        const uint mask = ((1u << LOW) - 1) << (LOW * j), top_mask = ((1u << HIGH) - 1) << (LOW * (j + 1));
        const uint bits = (codes & mask * 0x10001u) | (tops & top_mask * 0x10001u);
        q = as_type<half2>(bits | 0x64006400u) - half2(half(1024.0f + zero * float(1 << (LOW * j))));
        scale *= 1.0f / float(1 << (LOW * j));
      }
      w[i] = float(q.x) * scale + group.y;
      w[i + 2 * PER_BYTE] = float(q.y) * scale + group.y;
    }
  }
}
