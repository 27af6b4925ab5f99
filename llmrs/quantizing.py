"""In-situ quantization: weights are quantized when they are accessed."""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import cache

import numpy as np

from llmrs.core.errors import ModelError
from llmrs.models.arch.config import ModelConfig
from llmrs.quant import ggml
from llmrs.quant.fp8 import fp8
from llmrs.quant.quantize import RECIPES, quantize
from llmrs.quant.rounding import quantize_fp8, quantize_mlx, to_format
from llmrs.quant.schemes import FP8_BLOCK, SCHEMES, ModelShape, Scheme, plan
from llmrs.quant.tensor import FORMATS, AnyTensor, QuantTensor, Stored, Tensor

Importance = Mapping[str, np.ndarray]  # canonical name -> mean squares of a matrix's inputs, float32 (K,)
OnTensor = Callable[[str, AnyTensor, AnyTensor], None]  # name, before, after
CHUNK = 2**22  # weights that the quantizer of GGUF types gets at once; it has threads of its own
GPU_CHUNK, GPU_THREADS = 2**22, 4  # one thread packs blocks while the GPU fits another's
PER_THREAD = 2**19  # weights that a thread converts to other types at once
ADVISED = ("q8_0", "q6k", "q5k", "q4k", "q3k", "q2k")  # where a model does not fit, the most bits first
SAMPLE = 2**21  # weights of a matrix whose error is measured


class QuantizedWeights(Mapping[str, AnyTensor]):
    """The weights of a model in the types of a scheme. Each access quantizes; nothing is kept."""

    def __init__(
        self, weights: Mapping[str, AnyTensor], types: Mapping[str, str | None], importance: Importance | None = None,
        on_tensor: OnTensor = lambda name, before, after: None, device: str | None = None,
    ) -> None:  # fmt: skip
        """`types`: of `plan_types`. `device`: of `convert`."""
        self.weights, self.types, self.importance = weights, types, importance or {}
        self.on_tensor, self.device = on_tensor, device

    def __getitem__(self, name: str) -> AnyTensor:
        before, kind = self.weights[name], self.types[name]
        after = before if kind is None else convert(before, kind, self.importance.get(name), self.device)
        self.on_tensor(name, before, after)
        return after

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


def plan_types(scheme: Scheme, config: ModelConfig, stored: Mapping[str, Stored]) -> dict[str, str | None]:
    """The type of each weight, None: as it is. Warns once where blocks do not divide the rows.

    `stored`: what the file holds, of `Weights.stored`. Weights that have no more bits than their type in the scheme
    stay as they are. Raises ModelError where one has no more bits than the scheme's main type: it is quantized already.
    """
    types = plan(scheme, {name: s.shape for name, s in stored.items()}, model_shape(config))
    return _unless_quantized(scheme, types, stored)


def smaller(config: ModelConfig, stored: Mapping[str, Stored]) -> Iterator[tuple[str, dict[str, Stored]]]:
    """Recipes that the weights have not been quantized to already, the most bits first, and what they give."""
    shape = model_shape(config)
    for scheme in map(SCHEMES.__getitem__, ADVISED):
        types = {n: scheme.type_of(n, s.shape[-1], shape)[0] if s.shape[1:] else None for n, s in stored.items()}
        with suppress(ModelError):
            yield scheme.name, quantized(stored, _unless_quantized(scheme, types, stored))


def _unless_quantized(
    scheme: Scheme, types: Mapping[str, str | None], stored: Mapping[str, Stored]
) -> dict[str, str | None]:
    """`types` without those of weights that have no more bits already. Raises as `plan_types`."""
    found = dict(types)
    for name, kind in types.items():
        s = stored[name]
        if kind is None or s.is_dense or bits_per_weight(s) > bits_of(kind):
            continue
        if kind.startswith(scheme.type):
            problem = f"{name} is quantized already, in {s.format}: {scheme.name} would only add errors"
            raise ModelError(problem, "leave out quant, or give the model in bf16, f16 or with more bits")
        found[name] = None
    return found


def quantized(stored: Mapping[str, Stored], types: Mapping[str, str | None]) -> dict[str, Stored]:
    """What `QuantizedWeights` gives."""
    return {name: s if types[name] is None else _result(s, str(types[name])) for name, s in stored.items()}


def _result(s: Stored, kind: str) -> Stored:
    if kind in ggml.TYPES:
        return ggml.stored(ggml.TYPES[kind], s.shape)
    rows, columns = s.shape
    return Stored(kind, s.shape, rows * _row_bytes(kind, s.format if s.is_dense else "bf16", columns))


@cache
def _row_bytes(kind: str, scales: str, columns: int) -> int:
    return _converted(np.zeros((1, columns), np.float32), kind, scales).nbytes


def bits_per_weight(s: Stored) -> float:
    """Bits per weight of a matrix in its file."""
    return bits_of(s.format) if s.format in ggml.TYPES else 8 * s.nbytes / math.prod(s.shape)


def model_shape(c: ModelConfig) -> ModelShape:
    grouped = c.num_heads != c.num_kv_heads or c.architecture == "Qwen2ForCausalLM"
    is_70b = len(c.layer_kinds) == 80 and grouped and c.name in ("llama", "mistral", "qwen2")
    experts = c.experts.num_experts if c.experts else 0
    return ModelShape(len(c.layer_kinds), c.num_heads, c.num_kv_heads, experts, c.tie_word_embeddings, is_70b)


def convert(tensor: AnyTensor, kind: str, importance: np.ndarray | None = None, device: str | None = None) -> AnyTensor:
    """The tensor in another type: a name of quant/ggml.py, mlx<bits>_g<group>, or fp8.

    `device`: a GPU of Torch for the types of `quantize`; a few bytes in 10,000 are others than without it.
    """
    if tensor.format == kind:
        return tensor
    scales = tensor.format if isinstance(tensor, Tensor) else "bf16"
    threads, size = os.cpu_count() or 1, PER_THREAD
    if kind in RECIPES:
        threads, size = (GPU_THREADS, GPU_CHUNK) if device else (1, CHUNK)
    step = max(size // tensor.shape[-1] // FP8_BLOCK, 1) * FP8_BLOCK  # rows: whole blocks

    def part(begin: int) -> AnyTensor:
        return _converted(tensor.rows(slice(begin, begin + step)).float32(), kind, scales, importance, device)

    with ThreadPoolExecutor(threads) as pool:
        return _joined(list(pool.map(part, range(0, tensor.shape[0], step))))


def _converted(
    x: np.ndarray, kind: str, scales: str, importance: np.ndarray | None = None, device: str | None = None
) -> AnyTensor:
    """`scales`: dtype of MLX's scales."""
    if kind in FORMATS:
        return to_format(x, kind)
    if kind == "fp8":
        codes, factors = quantize_fp8(x, FP8_BLOCK)
        return fp8("fp8", codes, Tensor("f32", factors.shape, factors), (FP8_BLOCK, FP8_BLOCK))
    if not kind.startswith("mlx"):
        blocks = quantize(x, kind, importance, device)
        return ggml.tensor(ggml.TYPES[kind], x.shape, blocks.reshape(-1))
    bits, group = (int(n) for n in kind.removeprefix("mlx").split("_g"))
    return quantize_mlx(x, bits, group, scales)


def _joined(parts: Sequence[AnyTensor]) -> AnyTensor:
    """Rows of one tensor, in one type."""
    first = parts[0]
    if len(parts) == 1:
        return first
    rows = sum(p.shape[0] for p in parts)
    if isinstance(first, Tensor):
        data = np.concatenate([p.data for p in parts if isinstance(p, Tensor)])
        return Tensor(first.format, data.shape, data)
    packed = [p.arrays for p in parts if isinstance(p, QuantTensor)]
    return replace(
        first, shape=(rows, first.shape[1]), arrays={n: np.concatenate([a[n] for a in packed]) for n in first.arrays}
    )


def bits_of(kind: str) -> float:
    """Bits per weight of a type."""
    if kind in ggml.TYPES:
        return 8 * ggml.TYPES[kind].block_bytes / ggml.TYPES[kind].block
    if kind == "fp8":
        return 8 + 32 / FP8_BLOCK  # as in memory, where each row has its scales
    bits, group = (int(n) for n in kind.removeprefix("mlx").split("_g"))
    return bits + 32 / group


def squared_error(before: AnyTensor, after: AnyTensor) -> tuple[float, float]:
    """Sums over a sample of the rows: of the squares of the weights, and of the differences."""
    rows, columns = before.shape
    sample = slice(None, None, -(-rows * columns // SAMPLE))
    x, y = (t.rows(sample).float32() for t in (before, after))
    return float(np.square(x, dtype=np.float64).sum()), float(np.square(x - y, dtype=np.float64).sum())
