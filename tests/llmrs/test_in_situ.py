"""Quantization in situ: the tokens of the quantized model on every backend, what is kept of it, memory, refusals."""

import gc
import json
import shutil
import tracemalloc
from collections import Counter
from dataclasses import dataclass, is_dataclass
from importlib.util import find_spec
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llmrs import (
    ConfigError,
    Engine,
    EngineConfig,
    LoadCancelledError,
    MemoryLimitError,
    ModelError,
    SamplingParams,
    quantizing,
)
from llmrs.backends.base import load_backend
from llmrs.backends.torch.cpu import native
from llmrs.incoming import IncomingWeights
from llmrs.loading import plan
from llmrs.model import read_folder, read_gguf
from llmrs.models import demo
from llmrs.models.files.gguf import GGUFSource
from llmrs.models.files.safetensors import SafetensorsSource
from llmrs.quant.quantizer_ops import NUMPY_OPS

BACKENDS = ["reference", "torch", *(["mlx"] if find_spec("mlx") else [])]
SCHEMES = ["q4k", "q2_k", "fp8", *(["mlx4"] if find_spec("mlx") else [])]  # q2_k: embeddings too, and types by role
GREEDY = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
PROMPT = "What is 7 + 5? And what is llmrs?"
HF = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj", **{f"attn_{n}": f"self_attn.{n}_proj" for n in "qkv"},
    **{f"ffn_{n}": f"mlp.{n}_proj" for n in ("gate", "up", "down")},
}  # fmt: skip


def tokens(backend: str, path: Path | str, **options) -> list[int]:
    with Engine(EngineConfig(path, dtype="f32", backend=backend, device="cpu", max_model_len=64, **options)) as engine:
        return engine.generate_sync(GREEDY, [PROMPT])[0].token_ids


def dequantized(saved: Path) -> dict[str, torch.Tensor]:
    """float32 weights by their Hugging Face names, by others' code."""
    if saved.suffix == ".gguf":
        found = {}
        for t in gguf.GGUFReader(saved).tensors:
            layer, part = t.name.removesuffix(".weight").rpartition(".")[::2]
            prefix = f"model.layers.{layer.removeprefix('blk.')}." if layer else ""
            values = gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float32)
            found[f"{prefix}{HF[part]}.weight"] = torch.from_numpy(values)
        return found
    tensors = load_file(saved / "model.safetensors")
    found = {}
    for name in (n for n in tensors if n.endswith(".weight")):
        module, weight = name.removesuffix(".weight"), tensors[name]
        if f"{module}.scales" in tensors:
            import mlx.core as mx

            arrays = mx.load(str(saved / "model.safetensors"))
            parts = (arrays[f"{module}.{n}"] for n in ("weight", "scales", "biases"))
            weight = torch.from_numpy(np.array(mx.dequantize(*parts, group_size=64, bits=4, dtype=mx.float32)))
        elif f"{module}.weight_scale_inv" in tensors:
            scale = tensors[f"{module}.weight_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
            weight = weight.float() * scale[: weight.shape[0], : weight.shape[1]]
        found[name] = weight.float()
    return found


def folder_of(tensors: dict[str, torch.Tensor], to: Path, **config) -> Path:
    """A model with the demo's tokenizer."""
    shutil.copytree(demo.FILES, to, ignore=shutil.ignore_patterns("*.safetensors", "*.md"))
    save_file({n: t.contiguous() for n, t in tensors.items()}, to / "model.safetensors")
    path = to / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **config}), "utf-8")
    return to


@dataclass
class Kept:
    """What was saved while the reference ran, and its tokens."""

    path: Path
    tokens: list[int]


@pytest.fixture(scope="module", params=SCHEMES)
def kept(request, tmp_path_factory):
    name = request.param
    path = tmp_path_factory.mktemp(name) / ("model.gguf" if name.startswith("q") else "model")
    return name, Kept(path, tokens("reference", "demo", quant=name, save_quantized=path))


def test_tokens_are_those_of_the_dequantized_weights(kept, tmp_path):
    name, saved = kept
    assert saved.tokens == tokens("reference", folder_of(dequantized(saved.path), tmp_path / "dense"))
    assert saved.tokens != tokens("reference", "demo") or name == "fp8"  # it makes a difference


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_gives_the_same_tokens_also_from_what_was_saved(backend, kept):
    name, saved = kept
    assert tokens(backend, "demo", quant=name) == saved.tokens
    assert tokens(backend, saved.path) == saved.tokens


def test_the_types_of_what_is_saved(tmp_path):
    tokens("torch", "demo", quant="q4k", save_quantized=tmp_path / "a.gguf")
    types = Counter(t.type.name for t in GGUFSource(tmp_path / "a.gguf").tensors.values())
    assert types == {"q4_k": 24, "q8_0": 4, "bf16": 1, "f32": 17}
    tokens("torch", tmp_path / "a.gguf", quant="q2k", save_quantized=tmp_path / "b.gguf")  # v, in q8_0, stays
    types = Counter(t.type.name for t in GGUFSource(tmp_path / "b.gguf").tensors.values())
    assert types == {"q2_k": 24, "q8_0": 4, "bf16": 1, "f32": 17}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("quant", [None, "mlx4"])
def test_each_tensor_is_read_once_and_progress_ends_at_the_total(backend, quant, monkeypatch):
    read, seen, source = Counter(), [], SafetensorsSource.tensor
    monkeypatch.setattr(SafetensorsSource, "tensor", lambda self, name: (read.update([name]), source(self, name))[1])
    with Engine(
        EngineConfig(backend=backend, device="cpu", quant=quant, max_model_len=64),
        progress=lambda *values: seen.append(values),
    ):
        assert set(read.values()) == {1}
        assert len(read) == 46
    done, totals = zip(*seen, strict=True)
    assert sorted(done) == list(done)
    assert {totals[0]} == set(totals) == {done[-1]}
    assert len(done) > 20


HIDDEN, FFN = 1024, 4096
MERGED = 2 * FFN * HIDDEN  # weights of gate and up, the largest tensor of the graph


def random_model(to: Path, **shape) -> Path:
    """16 million weights in bf16, half of them in one tensor of the graph."""
    config = {"hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": 1, "vocab_size": 2048, **shape}
    hidden, ffn, q, kv = config["hidden_size"], config["intermediate_size"], 4 * 64, 2 * 64
    shapes = {"model.embed_tokens": (config["vocab_size"], hidden), "model.norm": (hidden,)}
    for n in range(config["num_hidden_layers"]):
        p = f"model.layers.{n}."
        shapes |= {
            f"{p}input_layernorm": (hidden,), f"{p}post_attention_layernorm": (hidden,),
            f"{p}self_attn.q_norm": (64,), f"{p}self_attn.k_norm": (64,), f"{p}self_attn.q_proj": (q, hidden),
            f"{p}self_attn.k_proj": (kv, hidden), f"{p}self_attn.v_proj": (kv, hidden),
            f"{p}self_attn.o_proj": (hidden, q), f"{p}mlp.gate_proj": (ffn, hidden), f"{p}mlp.up_proj": (ffn, hidden),
            f"{p}mlp.down_proj": (hidden, ffn),
        }  # fmt: skip
    torch.manual_seed(0)
    return folder_of({f"{n}.weight": torch.randn(s).bfloat16() / 20 for n, s in shapes.items()}, to, **config)


@pytest.fixture(scope="module")
def larger(tmp_path_factory):
    return random_model(tmp_path_factory.mktemp("larger") / "model")


RESERVED = 2**24  # bytes that the quantizer asks the C library for, once, and does not touch


@pytest.fixture
def small_chunks(monkeypatch):
    """Temporaries in proportion to the model."""
    monkeypatch.setattr(quantizing, "CHUNK", 2**18)
    monkeypatch.setattr(quantizing, "PER_THREAD", 2**16)
    monkeypatch.setattr(NUMPY_OPS, "chunk", 2**16)


@pytest.mark.parametrize("quant", ["q4k", "mlx4", "fp8"])
def test_peak_memory_on_mlx(larger, quant, small_chunks):
    """The quantized model and two tensors, in MLX and in NumPy together; after the load what was planned."""
    mx = pytest.importorskip("mlx.core")
    model = read_folder(larger)
    weights = IncomingWeights.of(model, quant)
    backend, config = load_backend("mlx")("cpu", "bf16", "bf16"), EngineConfig(larger, quant=quant)
    planned = plan(backend, config, model, weights.after, 10**9).weight_bytes
    assert planned < 0.6 * 2 * sum(np.prod(s.shape) for s in weights.before.values())
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    tracemalloc.start()
    with weights.opened() as tensors:
        backend.load(model.graph, tensors, lambda done: None)
    peak = mx.get_peak_memory() - before + tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    loaded = mx.get_active_memory() - before
    backend.close()
    assert 0.98 * planned < loaded < 1.02 * planned
    assert peak < planned + 2 * 2 * MERGED + RESERVED


@pytest.mark.parametrize("quant", ["q4k", "mlx4", "fp8"])
def test_peak_memory_in_numpy(larger, quant, small_chunks):
    """Of weights that are quantized, used and dropped: two tensors."""
    weights = IncomingWeights.of(read_folder(larger), quant)
    tracemalloc.start()
    with weights.opened() as tensors:
        held = [tensors[name] for name in tensors]
    now, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    size = sum(t.nbytes for name, t in zip(tensors, held, strict=True) if weights.types[name])
    assert size < 1.1 * now
    assert peak < size + 2 * MERGED + RESERVED  # gate and up are two here


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize("quant", ["q4_k_m", "q6k", "q8_0", "mlx4", "fp8"])
def test_memory_with_triton(larger, quant):
    """What was planned; at most a tenth more than in a file."""
    model, device = read_folder(larger), "cuda:0" if torch.cuda.is_available() else "cpu"
    weights = IncomingWeights.of(model, quant)
    backend, config = load_backend("torch")(device, "bf16", "bf16"), EngineConfig(larger, quant=quant)
    backend.use_kernels("triton")
    planned = plan(backend, config, model, weights.after, 10**9).weight_bytes
    with weights.opened(device=backend.quantizer_device(device)) as tensors:
        backend.load(model.graph, tensors, lambda done: None)
    found = dict[int, int]()
    for weight in (w for program in backend.programs for call in program.calls for w in call.weights):
        found.update((t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) for t in tensors_of(weight))
    assert 0.98 * planned < sum(found.values()) < 1.02 * planned
    assert sum(found.values()) < 1.1 * sum(s.nbytes for s in weights.after.values())


def tensors_of(value):
    """All in containers and dataclasses."""
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [t for part in (vars(value).values() if is_dataclass(value) else parts) for t in tensors_of(part)]


@pytest.mark.parametrize("quant", ["q4k", "q8_0"])
def test_weights_are_quantized_on_the_device(larger, quant, tmp_path, monkeypatch):
    """As `convert` does there."""
    monkeypatch.setattr(load_backend("torch"), "quantizer_device", staticmethod(lambda device: device))
    path = tmp_path / "x.gguf"
    with Engine(EngineConfig(larger, backend="torch", device="cpu", quant=quant, save_quantized=path)):
        pass
    before, saved = read_folder(larger).open_weights(), read_gguf(path).open_weights()
    for name, kind in IncomingWeights.of(read_folder(larger), quant).types.items():
        if kind:
            expected = quantizing.convert(before[name], kind, device="cpu")
            assert np.array_equal(saved[name].float32(), expected.float32())


def test_a_file_takes_its_size_on_mlx(larger, tmp_path):
    """At most a tenth more; norms are 4 bytes there and 2 here."""
    mx = pytest.importorskip("mlx.core")
    with IncomingWeights.of(read_folder(larger), "q4_k_m").opened(tmp_path / "a.gguf") as tensors:
        for name in tensors:
            tensors[name]
    model = read_gguf(tmp_path / "a.gguf")
    weights = IncomingWeights.of(model, None)
    backend = load_backend("mlx")("cpu", "bf16", "bf16")
    planned = plan(backend, EngineConfig(), model, weights.after, 10**9).weight_bytes
    mx.clear_cache()
    before = mx.get_active_memory()
    with weights.opened() as tensors:
        backend.load(model.graph, tensors, lambda done: None)
    loaded = mx.get_active_memory() - before
    backend.close()
    file = sum(t.nbytes for t in GGUFSource(tmp_path / "a.gguf").tensors.values())
    assert 0.98 * planned < loaded < 1.02 * planned
    assert 0.98 * file < loaded < 1.1 * file


def test_the_plan_of_a_backend_that_unpacks():
    """A CPU without kernels of ours."""
    config = EngineConfig(backend="torch", device="cpu", kernels="plain", quant="q4k", max_model_len=64)
    with Engine(config) as engine:
        title, text = engine.memory_plan.table()[0]
    assert title == "weights"
    assert "q4_k, bf16, q8_0 (quantized at load); unpacked to bf16: 7.35 MB" in text


@pytest.mark.skipif(not native.libraries(), reason="no C++ compiler built the CPU kernels")
def test_the_plan_of_a_cpu_with_kernels():
    with Engine(EngineConfig(backend="torch", device="cpu", quant="q4k", max_model_len=64)) as engine:
        assert engine.memory_plan.table()[0] == ("weights", "2.94 MB in q4_k, bf16, q8_0 (quantized at load)")


@pytest.fixture
def on_mlx():
    """Error and plan of a model with a memory limit."""
    pytest.importorskip("mlx.core")

    def plan_of(limit, quant=None, model="demo", **options):
        seen = []
        config = EngineConfig(model, backend="mlx", device="cpu", quant=quant, memory_limit=limit, **options)
        try:
            with Engine(config, on_memory_plan=seen.append):
                pass
        except MemoryLimitError as error:
            return str(error), seen[-1]
        return "", seen[-1]

    return plan_of


def test_a_model_that_does_not_fit_is_told_which_quantization_would(on_mlx):
    """The named one fits, with these bytes, and the next larger one does not."""
    whole = on_mlx(10**9, max_model_len=16)[1]
    assert whole.weights.formats == "bf16"
    room = whole.required - whole.weight_bytes
    sizes = {n: on_mlx(10**9, n, max_model_len=16)[1].weight_bytes for n in ("q8_0", "q6k", "q5k", "q4k", "q3k", "q2k")}
    assert sorted(sizes.values(), reverse=True) == list(sizes.values())
    for limit, best in ((whole.weight_bytes - 1, "q8_0"), (sizes["q4k"] + room, "q4k"), (sizes["q2k"] + room, "q2k")):
        error, refused = on_mlx(limit, max_model_len=16)
        megabytes = f"{sizes[best] / 1e6:.2f} MB"
        assert f"{best} would need {megabytes} and fits: --quant {best}" in error
        assert f"the weights need {whole.weight_bytes / 1e6:.2f} MB in bf16" in error
        assert not refused.fits
        assert on_mlx(limit, best, max_model_len=16)[0] == ""
    _, refused = on_mlx(sizes["q2k"] // 2, max_model_len=16)
    limit, none = refused.advice()
    assert limit.startswith("memory_limit of at least")
    assert none == f"no quantization fits: even q2k would need {sizes['q2k'] / 1e6:.2f} MB"
    error, refused = on_mlx(sizes["q4k"] + room - 1000, "q4k", max_model_len=16)
    assert "of KV cache" in error
    assert any("--quant q3k" in line for line in refused.advice())


def test_no_such_advice_where_it_cannot_apply(on_mlx, kept, larger):
    """Weights with few bits already, and a backend that unpacks them."""
    name, saved = kept
    _, refused = on_mlx(10**5, model=saved.path)
    assert any("no quantization fits" in line for line in refused.advice()) == (name != "q2_k")
    with pytest.raises(MemoryLimitError) as caught:
        Engine(EngineConfig(larger, backend="torch", device="cpu", memory_limit=10**6))
    assert "quant" not in str(caught.value)


def test_codebook_types_warn_of_the_memory_that_they_take(tmp_path):
    """The demo with one matrix in a type that is expanded."""
    path = tmp_path / "a.gguf"
    tokens("reference", "demo", quant="q8_0", save_quantized=path)
    reader, writer = gguf.GGUFReader(path), gguf.GGUFWriter(tmp_path / "b.gguf", "qwen3")
    for field in reader.fields.values():
        if not field.name.startswith(("GGUF.", "general.architecture")):
            kind, inner = field.types[0], field.types[-1]
            writer.add_key_value(field.name, field.contents(), kind, sub_type=inner if inner != kind else None)
    rng = np.random.default_rng(0)
    for t in reader.tensors:
        if t.name == "blk.1.ffn_up.weight":
            blocks = rng.integers(0, 60, (768, 66), np.uint8)
            writer.add_tensor(t.name, blocks, raw_dtype=gguf.GGMLQuantizationType.IQ2_XXS)
        else:
            writer.add_tensor(t.name, t.data, raw_dtype=t.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    words = r"1 tensors in iq2_xxs are expanded at load: in f32 they take 0\.79 MB instead of 50\.69 kB"
    with pytest.warns(UserWarning, match=words):
        tokens(BACKENDS[-1], tmp_path / "b.gguf")
    with pytest.raises(ModelError, match=r"layers\.1\.up is quantized already, in iq2_xxs"):
        tokens("torch", tmp_path / "b.gguf", quant="q4_0")


def test_quantized_already(kept):
    name, saved = kept
    with pytest.raises(ModelError, match=r"is quantized already, in .*: .* would only add errors"):
        tokens("torch", saved.path, quant=name)


def test_names_are_checked_with_the_other_options():
    with pytest.raises(ConfigError, match=r"quant: unknown quantization 'q4kk' \(hint: did you mean q4k"):
        EngineConfig(quant="q4kk")
    assert EngineConfig(quant="Q4_K_M").quant == "Q4_K_M"


def boom(*values):
    raise AssertionError("loading began")


@pytest.mark.parametrize(
    ("path", "quant", "words"),
    [
        ("there.gguf", "q4k", r"save_quantized: .*there\.gguf exists .*load it"),
        ("there", "mlx4", r"save_quantized: .*there exists"),
        ("new", "q4k", r"new is no name for q4k .*ends in \.gguf"),
        ("new.gguf", "mlx4", r"new\.gguf is no name for mlx4 .*leave out \.gguf"),
        ("a/new.gguf", "q4k", "there is no folder"),
        ("new.gguf", None, "not quantized"),
    ],
)
def test_paths_are_checked_before_anything_is_read(path, quant, words, tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    (tmp_path / "there.gguf").write_text("mine")
    monkeypatch.setattr("llmrs.engine.read_model", boom)
    with pytest.raises(ConfigError, match=words):
        Engine(EngineConfig(quant=quant, save_quantized=tmp_path / path))
    assert (tmp_path / "there.gguf").read_text() == "mine"


@pytest.mark.parametrize(("path", "quant"), [("new.gguf", "q4k"), ("new", "fp8")])
def test_free_space_is_checked_before_loading(path, quant, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**6))
    with pytest.raises(ModelError, match=r"needs .* bytes on the disk, and 1,000,000 are free"):
        Engine(EngineConfig(quant=quant, device="cpu", save_quantized=tmp_path / path), progress=boom)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("path", "quant"), [("new.gguf", "q4k"), ("new", "fp8")])
def test_a_load_that_is_cancelled_leaves_nothing(path, quant, tmp_path):
    config = EngineConfig(quant=quant, device="cpu", save_quantized=tmp_path / path)
    with pytest.raises(LoadCancelledError):
        Engine(config, progress=lambda done, total: done < total / 2)
    assert not list(tmp_path.iterdir())


def test_a_model_that_does_not_fit_is_not_written(tmp_path):
    config = EngineConfig(quant="q4k", device="cpu", save_quantized=tmp_path / "new.gguf", memory_limit=10**6)
    with pytest.raises(MemoryLimitError):
        Engine(config)
    assert not list(tmp_path.iterdir())
