"""A KV cache in fp8, as backends/reference/kv_fp8.py defines it: e4m3 data, one scale per token and head."""

from dataclasses import dataclass
from typing import Any

import torch

from llmrs.core.errors import BackendError

Tensor = torch.Tensor

E4M3 = torch.float8_e4m3fn
E4M3_MAX, MIN_ABSMAX = 448.0, 2.0**-100
MIN_CAPABILITY = (8, 9)  # from which NVIDIA GPUs convert e4m3


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Data (..., d) and scales float32 (...) of x (..., d)."""
    x = x.float()
    absmax = x.abs().amax(dim=-1)  # NaN if x has one
    tiny = absmax < MIN_ABSMAX
    data = (x * torch.where(tiny, 0.0, E4M3_MAX / absmax)[..., None]).to(E4M3)
    scales = torch.where(tiny, 0.0, absmax / E4M3_MAX)
    return data, torch.where(absmax.isfinite(), scales, torch.nan)


@dataclass(frozen=True)
class QuantizedKV:
    """A pool (..., d), used as a float32 tensor: quantized on write, dequantized on read. Indices do not reach into the
    last dimension."""

    data: Tensor  # E4M3 (..., d)
    scales: Tensor  # float32 (...)

    dtype = torch.float32

    @property
    def shape(self) -> torch.Size:
        return self.data.shape

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + self.scales.nbytes

    def flatten(self, first: int, last: int) -> "QuantizedKV":
        return QuantizedKV(self.data.flatten(first, last), self.scales.flatten(first, last))

    def transpose(self, a: int, b: int) -> "QuantizedKV":
        return QuantizedKV(self.data.transpose(a, b), self.scales.transpose(a, b))

    def unbind(self, dim: int) -> list["QuantizedKV"]:
        return [QuantizedKV(c, s) for c, s in zip(self.data.unbind(dim), self.scales.unbind(dim), strict=True)]

    def __getitem__(self, at: Any) -> Tensor:
        data = self.data.view(torch.uint8)[at].view(E4M3)  # bytes can be indexed on every device
        return data.float() * self.scales[at][..., None]

    def __setitem__(self, at: Any, x: Tensor) -> None:
        data, self.scales[at] = quantize(x)
        self.data.view(torch.uint8)[at] = data.view(torch.uint8)


def unpack(pool: Tensor | QuantizedKV) -> tuple[Tensor, Tensor | None]:
    """A pool's elements, and its scales if it is quantized."""
    return (pool.data, pool.scales) if isinstance(pool, QuantizedKV) else (pool, None)


def check_device(device: torch.device) -> None:
    """Raises BackendError for a GPU whose kernels can't convert e4m3."""
    if device.type == "cuda" and (found := torch.cuda.get_device_capability(device)) < MIN_CAPABILITY:
        required, given = (".".join(map(str, c)) for c in (MIN_CAPABILITY, found))
        raise BackendError(
            f"kv_cache_dtype: fp8 needs compute capability {required} for Triton kernels; {device} has {given}",
            "kv_cache_dtype: auto, or kernels: plain",
        )
