"""In-situ quantization: weights are quantized when they are accessed."""

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from llmrs.core.errors import ModelError
from llmrs.core.ir import Graph
from llmrs.models.arch.config import ModelConfig
from llmrs.quant import ggml
from llmrs.quant.fp8 import fp8
from llmrs.quant.quantize import quantize
from llmrs.quant.rounding import quantize_fp8, quantize_mlx, to_format
from llmrs.quant.schemes import FP8_BLOCK, ModelShape, Scheme, plan
from llmrs.quant.tensor import FORMATS, AnyTensor, QuantTensor, Tensor

Importance = Mapping[str, np.ndarray]  # canonical name -> mean squares of a matrix's inputs, float32 (K,)
OnTensor = Callable[[str, AnyTensor, AnyTensor], None]  # name, before, after
CHUNK = 2**24  # weights quantized at once


class QuantizedWeights(Mapping[str, AnyTensor]):
    """The weights of a model in the types of a scheme. Each access quantizes; only the last tensor is kept."""

    def __init__(
        self, weights: Mapping[str, AnyTensor], types: Mapping[str, str | None], importance: Importance | None = None,
        on_tensor: OnTensor = lambda name, before, after: None,
    ) -> None:  # fmt: skip
        """`types`: of `plan_types`."""
        self.weights, self.types, self.importance = weights, types, importance or {}
        self.on_tensor = on_tensor
        self.last: tuple[str, AnyTensor] | None = None

    def __getitem__(self, name: str) -> AnyTensor:
        if self.last is None or self.last[0] != name:
            self.last = None  # frees it first
            before, kind = self.weights[name], self.types[name]
            after = before if kind is None else convert(before, kind, self.importance.get(name))
            self.last = name, after
            self.on_tensor(name, before, after)
        return self.last[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


def plan_types(
    scheme: Scheme, config: ModelConfig, graph: Graph, weights: Mapping[str, AnyTensor] | None = None
) -> dict[str, str | None]:
    """The type of each weight, None: as it is. Warns once where blocks do not divide the rows.

    Weights of the file that have no more bits than their type in the scheme stay as they are. Raises ModelError where
    one has no more bits than the scheme's main type: it is quantized already.
    """
    shapes = {s.tensor: (s.rows, *w.columns) for w in graph.weights() for s in w.segments}
    types = plan(scheme, shapes, model_shape(config))
    for name in types if weights is not None else ():
        kind, stored = types[name], weights[name]
        if kind is None or not isinstance(stored, QuantTensor):
            continue
        bits = 8 * stored.nbytes / (stored.shape[0] * stored.shape[1])
        if bits > bits_of(kind):
            continue
        if kind == scheme.type:
            problem = f"{name} is quantized already, in {stored.format}: {scheme.name} would only add errors"
            raise ModelError(problem, "leave out quant, or give the model in bf16, f16 or with more bits")
        types[name] = None
    return types


def model_shape(c: ModelConfig) -> ModelShape:
    grouped = c.num_heads != c.num_kv_heads or c.architecture == "Qwen2ForCausalLM"
    is_70b = len(c.layer_kinds) == 80 and grouped and c.name in ("llama", "mistral", "qwen2")
    experts = c.experts.num_experts if c.experts else 0
    return ModelShape(len(c.layer_kinds), c.num_heads, c.num_kv_heads, experts, c.tie_word_embeddings, is_70b)


def convert(tensor: AnyTensor, kind: str, importance: np.ndarray | None = None) -> AnyTensor:
    """The tensor in another type: a name of quant/ggml.py, mlx<bits>_g<group>, or fp8."""
    if tensor.format == kind:
        return tensor
    if kind in FORMATS:
        return to_format(tensor.float32(), kind)
    if kind == "fp8":
        codes, scales = quantize_fp8(tensor.float32(), FP8_BLOCK)
        return fp8("fp8", codes, Tensor("f32", scales.shape, scales), (FP8_BLOCK, FP8_BLOCK))
    rows, columns = tensor.shape
    if not kind.startswith("mlx"):
        blocks = [quantize(x, kind, importance) for x in _chunks(tensor)]
        return ggml.tensor(ggml.TYPES[kind], (rows, columns), np.concatenate(blocks).reshape(-1))
    bits, group = (int(n) for n in kind.removeprefix("mlx").split("_g"))
    dtype = tensor.format if isinstance(tensor, Tensor) else "bf16"
    parts = [quantize_mlx(x, bits, group, dtype) for x in _chunks(tensor)]
    arrays = {name: np.concatenate([p.arrays[name] for p in parts]) for name in parts[0].arrays}
    return QuantTensor(parts[0].kind, (rows, columns), arrays)


def _chunks(tensor: AnyTensor) -> Iterator[np.ndarray]:
    """float32, some rows at a time."""
    step = max(CHUNK // tensor.shape[1], 1)
    for begin in range(0, tensor.shape[0], step):
        yield tensor.rows(slice(begin, begin + step)).float32()


def bits_of(kind: str) -> float:
    """Bits per weight of a type."""
    if kind in ggml.TYPES:
        return 8 * ggml.TYPES[kind].block_bytes / ggml.TYPES[kind].block
    if kind == "fp8":
        return 8 + 32 / FP8_BLOCK**2
    bits, group = (int(n) for n in kind.removeprefix("mlx").split("_g"))
    return bits + 32 / group


def relative_error(before: AnyTensor, after: AnyTensor) -> float:
    """Root mean square of the difference over that of the weights."""
    squares = errors = 0.0
    step = max(CHUNK // before.shape[-1], 1)
    for begin in range(0, before.shape[0], step):
        x, y = (t.rows(slice(begin, begin + step)).float32() for t in (before, after))
        squares += float(np.square(x, dtype=np.float64).sum())
        errors += float(np.square(x - y, dtype=np.float64).sum())
    return (errors / squares) ** 0.5 if squares else 0.0
