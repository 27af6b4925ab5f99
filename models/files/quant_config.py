"""What a model folder says about its quantization: `quantization` (MLX) or `quantization_config` (Hugging Face).

Only weights are quantized here. Settings of activations (dynamic or static scales of FP8 and NVFP4) and of the KV cache
(`kv_cache_scheme`, k_scale, v_scale) are ignored: activations stay in the dtype of computation, and the option
kv_cache_dtype chooses that of the cache.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmrs.core.errors import ModelError
from llmrs.models.files.json_reader import ConfigReader, read_json, short_repr
from llmrs.models.files.patterns import Patterns, compile_pattern
from llmrs.quant.affine import GPTQ_BITS, MLX_BITS, MLX_GROUPS, PACKED_BITS

MODELOPT_FILE = "hf_quant_config.json"
FIELDS = ("quantization", "quantization_config", "compression_config")
HINT = "use a version in bf16, FP8 or int4 (GPTQ, AWQ, compressed-tensors), or one for MLX"
MLX_MODES = {"affine": (64, 4), "mxfp4": (32, 4), "mxfp8": (32, 8), "nvfp4": (16, 4)}  # default group, bits
AUTO_ROUND = {"auto_round:auto_gptq": "gptq", "auto_round:gptq": "gptq", "auto_round:auto_awq": "awq",
              "auto_round:awq": "awq"}  # fmt: skip
CT_FLOATS = ("float-quantized", "naive-quantized", "mxfp8-quantized")
MAX_PATTERNS = 1000
EMBEDDINGS = re.compile(r"(.*\.)?embed_tokens$")


@dataclass(frozen=True)
class WeightScheme:
    """How the weight of a module is stored. 0 columns a group: a whole row."""

    layout: str  # of models/files/layouts.py
    bits: int = 0
    group: int = 0
    block: tuple[int, int] | None = None  # FP8: rows and columns a scale
    symmetric: bool = True
    version: int = 0  # GPTQ


MODELOPT = {
    **dict.fromkeys(("FP8", "FP8_PER_CHANNEL_PER_TOKEN"), WeightScheme("fp8")),
    **dict.fromkeys(("NVFP4", "W4A16_NVFP4"), WeightScheme("modelopt_nvfp4")),
    "MXFP8": WeightScheme("fp8", block=(1, 32)),
}


@dataclass(frozen=True)
class Quantization:
    """The schemes of a model's modules, such as model.layers.0.self_attn.q_proj."""

    field: str  # of config.json
    method: str
    default: WeightScheme | None
    named: Mapping[str, WeightScheme | None]  # by module; None: listed as not quantized
    patterns: Patterns[WeightScheme] = Patterns()
    inherited: bool = False  # named modules stand for the modules inside them, too

    def scheme(self, module: str) -> WeightScheme | None:
        """The scheme of a module, if it is quantized. Raises ModelError for patterns that take too long."""
        path = module
        while path and path not in self.named and self.inherited:
            path = path.rpartition(".")[0]
        return self.named[path] if path in self.named else self.patterns.find(module) or self.default


def read_quantization(path: Path, data: Mapping[str, Any]) -> Quantization | None:
    """The quantization of a config.json, or of modelopt's file beside it; None for none. Raises ModelError."""
    field = next((name for name in FIELDS if data.get(name) is not None), None)
    if field is None:
        beside = path.with_name(MODELOPT_FILE)
        return _modelopt(ConfigReader(beside, read_json(beside)), MODELOPT_FILE) if beside.exists() else None
    given = ConfigReader(path, data).mapping(field)
    r = ConfigReader(f"{path}: {field}", given)
    if field == "quantization":
        return _mlx(r, field)
    if field == "compression_config":
        raise _refused(r, "compression_config", "sparse or old compressed-tensors files")
    method = given.get("quant_method")
    if given.get("quant_algo") is not None or "quantization" in given:
        method = "modelopt"
    if not isinstance(method, str) or method not in METHODS:
        raise _refused(r, f"quant_method {short_repr(method)}", "methods other than " + ", ".join(METHODS))
    return METHODS[method](r, field)


def _refused(r: ConfigReader, what: str, which: str) -> ModelError:
    return ModelError(f"{r.path}: {what}: {which} are not supported", HINT)


def _choice(r: ConfigReader, name: str, default: Any, *allowed: Any) -> Any:
    """A field with one of a few values."""
    value = r.data.get(name)
    value = default if value is None else value
    if value not in allowed or type(value) not in map(type, allowed):  # 4.0 is 4, and no number of bits
        raise ModelError(r.error(name, " or ".join(map(repr, allowed))).message, HINT)
    return value


def _group(r: ConfigReader, name: str = "group_size", default: int | None = None) -> int:
    """Columns a group; -1 in the file, 0 here: a whole row."""
    value = r.data.get(name)
    return 0 if type(value) is int and value == -1 else r.integer(name, default)


def _not_converted(r: ConfigReader, *fields: str) -> dict[str, None]:
    """Modules that are listed as not quantized. Patterns among them match no module here; the tensors decide."""
    named: dict[str, None] = {}
    for name in fields:
        value = r.data.get(name)
        if value is not None and not (isinstance(value, list) and all(isinstance(n, str) for n in value)):
            raise r.error(name, "a list of modules")
        named |= dict.fromkeys(value or ())
    return named


def _mlx(r: ConfigReader, field: str) -> Quantization:
    """One setting for all modules, and one for each that differs; false: not quantized."""
    default, named = _mlx_scheme(r), dict[str, WeightScheme | None]()
    for module, value in r.data.items():
        if isinstance(value, dict):
            named[module] = _mlx_scheme(ConfigReader(f"{r.path}: {module[:100]}", value))
        elif isinstance(value, bool):
            named[module] = default if value else None
    return Quantization(field, "mlx", default, named)


def _mlx_scheme(r: ConfigReader) -> WeightScheme:
    mode = _choice(r, "mode", "affine", *MLX_MODES)
    group, bits = MLX_MODES[mode]
    affine = mode == "affine"
    group = _choice(r, "group_size", group, *(MLX_GROUPS if affine else (group,)))
    return WeightScheme(f"mlx_{mode}", _choice(r, "bits", bits, *(MLX_BITS if affine else (bits,))), group)


def _fp8(r: ConfigReader, field: str) -> Quantization:
    """DeepSeek's and Qwen's FP8; a null weight_block_size is one scale a tensor."""
    _choice(r, "fmt", "e4m3", "e4m3", "float8_e4m3fn")
    named = _not_converted(r, "modules_to_not_convert", "ignored_layers")
    return Quantization(field, "fp8", WeightScheme("fp8", block=_block(r, "weight_block_size")), named)


def _block(r: ConfigReader, name: str) -> tuple[int, int] | None:
    value = r.data.get(name)
    if value is None:
        return None
    if not (isinstance(value, list) and len(value) == 2 and all(type(n) is int and 0 < n < 2**20 for n in value)):
        raise r.error(name, "two whole numbers, rows and columns")
    return value[0], value[1]


def _mxfp4(r: ConfigReader, field: str) -> Quantization:
    """The files of gpt-oss."""
    return Quantization(field, "mxfp4", WeightScheme("mxfp4"), _not_converted(r, "modules_to_not_convert"))


def _gptq(r: ConfigReader, field: str) -> Quantization:
    if r.boolean("desc_act", False):
        raise _refused(r, "desc_act", "GPTQ files with activation order")
    style = next((n for n in ("checkpoint_format", "format") if r.data.get(n) is not None), "checkpoint_format")
    version = 2 if _choice(r, style, "gptq", "gptq", "gptq_v2") == "gptq_v2" else 1
    r.must_be("is_marlin_format", False)
    r.must_be("pack_dtype", "int32")
    r.must_be("dynamic", {})  # settings of single modules
    scheme = WeightScheme("gptq", _choice(r, "bits", None, *GPTQ_BITS), _group(r), version=version)
    return Quantization(field, "gptq", scheme, {})


def _awq(r: ConfigReader, field: str) -> Quantization:
    name = "format" if r.data.get("version") is None else "version"
    version = r.data.get(name)
    if str("gemm" if version is None else version).lower() != "gemm":
        raise r.error(name, "'gemm'")
    r.must_be("zero_point", True)
    r.must_be("backend", "autoawq", "auto")
    named = _not_converted(r, "modules_to_not_convert")
    scheme = WeightScheme("awq", _choice(r, "bits", _choice(r, "w_bit", 4, 4), 4), _group(r, default=128))
    return Quantization(field, "awq", scheme, named)


def _auto_round(r: ConfigReader, field: str) -> Quantization:
    """AutoRound in the layout of GPTQ or AWQ."""
    layout = AUTO_ROUND[_choice(r, "packing_format", None, *AUTO_ROUND)]
    _choice(r, "data_type", "int", "int")
    bits = _choice(r, "bits", None, *(GPTQ_BITS if layout == "gptq" else (4,)))
    default, named = WeightScheme(layout, bits, _group(r), version=1), dict[str, WeightScheme | None]()
    for module, value in r.mapping("extra_config").items():
        own = ConfigReader(f"{r.path}: {module[:100]}", {**r.data, **(value if isinstance(value, dict) else {})})
        own_bits = _choice(own, "bits", None, 16, 32, *GPTQ_BITS)
        named[module] = None if own_bits > 8 else WeightScheme(layout, own_bits, _group(own), version=1)
    return Quantization(field, "auto-round", default, named)


def _modelopt(r: ConfigReader, field: str) -> Quantization:
    """NVIDIA's modelopt; hf_quant_config.json nests the settings."""
    r = ConfigReader(f"{r.path}: quantization", r.mapping("quantization")) if "quantization" in r.data else r
    algorithm = _choice(r, "quant_algo", None, "MIXED_PRECISION", *MODELOPT)
    named: dict[str, WeightScheme | None] = {**_not_converted(r, "ignore", "exclude_modules")}
    if algorithm != "MIXED_PRECISION":
        return Quantization(field, "modelopt", MODELOPT[algorithm], named, inherited=True)
    for module, value in r.mapping("quantized_layers").items():
        own = ConfigReader(f"{r.path}: {module[:100]}", value if isinstance(value, dict) else {})
        named[module] = MODELOPT[_choice(own, "quant_algo", None, *MODELOPT)]
    return Quantization(field, "modelopt", None, named, inherited=True)


def _compressed_tensors(r: ConfigReader, field: str) -> Quantization:
    """Groups of modules by class (Linear, Embedding), by name, or by regular expression (re:)."""
    sparsity = ConfigReader(f"{r.path}: sparsity_config", r.mapping("sparsity_config"))
    _choice(sparsity, "format", "dense", "dense")
    if r.mapping("transform_config").get("config_groups"):
        raise _refused(r, "transform_config", "weights that are rotated while they run")
    default: WeightScheme | None = None
    named, patterns = dict[str, WeightScheme | None](), list[tuple[re.Pattern[str], WeightScheme]]()
    groups = r.mapping("config_groups")
    if not groups:
        raise r.error("config_groups", "a table of groups")
    for name, value in groups.items():
        group = ConfigReader(f"{r.path}: {name[:60]}", value if isinstance(value, dict) else {})
        scheme, targets = _ct_scheme(group, r.data.get("format")), group.data.get("targets")
        if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
            raise group.error("targets", "a list of modules")
        for target in targets:
            if target.startswith("re:"):
                patterns.append((_pattern(group, target.removeprefix("re:")), scheme))
            elif target == "Embedding":
                patterns.append((EMBEDDINGS, scheme))
            elif target == "Linear":
                default = scheme
            else:
                named[target] = scheme
    if len(patterns) > MAX_PATTERNS:
        raise r.error("config_groups", f"at most {MAX_PATTERNS} patterns")
    named |= _not_converted(r, "ignore")
    return Quantization(field, "compressed-tensors", default, named, Patterns(patterns))


def _pattern(r: ConfigReader, text: str) -> re.Pattern[str]:
    try:
        return compile_pattern(text)
    except ValueError as error:
        raise ModelError(f"{r.path}: {short_repr(text)} in targets is refused: {error}", "simplify it") from error


def _ct_scheme(group: ConfigReader, file_format: Any) -> WeightScheme:
    """The weights of a config group."""
    style = group.data.get("format") or file_format
    r = ConfigReader(f"{group.path}: weights", group.mapping("weights"))
    kind = r.data.get("type", "int"), r.data.get("num_bits")
    strategy = r.data.get("strategy") or ("group" if r.data.get("group_size") else "tensor")
    if r.data.get("actorder") in (True, "group", "dynamic"):
        raise _refused(r, "actorder", "weights with activation order")
    if style == "nvfp4-pack-quantized" and kind == ("float", 4):
        return WeightScheme("ct_nvfp4")
    if style == "mxfp4-pack-quantized" and kind == ("float", 4):
        return WeightScheme("ct_mxfp4")
    if style in CT_FLOATS and kind == ("float", 8):
        return WeightScheme(
            "fp8", block=_block(r, "block_structure") or ((1, _group(r)) if strategy == "group" else None)
        )
    if style == "pack-quantized" and kind[0] == "int":
        _choice(r, "strategy", strategy, "group", "channel")
        size = _group(r) if strategy == "group" else 0
        return WeightScheme(
            "ct_packed", _choice(r, "num_bits", None, *PACKED_BITS), size, symmetric=r.boolean("symmetric", True)
        )
    shown = f"format {short_repr(style)} with {short_repr(kind[1])} bits of type {short_repr(kind[0])}"
    raise _refused(group, shown, "such weights (int8 with quantized activations, FP6, sparse ones)")


METHODS: dict[str, Callable[[ConfigReader, str], Quantization]] = {
    "fp8": _fp8, "compressed-tensors": _compressed_tensors, "modelopt": _modelopt, "mxfp4": _mxfp4, "awq": _awq,
    "gptq": _gptq, "auto-round": _auto_round,
}  # fmt: skip
