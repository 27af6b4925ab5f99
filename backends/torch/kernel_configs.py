"""Launch configs of the attention kernels: measured where stored, else the kernels' defaults, shrunk to fit.

GEMM configs follow from shapes alone (`kernels/gemm.py`, `kernels/gemm_tma.py`); the other kernels move little.
"""

from dataclasses import dataclass, replace
from functools import cache

import torch

from llmrs.backends.torch.kernels.launch import next_power_of_2
from llmrs.backends.torch.kernels.paged_attention import AttnConfig, default_config
from llmrs.core.ir import Graph

BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn
# KB of shared memory per CTA, by compute capability (CUDA programming guide)
SMEM_KB = {(7, 5): 64, (8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227, (11, 0): 227}
MIN_SMEM_KB = 99  # of every other one


@dataclass(frozen=True)
class ConfigKey:
    """An attention launch: decode or prefill, query heads per KV head, head size, dtypes of queries and KV cache."""

    prefill: bool
    group: int
    head_dim: int
    dtype: torch.dtype
    kv_dtype: torch.dtype


# NVIDIA H200, shapes of Qwen3-0.6B, Llama-3.2-1B and Qwen3-8B (docs/benchmarks.md). An H100 differs in memory speed.
SM90_CONFIGS = {
    ConfigKey(False, 2, 128, BF16, BF16): AttnConfig(1, 64, 4, 3),
    ConfigKey(False, 2, 128, BF16, E4M3): AttnConfig(1, 64, 2, 3),
    ConfigKey(False, 4, 128, BF16, BF16): AttnConfig(1, 64, 4, 3),
    ConfigKey(False, 4, 64, BF16, BF16): AttnConfig(1, 64, 2, 2),
    ConfigKey(True, 2, 128, BF16, BF16): AttnConfig(64, 64, 8, 3),
}
PRETUNED = {"NVIDIA H200": SM90_CONFIGS, "NVIDIA H100": SM90_CONFIGS}


@dataclass(frozen=True)
class Device:
    """The properties of a GPU that launch configs depend on."""

    name: str
    capability: tuple[int, int]

    @staticmethod
    def of(device: torch.device) -> "Device":
        """A CPU, which interprets the kernels, counts as an sm_90 GPU."""
        if device.type != "cuda":
            return Device("cpu", (9, 0))
        return Device(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))

    @property
    def pretuned(self) -> dict[ConfigKey, AttnConfig]:
        """The configs of its family, such as NVIDIA H100 for NVIDIA H100 80GB HBM3; empty if none were measured."""
        return next((c for family, c in PRETUNED.items() if f"{self.name} ".startswith(f"{family} ")), {})

    @property
    def smem_bytes(self) -> int:
        """Shared memory per CTA."""
        return SMEM_KB.get(self.capability, MIN_SMEM_KB) * 1024


@cache
def attn_config(key: ConfigKey, device: Device) -> AttnConfig:
    """The measured config, or the kernel's default with fewer stages and keys per tile until it fits."""
    if key in device.pretuned:
        return device.pretuned[key]
    c = default_config(key.group, key.head_dim, key.dtype, prefill=key.prefill, fp8=key.kv_dtype.itemsize == 1)
    while smem_bytes(key, c, device) > device.smem_bytes and c.block_n > 16:
        c = replace(c, num_stages=c.num_stages - 1) if c.num_stages > 2 else replace(c, block_n=c.block_n // 2)
    return c


def smem_bytes(key: ConfigKey, c: AttnConfig, device: Device) -> int:
    """Upper bound of a CTA's shared memory: q, probabilities, and the K and V tiles in flight.

    Triton's pipeline keeps num_stages - 1 tiles, or num_stages where `tl.dot` reads them from shared memory as they
    are (sm_90 to sm_110); a tile of another dtype is converted to a copy there. tests/tools/triton_compile.py compares
    the bound with the compiler's number.
    """
    block_m, padded = next_power_of_2(c.q_tokens * next_power_of_2(key.group), 16), next_power_of_2(key.head_dim, 16)
    itemsize, kv_itemsize = key.dtype.itemsize, key.kv_dtype.itemsize
    dot_reads_smem, converted = 9 <= device.capability[0] < 12, key.dtype != key.kv_dtype
    in_flight = 2 * c.num_stages if dot_reads_smem and not converted else max(2 * c.num_stages - 2, 1)
    copies = (2 if dot_reads_smem else 1) * itemsize if converted else 0
    tiles = c.block_n * padded * (in_flight * kv_itemsize + copies)
    return itemsize * block_m * (padded + c.block_n) + tiles + 1024


def prefill_q_tokens(graph: Graph, dtype: torch.dtype, kv_dtype: torch.dtype, device: Device) -> int:
    """Query tokens of a prefill tile that every attention layer of a model can use."""
    equations = [e for f in (*graph.functions.values(), graph.main) for e in f.equations]
    shapes = [(e.inputs[0].type.sizes, e.inputs[1].type.sizes) for e in equations if e.op == "attend"]
    keys = {ConfigKey(True, int(q[0] // kv[0]), int(q[1]), dtype, kv_dtype) for q, kv in shapes}
    return min(attn_config(key, device).q_tokens for key in keys)
