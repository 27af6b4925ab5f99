"""quant_gemv, quant_gemm and quant_embed on blocks of the file formats, against the unpacked weights in float64."""

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")

from metal_cases import DTYPES, assert_found, kernels, without_barriers  # noqa: E402
from metal_mlx import Shim  # noqa: E402

from llmrs.backends.mlx import metal_rows as rows_module  # noqa: E402
from llmrs.backends.mlx import quant_matrix as matrix_module  # noqa: E402
from llmrs.backends.mlx.kernels import quant  # noqa: E402
from llmrs.backends.mlx.kernels.launch import Kernels  # noqa: E402
from llmrs.backends.mlx.metal_rows import MetalRows, metal_rows, packer, supports  # noqa: E402
from llmrs.backends.mlx.quant_matrix import packed_rows  # noqa: E402
from llmrs.backends.testing import FORMS  # noqa: E402
from llmrs.core.errors import BackendError  # noqa: E402
from llmrs.quant.form import Form  # noqa: E402
from llmrs.quant.ggml import TYPES, tensor  # noqa: E402
from llmrs.quant.tensor import QuantTensor  # noqa: E402
from llmrs.random_model import random_quantized  # noqa: E402

HALVES = {  # offsets of the f16 fields in a block
    "q4_0": (0,), "q4_1": (0, 2), "q5_0": (0,), "q5_1": (0, 2), "q8_0": (0,), "q2_k": (80, 82), "q3_k": (108,),
    "q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,), "iq4_nl": (0,), "iq4_xs": (0,), "mxfp4": (),
}  # fmt: skip
EXTREMES = [0, -0.0, 6e-8, -6.1e-5, 1.0, 65504]
FILES = [t.format.form for t in TYPES.values() if t.format]
FORMS_OF_FOLDERS = [pair for forms in FORMS for pair in forms if pair[0] not in FILES]
CHANNEL = (Form("affine", "u8", 256, "bf16", 128), ())  # a scale per row
OTHERS = {"+".join((str(form), *more)): (form, more) for form, more in (*FORMS_OF_FOLDERS, CHANNEL)}
ROUNDING = {mx.float32: 2**-24, mx.float16: 2**-11, mx.bfloat16: 2**-8}


def blocks(name: str, rows: int, columns: int, extremes=EXTREMES) -> QuantTensor:
    """Random blocks; the first rows with extreme scales, and of zeros alone."""
    t, rng = TYPES[name], np.random.default_rng(rows + columns)
    data = rng.integers(0, 256, (rows, columns // t.block, t.block_bytes), np.uint8)
    for at in HALVES[name]:
        scales = rng.normal(0, 0.01, data.shape[:2])
        scales[: rows // 2] = rng.choice(extremes, (rows // 2, data.shape[1]))
        data[:, :, at : at + 2] = scales.astype("<f2").view(np.uint8).reshape(*data.shape[:2], 2)
    if name == "mxfp4":
        data[:, :, 0] = rng.integers(100, 150, data.shape[:2])
    data[0] = 0
    made = tensor(t, (rows, columns), data.reshape(-1))
    assert isinstance(made, QuantTensor)
    return made


def weights(name: str, rows: int, columns: int, dtype) -> QuantTensor:
    """For activations of this dtype."""
    if name in HALVES:
        return blocks(name, rows, columns, EXTREMES[:-1] if dtype == mx.float16 else EXTREMES)
    form, more = OTHERS[name]
    columns = form.group if form == CHANNEL[0] else columns
    return random_quantized(np.random.default_rng(rows), form, more, (rows, columns))


def packed(tensor: QuantTensor, mutate=None) -> MetalRows:
    rows = packed_rows(tensor)
    assert supports(rows)
    return metal_rows(rows, kernels(mutate))


def activations(w: np.ndarray, count: int, dtype) -> mx.array:
    """(count, K), such that results fit float16."""
    x = np.random.default_rng(count).normal(size=(count, w.shape[1]))
    if dtype == mx.float16:
        x *= 1000 / np.abs(x @ w.T).max()
    return mx.array(x.astype(np.float32)).astype(dtype)


def float64(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32)).astype(np.float64)


def assert_products(got: mx.array, x: mx.array, w: np.ndarray) -> None:
    """x w^T, rounded once from float32 sums; `w`: (N, K), or one matrix per row of x."""
    assert got.dtype == x.dtype
    assert np.isfinite(float64(got)).all()
    expected, size = float64(x) @ w.swapaxes(-1, -2), np.abs(float64(x)) @ np.abs(w).swapaxes(-1, -2)
    error = np.abs(float64(got) - expected)
    limit = (
        1e-6 * size + ROUNDING[x.dtype] * np.abs(expected) + (2.0**-25 if x.dtype == mx.float16 else 0)
    )  # subnormals
    assert (error <= limit).all(), (error - limit).max()


def gemv(name="q4_k", m=1, dtype=mx.float32, rows=11, columns=1280, mutate=None):
    w = weights(name, rows, columns, dtype)
    x, ours = activations(w.float32(), m, dtype), packed(w, mutate)
    assert_products(quant.gemv(ours.kernels, x, ours.weight), x, w.float32().astype(np.float64))


def gemm(name="q4_k", m=33, dtype=mx.float32, rows=71, columns=256, mutate=None):
    w = weights(name, rows, columns, dtype)
    x, ours = activations(w.float32(), m, dtype), packed(w, mutate)
    assert_products(quant.gemm(ours.kernels, x, ours.weight), x, float64(mx.array(w.float32()).astype(dtype)))


def embed(name="q4_k", dtype=mx.float32, rows=11, columns=512, mutate=None):
    w, index = weights(name, rows, columns, dtype), [3, 0, rows - 1, 3]
    got, expected = packed(w, mutate).gather(mx.array(index), dtype), mx.array(w.float32()[index]).astype(dtype)
    assert got.dtype == dtype
    if mx.metal.is_available():  # which may round a product and a sum at once
        assert mx.allclose(got, expected, rtol=4 * ROUNDING[dtype])
    else:
        np.testing.assert_array_equal(float64(got), float64(expected))


def experts(name="q4_k", shared=True, dtype=mx.float32, rows=9, run=quant.gather_gemv, tokens=3, mutate=None):
    """Two of four experts for each token; none for the last expert but one."""
    chosen = np.random.default_rng(tokens).permuted(np.tile([0, 1, 3], (tokens, 1)), axis=1)[:, :2]
    w = weights(name, 4 * rows, 256, dtype)
    x = activations(w.float32(), tokens * (1 if shared else 2), dtype).reshape(tokens, -1, 256)
    ours = packed(w, mutate)
    got = run(ours.kernels, x, ours.weight, 4, mx.array(chosen))
    assert got.shape == (tokens, 2, rows)
    exact = w.float32().astype(np.float64) if run is quant.gather_gemv else float64(mx.array(w.float32()).astype(dtype))
    each = mx.broadcast_to(x, (tokens, 2, 256)).reshape(-1, 1, 256)
    assert_products(got.reshape(-1, 1, rows), each, exact.reshape(4, rows, 256)[chosen.ravel()])


def many(*arguments, rows=67, **options):
    experts(*arguments, rows=rows, run=quant.gather_gemm, tokens=60, **options)


needs_shim = pytest.mark.skipif(mx.metal.is_available(), reason="counts calls of the shim")
EVERY = pytest.mark.parametrize("name", [*HALVES, *OTHERS])


@EVERY
def test_gemv(name):
    gemv(name)


@EVERY
def test_gemm(name):
    gemm(name)


@EVERY
def test_embed(name):
    embed(name)


@pytest.mark.parametrize("m", range(1, quant.MAX_GEMV_M + 1))
def test_gemv_of_some_rows(m):
    gemv("q5_k", m, [mx.bfloat16, mx.float16, mx.float32][m % 3], rows=5, columns=768)


@pytest.mark.parametrize("name", ["q4_k", "q3_k", "q8_0", "iq4_nl"])
def test_gemv_of_four_rows_per_simdgroup(monkeypatch, name):
    monkeypatch.setattr(quant, "MIN_N_FOUR", 1)
    gemv(name)
    experts(name)


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize(("name", "columns"), [("q8_0", 1056), ("q6_k", 256)])
def test_types(name, columns, dtype):
    gemv(name, dtype=DTYPES[dtype], columns=columns)
    gemm(name, dtype=DTYPES[dtype], columns=columns if columns < 1000 else 96)
    embed(name, dtype=DTYPES[dtype], columns=columns)
    experts(name, dtype=DTYPES[dtype])
    many(name, dtype=DTYPES[dtype])


@pytest.mark.parametrize(("m", "rows"), [(9, 1), (32, 64), (65, 130)])
def test_gemm_shapes(m, rows):
    gemm("q4_k", m, rows=rows, columns=2048 if rows == 1 else 256)


@pytest.mark.parametrize("name", ["q4_k", "iq4_xs"])
def test_experts(name):
    for run in (experts, many):
        run(name, shared=True)
        run(name, shared=False)


@needs_shim
def test_few_and_many_rows_per_expert():
    w, shim = packed_rows(weights("q6_k", 4 * 9, 256, mx.float32)), Shim()
    rows = metal_rows(w, Kernels(shim))
    for tokens, kernel in ((16, "gemv"), (17, "gemm")):
        x, chosen = mx.random.normal((tokens, 1, 1, 256)), mx.random.randint(0, 4, (tokens, 2))
        got, expected = (r.gather_matmul(x, 4, chosen) for r in (rows, w))
        assert mx.allclose(got, expected, atol=1e-5 * mx.abs(expected).max().item())
        assert shim.calls[-1] == f"llmrs_quant_{kernel}"


@needs_shim
def test_every_number_of_rows(monkeypatch):
    """1 to 8 rows by quant_gemv, up to MAX_GEMM_M by quant_gemm, more by unpacked slices."""
    monkeypatch.setattr(rows_module, "MAX_GEMM_M", 16)
    monkeypatch.setattr(matrix_module, "SLICE_WEIGHTS", 2048)
    w = weights("q6_k", 19, 256, mx.float32)
    shim = Shim()
    rows = metal_rows(packed_rows(w), Kernels(shim))
    for m, kernel in ((1, "gemv"), (8, "gemv"), (9, "gemm"), (16, "gemm"), (17, "embed")):
        x = activations(w.float32(), m, mx.float32)
        assert_products(rows.linear(x[None])[0], x, w.float32().astype(np.float64))
        assert shim.calls[-1] == f"llmrs_quant_{kernel}"


@pytest.mark.parametrize("name", HALVES)
def test_planes_have_the_size_of_the_file(name):
    w = weights(name, 16, 512, mx.float32)
    rows = packed(w)
    assert sum(p.nbytes for n, p in rows.planes.items() if n != "table") <= 1.05 * w.nbytes


def test_what_the_kernels_take():
    """MLX's own kernels stay where they read the planes as they are; rows of other shapes are unpacked by MLX's ops."""
    pack = packer(kernels())
    native = packed_rows(weights("affine[u4, 64, bf16]+biases", 8, 256, mx.float32))
    assert pack(native, mx.bfloat16) == native
    for dtype in (mx.float16, mx.float32):  # MLX would convert the scales
        assert isinstance(pack(native, dtype), MetalRows)
    for files in (blocks("mxfp4", 8, 256), weights("fp4[e2m1, 32, e8m0]", 8, 256, mx.float32)):
        rows = pack(packed_rows(files), mx.bfloat16)
        assert not isinstance(rows, MetalRows)
        assert rows.native(mx.bfloat16)
        np.testing.assert_array_equal(np.array(rows.unpack(mx.float32)), files.float32())
    few = packed_rows(blocks("q6_k", 3, 256))
    assert pack(few, mx.float32) == few  # 3 super-scales


MUTATIONS = [
    (gemv, "q4_k", "column += 1024", "column += 1056"),
    (gemv, "q4_k", "simd_sum(acc[m * ROWS + r])", "acc[m * ROWS + r]"),
    (gemv, "q4_k", "first + r < count", "true"),
    (gemv, "q4_k", "(stack + min(first + r, count - 1)) *", "(stack + first + r) *"),
    (gemv, "q6_k", "(GROUP ? begin / GROUP : 0)", "(GROUP ? column / GROUP : 0)"),
    (gemv, "q6_k", "+ piece] : HIGH", "] : HIGH"),
    (gemv, "q5_k", ">> (8 * piece)", ">> (4 * piece)"),
    (gemv, "q4_k", "+ begin + 4 * part)", "+ column + 4 * part)"),
    (experts, "q4_k", "z / SHARE", "z % 2"),
    (experts, "q4_k", "size_t(experts[z]) * count", "size_t(experts[z] + 1) * count"),
    (experts, "q4_k", "size_t(experts[z]) * count", "size_t(experts[0]) * count"),
    (many, "q4_k", "order[token]) / SHARE", "order[token])"),
    (many, "q4_k", "+ BM - 1) / BM", ") / BM"),
    (many, "q4_k", "if (first_token < end) break;", "if (first_token <= end) break;"),
    (many, "q4_k", "if (expert == experts) return;", ""),
    (many, "q4_k", "size_t(expert) * count", "size_t(0) * count"),
    (many, "q4_k", "uint(order[m]) : m", "m : m"),
    (gemm, "q4_k", "min(first_row + tid / 2, count - 1)", "first_row + tid / 2"),
    (gemm, "q4_k", "min(first_token + x_row, end - 1)", "first_token + x_row"),
    (gemm, "q4_k", "ulong2(0, 0), true", "ulong2(0, 0), false"),
    (gemm, "q4_k", "m < end", "true"),
    (gemm, "q4_k", "n + e < count", "n < count"),
    (gemm, "q4_k", "left[i / 4], right[i % 4]", "left[i % 2], right[i % 4]"),
    (gemm, "q5_k", "piece * 8", "piece * 4"),
    (gemm, "q6_k", "column / GROUP", "k / GROUP"),
    (embed, "q4_k", "index[token]", "index[0]"),
    (embed, "q5_k", "piece % 2 * 8", "piece % 2 * 4"),
    (embed, "q6_k", "LOW * (j + 1)", "LOW * j"),
    (embed, "q6_k", "at < LOW ? 0 : at - LOW", "at < LOW ? 0 : at - LOW + 1"),
    (embed, "q6_k", "t % PER_SHIFT * HIGH", "t % PER_SHIFT"),
    (embed, "q4_k", "offset *= -float(pair.y)", "offset *= float(pair.y)"),
    (embed, "q4_k", "i + 2 * PER_BYTE", "i + PER_BYTE"),
    (embed, "q8_0", "zero * float(1 << (LOW * j))", "zero * float(1 << j) + 1"),
    (embed, "q4_0", "zero * float(1 << (LOW * j))", "zero"),
    (embed, "q2_k", "float(uint(s) & 15u)", "float(uint(s))"),
    (embed, "iq4_xs", "& 15u] * group.x", "& 7u] * group.x"),
    (embed, "mxfp4", "SCALE == E8M0 ? 1u : 0u", "1u"),
    (embed, "fp8[e4m3, 32, e8m0]", "scale *= 256.0f", "scale *= 128.0f"),
    *((run, "iq4_nl", *p.values) for run in (gemv, gemm, embed) for p in without_barriers(f"quant_{run.__name__}")),
]


@pytest.mark.parametrize(("run", "name", "old", "new"), MUTATIONS)
def test_a_mutated_kernel_fails(run, name, old, new):
    options = {"columns": 1280} if run is gemv else {}
    assert_found(old, new, lambda mutate: run(name, **options, mutate=mutate))


def test_the_launchers_check_their_arguments():
    w = packed(weights("q4_k", 11, 256, mx.float32))
    for run, x, message in (
        (quant.gemv, mx.zeros((9, 256)), "9 rows of x"),
        (quant.gemv, mx.zeros((1, 512)), r"x has shape \(1, 512\), not \(1, 256\)"),
        (quant.gemm, mx.zeros((9, 256), mx.int32), "x is mlx.core.int32"),
    ):
        with pytest.raises(BackendError, match=message):
            run(w.kernels, x, w.weight)
