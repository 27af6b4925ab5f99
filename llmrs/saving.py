"""Writes quantized weights: a GGUF file, or a folder as MLX (mlx-lm) and vLLM (quant_method fp8) read it.

A writer takes each weight once by its canonical name, in any order, also while a backend loads it.
"""

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from llmrs.core.errors import ModelError
from llmrs.model import Model
from llmrs.models import demo
from llmrs.models.arch.config import ModelConfig
from llmrs.models.arch.families import family
from llmrs.models.arch.gguf_export import ExportTensor, export_tensors, exported, metadata_of, window_period
from llmrs.models.files.formats import FILE_TYPES as GGUF_FILE_TYPES
from llmrs.models.files.generation import GGUF_NAMES
from llmrs.models.files.gguf import GGUFSource
from llmrs.models.files.gguf_writer import GgufFile, GgufTensor, open_gguf
from llmrs.models.files.json_reader import read_json
from llmrs.models.files.output import new_folder
from llmrs.models.files.safetensors import SINGLE
from llmrs.models.files.safetensors_writer import Infos, SafetensorsFile, open_safetensors, size_of
from llmrs.models.files.weights import stored_name
from llmrs.models.hub.snapshot import SMALL
from llmrs.models.text.gguf_vocabulary import vocabulary
from llmrs.quant.ggml import TYPES
from llmrs.quant.schemes import FP8_BLOCK, MLX_GROUPS, Scheme
from llmrs.quant.tensor import AnyTensor, QuantTensor, Stored, Tensor
from llmrs.quantizing import convert

EXPERT = re.compile(r"\.experts\.(\d+)\.")
PART_NAME = re.compile(r"-\d{5}-of-\d{5}$")  # at the end of a file's name
DENSE_NAME = re.compile(r"[-.](f32|f16|bf16|q8_0)$", re.IGNORECASE)
SAMPLING = "general.sampling."
OF_ONE_FILE = ("split.", "general.alignment", "general.file_type", "quantize.imatrix.")  # keys that are not copied
DTYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16"}  # in safetensors
FILE_TYPES = {name.lower(): number for number, name in GGUF_FILE_TYPES.items()}
FILE_TYPES |= {f"q{bits}k": FILE_TYPES[mix] for bits, mix in  # of recipes the nearest
               ((2, "q2_k"), (3, "q3_k_s"), (4, "q4_k_s"), (5, "q5_k_s"), (6, "q6_k"))}  # fmt: skip


class Saver(Protocol):
    """An output that is being written. `nbytes`: its size."""

    nbytes: int

    def put(self, name: str, tensor: AnyTensor) -> None:
        """A weight by its canonical name; a second time it is ignored."""


@contextmanager
def save(
    path: Path, scheme: Scheme, model: Model, stored: Mapping[str, Stored], types: Mapping[str, str | None],
    *, force: bool = False,
) -> Iterator[Saver]:  # fmt: skip
    """A file or folder that appears at the end of the block, when every weight was put.

    `stored`: what the model's file holds. `types`: those of `plan_types`. Raises ConfigError for a path that can't be
    used, ModelError for a model that the format can't express, and where it can't be written.
    """
    if scheme.is_gguf:
        kinds = {name: types[name] or _stored_type(name, s, model) for name, s in stored.items()}
        tensors = {t.name: t for t in export_tensors(model.config, model.graph)}
        entries = [GgufTensor(t.name, TYPES[kinds[t.sources[0]] if t.sources else "f32"], t.shape)
                   for t in tensors.values()]  # fmt: skip
        metadata = {**gguf_metadata(model), "general.file_type": FILE_TYPES[scheme.name]}
        with open_gguf(path, metadata, entries, force=force) as file:
            yield GgufSaver(model, tensors, kinds, file)
        return
    if model.path.is_file():
        problem = f"{model.path} has no config.json and tokenizer.json, which a folder in {scheme.name} needs"
        raise ModelError(problem, "give the model's folder, or quantize to a GGUF type such as q4k")
    kinds = {name: types[name] or _dense_type(s) for name, s in stored.items()}
    infos = _infos(model, stored, kinds)
    with new_folder(path, size_of(infos), force=force) as folder:
        config = {**read_json(model.path / "config.json"), **quantization(scheme, model, types)}
        (folder / "config.json").write_text(json.dumps(config, indent=2), "utf-8")
        for name in SMALL:
            if (model.path / name).is_file():
                (folder / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(model.path / name, folder / name)
        with open_safetensors(folder / SINGLE, infos) as file:
            yield FolderSaver(model, kinds, file, size_of(infos))


def model_name(path: Path) -> str:
    """For the names of files that are made of it. `path`: of a `Model`."""
    if path == demo.FILES:
        return "demo"
    if path.is_file():
        return DENSE_NAME.sub("", PART_NAME.sub("", path.stem))
    path = path.resolve()
    return path.parents[1].name.rpartition("--")[2] if path.parent.name == "snapshots" else path.name


def gguf_metadata(model: Model) -> dict[str, Any]:
    """Every key but general.file_type. Raises ModelError for what GGUF files can't express."""
    if model.path.is_file():
        with closing(GGUFSource(model.path)) as source:
            copied = {key: v for key, v in source.metadata.items() if not key.startswith((*OF_ONE_FILE, SAMPLING))}
        return {**copied, **_sampling(model)}
    general = {"general.type": "model", "general.name": model_name(model.path), "general.quantization_version": 2}
    words = vocabulary(model.path, model.tokenizer, model.config.vocab_size, model.eos_ids)
    return {**metadata_of(model.config), **general, **_sampling(model), **words}


def _sampling(model: Model) -> dict[str, Any]:
    """The author's sampling values; whole numbers are i32 there."""
    given = {key: getattr(model.sampling, name) for name, key in GGUF_NAMES.items()}
    return {SAMPLING + key: np.int32(v) if isinstance(v, int) else v for key, v in given.items() if v is not None}


def quantization(scheme: Scheme, model: Model, types: Mapping[str, str | None]) -> dict[str, Any]:
    """The fields of config.json that say how the weights are quantized."""
    names = family(model.config.architecture).names
    modules = {
        stored_name(n, names).removesuffix(".weight"): kind for n, kind in types.items() if not n.endswith(".bias")
    }
    tied = {"tie_word_embeddings": model.config.tie_word_embeddings}
    if scheme.kind == "fp8":
        shapes = {s.tensor for w in model.graph.weights() if w.columns for s in w.segments}
        matrices = {stored_name(n, names).removesuffix(".weight") for n in shapes}
        rest = sorted({n for n in matrices if modules[n] is None} | {names["lm_head"].removesuffix(".weight")})
        method = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [FP8_BLOCK, FP8_BLOCK]}
        return {**tied, "quantization_config": {**method, "modules_to_not_convert": rest}}
    bits, main = int(scheme.type.removeprefix("mlx")), MLX_GROUPS[0]
    found: dict[str, Any] = {"group_size": main, "bits": bits, "mode": "affine"}
    for module, kind in modules.items():
        if kind is not None and (group := int(kind.rpartition("_g")[2])) != main:
            found[stacked(module)[0]] = {"group_size": group, "bits": bits, "mode": "affine"}
    return {**_older_fields(model.config), **tied, "quantization": found, "quantization_config": found}


def _older_fields(c: ModelConfig) -> dict[str, Any]:
    """What mlx-lm reads in transformers 4's spelling only."""
    fields: dict[str, Any] = {"rope_theta": c.rope.theta}
    if c.rope.scaling["rope_type"] != "default":
        fields["rope_scaling"] = dict(c.rope.scaling)
    if c.experts is not None:
        fields["num_experts"] = c.experts.num_experts
    if c.name == "gemma3":
        fields |= {"rope_local_base_freq": c.local_rope.theta, "sliding_window_pattern": window_period(c)}
    return fields


def _infos(model: Model, stored: Mapping[str, Stored], kinds: Mapping[str, str]) -> Infos:
    """Names, dtypes and shapes of the file's tensors."""
    names, infos = family(model.config.architecture).names, dict[str, tuple[str, tuple[int, ...]]]()
    shapes = {s.tensor: (s.rows, *w.columns) for w in model.graph.weights() for s in w.segments}
    experts = model.config.experts.num_experts if model.config.experts else 0
    for canonical, kind in kinds.items():
        dtype = DTYPES[_dense_type(stored[canonical])]
        for name, (file_dtype, shape) in _parts(stored_name(canonical, names), kind, shapes[canonical], dtype).items():
            target, is_stack = stacked(name) if _is_mlx(kinds) else (name, False)
            infos[target] = file_dtype, ((experts, *shape) if is_stack else shape)
    return infos


def _is_mlx(kinds: Mapping[str, str]) -> bool:
    return any(kind.startswith("mlx") for kind in kinds.values())


def _parts(name: str, kind: str, shape: tuple[int, ...], dtype: str) -> Infos:
    """A weight's tensors in a folder: name -> dtype, shape."""
    module = name.removesuffix(".weight")
    if kind in DTYPES:
        return {name: (DTYPES[kind], shape)}
    if kind == "fp8":
        blocks = -(-shape[0] // FP8_BLOCK), -(-shape[1] // FP8_BLOCK)
        return {name: ("F8_E4M3", shape), f"{module}.weight_scale_inv": ("F32", blocks)}
    bits, group = (int(n) for n in kind.removeprefix("mlx").split("_g"))
    scales = dtype, (shape[0], shape[1] // group)
    return {name: ("U32", (shape[0], shape[1] * bits // 32)), f"{module}.scales": scales, f"{module}.biases": scales}


def stacked(name: str) -> tuple[str, bool]:
    """mlx-lm's name of a tensor that holds this one, and whether it is a stack of experts."""
    found, count = EXPERT.subn(".switch_mlp.", name)
    return found, bool(count)


def _dense_type(s: Stored) -> str:
    return s.format if s.is_dense else "bf16"


def _stored_type(name: str, s: Stored, model: Model) -> str:
    """The type in a GGUF file of a weight that is not quantized anew."""
    if len(s.shape) == 1 or name.endswith("router"):
        return "f32"
    packed = model.path.is_file() and not s.expanded  # safetensors have an mxfp4 of their own
    return s.format if s.is_dense or packed else "bf16"


class GgufSaver:
    """Each weight goes to its place in the file, stacked experts one after the other."""

    def __init__(
        self, model: Model, tensors: Mapping[str, ExportTensor], kinds: Mapping[str, str], file: GgufFile
    ) -> None:
        self.model, self.kinds, self.file, self.nbytes = model, kinds, file, file.size
        self.places = {s: (t.name, n) for t in tensors.values() for n, s in enumerate(t.sources)}
        for t in tensors.values():
            if not t.sources:  # made of the config
                for part in exported(model.config, {}, t):
                    file.write(t.name, _bytes(part))

    def put(self, name: str, tensor: AnyTensor) -> None:
        if name not in self.places:
            return
        target, index = self.places.pop(name)
        part = next(exported(self.model.config, {name: tensor}, ExportTensor(target, (name,), tensor.shape)))
        data = _bytes(convert(part, self.kinds[name]))
        self.file.write(target, data, index * data.nbytes)


def _bytes(tensor: AnyTensor) -> np.ndarray:
    return tensor.arrays["blocks"] if isinstance(tensor, QuantTensor) else tensor.data


class FolderSaver:
    """Tensors by their Hugging Face names; MLX's stacks of experts as mlx-lm names them."""

    def __init__(self, model: Model, kinds: Mapping[str, str], file: SafetensorsFile, nbytes: int) -> None:
        self.names, self.kinds, self.file, self.nbytes = family(model.config.architecture).names, kinds, file, nbytes
        self.left = set(kinds)

    def put(self, name: str, tensor: AnyTensor) -> None:
        if name not in self.left:
            return
        self.left.remove(name)
        full = stored_name(name, self.names)
        expert = EXPERT.search(full) if _is_mlx(self.kinds) else None
        for part, data in zip(_parts(full, self.kinds[name], (1, 1), "F32"), self._data(name, tensor), strict=True):
            self.file.write(stacked(part)[0] if expert else part, data, int(expert[1]) * data.nbytes if expert else 0)

    def _data(self, name: str, tensor: AnyTensor) -> list[np.ndarray]:
        """As `_parts` lists them."""
        tensor = convert(tensor, self.kinds[name])
        if isinstance(tensor, Tensor):
            return [tensor.data]
        planes = tensor.arrays
        if tensor.format == "fp8":
            return [planes["codes"], planes["scales"][::FP8_BLOCK]]
        return [planes["codes"], planes["scales"], planes["biases"]]
