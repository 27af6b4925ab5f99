"""The shim: results as on a GPU, and reports of errors that a GPU hides."""

import numpy as np
import pytest
from metal_source import MetalError, translate
from metalshim import Kernel

HEAD = """
template <typename T, int N>
[[kernel]] void k(
  const device float* x [[buffer(0)]],
  const constant int* x_shape [[buffer(1)]],
  device float* y [[buffer(2)]],
  uint thread_index_in_threadgroup [[thread_index_in_threadgroup]],
  uint thread_index_in_simdgroup [[thread_index_in_simdgroup]],
  uint simdgroup_index_in_threadgroup [[simdgroup_index_in_threadgroup]],
  uint3 thread_position_in_grid [[thread_position_in_grid]]) {
  const uint i = thread_position_in_grid.x, lane = thread_index_in_simdgroup;
"""
TAIL = '\n}\ntemplate [[host_name("k")]] [[kernel]] decltype(k<float, 64>) k<float, 64>;\n'


def kernel(body, header=""):
    return Kernel(header + HEAD + body + TAIL)


def run(body, x=None, size=64, header=""):
    x = np.arange(64, dtype=np.float32) if x is None else x
    y = np.empty(size, np.float32)
    kernel(body, header).run({"x": x, "y": y}, ["y"], (64, 1, 1), (64, 1, 1))
    return y


REVERSE = """
  threadgroup float shared[N];
  shared[i] = x[i];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  y[i] = shared[N - 1 - i];
"""

WITHIN = """
  threadgroup float shared[N];
  shared[i] = x[i];
  float s = simd_sum(x[i]);
  simdgroup_barrier(mem_flags::mem_threadgroup);
  y[i] = shared[i ^ 31] + 0.0f * s;
"""


def test_threadgroup_memory_and_barriers():
    np.testing.assert_array_equal(run(WITHIN), np.arange(64).reshape(2, 32)[:, ::-1].ravel())
    np.testing.assert_array_equal(run(REVERSE), np.arange(64)[::-1])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("y[i] = x[i + 1];", r"x\[64\] is out of bounds, it has 64 elements; thread \(63, 0, 0\)"),
        ("y[i + 1] = x[i];", r"y\[64\] is out of bounds"),
        ("y[i] = x[i - 1];", r"x\[4294967295\] is out of bounds"),
        ("const device float* p = x + 60; y[i] = p[i / 8];", r"x\[64\] is out of bounds"),
        ("const device float4* p = reinterpret_cast<const device float4*>(x + 2); y[i] = p[0].x;", "not aligned"),
        ("y[i] = x[i] + x_shape[1];", r"x_shape\[1\] is out of bounds"),
        (REVERSE.replace("N - 1 - i", "N - i"), r"shared\[64\] is out of bounds"),
        ("float a[4] = {0, 0, 0, 0}; y[i] = a[i];", "index 4 of a thread's array is out of bounds"),
        ("y[i] = x[i] + float(1 << i);", "shift by 32"),
        (REVERSE.replace("threadgroup_barrier", "// "), r"shared\[\d+\]: one thread writes it and another one"),
        (REVERSE.replace("mem_threadgroup", "mem_device"), r"shared\[\d+\]: one thread writes it and another one"),
        (WITHIN.replace("mem_threadgroup", "mem_none"), r"shared\[\d+\]: one thread writes it and another one"),
        (WITHIN.replace("simdgroup_barrier", "// "), r"shared\[\d+\]: one thread writes it and another one"),
        (
            REVERSE.replace("threadgroup_barrier", "if (i < 32) threadgroup_barrier"),
            "a thread returned while others wait|without a barrier",
        ),
        (
            REVERSE + "if (i < 32) threadgroup_barrier(mem_flags::mem_threadgroup); else\nthreadgroup_barrier"
            "(mem_flags::mem_threadgroup);",
            "divergent barriers",
        ),
        ("if (i == 3) return;" + REVERSE, "a thread returned while others wait"),
        (
            "float s = x[i]; if (lane < 7) s = simd_sum(s); else\n s = simd_sum(s); y[i] = s;",
            "divergent simdgroup operations",
        ),
        (
            "float s = x[i]; if (i < 7) s = simd_sum(s); threadgroup_barrier(mem_flags::mem_none); y[i] = s;",
            "divergent control",
        ),
        ("if (i > 2) y[i] = x[i];", r"y\[0\] and 2 more were never written"),
        (
            REVERSE.replace("shared[i] = x[i];", "if (i > 2) shared[i] = x[i];"),
            "depend on the order of the threads or on memory",
        ),
        ("for (;;) simdgroup_barrier(mem_flags::mem_none);", "a loop without an end"),
        ("threadgroup float a[8193]; a[i] = 0; y[i] = a[i];", "more than 32768 bytes"),
    ],
)
def test_what_goes_wrong_is_reported(body, message):
    with pytest.raises(MetalError, match=message):
        run(body)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("const float* p = 0; y[i] = 1;", "missing address space"),
        ("float& p = y[i];", "missing address space"),
        ("T* p = y;", "missing address space"),
        ("double a = 1; y[i] = a;", "no double"),
        ("y[i] = std::exp(x[i]);", "no standard library"),
        ("static int n = 0; y[i] = n;", "static"),
        ("[[likely]] y[i] = 1;", r"unknown attribute \[\[likely\]\]"),
        ("threadgroup float a[2][2]; y[i] = 1;", "one-dimensional"),
        ("device float a = 1; y[i] = a;", "device address space"),
        ("auto f = [&](int a) { return a; }; y[i] = f(1);", "lambdas"),
        ("int n = x_shape[0]; float a[n]; y[i] = a[0];", "variable length array"),
        ("int n = x_shape[0]; threadgroup float a[n]; a[i] = 1; y[i] = 2;", "not usable in a constant expression"),
        ("threadgroup float a[N]; const device float* p = a; y[i] = p[i];", "conversion"),
        ("half h = x[i]; y[i] = h;", "conversion"),
        ("y[i] = 1.5;", "double; say 1.5f"),
        ("y[i] = 1e3 * x[i];", "double; say 1e3f"),
        ("y[i] = 0x1p-3f;", "hexadecimal"),
        ("x[i] = 1; y[i] = 1;", "read-only"),
    ],
)
def test_what_is_no_metal_is_refused(body, message):
    with pytest.raises(MetalError, match=message):
        run(body)


def test_unknown_attribute_of_a_parameter():
    with pytest.raises(MetalError, match="unknown attribute"):
        translate(HEAD.replace("[[thread_index_in_simdgroup]]", "[[lane]]") + TAIL)


def test_simdgroup_operations():
    x = np.random.default_rng(0).integers(-50, 50, 64).astype(np.float32)
    half = x.reshape(2, 32)
    for body, expected in {
        "simd_sum(x[i])": np.repeat(half.sum(1), 32),
        "simd_max(x[i])": np.repeat(half.max(1), 32),
        "simd_min(x[i])": np.repeat(half.min(1), 32),
        "simd_shuffle_xor(x[i], 5)": x[np.arange(64) ^ 5],
        "simd_shuffle(x[i], 31 - lane)": half[:, ::-1].ravel(),
        "simd_broadcast(x[i], 7)": np.repeat(half[:, 7], 32),
        "simd_broadcast_first(x[i])": np.repeat(half[:, 0], 32),
        "simd_prefix_exclusive_sum(x[i])": (half.cumsum(1) - half).ravel(),
        "simd_prefix_inclusive_sum(x[i])": half.cumsum(1).ravel(),
        "simd_any(x[i] == 49.0f) ? 1 : 0": np.repeat((half == 49).any(1), 32),
    }.items():
        np.testing.assert_array_equal(run(f"y[i] = {body};", x), expected, err_msg=body)


def test_matrices_multiply():
    body = """
      simdgroup_float8x8 a, b, c = make_filled_simdgroup_matrix<float, 8, 8>(1.0f);
      simdgroup_load(a, x, 8);
      simdgroup_load(b, x, 8, ulong2(0, 0), true);
      simdgroup_multiply_accumulate(c, a, b, c);
      simdgroup_store(c, y, 8);
    """
    x = np.random.default_rng(0).integers(-5, 5, 64).astype(np.float32)
    y = np.empty(64, np.float32)
    kernel(body).run({"x": x, "y": y}, ["y"], (32, 1, 1), (32, 1, 1))
    m = x.reshape(8, 8)
    np.testing.assert_array_equal(y.reshape(8, 8), 1 + m @ m.T)


@pytest.mark.filterwarnings("ignore:overflow")
def test_half_and_bfloat_round_to_nearest_even():
    x = np.random.default_rng(0).normal(size=64).astype(np.float32)
    x[:4] = 1 + 2.0**-11, 1 + 3 * 2.0**-11, 65520, 1e-8
    np.testing.assert_array_equal(run("y[i] = half(x[i]);", x), x.astype(np.float16).astype(np.float32))
    bits = x.view(np.uint32).astype(np.uint64)
    bits = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16).astype(np.uint32)
    np.testing.assert_array_equal(run("y[i] = bfloat(x[i]);", x), bits.view(np.float32))
    product = (x.astype(np.float16) * x.astype(np.float16)).astype(np.float32)
    np.testing.assert_array_equal(run("half h = half(x[i]); y[i] = h * h;", x), product)


def test_headers_constants_functions_and_atomics():
    header = """
    constant float OFFSET = 1;
    template <typename T> inline T twice(const device T* p, uint i) { return p[i] + p[i]; }
    inline void bump(threadgroup atomic_uint* n) { atomic_fetch_add_explicit(n, 1u, memory_order_relaxed); }
    """
    body = """
      threadgroup atomic_uint n[1];
      if (i == 0) atomic_store_explicit(n, 0u, memory_order_relaxed);
      threadgroup_barrier(mem_flags::mem_threadgroup);
      bump(n);
      threadgroup_barrier(mem_flags::mem_threadgroup);
      y[i] = twice(x, i) + OFFSET + float(atomic_load_explicit(n, memory_order_relaxed));
    """
    np.testing.assert_array_equal(run(body, header=header), np.arange(64) * 2 + 65)
