"""Weights of GGUF files with the changes of llama.cpp's conversion undone: those of the checkpoint, bit for bit."""

import gguf_families
import numpy as np
import pytest

from llmrs.core.errors import ModelError
from llmrs.model import read_gguf
from llmrs.models.arch.families import family, graph_of, read_config
from llmrs.models.files.gguf import GGUFSource
from llmrs.models.files.gguf_weights import UnconvertedSource, half_rows
from llmrs.models.files.quantized import open_weights
from llmrs.models.files.weights import Weights
from llmrs.quant.tensor import QuantTensor

ARCHITECTURES = {"mistral": ("llama", "mistral3"), "mistral-nemo": ("llama", "mistral3")}
CASES = [(name, arch) for name in gguf_families.CONVERTED for arch in ARCHITECTURES.get(name, (None,))]


def stored(folder):
    """Those of the folder, under our names."""
    config = read_config(folder)
    names = family(config.architecture).names
    return Weights(graph_of(config), names, open_weights(folder), tied=config.tie_word_embeddings)


@pytest.mark.parametrize(("name", "arch"), CASES)
def test_weights_are_those_of_the_checkpoint(name, arch, checkpoints, tmp_path):
    """Norms of Gemma but for the rounding of 1 + w."""
    folder = checkpoints.folder(name)
    ours = read_gguf(gguf_families.write(folder, tmp_path / "a.gguf", arch=arch)).open_weights()
    expected = stored(folder)
    assert ours.keys() == expected.keys()
    for weight, tensor in expected.items():
        values = ours[weight].float32()
        if name.startswith("gemma3") and "norm" in weight:
            np.testing.assert_array_equal(values + np.float32(1), tensor.float32() + np.float32(1))
        else:
            np.testing.assert_array_equal(values, tensor.float32())


@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "q4_1", "q5_0", "bf16"])
@pytest.mark.parametrize("name", ["llama", "qwen3-moe"])
def test_quantized_weights(name, kind, checkpoints, tmp_path):
    """Rows of q and k and experts are moved as they are, packed."""
    folder = checkpoints.folder(name)
    ours = read_gguf(gguf_families.write(folder, tmp_path / "a.gguf", kind=kind)).open_weights()
    expected = stored(gguf_families.rounded(folder, tmp_path / "rounded", kind))
    formats = {w: ours[w].format for w in ours}
    assert {kind, "f32"} == set(formats.values())
    for weight, tensor in expected.items():
        np.testing.assert_array_equal(ours[weight].float32(), tensor.float32())
    assert formats["layers.1.q"] == formats["layers.1.k"] == kind
    if name == "qwen3-moe":
        assert formats["layers.2.experts.5.up"] == kind
        assert formats["layers.0.router"] == "f32"


def test_quantized_experts_are_views_of_the_file(checkpoints, tmp_path):
    source = GGUFSource(gguf_families.write(checkpoints.folder("qwen3-moe"), tmp_path / "a.gguf", kind="q8_0"))
    weights = UnconvertedSource(source, read_config(checkpoints.folder("qwen3-moe")), tmp_path / "a.gguf")
    expert = weights.tensor("blk.0.ffn_up_exps.3.weight")
    assert isinstance(expert, QuantTensor)
    assert expert.shape == weights.shape("blk.0.ffn_up_exps.3.weight") == (24, 64)
    assert np.shares_memory(expert.arrays["blocks"], source.tensor("blk.0.ffn_up_exps.weight").arrays["blocks"])
    assert "blk.0.ffn_up_exps.weight" not in weights.names()


@pytest.mark.parametrize(("heads", "size"), [(1, 2), (3, 4), (4, 16)])
def test_order_of_rows(heads, size):
    """Undoes the permutation that conversion makes for interleaved rope."""
    rows = np.arange(heads * size)
    permuted = rows.reshape(heads, 2, size // 2).swapaxes(1, 2).reshape(-1)
    np.testing.assert_array_equal(permuted[half_rows(len(rows), heads)], rows)


def rewritten(folder, path, change):
    """The file with some of its tensors changed: `change` of name -> (data, type)."""
    original = gguf_families.tensors
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf_families, "tensors", lambda *args: change(original(*args)))
        return gguf_families.write(folder, path)


def without(name):
    return lambda tensors: {n: t for n, t in tensors.items() if n != name}


def cut(name, index):
    return lambda tensors: {n: (np.ascontiguousarray(d[index]) if n == name else d, t) for n, (d, t) in tensors.items()}


BAD = {
    "no q": ("llama", without("blk.1.attn_q.weight"), "lacks blk.1.attn_q.weight"),
    "no embeddings": ("llama", without("token_embd.weight"), "lacks token_embd.weight"),
    "no experts": ("qwen3-moe", without("blk.1.ffn_up_exps.weight"), "lacks blk.1.ffn_up_exps.0.weight"),
    "no router": ("qwen3-moe", without("blk.1.ffn_gate_inp.weight"), "blk.1.ffn_"),
    "fewer experts": ("qwen3-moe", cut("blk.1.ffn_up_exps.weight", slice(5)), "(5, 24, 64)"),
    "experts in one matrix": ("qwen3-moe", cut("blk.1.ffn_up_exps.weight", 0), "(24, 64)"),
    "fewer rows of q": ("llama", cut("blk.1.attn_q.weight", slice(48)), "(48, 64)"),
    "odd rows of k": ("llama", cut("blk.1.attn_k.weight", slice(31)), "(31, 64)"),
    "narrow rows": ("llama", cut("blk.1.ffn_up.weight", (slice(None), slice(32))), "(96, 32)"),
    "a norm of another size": ("gemma3", cut("blk.1.attn_norm.weight", slice(10)), "(10,)"),
    "fewer divisors": ("llama-3.1-bias", cut("rope_freqs.weight", slice(7)), "(7,)"),
    "one more": ("llama", lambda t: {**t, "blk.0.attn_sinks.weight": t["output_norm.weight"]}, "blk.0.attn_sinks"),
    "experts of a dense model": (
        "llama", lambda t: {**t, "blk.0.ffn_up_exps.weight": (np.zeros((2, 4, 4), np.float32), None)}, "ffn_up_exps"
    ),
    "divisors where none are used": (
        "qwen3", lambda t: {**t, "rope_freqs.weight": (np.ones(8, np.float32), None)}, "rope_freqs.weight"
    ),
    "fewer layers": ("llama", lambda t: {n: d for n, d in t.items() if "blk.2" not in n}, "lacks blk.2"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_tensors_that_the_config_does_not_ask_for(name, checkpoints, tmp_path):
    checkpoint, change, word = BAD[name]
    path = rewritten(checkpoints.folder(checkpoint), tmp_path / "a.gguf", change)
    with pytest.raises(ModelError) as caught:
        read_gguf(path).open_weights()
    assert word in caught.value.message
    assert caught.value.hint


def test_quantized_norms_are_refused(checkpoints, tmp_path):
    norm = gguf_families.pack(np.ones((12, 64)), "q8_0")

    def change(tensors):
        return {n: (norm[0][0], norm[1]) if n == "blk.0.attn_norm.weight" else t for n, t in tensors.items()}

    weights = read_gguf(rewritten(checkpoints.folder("llama"), tmp_path / "a.gguf", change)).open_weights()
    with pytest.raises(ModelError, match="quantized to q8_0"):
        weights["layers.0.attn_norm"]


def test_tied_and_untied_heads(checkpoints, tmp_path):
    """By whether the file holds one."""
    for name, tied in (("llama", False), ("qwen3", True), ("gemma3", True), ("gemma3-untied", False)):
        model = read_gguf(gguf_families.write(checkpoints.folder(name), tmp_path / f"{name}.gguf"))
        assert model.config.tie_word_embeddings is tied
        assert ("lm_head" in model.open_weights()) is not tied
