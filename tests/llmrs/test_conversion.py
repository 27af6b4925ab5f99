"""Quantizing a model to a file: memory, quantized sources, and importance."""

import dataclasses
import shutil
import tracemalloc
import warnings
from pathlib import Path

import gguf
import numpy as np
import pytest
import texts
import tiny

from llmrs import EngineConfig
from llmrs.cli import main
from llmrs.conversion import quantize_model
from llmrs.core.errors import ModelError
from llmrs.evaluation import read_samples
from llmrs.model import read_folder, read_gguf, read_model
from llmrs.models import demo
from llmrs.models.arch.gguf_export import gguf_name
from llmrs.quant.schemes import find_scheme
from llmrs.saving import model_name

MIB = 2**20


@pytest.fixture(scope="module")
def model():
    return read_model(EngineConfig())


def weights(path):
    model = read_folder(path) if path.is_dir() else read_gguf(path)
    opened = model.open_weights()
    return {name: opened[name] for name in opened}


def test_a_tensor_at_a_time(tmp_path):
    """24 matrices of 2 MB as float32, 4 MB of embeddings: temporaries are some of one matrix, not of the model."""
    tiny.write_checkpoint(
        "qwen3", tmp_path, hidden_size=512, intermediate_size=1024, num_hidden_layers=8, vocab_size=2048
    )
    texts.write_text_files(tmp_path, texts.byte_level())
    texts.change(tmp_path / "generation_config.json", eos_token_id=2, bos_token_id=None)
    model, peaks = read_folder(tmp_path), []

    def measure(matrix):
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.reset_peak()

    for name in ("q8_0", "mlx8"):
        tracemalloc.start()
        summary = quantize_model(model, find_scheme(name), tmp_path / f"x.{name}", on_matrix=measure)
        tracemalloc.stop()
        assert summary.bytes_before > 55 * MIB
        assert max(peaks[1:]) < 32 * MIB  # the first one's follow the tokenizer, whose file is read at once
        peaks.clear()


@pytest.mark.parametrize("name", ["q4k", "q5_k_m", "q8_0", "bf16"])
def test_what_a_file_holds_is_what_the_summary_says(name, model, tmp_path):
    matrices = []
    summary = quantize_model(model, find_scheme(name), tmp_path / "x.gguf", on_matrix=matrices.append)
    assert (tmp_path / "x.gguf").stat().st_size == summary.bytes_after
    assert [m.done for m in matrices] == [*range(1, matrices[-1].total + 1)]
    before, after = model.open_weights(), weights(tmp_path / "x.gguf")
    assert summary.weights == sum(np.prod(t.shape) for t in after.values())
    for m in matrices:
        canonical = next(n for n in after if gguf_name(n) == f"{m.name}.weight")
        x, y = before[canonical].float32(), after[canonical].float32()
        assert (m.before, m.after) == (before[canonical].format, after[canonical].format)
        assert m.error == pytest.approx(np.linalg.norm(x - y) / np.linalg.norm(x), rel=1e-4)


def test_a_file_keeps_what_the_folder_says(tmp_path):
    """Also one that is made of another file."""
    folder = shutil.copytree(demo.FILES, tmp_path / "model")
    changed = {
        "do_sample": True,
        "temperature": 0.5,
        "top_k": 20,
        "top_p": 0.75,
        "min_p": 0.125,
        "repetition_penalty": 1.5,
    }
    texts.change(folder / "generation_config.json", **changed)
    (folder / "chat_template.jinja").write_text(texts.CHATML)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text(texts.CHATML + "tools")
    model = read_folder(folder)
    quantize_model(model, find_scheme("bf16"), tmp_path / "bf16.gguf")
    quantize_model(read_gguf(tmp_path / "bf16.gguf"), find_scheme("q8_0"), tmp_path / "q8_0.gguf")
    for name in ("bf16", "q8_0"):
        made = read_gguf(tmp_path / f"{name}.gguf")
        assert made.sampling == model.sampling
        assert made.eos_ids == model.eos_ids
        assert made.config.norm_eps == np.float32(1e-6)
        assert dataclasses.replace(made.config, norm_eps=1e-6) == model.config
        r = gguf.GGUFReader(tmp_path / f"{name}.gguf")
        assert r.get_field("tokenizer.chat_template").contents() == texts.CHATML
        assert r.get_field("tokenizer.chat_template.tool_use").contents() == texts.CHATML + "tools"
        assert r.get_field("general.sampling.top_k").types == [gguf.GGUFValueType.INT32]
        assert r.get_field("general.name").contents() == "model"


def test_names_of_outputs(tmp_path, monkeypatch):
    snapshot = tmp_path / "models--Qwen--Qwen3-0.6B" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    assert model_name(snapshot) == "Qwen3-0.6B"
    for name in ("Qwen3-0.6B-BF16.gguf", "Qwen3-0.6B-00002-of-00003.gguf", "Qwen3-0.6B.gguf", "Qwen3-0.6B.q8_0.gguf"):
        (tmp_path / name).touch()
        assert model_name(tmp_path / name) == "Qwen3-0.6B"
    monkeypatch.chdir(snapshot.parents[1])
    assert model_name(Path()) == "models--Qwen--Qwen3-0.6B"
    assert model_name(demo.FILES) == "demo"


def test_quantized_folders_are_sources(model, tmp_path):
    """MLX's eight bits have more than Q4_K's; its four bits have as many."""
    for bits in (4, 8):
        quantize_model(model, find_scheme(f"mlx{bits}"), tmp_path / f"mlx{bits}")
    eight, q4k = read_folder(tmp_path / "mlx8"), find_scheme("q4k")
    quantize_model(eight, q4k, tmp_path / "x.gguf")
    assert weights(tmp_path / "x.gguf")["layers.0.q"].format == "q4_k"
    with pytest.raises(ModelError, match=r"layers\.0\.q is quantized already, in mlx4_g64"):
        quantize_model(read_folder(tmp_path / "mlx4"), q4k, tmp_path / "y.gguf")
    assert not (tmp_path / "y.gguf").exists()


def rewritten(source, target, changes, **options):
    """A copy by the gguf package; `changes`: name -> data and type."""
    r = gguf.GGUFReader(source)
    w = gguf.GGUFWriter(target, "qwen3", **options)
    for field in r.fields.values():
        if not field.name.startswith(("GGUF.", "general.architecture")):
            inner = field.types[1] if len(field.types) > 1 else None
            w.add_key_value(field.name, field.contents(), field.types[0], inner)
    for t in r.tensors:
        data, kind = changes.get(t.name, (t.data, None))
        w.add_tensor(t.name, data, raw_dtype=kind)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


@pytest.fixture(scope="module")
def exact(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("exact") / "f32.gguf"
    quantize_model(model, find_scheme("f32"), path)
    return path


def test_codebook_types_are_quantized_already(exact, tmp_path):
    """They are expanded at load, and have few bits nevertheless."""
    kind = gguf.GGMLQuantizationType.IQ2_XXS
    rewritten(exact, tmp_path / "iq.gguf", {"blk.0.attn_q.weight": (np.zeros((256, 66), np.uint8), kind)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ModelError, match=r"layers\.0\.q is quantized already, in iq2_xxs"):
            quantize_model(read_gguf(tmp_path / "iq.gguf"), find_scheme("q4k"), tmp_path / "x.gguf")


def test_split_files_become_one(exact, tmp_path):
    rewritten(exact, tmp_path / "x", {}, split_max_tensors=20)
    parts = sorted(tmp_path.iterdir())
    assert len(parts) == 3
    for name, source in (("whole", exact), ("split", parts[1])):
        quantize_model(read_gguf(source), find_scheme("q8_0"), tmp_path / f"{name}.gguf")
    whole, split = (weights(tmp_path / f"{name}.gguf") for name in ("whole", "split"))
    assert all(np.array_equal(whole[n].float32(), split[n].float32()) for n in whole)
    before = parts[0].read_bytes()
    assert main(["quantize", str(parts[1]), "--quant", "q8_0", "-o", str(parts[0]), "--force"]) == 2
    assert parts[0].read_bytes() == before


def test_importance_lowers_the_errors_that_count(model, tmp_path):
    names = [n for n in model.open_weights() if n.endswith((".q", ".up"))]
    rng = np.random.default_rng(0)
    importance = {n: np.exp(3 * rng.normal(size=256)).astype(np.float32) for n in names}
    errors = []
    for given in (None, importance):
        quantize_model(model, find_scheme("q3k"), tmp_path / "x.gguf", importance=given, force=True)
        before, after = model.open_weights(), weights(tmp_path / "x.gguf")
        squares = [((before[n].float32() - after[n].float32()) ** 2 * importance[n]).sum() for n in names]
        errors.append(np.array(squares))
    assert (errors[1] < 0.8 * errors[0]).all()


def test_chunks_of_a_text(model, tmp_path):
    (tmp_path / "x.txt").write_text("Hello world. " * 400)
    tokens = model.tokenizer.encode("Hello world. " * 400)
    samples = read_samples(tmp_path / "x.txt", model)
    assert [t for s in samples for t in s.tokens] == tokens
    assert {len(s.tokens) for s in samples[:-1]} == {512}
    assert all(s.places.tolist() == [*range(1, len(s.tokens))] for s in samples)
