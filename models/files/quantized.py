"""The weights of a safetensors folder by the names of a model's graph: quantized ones, and experts stored in a stack.

A module such as model.layers.0.self_attn.q_proj has a `weight`, whatever tensors the file holds for it. A module is
quantized if the file holds such tensors; the config says how. A stack is split by name:

    P.switch_mlp.gate_proj.weight (E, N, K)  ->  P.experts.{e}.gate_proj.weight      MLX
    P.experts.gate_up_proj (E, 2 N, K)       ->  gate_proj, then up_proj; in gpt-oss's files row by row
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from llmrs.core.errors import ModelError
from llmrs.models.files.json_reader import read_json
from llmrs.models.files.layouts import HINT, LAYOUTS, Parts, fp8_scale
from llmrs.models.files.quant_config import Quantization, WeightScheme, read_quantization
from llmrs.models.files.safetensors import SafetensorsSource
from llmrs.quant.fp8 import scale_columns
from llmrs.quant.tensor import FORMATS, AnyTensor, Stored, Tensor, WeightSource

# Parts of quantized modules, and scales of activations and of the KV cache, which are ignored.
PARTS = frozenset(part for layout in LAYOUTS.values() for part in (*layout.needs, *layout.may)) - {"weight"}
IGNORED = frozenset(
    "input_scale input_global_scale input_zero_point activation_scale output_scale k_scale v_scale q_scale prob_scale"
    " k_global_scale v_global_scale".split()
)
FUSED = re.compile(r"(.*\.experts\.(?:gate_up|down)_proj)(?:_(blocks|scales|scale_inv|bias))?")  # no .weight
SWITCH = re.compile(r"(.*)\.switch_mlp\.(gate|up|down)_proj")
EXPERTS = re.compile(r"(.*\.experts)\.(gate_up|down)_proj")
MAX_EXPERTS = 4096
MAX_ENTRIES = 2**19  # tensors of experts; today's largest models have a fifth


@dataclass(frozen=True)
class Entry:
    """A tensor of the graph: the weight of a module, or one of its dense parts."""

    parts: Parts
    part: str
    scheme: WeightScheme | None = None  # of a quantized weight
    rows: slice | None = None  # of the module's; None: all


class QuantizedSource:
    """A `WeightSource` over the tensors of the file."""

    def __init__(self, source: SafetensorsSource, quantization: Quantization | None) -> None:
        """Raises ModelError that names the module where its tensors and the config contradict each other."""
        self.source, self.quantization = source, quantization
        self.entries: dict[str, Entry] = {}
        modules = _modules(source)
        for module, names in modules.items():
            for name, entry in self._entries(Parts(module, names, source)):
                if name in self.entries:
                    raise ModelError(f"the checkpoint holds {name} twice", "write the checkpoint again")
                self.entries[name] = entry
            if len(self.entries) > MAX_ENTRIES:
                raise ModelError(f"the checkpoint holds over {MAX_ENTRIES} tensors", HINT)
        if quantization is not None:
            self._check_named(quantization, modules)

    def names(self) -> Iterable[str]:
        return self.entries

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises ModelError for quantized tensors that don't fit together."""
        e = self.entries[name]
        shape = e.parts.shape(e.part) if e.scheme is None else LAYOUTS[e.scheme.layout].shape(e.parts, e.scheme)
        return shape if e.rows is None else (len(range(*e.rows.indices(shape[0]))), *shape[1:])

    def stored(self, name: str) -> Stored:
        e, shape = self.entries[name], self.shape(name)
        if e.scheme is None:
            kind = self.source.stored(e.parts.names[e.part]).format
            return Stored(kind, shape, math.prod(shape) * FORMATS[kind].itemsize)
        return _stored(e.parts, e.scheme, *shape)

    def tensor(self, name: str) -> AnyTensor:
        """A view of the file; GPTQ, AWQ and scales of blocks are copied. Raises ModelError."""
        e = self.entries[name]
        if e.scheme is not None:
            self.shape(name)
            tensor: AnyTensor = LAYOUTS[e.scheme.layout].read(e.parts, e.scheme)
        elif e.parts.expert is None:
            tensor = self.source.tensor(e.parts.names[e.part])
        else:
            whole = self.source.tensor(e.parts.names[e.part])
            tensor = Tensor(whole.format, whole.shape[1:], whole.data[e.parts.expert])
        return tensor if e.rows is None else tensor.rows(e.rows)

    def close(self) -> None:
        self.entries.clear()
        self.source.close()

    def _entries(self, p: Parts) -> Iterator[tuple[str, Entry]]:
        scheme = self._scheme(p)
        weight = [Entry(p, LAYOUTS[scheme.layout].needs[0], scheme)] if scheme else []
        used = PARTS | IGNORED | {"weight"} if scheme else IGNORED if self.quantization else frozenset()
        dense = [part for part in p.names if part not in used]
        if (
            scheme
            and scheme.layout == "gptq"
            and "bias" in dense
            and not self.source.tensor(p.names["bias"]).data.any()
        ):
            dense.remove("bias")  # older files give every module one
        for e in (*weight, *(Entry(p, part) for part in dense)):
            names = _in_stack(e, interleaved=scheme is not None and scheme.layout == "mxfp4")
            yield from names or [(f"{p.module}.weight" if e.scheme else p.names[e.part], e)]

    def _scheme(self, p: Parts) -> WeightScheme | None:
        """The scheme of a quantized module. Raises ModelError if it is stored in another one."""
        parts, q = p.names.keys() & PARTS, self.quantization
        if q is None or (not parts and ("weight" not in p.names or p.format("weight") in (*FORMATS, "F64"))):
            return None
        found = ", ".join(sorted(parts)) or f"a weight of {p.format('weight')}"
        scheme = q.scheme(p.module)
        if scheme is None:
            raise ModelError(f"{p.module} holds {found}; {q.field} in config.json says that it is not quantized", HINT)
        layout = LAYOUTS[scheme.layout]
        if lacks := [part for part in layout.needs if part not in p.names]:
            raise ModelError(f"{p.module} lacks {lacks[0]}: it holds {found}, and {q.field} is {q.method}", HINT)
        if more := sorted((parts | p.names.keys() & {"weight"}) - {*layout.needs, *layout.may}):
            raise ModelError(f"{p.names[more[0]]} is unexpected: {q.field} is {q.method} ({scheme.layout})", HINT)
        return scheme

    def _check_named(self, q: Quantization, modules: Mapping[str, Mapping[str, str]]) -> None:
        """Refuses dense modules that the config names as quantized, and a model with no quantized module at all."""
        quantized = {e.parts.module for e in self.entries.values() if e.scheme}
        dense = {m for m, parts in modules.items() if "weight" in parts} - quantized
        for module in (m for m, scheme in q.named.items() if scheme and m in dense):
            raise ModelError(f"{module} is not quantized; {q.field} in config.json says that it is", HINT)
        if not quantized:
            hint = f"remove {q.field} from config.json if the weights are not quantized"
            raise ModelError(f"{q.field} in config.json is {q.method}, and no tensor is quantized", hint)


def _modules(source: SafetensorsSource) -> dict[str, dict[str, str]]:
    """Module -> part -> name of the tensor."""
    modules: dict[str, dict[str, str]] = {}
    for name in source.names():
        if fused := FUSED.fullmatch(name):
            module, part = fused[1], fused[2] or "weight"
        else:
            module, _, part = name.rpartition(".")
        modules.setdefault(module, {})[part] = name
    return modules


def _stored(p: Parts, s: WeightScheme, rows: int, columns: int) -> Stored:
    """Rows of a quantized weight as its layout reads them."""

    def scale_bytes(part: str) -> int:
        return FORMATS[p.format(part)].itemsize if p.format(part) in FORMATS else 1

    bits, group, each, more = s.bits or 4, s.group or columns, 1, 0  # bytes per group, and per row
    if s.layout == "fp8":
        part, name, (_, width) = fp8_scale(p, s)
        bits, group, each = 8, scale_columns(columns, width), scale_bytes(part)
    elif s.layout == "mlx_affine":
        name, each = f"mlx{bits}_g{group}", 2 * scale_bytes("scales")
    elif s.layout == "ct_packed":
        name = f"int{bits}" + (f"_g{group}" if group < columns else "_channel")
        each = scale_bytes("weight_scale") + (not s.symmetric)
    elif s.layout in ("gptq", "awq"):
        name, each = f"{s.layout}{bits}_g{group}", scale_bytes("scales") + 1
    else:
        name = s.layout.rpartition("_")[2]
        group = 16 if name == "nvfp4" else 32
        more = 4 if p.names.keys() & {"global_scale", "weight_global_scale", "weight_scale_2"} else 0
    return Stored(name, (rows, columns), rows * (columns * bits // 8 + columns // group * each + more))


def _in_stack(e: Entry, *, interleaved: bool) -> list[tuple[str, Entry]]:
    """Names and entries of the experts in a stack; none for other modules."""
    switch, fused = SWITCH.fullmatch(e.parts.module), EXPERTS.fullmatch(e.parts.module)
    if not (switch or fused):
        return []
    suffix = "weight" if e.scheme else e.part
    shape = e.parts.shape(e.part)
    if len(shape) < 2 or not 0 < shape[0] <= MAX_EXPERTS:
        raise e.parts.error(e.part, f"a stack of 1 to {MAX_EXPERTS} experts")
    if odd := [p for p in e.parts.names if p not in IGNORED and e.parts.shape(p)[:1] != shape[:1]]:
        raise e.parts.error(odd[0], f"of {shape[0]} experts, as {e.parts.names[e.part]}")
    parts: dict[str, slice | None]
    if switch:
        path, parts = f"{switch[1]}.experts", {switch[2]: None}
    else:
        assert fused is not None
        path, parts = fused[1], {"down": None} if fused[2] == "down" else _halves(e, interleaved)
    return [
        (f"{path}.{n}.{name}_proj.{suffix}", replace(e, parts=replace(e.parts, expert=n), rows=rows))
        for n in range(shape[0])
        for name, rows in parts.items()
    ]


def _halves(e: Entry, interleaved: bool) -> dict[str, slice | None]:
    """The rows of gate and up in gate_up_proj."""
    if interleaved:
        return {"gate": slice(0, None, 2), "up": slice(1, None, 2)}
    half = e.parts.shape(e.part)[1] // 2
    return {"gate": slice(0, half), "up": slice(half, None)}


def open_weights(folder: Path) -> WeightSource:
    """The weights of a model folder, quantized or not. Raises ModelError."""
    return with_quantization(SafetensorsSource(folder), folder)


def with_quantization(source: SafetensorsSource, folder: Path) -> SafetensorsSource | QuantizedSource:
    """The weights of the folder whose tensors these are. Raises ModelError."""
    quantization = read_quantization(folder / "config.json", read_json(folder / "config.json"))
    stacked = any(FUSED.fullmatch(n) or ".switch_mlp." in n for n in source.names())
    return QuantizedSource(source, quantization) if quantization or stacked else source
