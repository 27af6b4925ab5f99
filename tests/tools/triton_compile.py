"""Compiles every kernel in every configuration that a GPU would run, without one. Prints a line for each.

    python tests/tools/triton_compile.py [few | all] [sm_80 sm_89 sm_90 sm_100 sm_120]    (all, sm_90)

`few`: the shapes of two models; `all`: awkward ones too. Each must fit into the target's shared memory. Run by
test_triton_compile.py and `make compile` in a process of its own, where Triton's interpreter is off.
"""

import re
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import ClassVar

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from llmrs.backends.torch.kernel_configs import SM90_CONFIGS, ConfigKey, Device, attn_config, smem_bytes
from llmrs.backends.torch.kernels import gemm, gumbel_argmax, top_k_top_p
from llmrs.backends.torch.kernels.act_and_mul import act_and_mul_kernel
from llmrs.backends.torch.kernels.dequantize import dequantize_kernel
from llmrs.backends.torch.kernels.embedding import embed_kernel
from llmrs.backends.torch.kernels.gemm_small_m import gemm_small_m_kernel
from llmrs.backends.torch.kernels.gemm_tma import PREFETCH_LINES, TmaConfig, gemm_tma_kernel
from llmrs.backends.torch.kernels.gemv import gemv_kernel
from llmrs.backends.torch.kernels.gumbel import reduce_argmax_kernel
from llmrs.backends.torch.kernels.launch import dot_precision, next_power_of_2
from llmrs.backends.torch.kernels.paged_attention import AttnConfig, combine_splits_kernel, paged_attention_kernel
from llmrs.backends.torch.kernels.prefill_attention_tma import prefill_attention_tma_kernel, prefill_config
from llmrs.backends.torch.kernels.qk_norm_rope_cache import qk_norm_rope_write_kv_kernel
from llmrs.backends.torch.kernels.quant_gemm import quant_gemm_config, quant_gemm_kernel, reduce_splits_kernel
from llmrs.backends.torch.kernels.quant_gemv import quant_gemv_config, quant_gemv_kernel
from llmrs.backends.torch.kernels.quantize_activations import UNITS_PER_WARP, quantize_activations_kernel
from llmrs.backends.torch.kernels.rms_norm import fused_add_rms_norm_kernel
from llmrs.backends.torch.kv_fp8 import E4M3, MIN_CAPABILITY
from llmrs.backends.torch.triton_rows import PLANES, TritonRows
from llmrs.quant import ggml
from llmrs.quant.form import Form

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
# arguments that a kernel may read before gdc_wait: weights, and input arrays that a copy fills
EARLY = {"w", "weight", "norm_weight", "tiles", "positions", *PLANES}
DIVISIBLE = ("V", "span", "k_per_split")  # by 16, as strides are
FLOATS = ("scale", "eps", "weight_offset")
TARGETS = {f"sm_{a}{b}": Device(f"sm_{a}{b}", (a, b)) for a, b in ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0))}
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


class Run:
    """What is compiled for: set by `main`."""

    device = TARGETS["sm_90"]
    few = True
    done: ClassVar[set[ConfigKey]] = set()
    tma: ClassVar[set[tuple]] = set()


def compiled(
    kernel, pointers: dict[str, str], constants: dict, warps: int = 4, stages: int = 3, pdl=True, divisible=()
):
    """The kernel, compiled without PDL and, where the target has it, with. Arguments that are not named are int32;
    strides, DIVISIBLE and `divisible` are multiples of 16."""
    signature, attributes = {}, {}
    for n, name in enumerate(kernel.arg_names):
        kind = "fp32" if name in FLOATS else "i32"
        if name in pointers:
            kind = pointers[name] if pointers[name].startswith("tensordesc") else f"*{pointers[name]}"
        signature[name] = "constexpr" if name in constants or name == "PDL" else kind
        if kind.startswith("*") or name in (*DIVISIBLE, *divisible) or name.startswith("stride_"):
            attributes[(n,)] = [["tt.divisibility", 16]]
    major, minor = Run.device.capability
    target = GPUTarget("cuda", 10 * major + minor, 32)
    for with_pdl in (False, True) if pdl and major >= 9 else (False,):
        source = ASTSource(kernel, signature, constants | {"PDL": with_pdl}, attributes)
        found = triton.compile(source, target=target, options={"num_warps": warps, "num_stages": stages})
        assert found.metadata.shared <= Run.device.smem_bytes, (kernel.__name__, constants, found.metadata.shared)
        check_pdl(found, with_pdl)
        spills = " LOCAL MEMORY" if ".local " in found.asm["ptx"] else ""
        how = " PDL" if with_pdl else ""
        print(kernel.__name__, constants, f"shared {found.metadata.shared}{how}{spills}")
    return found


def check_pdl(found, pdl: bool) -> None:
    """With PDL a kernel waits once, and before that it reads only what no kernel writes."""
    ptx = found.asm["ptx"]
    if not pdl:
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


def resources(found) -> tuple[int, int]:
    """Registers of a thread, and bytes spilled to its stack, by ptxas."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(found.asm["cubin"])
        file.flush()
        said = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    counts = {name: int(count) for name, count in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
    return counts["REG"], counts["STACK"] + counts["LOCAL"]


def check_tensor_cores(found, note: str) -> None:
    """TMA loads, Hopper's wgmma, and nothing spilled."""
    assert "cp.async.bulk.tensor" in found.asm["ptx"]
    if Run.device.capability == (9, 0):
        assert "wgmma.mma_async" in found.asm["ptx"]
    registers, spilled = resources(found)
    print(f"    {note}: registers {registers}")
    assert spilled == 0, note


def caches(dtype: torch.dtype, *, fp8: bool) -> tuple[dict[str, str], dict[str, None]]:
    """Pointers to a KV cache in `dtype` or fp8, and absent arguments."""
    scales = ("k_scales", "v_scales")
    if not fp8:
        return dict.fromkeys(("k_cache", "v_cache"), NAMES[dtype]), dict.fromkeys(scales)
    return dict.fromkeys(("k_cache", "v_cache"), "fp8e4nv") | dict.fromkeys(scales, "fp32"), {}


def tile_constants(config: AttnConfig, group: int, head_dim: int, block_size: int) -> dict[str, int]:
    return {
        "GROUP": group, "HEAD_DIM": head_dim, "HEAD_DIM_PAD": next_power_of_2(head_dim, 16), "BLOCK_SIZE": block_size,
        "BLOCK_M": next_power_of_2(config.q_tokens * next_power_of_2(group), 16), "BLOCK_N": config.block_n,
    }  # fmt: skip


def attn_configs(key: ConfigKey) -> list[AttnConfig]:
    """The default for the device, and on sm_90 the measured one first."""
    Run.done.add(key)
    measured = [SM90_CONFIGS[key]] if Run.device.capability == (9, 0) and key in SM90_CONFIGS else []
    return [*dict.fromkeys([*measured, attn_config(key, Run.device)])]


def paged_attention(dtype: torch.dtype, group: int, head_dim: int, block_size: int, window: int, *, fp8: bool) -> None:
    partial = dict.fromkeys(("partial_acc", "partial_m", "partial_l"), "fp32")
    cache, absent = caches(dtype, fp8=fp8)
    tensors = {"q": NAMES[dtype], "out": NAMES[dtype], "block_tables": "i32", "tiles": "i32"} | cache | partial
    for prefill in (False, True):
        key = ConfigKey(prefill, group, head_dim, dtype, E4M3 if fp8 else dtype)
        first, *others = attn_configs(key)
        for config, splits in [(first, 1), *([] if prefill else [(first, 8)]), *((c, 1) for c in others)]:
            constants = tile_constants(config, group, head_dim, block_size) | absent
            constants |= {
                "NUM_SPLITS": splits, "WINDOW": window, "PREFILL": prefill, "PRECISION": dot_precision(dtype),
            }  # fmt: skip
            how = config.num_warps, config.num_stages, config == first
            found = compiled(paged_attention_kernel, tensors, constants, *how)
            needed = smem_bytes(key, config, Run.device)
            assert found.metadata.shared <= needed, (key, config, found.metadata.shared)
    constants = {"HEAD_DIM": head_dim, "HEAD_DIM_PAD": next_power_of_2(head_dim, 16), "NUM_SPLITS": 8}
    compiled(combine_splits_kernel, {"tiles": "i32", "out": NAMES[dtype], **partial}, constants, 1)


def prefill_attention_tma(dtype: torch.dtype, group: int, head_dim: int, block_size: int) -> None:
    t, config = NAMES[dtype], prefill_config(group, head_dim, block_size)
    constants = tile_constants(config, group, head_dim, block_size)
    desc = f"tensordesc<{t}[{config.block_n},{constants['HEAD_DIM_PAD']}]>"
    tensors = {"q": t, "out": t, "k_desc": desc, "v_desc": desc, "block_tables": "i32", "tiles": "i32"}
    found = compiled(prefill_attention_tma_kernel, tensors, constants, config.num_warps, config.num_stages)
    check_tensor_cores(found, str(config))


def elementwise(dtype: torch.dtype, d: int) -> None:
    t, padded = NAMES[dtype], next_power_of_2(d)
    for split_k, residual in ((1, False), (1, True), (2, True), (6, True)):
        tensors = dict.fromkeys(("residual", "weight", "residual_out", "out"), t) | {"x": t if split_k == 1 else "fp32"}
        constants = {"D": d, "BLOCK_D": padded, "SPLIT_K": split_k, "HAS_RESIDUAL": residual}
        compiled(fused_add_rms_norm_kernel, tensors, constants, min(max(padded // 512, 1), 16))
    for gelu in (False, True):
        constants = {"N": 3 * d, "BLOCK_N": 1024, "GELU": gelu}
        compiled(act_and_mul_kernel, dict.fromkeys(("gate", "up", "out"), t), constants)
    tensors = {"input_ids": "i32", "last_tokens": "i64", "table": t, "out": t}
    compiled(embed_kernel, tensors, {"D": d, "BLOCK_D": min(1024, padded)}, 2)


def gemms(dtype: torch.dtype, n: int, k: int, act: str, norm: bool, residual: bool, ms: tuple[int, ...]) -> None:
    """The kernels that `select_gemm` chooses for these M."""
    w = torch.empty(n * (2 if act else 1), k, dtype=dtype, device="meta")
    tensors = dict.fromkeys(("x", "norm_weight", "w", "bias", "residual", "out"), NAMES[dtype])
    common = {"K": k, "ACT": gemm.ACTS[act], "HAS_BIAS": False, "HAS_RESIDUAL": residual}
    for m in ms:
        config = gemm.select_gemm(m, w, bool(act), residual, Run.device.smem_bytes)
        if config is None:
            continue  # cuBLAS
        if isinstance(config, TmaConfig):
            gemm_tma(config, dtype, n, k, common["ACT"])
            continue
        if isinstance(config, gemm.GemvConfig):
            kernel, constants = gemv_kernel, gemm.gemv_constexprs(config, m, k, dtype.itemsize, bool(act))
            constants["FUSE_NORM"] = norm and gemm.can_fuse_norm(w) and m <= gemm.MAX_FUSED_NORM_M
        else:
            kernel, constants = gemm_small_m_kernel, gemm.small_m_constexprs(config, m, k, dtype)
        given = {name: t for name, t in tensors.items() if name in kernel.arg_names}
        how = config.num_warps, getattr(config, "num_stages", 1), True, () if n % 16 else ("N",)
        registers, spilled = resources(compiled(kernel, given, common | constants, *how))
        where = "LOCAL MEMORY" if spilled > 16 else "spilled"  # up to four registers cost nothing
        print(f"    M = {m}: registers {registers}, {where} {spilled} bytes")


def gemm_tma(config: TmaConfig, dtype: torch.dtype, n: int, k: int, act: int) -> None:
    """Each code once: it depends on the matrix only by divisibility."""
    t, divisible = NAMES[dtype], tuple(name for name, size in (("N", n), ("K", k)) if size % 16 == 0)
    code = asdict(config) | {"split_k": config.split_k > 1}
    key = (dtype, Run.device, *code.values(), act, divisible)
    if key in Run.tma:
        return
    Run.tma.add(key)
    shapes = (("x_desc", config.block_m), ("w_desc", config.block_n))
    tensors = {name: f"tensordesc<{t}[{rows},{config.block_k}]>" for name, rows in shapes}
    tensors |= {"w": t, "bias": t, "out": "fp32" if config.split_k > 1 else t}
    constants = {
        "BLOCK_K": config.block_k, "BLOCK_N": config.block_n, "BLOCK_M": config.block_m,
        "PREFETCH_LINES": PREFETCH_LINES, "ACT": act,
    }  # fmt: skip
    for bias in (False, True) if config.split_k == 1 else (False,):
        how = config.num_warps, config.num_stages, True, divisible
        check_tensor_cores(compiled(gemm_tma_kernel, tensors, constants | {"HAS_BIAS": bias}, *how), str(config))


def quantized(dtype: torch.dtype, name: str, k: int, act: bool, ms: tuple[int, ...]) -> None:
    """The kernels of a form of weights, by M as quant_linear.py chooses them; nothing may be spilled."""
    form = FORMS[name]
    planes = [p for p in ("low", "high", "scales", "offsets", "supers") if p in USED[name]]
    rows = TritonRows(form, k, {p: torch.empty(0, dtype=USED[name][p], device="meta") for p in planes})
    constants = rows.constants | dict.fromkeys(set(PLANES) - set(planes))
    t = NAMES[dtype]
    tensors = {p: POINTERS[USED[name][p]] for p in planes} | {"bias": t, "residual": t, "out": t}
    for m in ms:
        if m <= 4 and rows.integers:
            config = quant_gemv_config(m, 8192, k, act)
            sizes = {
                "K": k, "BLOCK_U": min(32 * config.num_warps, next_power_of_2(k // 32)), "ROWS": config.rows,
                "PREFETCH": config.prefetch, "BLOCK_M": next_power_of_2(m), "ACT": int(act),
            }  # fmt: skip
            around = {"HAS_BIAS": False, "HAS_RESIDUAL": not act}
            given = tensors | {"x": "i32", "x_scales": "fp32"}
            found = compiled(quant_gemv_kernel, given, constants | sizes | around, config.num_warps)
        else:
            config = quant_gemm_config(m, 8192, k, async_mma=9 <= Run.device.capability[0] < 12)
            sizes = {"K": k, "BLOCK_K": config.block_k, "BLOCK_N": config.block_n, "BLOCK_M": config.block_m}
            given = {p: kind for p, kind in tensors.items() if p != "residual"} | {"x": t}
            how = {"HAS_BIAS": False, "PRECISION": dot_precision(dtype)}
            found = compiled(quant_gemm_kernel, given, constants | sizes | how, config.num_warps, config.num_stages)
        registers, spilled = resources(found)
        where = "LOCAL MEMORY" if spilled > 16 else "spilled"
        print(f"    {name}, M = {m}: registers {registers}, {where} {spilled} bytes")
    sizes = {"K": k, "BLOCK_R": 1, "BLOCK_K": min(4096, next_power_of_2(k)), "HAS_INDEX": True, "TOKENS": True}
    given = {p: kind for p, kind in tensors.items() if p in USED[name]} | {
        "index": "i32",
        "last_tokens": "i64",
        "out": t,
    }
    compiled(dequantize_kernel, given, constants | sizes)


def around_quantized(dtype: torch.dtype, k: int) -> None:
    tensors = {"x": NAMES[dtype], "norm_weight": NAMES[dtype], "codes": "i32", "scales": "fp32"}
    for norm, warps in ((False, 1), (True, 4)):
        sizes = {"K": k, "BLOCK_K": next_power_of_2(k), "BLOCK_U": UNITS_PER_WARP * warps, "HAS_NORM": norm}
        compiled(quantize_activations_kernel, tensors, sizes, warps)
    tensors = {"partial": "fp32", "bias": NAMES[dtype], "out": NAMES[dtype]}
    compiled(reduce_splits_kernel, tensors, {"SPLIT_K": 4, "BLOCK_N": 1024, "HAS_BIAS": True})


def qk_norm_rope(dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, norm: bool, *, fp8: bool) -> None:
    cache, absent = caches(dtype, fp8=fp8)
    tensors = dict.fromkeys(("q", "k", "v", "q_norm", "k_norm", "q_out"), NAMES[dtype]) | cache
    tensors |= {"positions": "i32", "slot_mapping": "i32", "cos_sin_cache": "fp32"}
    for per_cta in dict.fromkeys(min(n, next_power_of_2(kv_heads)) for n in (4, 16)):
        constants = {
            "HQ": heads, "HK": kv_heads, "HEAD_DIM": head_dim, "HALF": head_dim // 2,
            "HALF_PAD": next_power_of_2(head_dim // 2), "HEADS_PER_CTA": per_cta, "BLOCK_SIZE": 64, "HAS_NORM": norm,
        }  # fmt: skip
        compiled(qk_norm_rope_write_kv_kernel, tensors, constants | absent, max(per_cta // 4, 1))


def sampling(dtype: torch.dtype) -> None:
    partial = {"partial_max": "fp32", "partial_argmax": "i32"}
    tensors = {"logits": NAMES[dtype], "temperature": "fp32", "rng_keys": "i32", "thresholds": "i32", **partial}
    for filtered in (False, True):
        constants = {"CHUNK": gumbel_argmax.CHUNK, "FILTER": filtered}
        compiled(gumbel_argmax.sample_gumbel_kernel, tensors, constants, 1)
    floats = dict.fromkeys(("temperature", "top_p", "min_p"), "fp32")
    tensors = {"logits": NAMES[dtype], "top_k": "i32", "thresholds": "i32", **floats}
    compiled(top_k_top_p.find_thresholds_kernel, tensors, {"BLOCK_V": top_k_top_p.BLOCK_V}, 8)
    for block in (64, 256):
        tensors = {"req_slots": "i32", "last_tokens": "i64", "tokens": "i32", **partial}
        compiled(reduce_argmax_kernel, tensors, {"BLOCK": block}, 1)


FORMS = {
    name: ggml.TYPES[name].format.form for name in ("q4_k", "q5_k", "q6_k", "q3_k", "q2_k", "q8_0", "q5_0", "iq4_xs")
}
FORMS |= {"mlx4": Form("affine", "u4", 64, "bf16"), "fp8": Form("fp8", "e4m3", 128, "f32"),
          "nvfp4": Form("fp4", "e2m1", 16, "e4m3")}  # fmt: skip
I8, U8, I16, I32, F16 = torch.int8, torch.uint8, torch.int16, torch.int32, torch.float16
POINTERS = {I8: "i8", U8: "u8", I16: "i16", I32: "i32", F16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
USED: dict[str, dict[str, torch.dtype]] = {  # planes and their types
    "q4_k": {"low": I32, "scales": I16, "supers": I32}, "q5_k": {"low": I32, "high": I32, "scales": I16, "supers": I32},
    "q6_k": {"low": I32, "high": I32, "scales": I8, "supers": I16}, "q2_k": {"low": I32, "scales": U8, "supers": I32},
    "q3_k": {"low": I32, "high": I32, "scales": I8, "supers": I16}, "q8_0": {"low": I32, "scales": F16},
    "q5_0": {"low": I32, "high": I32, "scales": F16}, "iq4_xs": {"low": I32, "scales": I8, "supers": I16},
    "mlx4": {"low": I32, "scales": torch.bfloat16, "offsets": torch.bfloat16}, "nvfp4": {"low": I32, "scales": U8},
    "fp8": {"low": I32, "scales": torch.float32},
}  # fmt: skip
# N, K, activation, norm (for M = 1), residual; Qwen3-0.6B's layer and LM head, then Llama-3.2-1B's, Qwen3-8B's, awkward
GEMMS = [
    (4096, 1024, "", True, False), (1024, 2048, "", False, True), (3072, 1024, "silu_and_mul", True, False),
    (1024, 3072, "", False, True), (151936, 1024, "", False, False), (151936, 4096, "", False, False),
    (3072, 2048, "", True, False), (2048, 2048, "", False, True), (8192, 2048, "silu_and_mul", True, False),
    (2048, 8192, "", False, True),
    (6144, 4096, "", True, False), (4096, 4096, "", False, True), (12288, 4096, "silu_and_mul", True, False),
    (4096, 12288, "", False, True), (21504, 5376, "gelu_and_mul", True, False),
    (1000, 80, "gelu_and_mul", True, True), (2560, 2560, "", True, False), (1152, 1152, "", True, True),
]  # fmt: skip
# query heads per KV head, head size, block size, window
ATTENTIONS = [
    (2, 128, 64, 0), (4, 64, 64, 0), (4, 128, 64, 0), (2, 256, 64, 512), (1, 24, 64, 6), (5, 96, 16, 0),
    (8, 128, 64, 4096),
]  # fmt: skip
MS = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512)


def main(few: bool, device: Device) -> None:
    Run.few, Run.device = few, device
    gemm.has_tma = lambda _: device.capability >= (9, 0)
    fp8_caches = (False, True) if device.capability >= MIN_CAPABILITY else (False,)
    for dtype in (torch.bfloat16,) if few else (torch.bfloat16, torch.float16, torch.float32):
        for attention in ATTENTIONS[:3] if few else ATTENTIONS:
            for fp8 in fp8_caches:
                paged_attention(dtype, *attention, fp8=fp8)
        tma = device.capability >= (9, 0) and dtype != torch.float32
        for group, head_dim, block_size, window in (*ATTENTIONS, (2, 128, 128, 0)) if tma else ():
            if window == 0 and (not few or head_dim == 128):
                prefill_attention_tma(dtype, group, head_dim, block_size)
        for d in (1024,) if few else (1024, 80, 5376):
            elementwise(dtype, d)
        for shape in GEMMS[:4] if few else GEMMS:
            gemms(dtype, *shape, (1, 2, 16, 256) if few else MS)
        for heads in ((16, 8, 128),) if few else ((16, 8, 128), (3, 1, 24), (4, 1, 256)):
            for norm in (False, True):
                for fp8 in fp8_caches:
                    qk_norm_rope(dtype, *heads, norm, fp8=fp8)
        sampling(dtype)
        if dtype != torch.float32:
            around_quantized(dtype, 4096)
        for name in ("q4_k",) if few else FORMS:
            for k, act in ((4096, True),) if few else ((1024, False), (4096, True), (12288, False)):
                ms = (16,) if dtype == torch.float32 else (1, 64) if few else (1, 2, 4, 16, 64, 128, 256)
                quantized(dtype, name, k, act, ms)
    measured = {key for key in SM90_CONFIGS if True in fp8_caches or key.kv_dtype != E4M3}
    assert measured <= Run.done, measured - Run.done


if __name__ == "__main__":
    for name in [a for a in sys.argv[1:] if a in TARGETS] or ["sm_90"]:
        print(f"-- {name}, {TARGETS[name].smem_bytes // 1024} KB", flush=True)
        main("few" in sys.argv, TARGETS[name])
