// Scalar and vector types of the Metal Shading Language (MSL), in C++.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <type_traits>

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;

// half and bfloat. Operations within a type round to it; with a float they give a float. Conversion from float is
// explicit (MSL converts silently to half only), so that one kernel source is valid for all types.
struct ms_half_bits {
  static uint16_t pack(float f) { _Float16 h = _Float16(f); uint16_t u; std::memcpy(&u, &h, 2); return u; }
  static float unpack(uint16_t u) { _Float16 h; std::memcpy(&h, &u, 2); return float(h); }
};
struct ms_bfloat_bits {  // the upper half of a float, rounded to nearest, ties to even
  static uint16_t pack(float f) {
    uint32_t b;
    std::memcpy(&b, &f, 4);
    if ((b & 0x7fffffffu) > 0x7f800000u) return uint16_t((b >> 16) | 64);  // stays a NaN
    return uint16_t((b + 0x7fffu + ((b >> 16) & 1)) >> 16);
  }
  static float unpack(uint16_t u) { uint32_t b = uint32_t(u) << 16; float f; std::memcpy(&f, &b, 4); return f; }
};
template <class Bits> struct ms_narrow {
  uint16_t u;
  ms_narrow() = default;
  template <class U, class = std::enable_if_t<std::is_arithmetic_v<U>>> explicit ms_narrow(U v) : u(Bits::pack(float(v))) {}
  template <class B> explicit ms_narrow(ms_narrow<B> v) : u(Bits::pack(float(v))) {}
  operator float() const { return Bits::unpack(u); }
  ms_narrow operator-() const { return ms_narrow(-float(*this)); }
#define MS_OP(o) \
  friend ms_narrow operator o(ms_narrow a, ms_narrow b) { return ms_narrow(float(a) o float(b)); } \
  ms_narrow& operator o##=(ms_narrow b) { return *this = *this o b; }
  MS_OP(+) MS_OP(-) MS_OP(*) MS_OP(/)
#undef MS_OP
};
typedef ms_narrow<ms_half_bits> half;
typedef ms_narrow<ms_bfloat_bits> bfloat;
typedef half float16_t;  // MLX's names
typedef bfloat bfloat16_t;

template <class T> constexpr bool ms_real = std::is_floating_point_v<T> || std::is_same_v<T, half> || std::is_same_v<T, bfloat>;
template <class T> constexpr bool ms_scalar = ms_real<T> || std::is_integral_v<T>;

// Vectors: x y z w, [], constructors, arithmetic. No swizzles: our kernels use none.
template <class T, int N> struct ms_parts;
template <class T> struct alignas(2 * sizeof(T)) ms_parts<T, 2> { T x, y; };
template <class T> struct alignas(4 * sizeof(T)) ms_parts<T, 3> { T x, y, z; };
template <class T> struct alignas(4 * sizeof(T)) ms_parts<T, 4> { T x, y, z, w; };
template <class T, int N> struct vec : ms_parts<T, N> {
  vec() = default;
  explicit(ms_real<T> && sizeof(T) == 2) vec(T s) { for (int i = 0; i < N; i++) (*this)[i] = s; }
  template <class U> explicit vec(const vec<U, N>& o) { for (int i = 0; i < N; i++) (*this)[i] = T(o[i]); }
  template <class A, class B, class... R> vec(A a, B b, R... r) { int i = 0; put(i, a); put(i, b); (put(i, r), ...); }
  T& operator[](int i) { return (&this->x)[i]; }
  const T& operator[](int i) const { return (&this->x)[i]; }

 private:
  template <class U, int M> void put(int& i, const vec<U, M>& v) { for (int k = 0; k < M; k++) (*this)[i++] = T(v[k]); }
  template <class U, std::enable_if_t<ms_scalar<U>, int> = 0> void put(int& i, U v) { (*this)[i++] = T(v); }
};
#define MS_OP(o) \
  template <class T, int N> vec<T, N> operator o(vec<T, N> a, const vec<T, N>& b) { for (int i = 0; i < N; i++) a[i] = a[i] o b[i]; return a; } \
  template <class T, int N, class S, std::enable_if_t<ms_scalar<S>, int> = 0> vec<T, N> operator o(vec<T, N> a, S s) { return a o vec<T, N>(T(s)); } \
  template <class T, int N, class S, std::enable_if_t<ms_scalar<S>, int> = 0> vec<T, N> operator o(S s, vec<T, N> a) { return vec<T, N>(T(s)) o a; } \
  template <class T, int N, class S> vec<T, N>& operator o##=(vec<T, N>& a, const S& s) { return a = a o s; }
MS_OP(+) MS_OP(-) MS_OP(*) MS_OP(/)
#undef MS_OP
#define MS_VECTORS(t) typedef vec<t, 2> t##2; typedef vec<t, 3> t##3; typedef vec<t, 4> t##4;
MS_VECTORS(float) MS_VECTORS(half) MS_VECTORS(bfloat) MS_VECTORS(int) MS_VECTORS(uint)
MS_VECTORS(ulong) MS_VECTORS(char) MS_VECTORS(uchar) MS_VECTORS(short) MS_VECTORS(ushort)
#undef MS_VECTORS
