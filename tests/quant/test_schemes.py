"""Recipes: names, and llama.cpp's mixes tensor by tensor against the files that llama.cpp writes."""

import re
import warnings
from pathlib import Path

import gguf
import numpy as np
import pytest
from llama_cpp import quantize, require_llama_cpp

from llmrs.core.errors import ConfigError
from llmrs.quant.schemes import SCHEMES, ModelShape, find_scheme, plan

MIXES = [s.name for s in SCHEMES.values() if s.kind == "mix"]
ROLES = {
    "attn_q": "q", "attn_k": "k", "attn_v": "v", "attn_output": "o",
    **{f"ffn_{n}{e}": n for n in ("gate", "up", "down") for e in ("", "_exps")},
}  # fmt: skip


def test_the_docs_name_every_scheme():
    page = (Path(__file__).parents[2] / "docs" / "quantization.md").read_text("utf-8")
    names = page.split("## Names")[1].split("##")[0]
    assert {n for part in re.findall(r"`([^`]+)`", names) for n in part.split()} >= SCHEMES.keys()
    table = page.split("<!-- quality -->")[1].split("\n\n")[0]
    assert set(re.findall(r"^\| (\w+) \|", table, re.M)) >= SCHEMES.keys()


def canonical(name: str) -> str:
    whole = {"token_embd.weight": "embed", "output.weight": "lm_head", "output_norm.weight": "final_norm"}
    if name in whole:
        return whole[name]
    _, layer, part, _ = name.split(".")
    return f"layers.{layer}.{ROLES.get(part, part)}"


def random_gguf(path: Path, layers: int, heads: int, kv_heads: int, hidden: int, ffn: int, tied: bool, experts: int):
    """A Llama of random weights without a tokenizer's words."""
    w = gguf.GGUFWriter(path, "llama")
    w.add_block_count(layers)
    w.add_context_length(64)
    w.add_embedding_length(hidden)
    w.add_feed_forward_length(ffn)
    w.add_head_count(heads)
    w.add_head_count_kv(kv_heads)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_vocab_size(64)
    w.add_tokenizer_model("none")
    if experts:
        w.add_expert_count(experts)
        w.add_expert_used_count(2)
    stack, part = ((experts,), "_exps") if experts else ((), "")
    rows, columns = 8, {"ffn_down": ffn}  # few rows: the types depend on the columns
    shapes = {"token_embd": (rows, hidden), "output_norm": (hidden,)} | ({} if tied else {"output": (rows, hidden)})
    for n in range(layers):
        shapes |= {f"blk.{n}.{name}": (hidden,) for name in ("attn_norm", "ffn_norm")}
        shapes |= {f"blk.{n}.attn_{name}": (rows, hidden) for name in ("q", "k", "v", "output")}
        for name in ("ffn_gate", "ffn_up", "ffn_down"):
            shapes[f"blk.{n}.{name}{part}"] = (*stack, rows, columns.get(name, hidden))
        if experts:
            shapes[f"blk.{n}.ffn_gate_inp"] = (experts, hidden)
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        w.add_tensor(f"{name}.weight", rng.normal(size=shape).astype(np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return {f"{name}.weight": shape for name, shape in shapes.items()}


CASES = {  # layers, heads, kv_heads, hidden, ffn, tied, experts
    "1 layer": (1, 4, 4, 256, 256, True, 0),
    "7 layers": (7, 4, 1, 256, 512, False, 0),
    "22 layers": (22, 8, 2, 256, 256, True, 0),
    "35 layers": (35, 4, 2, 256, 256, False, 0),
    "ragged": (5, 4, 2, 128, 96, False, 0),
    "ragged tied": (5, 4, 2, 128, 40, True, 0),
    "4 experts": (9, 4, 2, 256, 256, False, 4),
    "8 experts": (9, 4, 2, 256, 256, False, 8),
    "70B": (80, 8, 1, 256, 256, True, 0),
}


@pytest.mark.parametrize("case", CASES)
def test_mixes_are_llama_cpps(case, tmp_path):
    require_llama_cpp()
    layers, heads, kv_heads, _, _, tied, experts = CASES[case]
    shapes = random_gguf(tmp_path / "in.gguf", *CASES[case])
    model = ModelShape(layers, heads, kv_heads, experts, tied, is_70b=layers == 80)
    mixes = MIXES if layers < 80 else ("q3_k_s", "q4_k_m")  # those that the 70B rule changes
    quantize(tmp_path / "in.gguf", {tmp_path / mix: mix for mix in mixes})
    for mix in mixes:
        found = {t.name: t.tensor_type.name.lower() for t in gguf.GGUFReader(tmp_path / mix).tensors}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            types = plan(SCHEMES[mix], {canonical(n): shapes[n] for n in found}, model)
        wrong = {n: (types[canonical(n)], kind) for n, kind in found.items() if (types[canonical(n)] or "f32") != kind}
        assert not wrong, f"{mix}: ours, llama.cpp's: {wrong}"


def test_recipes_keep_v_in_8_bits_and_leave_tables_alone():
    shapes = dict.fromkeys(
        ("embed", "lm_head", *(f"layers.1.{r}" for r in "qkvo"), "layers.0.experts.3.down"), (4, 256)
    )
    types = plan(find_scheme("q4k"), {**shapes, "layers.0.router": (4, 256), "final_norm": (256,)}, ModelShape(2, 4, 4))
    assert types == {
        "embed": None, "lm_head": None, "layers.1.q": "q4_k", "layers.1.k": "q4_k", "layers.1.v": "q8_0",
        "layers.1.o": "q4_k", "layers.0.experts.3.down": "q4_k", "layers.0.router": None, "final_norm": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "columns", "expected"),
    [("q4k", 96, "q8_0"), ("q4k", 40, None), ("q4_0", 40, None), ("q8_0", 33, None), ("q4_k_m", 40, "f16"),
     ("mlx4", 40, None), ("fp8", 200, None)],
)  # fmt: skip
def test_a_fallback_is_warned_of_once(name, columns, expected):
    with pytest.warns(UserWarning, match=r"layers\.0\.up and 1 more: ") as caught:
        types = plan(find_scheme(name), {f"layers.{i}.up": (8, columns) for i in range(2)}, ModelShape(2, 4, 4))
    assert set(types.values()) == {expected}
    text = str(caught[0].message)
    assert len(caught) == 1
    assert (expected or "not quantized") in text
    assert str(columns) in text


@pytest.mark.parametrize(("columns", "expected"), [(96, "mlx4_g32"), (128, "mlx4_g64")])
def test_mlx_takes_the_largest_group_that_divides(columns, expected):
    assert find_scheme("mlx4").type_of("lm_head", columns, ModelShape(1, 4, 4)) == (expected, "mlx4")


@pytest.mark.parametrize(
    ("given", "name"),
    [("Q4_K_M", "q4_k_m"), ("q4-k-m", "q4_k_m"), ("q4_k", "q4_k_m"), ("q4km", "q4_k_m"), ("q4k", "q4k"), ("Q6K", "q6k"),
     ("q6_k", "q6_k"), ("Q8_0", "q8_0"), ("MLX4", "mlx4"), (" fp8 ", "fp8")],
)  # fmt: skip
def test_spellings(given, name):
    assert find_scheme(given).name == name


def test_an_unknown_name_gets_a_guess():
    with pytest.raises(ConfigError, match=r"quant: unknown quantization 'q4kk' \(hint: did you mean q4k"):
        find_scheme("q4kk")
