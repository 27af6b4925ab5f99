"""The quantizer of GGUF's types, against llama.cpp's, with the `gguf` package as the reader of the blocks."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gguf import quants
from gguf.constants import GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_cpp import quantize_matrix, require_llama_cpp
from safetensors.torch import load_file

from llmrs.core.errors import ConfigError, LlmrsError, ModelError
from llmrs.quant.ggml import TYPES
from llmrs.quant.quantize import RECIPES, quantize
from llmrs.quant.quantizer_ops import NUMPY_OPS
from llmrs.quant.quantizer_torch import TorchOps

K_TYPES = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k")
DEMO = Path(__file__).parents[2] / "models" / "demo" / "files" / "model.safetensors"
REAL = ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.v_proj.weight",
        "model.layers.0.mlp.up_proj.weight", "model.layers.2.mlp.down_proj.weight")  # fmt: skip
NAN, INF = float("nan"), float("inf")


def gaussian(rows: int = 128, columns: int = 512, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.02, (rows, columns)).astype(np.float32)


def outliers() -> np.ndarray:
    x = gaussian()
    x[np.random.default_rng(1).random(x.shape) < 0.002] *= 20
    return x


def matrices() -> dict[str, np.ndarray]:
    rng, shape = np.random.default_rng(1), (128, 512)
    found = {
        "gauss": gaussian(),
        "t3": 0.02 * rng.standard_t(3, shape),
        "laplace": rng.laplace(0, 0.02, shape),
        "uniform": rng.uniform(-1, 1, shape),
        "outliers": outliers(),
        "columns": gaussian() * np.where(rng.random(shape[1]) < 0.01, 20, 1),
        "positive": np.abs(gaussian()) + 0.01,
        "positive groups": np.where(np.arange(512) // 32 % 2, np.abs(gaussian()) + 0.01, gaussian()),
    }
    demo = load_file(DEMO)
    for name in REAL:
        found[".".join(name.split(".")[1:-1])] = demo[name][:256].float().numpy()
    return {name: np.ascontiguousarray(x, np.float32) for name, x in found.items()}


def unpacked(blocks: np.ndarray, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    with np.errstate(over="ignore"):
        return quants.dequantize(blocks.reshape(shape[0], -1), GGMLQuantizationType(TYPES[kind].number))


def error(x: np.ndarray, y: np.ndarray, importance: np.ndarray | float = 1.0) -> float:
    """Root mean square of the difference, relative to that of x."""
    squares = np.square(y.astype(np.float64) - x) * importance
    return float(np.sqrt(squares.sum() / (np.square(x, dtype=np.float64) * importance).sum()))


def ours(x: np.ndarray, kind: str, importance: np.ndarray | None = None) -> np.ndarray:
    blocks = quantize(x, kind, importance)
    assert blocks.dtype == np.uint8
    assert blocks.shape == (len(x), TYPES[kind].nbytes((x.shape[1],)))
    return unpacked(blocks, kind, x.shape)


def theirs(x: np.ndarray, kind: str, importance: np.ndarray | None = None) -> np.ndarray:
    return unpacked(quantize_matrix(x, TYPES[kind].number, importance), kind, x.shape)


def test_errors_are_at_most_those_of_llama_cpp(capsys):
    require_llama_cpp()
    found, lines = matrices(), []
    ratios = {k: {n: error(x, ours(x, k)) / error(x, theirs(x, k)) for n, x in found.items()} for k in RECIPES}
    for name in found:
        lines.append(f"{name:25}" + "".join(f"{100 * (ratios[k][name] - 1):+8.2f}" for k in RECIPES))
    with capsys.disabled():
        print("\nroot mean square error against llama.cpp's, %\n" + " " * 25 + "".join(f"{k:>8}" for k in RECIPES))
        print("\n".join(lines))
    worse = {(k, n): r for k, row in ratios.items() for n, r in row.items() if r > 1}
    assert not worse


# Of llama.cpp 0.4.0 on gaussian().
THEIR_ERRORS = {
    "q4_0": 0.086234, "q4_1": 0.0782, "q5_0": 0.042783, "q5_1": 0.038039, "q8_0": 0.005368, "q2_k": 0.296097,
    "q3_k": 0.151486, "q4_k": 0.071469, "q5_k": 0.036272, "q6_k": 0.017801, "iq4_nl": 0.076489, "iq4_xs": 0.077032,
}  # fmt: skip


@pytest.mark.parametrize("kind", RECIPES)
def test_errors_are_at_most_those_that_llama_cpp_had(kind):
    assert error(gaussian(), ours(gaussian(), kind)) < THEIR_ERRORS[kind]


@pytest.mark.parametrize("kind", K_TYPES)
def test_the_recorded_errors_are_those_of_llama_cpp(kind):
    assert error(gaussian(), theirs(gaussian(), kind)) == pytest.approx(THEIR_ERRORS[kind], rel=1e-3)


@pytest.mark.parametrize("kind", RECIPES)
def test_importance_lowers_the_weighted_error(kind):
    x, importance = gaussian(), np.random.default_rng(2).lognormal(0, 1.5, 512).astype(np.float32)
    plain, weighted = ours(x, kind), ours(x, kind, importance)
    assert error(x, weighted, importance) < 0.95 * error(x, plain, importance)
    assert error(x, weighted) > error(x, plain)
    assert np.array_equal(quantize(x, kind, importance), quantize(x, kind, importance * 2.0**80))
    assert np.array_equal(quantize(x, kind, importance * 0), quantize(x, kind))


@pytest.mark.parametrize("kind", RECIPES)
def test_what_never_mattered_is_quantized_all_the_same(kind):
    x, importance = gaussian(), np.repeat(np.float32([1, 0]), 256)
    y = ours(x, kind, importance)
    assert error(x[:, 256:], y[:, 256:]) < 1.02 * THEIR_ERRORS[kind]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", RECIPES)
def test_bytes_depend_on_neither_chunks_nor_threads(kind, weighted, monkeypatch):
    x = outliers()[:20]
    importance = np.random.default_rng(2).lognormal(0, 1.5, 512).astype(np.float32) if weighted else None
    whole = quantize(x, kind, importance)
    assert np.array_equal(np.concatenate([quantize(row[None], kind, importance) for row in x]), whole)
    for chunk, threads in ((256, 1), (768, 3), (2**12, 4)):
        monkeypatch.setattr(NUMPY_OPS, "chunk", chunk)
        monkeypatch.setattr(os, "cpu_count", lambda threads=threads: threads)
        assert np.array_equal(quantize(x, kind, importance), whole)


@pytest.mark.parametrize("kind", RECIPES)
def test_torch_does_the_same(kind, monkeypatch):
    x, importance = outliers(), np.random.default_rng(2).lognormal(0, 1, 512).astype(np.float32)
    for counts in (None, importance):
        blocks = quantize(x, kind, counts, device="cpu")
        y = unpacked(blocks, kind, x.shape)
        of = 1.0 if counts is None else counts
        assert error(x, y, of) == pytest.approx(error(x, ours(x, kind, counts), of), rel=1e-3)
        monkeypatch.setattr(TorchOps, "chunk", 256)
        assert np.array_equal(quantize(x[:2], kind, counts, device="cpu"), blocks[:2])
        monkeypatch.undo()


SIZES = st.sampled_from([0.0, 1e-45, 1e-30, 1e-12, 6e-8, 1e-6, 1e-3, 1.0, 1e3, 65504.0, 1e6, 1e9, 1e20, 3.4e38])


@st.composite
def blocks_of_all_sizes(draw):
    """(1, 256): a few kinds of weights at a few sizes."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    low, high = draw(SIZES), draw(SIZES)
    spread = draw(st.sampled_from(["gauss", "constant", "one", "few", "positive"]))
    x = {
        "gauss": rng.normal(0, 0.3, 256),
        "constant": np.ones(256),
        "one": np.arange(256) == draw(st.integers(0, 255)),
        "few": rng.integers(-1, 2, 256),
        "positive": rng.random(256),
    }[spread].clip(-1, 1)
    size = np.where(rng.random(256) < draw(st.sampled_from([0.0, 0.01, 0.5])), low, high)
    return (x * size * draw(st.sampled_from([-1, 1]))).astype(np.float32)[None]


@pytest.mark.parametrize("kind", RECIPES)
@settings(max_examples=60, deadline=None)
@given(x=blocks_of_all_sizes(), weighted=st.booleans())
def test_any_finite_weights(kind, x, weighted):
    importance = np.arange(256, dtype=np.float32) if weighted else None
    y = ours(x, kind, importance).astype(np.float64)
    assert np.isfinite(y).all()
    if not weighted:
        assert np.square(y - x).sum() <= 1.001 * np.square(x, dtype=np.float64).sum()  # not worse than zeros
    assert np.array_equal(ours(x * 0, kind), x * 0)


@pytest.mark.parametrize("kind", RECIPES)
def test_constants(kind):
    for value in (1.0, -1.0, 0.37, -1e-4, 2000.0):
        x = np.full((2, 256), value, np.float32)
        assert error(x, ours(x, kind)) < 0.02


@pytest.mark.parametrize("kind", RECIPES)
def test_powers_of_two_change_only_the_scales(kind):
    x = gaussian(4)
    assert np.array_equal(ours(x * 4096, kind), ours(x * 64, kind) * 64)


@pytest.mark.parametrize("kind", RECIPES)
def test_what_is_too_large_saturates(kind):
    x = gaussian(2) * np.float32(1e36)
    y = ours(x, kind)
    large = np.abs(x) > 1e34
    assert (np.sign(y) == np.sign(x))[large].mean() > 0.5  # Q2_K has few levels
    assert np.abs(y).max() > 65504


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_weights_that_are_no_numbers_are_refused(value):
    x = gaussian(2)
    x[1, 300] = value
    with pytest.raises(ModelError, match="NaN or infinite"):
        quantize(x, "q4_k")
    with pytest.raises(ModelError, match="importance"):
        quantize(gaussian(2), "q4_k", x[1])


def test_numpy_is_enough():
    code = "import sys, llmrs.quant.quantize; assert not {'torch', 'mlx', 'gguf'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_wrong_calls_are_refused():
    with pytest.raises(ValueError, match="blocks of 256"):
        quantize(gaussian(2, 96), "q4_k")
    with pytest.raises(ValueError, match="blocks of 32"):
        quantize(gaussian(2, 48), "q8_0")
    with pytest.raises(ValueError, match="shape"):
        quantize(gaussian(2), "q4_k", np.ones(256, np.float32))
    with pytest.raises(ModelError, match="negative"):
        quantize(gaussian(2), "q4_k", -np.ones(512, np.float32))
    with pytest.raises(ConfigError, match=r"q4_m.*did you mean") as caught:
        quantize(gaussian(2), "q4_m")
    assert isinstance(caught.value, LlmrsError)
    assert quantize(gaussian(0), "q4_k").shape == (0, 288)
