// <metal_stdlib> and <metal_simdgroup_matrix> on a CPU.
#pragma once
#include "metal_threads.h"

#undef INFINITY
#define INFINITY __builtin_inff()
#define MAXFLOAT 3.402823466e+38F
#define FLT_MAX MAXFLOAT
#define INT_MAX 2147483647
#define UINT_MAX 4294967295u

namespace metal {
enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
inline mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(int(a) | int(b)); }
inline bool ms_orders(mem_flags f) { return int(f) & int(mem_flags::mem_threadgroup); }
enum memory_order { memory_order_relaxed };
#define MS_LINE int line = __builtin_LINE()
inline void threadgroup_barrier(mem_flags f, MS_LINE) { ms::group_barrier(line, ms_orders(f)); }
inline void simdgroup_barrier(mem_flags f, MS_LINE) {
  ms::together((ms_orders(f) ? ms::SIMD_BARRIER : 17) + 32 * line, 0, [](auto&, uint, uint) { return 0; });
}

// ---- mathematics: computed in float and rounded to the argument's type
#define MS_UNARY(n, e) \
  template <class T, std::enable_if_t<ms_real<T>, int> = 0> T n(T v) { float x = float(v); return T(e); } \
  template <class T, int N> vec<T, N> n(vec<T, N> v) { for (int i = 0; i < N; i++) v[i] = n(v[i]); return v; }
#define MS_MATHS \
  MS_UNARY(exp, std::exp(x)) MS_UNARY(exp2, std::exp2(x)) MS_UNARY(log, std::log(x)) MS_UNARY(log2, std::log2(x)) \
  MS_UNARY(sqrt, std::sqrt(x)) MS_UNARY(rsqrt, 1.0f / std::sqrt(x)) MS_UNARY(sin, std::sin(x)) MS_UNARY(cos, std::cos(x)) \
  MS_UNARY(tanh, std::tanh(x)) MS_UNARY(floor, std::floor(x)) MS_UNARY(ceil, std::ceil(x)) MS_UNARY(round, std::round(x)) \
  MS_UNARY(rint, std::nearbyint(x)) MS_UNARY(trunc, std::trunc(x)) MS_UNARY(fabs, std::fabs(x))
MS_MATHS
template <class T, std::enable_if_t<ms_scalar<T>, int> = 0> T abs(T x) { return x < T(0) ? T(-x) : x; }
template <class T, std::enable_if_t<ms_scalar<T>, int> = 0> T max(T a, T b) { return a < b ? b : a; }
template <class T, std::enable_if_t<ms_scalar<T>, int> = 0> T min(T a, T b) { return b < a ? b : a; }
template <class T> T clamp(T x, T low, T high) { return min(max(x, low), high); }
template <class T> T fma(T a, T b, T c) { return T(std::fma(float(a), float(b), float(c))); }
template <class T> T pow(T a, T b) { return T(std::pow(float(a), float(b))); }
template <class T> T select(T a, T b, bool c) { return c ? b : a; }
template <class T> bool isnan(T x) { return std::isnan(float(x)); }
template <class T> bool isinf(T x) { return std::isinf(float(x)); }
template <class T, int N> T dot(vec<T, N> a, vec<T, N> b) { T s = T(0); for (int i = 0; i < N; i++) s = T(s + a[i] * b[i]); return s; }
inline uint popcount(uint x) { return __builtin_popcount(x); }
inline uint clz(uint x) { return x ? __builtin_clz(x) : 32; }
inline uint ctz(uint x) { return x ? __builtin_ctz(x) : 32; }
template <class D, class S> D as_type(S s) { static_assert(sizeof(D) == sizeof(S)); D d; std::memcpy(&d, &s, sizeof(D)); return d; }
namespace fast { using namespace metal; MS_MATHS }
namespace precise { using namespace metal; MS_MATHS }
#undef MS_UNARY
#undef MS_MATHS

// ---- simdgroup reductions (in the order of a butterfly), shuffles, votes, scans
#define MS_REDUCE(n, id, e) template <class T> T n(T v, MS_LINE) { return ms::together(id + 32 * line, v, [](ms::Simdgroup& g, uint turn, uint) { \
  T r[32]; bool k[32]; for (uint l = 0; l < 32; l++) { k[l] = g.mask[turn] >> l & 1; if (k[l]) r[l] = ms::lane_value<T>(g, turn, l); } \
  for (uint s = 16; s; s >>= 1) for (uint l = 0; l < s; l++) { \
    if (k[l] && k[l + s]) { T a = r[l], b = r[l + s]; r[l] = e; } else if (k[l + s]) { r[l] = r[l + s]; k[l] = true; } } \
  return r[0]; }); }
MS_REDUCE(simd_sum, 2, T(a + b)) MS_REDUCE(simd_max, 3, max(a, b)) MS_REDUCE(simd_min, 4, min(a, b))
MS_REDUCE(simd_product, 5, T(a * b)) MS_REDUCE(simd_or, 6, T(a | b)) MS_REDUCE(simd_and, 7, T(a & b))
#undef MS_REDUCE
#define MS_SHUFFLE(n, id, from) template <class T> T n(T v, uint d, MS_LINE) { return ms::together(id + 32 * line, v, [d](ms::Simdgroup& g, uint turn, uint l) { \
  uint s = (from); return s < 32 && (g.mask[turn] >> s & 1) ? ms::lane_value<T>(g, turn, s) : ms::lane_value<T>(g, turn, l); }); }
MS_SHUFFLE(simd_shuffle, 8, d) MS_SHUFFLE(simd_shuffle_xor, 9, l ^ d) MS_SHUFFLE(simd_shuffle_down, 10, l + d)
MS_SHUFFLE(simd_shuffle_up, 11, l - d) MS_SHUFFLE(simd_broadcast, 12, d)
#undef MS_SHUFFLE
template <class T> T simd_broadcast_first(T v, MS_LINE) {
  return ms::together(13 + 32 * line, v, [](ms::Simdgroup& g, uint turn, uint) { return ms::lane_value<T>(g, turn, __builtin_ctz(g.mask[turn])); });
}
template <class T> T ms_scan(T v, bool inclusive, int line) {
  return ms::together(14 + inclusive + 32 * line, v, [inclusive](ms::Simdgroup& g, uint turn, uint lane) {
    T sum = T(0);
    for (uint i = 0; i < lane + inclusive; i++) if (g.mask[turn] >> i & 1) sum = T(sum + ms::lane_value<T>(g, turn, i));
    return sum;
  });
}
template <class T> T simd_prefix_inclusive_sum(T v, MS_LINE) { return ms_scan(v, true, line); }
template <class T> T simd_prefix_exclusive_sum(T v, MS_LINE) { return ms_scan(v, false, line); }
inline uint ms_votes(bool c, int line) {
  return ms::together(16 + 32 * line, c, [](ms::Simdgroup& g, uint turn, uint) {
    uint votes = 0;
    for (uint i = 0; i < 32; i++) if ((g.mask[turn] >> i & 1) && ms::lane_value<bool>(g, turn, i)) votes |= 1u << i;
    return votes;
  });
}
inline bool simd_any(bool c, MS_LINE) { return ms_votes(c, line) != 0; }
inline bool simd_all(bool c, MS_LINE) { return ms_votes(!c, line) == 0; }

// ---- atomics: only one fiber runs at a time, so plain updates are atomic
template <class T> struct atomic { T v; };
typedef atomic<uint> atomic_uint;
typedef atomic<int> atomic_int;
#define MS_ATOMIC(n, e) template <class P, class U> auto atomic_fetch_##n##_explicit(P p, U u, memory_order) { auto o = p->v; decltype(o) x = u; p->v = e; return o; }
MS_ATOMIC(add, o + x) MS_ATOMIC(sub, o - x) MS_ATOMIC(max, o < x ? x : o) MS_ATOMIC(min, x < o ? x : o) MS_ATOMIC(or, o | x) MS_ATOMIC(and, o & x)
#undef MS_ATOMIC
template <class P> auto atomic_load_explicit(P p, memory_order) { return p->v; }
template <class P, class U> void atomic_store_explicit(P p, U u, memory_order) { p->v = u; }

// ---- 8x8 matrices, two elements per lane. Apple does not document the layout, so the one here is arbitrary, without
// thread_elements().
template <class T, int R = 8, int C = 8> struct simdgroup_matrix {
  static_assert(R == 8 && C == 8 && ms_real<T>);
  vec<T, 2> e;
  simdgroup_matrix() = default;
  explicit simdgroup_matrix(T v) : e(v) {}
};
typedef simdgroup_matrix<float> simdgroup_float8x8;
typedef simdgroup_matrix<half> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat> simdgroup_bfloat8x8;
template <class T, int R, int C> simdgroup_matrix<T, R, C> make_filled_simdgroup_matrix(T v) { return simdgroup_matrix<T, R, C>(v); }
inline uint ms_row(uint lane) { return (lane * 13 + 7) % 32 / 4; }
inline uint ms_column(uint lane) { return (lane * 13 + 7) % 4 * 2; }
inline uint ms_lane(uint row, uint column) { return (row * 4 + column / 2 + 25) * 5 % 32; }
// Loads and stores do not synchronize the lanes, so that a missing barrier is detected.
template <class T, ms::Space S, class U>
void simdgroup_load(simdgroup_matrix<T>& m, ms::ptr<S, U> p, ulong stride = 8, ulong2 origin = ulong2(0ul), bool transposed = false) {
  static_assert(std::is_same_v<T, std::remove_const_t<U>>);
  uint r = ms_row(ms::current->lane), c = ms_column(ms::current->lane);
  for (int i = 0; i < 2; i++)
    m.e[i] = transposed ? p[(origin.y + c + i) * stride + origin.x + r] : p[(origin.y + r) * stride + origin.x + c + i];
}
template <class T, ms::Space S>
void simdgroup_store(simdgroup_matrix<T> m, ms::ptr<S, T> p, ulong stride = 8, ulong2 origin = ulong2(0ul), bool transposed = false) {
  uint r = ms_row(ms::current->lane), c = ms_column(ms::current->lane);
  for (int i = 0; i < 2; i++)
    p[transposed ? (origin.y + c + i) * stride + origin.x + r : (origin.y + r) * stride + origin.x + c + i] = m.e[i];
}
template <class D, class A, class B, class C>
void simdgroup_multiply_accumulate(simdgroup_matrix<D>& d, simdgroup_matrix<A> a, simdgroup_matrix<B> b, simdgroup_matrix<C> c, MS_LINE) {
  struct Pair { vec<A, 2> a; vec<B, 2> b; };
  d.e = ms::together(19 + 32 * line, Pair{a.e, b.e}, [c](ms::Simdgroup& g, uint turn, uint lane) {
    const uint row = ms_row(lane), column = ms_column(lane);
    vec<D, 2> out;
    for (int i = 0; i < 2; i++) {
      float sum = float(c.e[i]);
      for (uint k = 0; k < 8; k++) {
        Pair left = ms::lane_value<Pair>(g, turn, ms_lane(row, k)), right = ms::lane_value<Pair>(g, turn, ms_lane(k, column));
        sum += float(left.a[k % 2]) * float(right.b[column % 2 + i]);
      }
      out[i] = D(sum);
    }
    return out;
  });
}
template <class D, class A, class B>
void simdgroup_multiply(simdgroup_matrix<D>& d, simdgroup_matrix<A> a, simdgroup_matrix<B> b, MS_LINE) {
  simdgroup_multiply_accumulate(d, a, b, simdgroup_matrix<D>(D(0)), line);
}
}  // namespace metal
