"""How launches are cut: stored for devices where it was measured, by capability elsewhere, or chosen by `tuning`.

A cut is a few whole numbers, so that a file can hold it. For each kernel, what it is looked up by, and what it says:

    decode, prompt  query heads of a KV head, head size      tokens of a tile, keys at a time, warps, stages
    matvec          rows and columns of the matrix           rows of a program

The other kernels move little and are cut by their sizes alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from llmrs.backends.torch.kernels.launch import power
from llmrs.backends.torch.kernels.matvec import rows_together
from llmrs.backends.torch.kernels.paged_attention import Tiling, tiling
from llmrs.backends.torch.kv_fp8 import Scaled

Cut = tuple[int, ...]

# NVIDIA H200, shapes of Qwen3-0.6B, Llama-3.2-1B and Qwen3-8B in bfloat16: docs/benchmarks.md.
# An H100 is the same chip with slower memory.
HOPPER: dict[str, Cut] = {
    "decode 2x128 bfloat16 bfloat16": (1, 64, 4, 3),
    "decode 2x128 bfloat16 float8_e4m3fn": (1, 64, 2, 3),
    "decode 4x128 bfloat16 bfloat16": (1, 64, 4, 3),
    "decode 4x64 bfloat16 bfloat16": (1, 64, 2, 2),
    "prompt 2x128 bfloat16 bfloat16": (64, 64, 8, 3),
    "matvec 1024x2048 bfloat16": (4,),
    "matvec 1024x3072 bfloat16": (4,),
    "matvec 4096x1024 bfloat16": (8,),
    "matvec 6144x1024 bfloat16": (8,),
    "matvec 151936x1024 bfloat16": (8,),
}
STORED: dict[str, dict[str, Cut]] = {"NVIDIA H200": HOPPER, "NVIDIA H100": HOPPER}

# KB of shared memory that a program may have, by capability (CUDA programming guide); a new one has the least
SHARED = {(7, 5): 64, (8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227, (11, 0): 227}
LEAST = 99
CPU = "cpu"


@dataclass(frozen=True)
class Device:
    """What cuts depend on."""

    name: str
    capability: tuple[int, int]

    @staticmethod
    def of(device: torch.device) -> "Device":
        """On a CPU the kernels are interpreted, and cut as for an H200."""
        if device.type != "cuda":
            return Device(CPU, (9, 0))
        return Device(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))

    @property
    def stored(self) -> Mapping[str, Cut] | None:
        """The cuts of its family, such as NVIDIA H100 for NVIDIA H100 80GB HBM3; None: it was never measured."""
        return next((cuts for family, cuts in STORED.items() if f"{self.name} ".startswith(f"{family} ")), None)

    @property
    def unknown(self) -> bool:
        """Whether it is a GPU of which nothing is stored."""
        return self.name != CPU and self.stored is None

    @property
    def shared(self) -> int:
        """Bytes of shared memory that a program may have."""
        return SHARED.get(self.capability, LEAST) * 1024


@dataclass(frozen=True)
class Key:
    """What a cut is chosen for. `types` are those of the computation and, for attention, of the KV cache."""

    kernel: str
    shape: tuple[int, ...]
    types: tuple[torch.dtype, ...]

    def __str__(self) -> str:
        types = (str(t).removeprefix("torch.") for t in self.types)
        return " ".join([self.kernel, "x".join(map(str, self.shape)), *types])


def attention_key(group: int, size: int, dtype: torch.dtype, kv_dtype: torch.dtype, *, prompt: bool) -> Key:
    return Key("prompt" if prompt else "decode", (group, size), (dtype, kv_dtype))


def pool_type(pool: torch.Tensor | Scaled) -> torch.dtype:
    """What the elements of a KV cache are stored as."""
    return pool.codes.dtype if isinstance(pool, Scaled) else pool.dtype


def default(key: Key, device: Device) -> Cut:
    """Without a measurement: that of an H200, made smaller until it fits."""
    if key.kernel == "matvec":
        return (rows_together(key.shape[0]),)
    group, size = key.shape
    cut = tiling(group, size, key.types[0], prompt=key.kernel == "prompt", fp8=key.types[1].itemsize == 1)
    tokens, keys, warps, stages = cut.tokens, cut.keys, cut.warps, cut.stages
    while shared_memory(key, (tokens, keys, warps, stages), device) > device.shared and keys > 16:
        keys, stages = (keys, stages - 1) if stages > 2 else (keys // 2, stages)
    return tokens, keys, warps, stages


def candidates(key: Key, device: Device) -> list[Cut]:
    """What tuning tries: the default first, then at most four others that fit."""
    found = dict.fromkeys([default(key, device), *_others(key)])
    return [cut for cut in found if shared_memory(key, cut, device) <= device.shared][:5]


def _others(key: Key) -> list[Cut]:
    if key.kernel == "matvec":
        return [(2,), (4,), (8,), (16,)]
    if key.types[0] == torch.float32:  # tests and small models
        return []
    group, wide = key.shape[0], key.shape[1] > 128
    if key.kernel == "decode":
        return [(1, k // (1 + wide), w, s) for k, w, s in ((64, 2, 2), (64, 4, 2), (64, 4, 3), (64, 2, 3))]
    rows = 64 if wide else 128
    some = ((rows, 64, 8, 2), (rows, 32, 8, 3), (rows // 2, 64, 4, 2), (rows // 2, 32, 4, 3))
    return [(max(r // power(group), 1), k // (1 + wide), w, s) for r, k, w, s in some]


def shared_memory(key: Key, cut: Cut, device: Device) -> int:
    """Bytes that a program needs, an upper bound: queries, weights, and the keys and values that are on their way.

    Those are what Triton's pipeline makes of the stages: one less than there are, or all where `tl.dot` reads them
    from shared memory (sm_90 to sm_110) as they are; where their type is another, a tile is copied there as well.
    tests/tools/triton_compile.py compares it with what the compiler says.
    """
    if key.kernel not in ("decode", "prompt"):
        return 0
    (group, size), (tokens, keys, _, stages) = key.shape, cut
    rows, padded = power(tokens * power(group), 16), power(size, 16)
    own, pool = (t.itemsize for t in key.types)
    reads_shared, converted = 9 <= device.capability[0] < 12, key.types[0] != key.types[1]
    under_way = 2 * stages if reads_shared and not converted else max(2 * stages - 2, 1)
    copied = (2 if reads_shared else 1) * own if converted else 0
    return own * rows * (padded + keys) + keys * padded * (under_way * pool + copied) + 1024


class Cuts:
    """The cuts of one device. What `tuning` chose wins over what is stored, and that over the defaults."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.known: dict[Key, Cut] = {}

    def of(self, key: Key) -> Cut:
        if key not in self.known:
            stored = self.device.stored or {}
            self.known[key] = stored.get(str(key)) or default(key, self.device)
        return self.known[key]

    def tiling(self, group: int, size: int, dtype: torch.dtype, kv_dtype: torch.dtype, *, prompt: bool) -> Tiling:
        return Tiling(*self.of(attention_key(group, size, dtype, kv_dtype, prompt=prompt)))

    def rows(self, weight: torch.Tensor) -> int:
        """Rows of one of matvec's programs."""
        return self.of(Key("matvec", tuple(weight.shape), (weight.dtype,)))[0]
