"""Importance matrices: llmrs's against hooks in transformers, files of both formats of llama.cpp, and broken files."""

import contextlib
import struct

import gguf
import numpy as np
import pytest
import texts
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmrs import EngineConfig
from llmrs.core.errors import ModelError
from llmrs.imatrix import measure, read_importance
from llmrs.model import read_model
from llmrs.models.files.imatrix import Sums, read_imatrix, write_imatrix

NAMES = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
         "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
         "mlp.down_proj": "ffn_down"}  # fmt: skip
SUMS = {
    "blk.0.attn_q.weight": Sums(np.array([[4.0, 8.0]]), np.array([4])),
    "blk.0.ffn_up_exps.weight": Sums(np.array([[2.0, 4.0], [0.0, 0.0]]), np.array([2, 0])),
}


@pytest.fixture
def folder(request, tmp_path):
    tiny.write_checkpoint(request.param, tmp_path, vocab_size=320)
    texts.write_text_files(tmp_path)
    texts.change(tmp_path / "generation_config.json", eos_token_id=2, bos_token_id=None)
    return tmp_path


def measured(folder, chunk=16, chunks=2):
    model = read_model(EngineConfig(str(folder)))
    (tokens,) = tiny.prompts(chunk * chunks + 5)
    return model, tokens, measure(model.graph, model.open_weights(), tokens, chunk)


@pytest.mark.parametrize("folder", ["llama"], indirect=True)
def test_sums_are_those_of_transformers(folder):
    import transformers

    _, tokens, sums = measured(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = {}

    def hook(name):
        def add(module, inputs, output):
            expected[name] = expected.get(name, 0) + inputs[0].double().square().sum((0, 1)).numpy()

        return add

    for name, module in model.model.named_modules():
        for theirs, ours in NAMES.items():
            if name.endswith(theirs):
                module.register_forward_hook(hook(f"blk.{name.split('.')[1]}.{ours}.weight"))
    with torch.no_grad():
        for n in (0, 16):
            model(torch.tensor([tokens[n : n + 16]]))
    assert sums.keys() == expected.keys()
    for name, s in sums.items():
        assert s.tokens.tolist() == [32]
        assert np.allclose(s.squares, expected[name], rtol=1e-4)


@pytest.mark.parametrize("folder", ["qwen3-moe"], indirect=True)
def test_experts(folder, tmp_path):
    """Each token counts for its two experts, and for no other."""
    model, _, sums = measured(folder)
    for layer in range(3):
        up, gate, down = (sums[f"blk.{layer}.ffn_{n}_exps.weight"] for n in ("up", "gate", "down"))
        assert up.tokens.sum() == 2 * 32
        assert (up.tokens == down.tokens).all()
        assert np.array_equal(up.squares, gate.squares)
        assert ((up.squares.sum(1) > 0) == (up.tokens > 0)).all()
        assert down.squares.shape == (6, 24)
    write_imatrix(tmp_path / "x.gguf", sums, "text", 2, 16)
    importance = read_importance(tmp_path / "x.gguf", model.graph)
    assert importance["layers.0.q"].shape == (64,)
    for e, count in enumerate(sums["blk.0.ffn_up_exps.weight"].tokens):
        assert (f"layers.0.experts.{e}.up" in importance) == (count > 0)


def test_the_gguf_package_reads_it(tmp_path):
    write_imatrix(tmp_path / "x.gguf", SUMS, "text.txt", 3, 512)
    r = gguf.GGUFReader(tmp_path / "x.gguf")
    keys = {
        name: r.get_field(name).contents() for name in ("general.type", "imatrix.chunk_count", "imatrix.chunk_size")
    }
    assert keys == {"general.type": "imatrix", "imatrix.chunk_count": 3, "imatrix.chunk_size": 512}
    assert r.get_field("imatrix.datasets").contents() == ["text.txt"]
    found = {t.name: (t.data.tolist(), [int(n) for n in t.shape]) for t in r.tensors}
    assert found["blk.0.ffn_up_exps.weight.in_sum2"] == ([[2, 4], [0, 0]], [2, 2])
    assert found["blk.0.ffn_up_exps.weight.counts"] == ([[2], [0]], [1, 2])
    means = read_imatrix(tmp_path / "x.gguf")
    assert means["blk.0.attn_q.weight"].tolist() == [[1, 2]]
    assert means["blk.0.ffn_up_exps.weight"][0].tolist() == [1, 2]
    assert np.isnan(means["blk.0.ffn_up_exps.weight"][1]).all()


def dat(*entries):
    """An older file: of name, calls, values."""
    data = struct.pack("<i", len(entries))
    for name, calls, values in entries:
        data += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, len(values))
        data += np.array(values, "<f4").tobytes()
    return data + struct.pack("<ii", 7, 4) + b"text"  # chunks, and the name of the text


def test_the_older_format(tmp_path):
    (tmp_path / "x.dat").write_bytes(dat(("blk.0.attn_q.weight", 4, [4.0, 8.0]), ("output.weight", 0, [0.0])))
    means = read_imatrix(tmp_path / "x.dat")
    assert means["blk.0.attn_q.weight"].tolist() == [[1, 2]]


WHOLE = dat(("a", 1, [1.0, 2.0]), ("b", 1, [3.0]))


@given(st.integers(0, 40), st.integers(0, 255), st.integers(0, len(WHOLE)))
def test_broken_files_are_refused_or_read(tmp_path_factory, at, byte, end):
    path = tmp_path_factory.getbasetemp() / "x.dat"
    path.write_bytes((WHOLE[:at] + bytes([byte]) + WHOLE[at + 1 :])[:end])
    with contextlib.suppress(ModelError):
        assert all(m.dtype == np.float32 for m in read_imatrix(path).values())


def test_other_files(tmp_path):
    from llmrs.models.files.gguf_writer import open_gguf

    model = read_model(EngineConfig())
    path = tmp_path / "x.gguf"
    with open_gguf(path, {"general.architecture": "qwen3"}, []):
        pass
    with pytest.raises(ModelError, match="holds no importance matrix"):
        read_imatrix(path)
    write_imatrix(path, {"blk.0.attn_q.weight": Sums(np.ones((1, 7)), np.ones(1, np.int64))}, "", 1, 1, force=True)
    with pytest.raises(ModelError, match=r"another model: blk.0.attn_q.weight has the shape \(1, 7\)"):
        read_importance(path, model.graph)
    write_imatrix(path, {"blk.77.attn_q.weight": Sums(np.ones((1, 256)), np.ones(1, np.int64))}, "", 1, 1, force=True)
    with pytest.raises(ModelError, match="none of its matrices"):
        read_importance(path, model.graph)
    (tmp_path / "x.dat").write_bytes(dat(("a", 1, [float("inf")])))
    with pytest.raises(ModelError, match="no means of squares"):
        read_imatrix(tmp_path / "x.dat")
