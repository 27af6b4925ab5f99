"""Compiles every kernel in every configuration that a GPU would run, without one. Prints a line for each.

    python tests/tools/triton_compile.py [few | all] [sm_80 sm_89 sm_90 sm_100]    (all, sm_90)

`few` are two shapes, `all` are awkward ones too. Each must fit into the shared memory of the
target. Run by test_triton_compile.py and `make compile` in a process of its own,
where Triton's interpreter is off.
"""

import re
import subprocess
import sys
import tempfile
from dataclasses import astuple
from pathlib import Path
from typing import ClassVar

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from llmrs.backends.torch.kernel_configs import SM90_CONFIGS, ConfigKey, Device, attn_config, smem_bytes
from llmrs.backends.torch.kernels import (
    act_and_mul,
    embedding,
    gumbel,
    gumbel_argmax,
    paged_attention,
    qk_norm_rope_cache,
    rms_norm,
)
from llmrs.backends.torch.kernels import gemm as rows_of
from llmrs.backends.torch.kernels import prefill_attention_tma as prompt_of
from llmrs.backends.torch.kernels import top_k_top_p as edges_of
from llmrs.backends.torch.kernels.gemm_tma import LINES, Tiles, many
from llmrs.backends.torch.kernels.launch import power, precision
from llmrs.backends.torch.kernels.paged_attention import AttnConfig
from llmrs.backends.torch.kv_fp8 import CODES, LEAST_CAPABILITY

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
# weights, and arrays of the step that a copy brings
EARLY = {"w", "norm", "tiles", "positions"}
TARGETS = {f"sm_{a}{b}": Device(f"sm_{a}{b}", (a, b)) for a, b in ((8, 0), (8, 9), (9, 0), (10, 0))}
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


class Run:
    """What is compiled for: set by `main`."""

    device = TARGETS["sm_90"]
    few = True
    done: ClassVar[set[ConfigKey]] = set()
    tiles: ClassVar[set[tuple]] = set()


def configs(key: ConfigKey) -> list[AttnConfig]:
    """The default for the device, and on sm_90 the measured one first."""
    Run.done.add(key)
    measured = [SM90_CONFIGS[key]] if Run.device.capability == (9, 0) and key in SM90_CONFIGS else []
    return [*dict.fromkeys([*measured, attn_config(key, Run.device)])]


def compiled(
    kernel, pointers: dict[str, str], constants: dict, floats=(), longs=(), warps: int = 4, stages: int = 3, chain=True,
    sixteens=(),
):  # fmt: skip
    """The kernel, chained where a GPU can: it is compiled both ways. Arguments that are not named are int32, and
    strides, V, span and `sixteens` are multiples of 16."""
    signature, attributes = {}, {}
    for n, name in enumerate(kernel.arg_names):
        kind = "fp32" if name in floats else "i64" if name in longs else "i32"
        fixed = "constexpr" if name in constants or name == "PDL" else None
        if name in pointers:
            kind = pointers[name] if pointers[name].startswith("tensordesc") else f"*{pointers[name]}"
        signature[name] = fixed or kind
        if (
            kind.startswith("*")
            or name in ("V", "span", *sixteens)
            or name.endswith(("_row", "_head", "_block", "_token"))
        ):
            attributes[(n,)] = [["tt.divisibility", 16]]
    major, minor = Run.device.capability
    target = GPUTarget("cuda", 10 * major + minor, 32)
    for chained in (False, True) if chain and major >= 9 else (False,):
        source = ASTSource(kernel, signature, constants | {"PDL": chained}, attributes)
        found = triton.compile(source, target=target, options={"num_warps": warps, "num_stages": stages})
        assert found.metadata.shared <= Run.device.smem_bytes, (kernel.__name__, constants, found.metadata.shared)
        check_chain(found, chained)
        spills = " LOCAL MEMORY" if ".local " in found.asm["ptx"] else ""
        how = " chained" if chained else ""
        print(kernel.__name__, constants, f"shared {found.metadata.shared}{how}{spills}")
    return found


def check_chain(found, chained: bool) -> None:
    """A chained kernel waits once, and before that it reads only what no kernel writes; others know nothing of it."""
    ptx = found.asm["ptx"]
    if not chained:
        assert "griddepcontrol" not in ptx
        return
    assert ptx.count("griddepcontrol.wait") == 1
    assert ptx.count("griddepcontrol.launch_dependents") == 1
    assert ptx.index("griddepcontrol.wait") < ptx.index("griddepcontrol.launch_dependents")
    early = ptx[: ptx.index("griddepcontrol.wait")]
    assert not re.search(r"\b(st|red|atom)\.(?!shared)", early)
    assert not re.search(r"^\s*(ret|@%p\d+ bra|bra)\b", early, re.M)  # every way out comes after the wait
    assert read_early(found.asm["ttir"]) <= EARLY, read_early(found.asm["ttir"])
    assert bool(read_early(found.asm["ttir"])) == ("ld.global" in early)


def read_early(ttir: str) -> set[str]:
    """The arguments from which a kernel loads before it waits."""
    sources: dict[str, set[str]] = {name: {name} for name in re.findall(r"%(\w+): !tt\.ptr", ttir)}
    read = set()
    for line in ttir[: ttir.index("griddepcontrol.wait")].splitlines():
        if made := re.match(r"\s*%([\w:#]+) = (.*)", line):
            names = re.findall(r"%(\w+)", made[2])
            sources[made[1]] = set().union(*(sources.get(n, set()) for n in names))
            if "tt.load" in made[2]:
                read |= sources[made[1]]
    return read


def pools(dtype: torch.dtype, *, fp8: bool) -> tuple[dict[str, str], dict[str, None]]:
    """Pointers to a KV cache in `dtype` or fp8, and what is not there."""
    scales = ("key_scales", "value_scales")
    if not fp8:
        return dict.fromkeys(("keys", "values"), NAMES[dtype]), dict.fromkeys(scales)
    return dict.fromkeys(("keys", "values"), "fp8e4nv") | dict.fromkeys(scales, "fp32"), {}


def attentions(dtype: torch.dtype, group: int, size: int, block: int, window: int, *, fp8: bool) -> None:
    t, padded = NAMES[dtype], power(size, 16)
    ints = dict.fromkeys(("tables", "tiles"), "i32")
    parts = dict.fromkeys(("part_sum", "part_most", "part_weight"), "fp32")
    cache, absent = pools(dtype, fp8=fp8)
    for prompt in (False, True):
        key = ConfigKey(prompt, group, size, dtype, CODES if fp8 else dtype)
        first, *others = configs(key)
        for cut, split in [(first, 1), *([] if prompt else [(first, 8)]), *((cut, 1) for cut in others)]:
            tokens, keys, warps, stages = astuple(cut)
            constants = {
                "G": group, "D": size, "DP": padded, "BLOCK": block, "R": power(tokens * power(group), 16),
                "TILE": keys, "SPLITS": split, "WINDOW": window, "PROMPT": prompt, "PRECISION": precision(dtype),
            }  # fmt: skip
            constants |= absent
            tensors = dict.fromkeys(("q", "y"), t) | cache | ints | parts
            found = compiled(paged_attention._attend, tensors, constants, ("scale",), (), warps, stages, cut == first)
            assert found.metadata.shared <= smem_bytes(key, cut, Run.device), (key, cut, found.metadata.shared)
    compiled(
        paged_attention._combine, {"tiles": "i32", "y": t, **parts}, {"D": size, "DP": padded, "SPLITS": 8}, warps=1
    )


def prompts(dtype: torch.dtype, group: int, size: int, block: int) -> None:
    """With its registers; matrix products of Hopper's kind, copies by the copy engine, and nothing spilled."""
    t, padded, cut = NAMES[dtype], power(size, 16), prompt_of.prefill_config(group, size, block)
    constants = {
        "G": group, "D": size, "DP": padded, "BLOCK": block, "R": power(cut.q_tokens * power(group), 16),
        "KEYS": cut.block_n,
    }  # fmt: skip
    pool = f"tensordesc<{t}[{cut.block_n},{padded}]>"
    tensors = {"q": t, "y": t, "keys": pool, "values": pool, "tables": "i32", "tiles": "i32"}
    found = compiled(prompt_of._prompt, tensors, constants, ("scale",), (), cut.num_warps, cut.num_stages)
    if Run.device.capability == (9, 0):
        assert "wgmma.mma_async" in found.asm["ptx"]
    assert "cp.async.bulk.tensor" in found.asm["ptx"]
    registers, spilled = resources(found)
    print(f"    registers {registers}")
    assert spilled == 0


def rows(dtype: torch.dtype, width: int) -> None:
    t, padded = NAMES[dtype], power(width)
    for parts in (0, 1, 2, 6):
        tensors = dict.fromkeys(("x", "y", "w", "total", "n"), t) | ({"y": "fp32"} if parts > 1 else {})
        constants = {"D": width, "DP": padded, "PARTS": parts}
        compiled(rms_norm._norm, tensors, constants, ("eps", "offset"), warps=min(max(padded // 512, 1), 16))
    for gelu in (False, True):
        constants = {"N": 3 * width, "PART": 1024, "GELU": gelu}
        compiled(act_and_mul._gated, dict.fromkeys(("gate", "up", "y"), t), constants)
    constants = {"D": width, "PART": min(1024, padded)}
    compiled(embedding._embed, {"tokens": "i32", "last": "i64", "table": t, "y": t}, constants, warps=2)


def products(dtype: torch.dtype, count: int, width: int, gate: str, norm: bool, add: bool, counts: tuple) -> None:
    """For numbers of rows; and what ptxas says."""
    w = torch.empty(count * (2 if gate else 1), width, dtype=dtype, device="meta")
    tensors = dict.fromkeys(("x", "norm", "w", "bias", "more", "y"), NAMES[dtype])
    bound = {"K": width, "GATE": rows_of.GATES[gate], "BIAS": False, "ADD": add}
    for rows in counts:
        cut = rows_of.cut_of(rows, w, bool(gate), add, Run.device.smem_bytes)
        if isinstance(cut, Tiles):
            tiles(cut, dtype, count, width, bound["GATE"])
        if not isinstance(cut, rows_of.Cut):
            continue  # the library's
        kernel, own = kernel_of(cut, rows, width, dtype, gate)
        own |= {"PART": cut.part, "EACH": cut.each}
        own["NORM"] = norm and rows_of.normed(w) and rows <= rows_of.NORMED
        stages = own.pop("num_stages", 1)
        constants = {k: v for k, v in (bound | own).items() if k in kernel.arg_names}
        given = {k: v for k, v in tensors.items() if k in kernel.arg_names}
        sixteens = () if count % 16 else ("N",)
        found = compiled(kernel, given, constants, ("eps", "offset"), (), cut.warps, stages, True, sixteens)
        registers, spilled = resources(found)
        where = "LOCAL MEMORY" if spilled > 16 else "spilled"  # a register or four by the way cost nothing
        print(f"    {rows} rows: registers {registers}, {where} {spilled} bytes")


def kernel_of(cut, rows: int, width: int, dtype: torch.dtype, gate: str):
    """The kernel that does a cut, and its constants."""
    if rows_of.vectors(rows, width, bool(gate)):
        return rows_of.few, rows_of.of_few(cut, rows, width, dtype.itemsize, gate)
    return rows_of.some, rows_of.of_some(cut, rows, width, dtype)


def tiles(cut: Tiles, dtype: torch.dtype, count: int, width: int, gate: int) -> None:
    """`many`, whose code does not depend on the matrix: from the copy engine right into Hopper's products."""
    t, sixteens = NAMES[dtype], tuple(n for n, size in (("N", count), ("K", width)) if size % 16 == 0)
    key = (dtype, Run.device, cut.each, cut.count, cut.part, cut.stages, cut.split > 1, gate, sixteens)
    if key in Run.tiles:
        return
    Run.tiles.add(key)
    shapes = (("x_tiles", cut.count), ("w_tiles", cut.each))
    tensors = {name: f"tensordesc<{t}[{rows},{cut.part}]>" for name, rows in shapes}
    tensors |= {"w": t, "bias": t, "y": "fp32" if cut.split > 1 else t}
    constants = {"PART": cut.part, "EACH": cut.each, "COUNT": cut.count, "LINES": LINES, "GATE": gate}
    for bias in (False, True) if cut.split == 1 else (False,):
        found = compiled(many, tensors, constants | {"BIAS": bias}, (), (), cut.warps, cut.stages, True, sixteens)
        assert "cp.async.bulk.tensor" in found.asm["ptx"]
        if Run.device.capability == (9, 0):
            assert "wgmma.mma_async" in found.asm["ptx"]
        registers, spilled = resources(found)
        print(f"    {cut}: registers {registers}")
        assert spilled == 0, cut


def resources(found) -> tuple[int, int]:
    """Registers of a thread, and bytes that did not fit into them, as ptxas gave them: those are on the stack."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(found.asm["cubin"])
        file.flush()
        said = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    counts = {name: int(count) for name, count in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
    return counts["REG"], counts["STACK"] + counts["LOCAL"]


def ropes(dtype: torch.dtype, heads: int, kv_heads: int, size: int, norms: bool, *, fp8: bool) -> None:
    cache, absent = pools(dtype, fp8=fp8)
    tensors = dict.fromkeys(("q", "k", "v", "qw", "kw", "out"), NAMES[dtype]) | cache
    tensors |= {"positions": "i32", "cells": "i32", "turns": "fp32"}
    for most in (4, 16):
        together = min(most, power(kv_heads))
        constants = {
            "HQ": heads, "HK": kv_heads, "D": size, "HALF": size // 2, "HALF_P": power(size // 2),
            "HEADS": together, "BLOCK": 64, "NORM": norms,
        }  # fmt: skip
        compiled(
            qk_norm_rope_cache._qk_norm_rope_write_kv,
            tensors,
            constants | absent,
            ("eps", "offset"),
            warps=max(together // 4, 1),
        )


def samplings(dtype: torch.dtype) -> None:
    tensors = {
        "logits": NAMES[dtype],
        "temperature": "fp32",
        "keys": "i32",
        "edges": "i32",
        "scores": "fp32",
        "ids": "i32",
    }
    for edges in (False, True):
        compiled(gumbel_argmax._search, tensors, {"CHUNK": gumbel_argmax.CHUNK, "EDGES": edges}, warps=1)
    floats = dict.fromkeys(("temperature", "top_p", "min_p"), "fp32")
    tensors = {"logits": NAMES[dtype], "top_k": "i32", "edges": "i32", **floats}
    compiled(edges_of._edges, tensors, {"PART": edges_of.PART}, warps=8)
    ints = {"scores": "fp32", "ids": "i32", "slots": "i32", "last": "i64", "tokens": "i32"}
    for parts in (64, 256):
        compiled(gumbel.pick, ints, {"PARTS": parts}, warps=1)


# Of Qwen3-0.6B's layer and head; then Llama-3.2-1B's and Qwen3-8B's, and awkward ones. A norm only of one row.
FEW = [
    (4096, 1024, "", True, False), (1024, 2048, "", False, True), (3072, 1024, "silu_and_mul", True, False),
    (1024, 3072, "", False, True), (151936, 1024, "", False, False), (151936, 4096, "", False, False),
    (3072, 2048, "", True, False), (2048, 2048, "", False, True), (8192, 2048, "silu_and_mul", True, False),
    (2048, 8192, "", False, True),
    (6144, 4096, "", True, False), (4096, 4096, "", False, True), (12288, 4096, "silu_and_mul", True, False),
    (4096, 12288, "", False, True), (21504, 5376, "gelu_and_mul", True, False),
    (1000, 80, "gelu_and_mul", True, True), (2560, 2560, "", True, False), (1152, 1152, "", True, True),
]  # fmt: skip


def main(few: bool, device: Device) -> None:
    Run.few, Run.device = few, device
    rows_of.hopper = lambda _: device.capability >= (9, 0)
    caches = (False, True) if device.capability >= LEAST_CAPABILITY else (False,)  # in the computation's type, or fp8
    every = [
        (2, 128, 64, 0),
        (4, 64, 64, 0),
        (4, 128, 64, 0),
        (2, 256, 64, 512),
        (1, 24, 64, 6),
        (5, 96, 16, 0),
        (8, 128, 64, 4096),
    ]
    for dtype in (torch.bfloat16,) if few else (torch.bfloat16, torch.float16, torch.float32):
        for group, size, block, window in every[:3] if few else every:
            for fp8 in caches:
                attentions(dtype, group, size, block, window, fp8=fp8)
        copies = device.capability >= (9, 0) and dtype != torch.float32
        for group, size, block, window in (*every, (2, 128, 128, 0)) if copies else ():
            if window == 0 and (not few or size == 128):
                prompts(dtype, group, size, block)
        for width in (1024,) if few else (1024, 80, 5376):
            rows(dtype, width)
        for sizes in FEW[:4] if few else FEW:
            products(dtype, *sizes, (1, 2, 16, 256) if few else (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512))
        for shape in ((16, 8, 128),) if few else ((16, 8, 128), (3, 1, 24), (4, 1, 256)):
            for norms in (False, True):
                for fp8 in caches:
                    ropes(dtype, *shape, norms, fp8=fp8)
        samplings(dtype)
    stored = {key for key in SM90_CONFIGS if True in caches or key.kv_dtype != CODES}
    assert stored <= Run.done, stored - Run.done


if __name__ == "__main__":
    for name in [a for a in sys.argv[1:] if a in TARGETS] or ["sm_90"]:
        print(f"-- {name}, {TARGETS[name].smem_bytes // 1024} KB", flush=True)
        main("few" in sys.argv, TARGETS[name])
