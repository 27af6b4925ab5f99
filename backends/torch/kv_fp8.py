"""A KV cache in fp8, as backends/reference/kv_fp8.py defines it: e4m3 codes, and a scale for each token and head."""

from dataclasses import dataclass
from typing import Any

import torch

from llmrs.core.errors import BackendError

Tensor = torch.Tensor

CODES = torch.float8_e4m3fn
LARGEST, TINY = 448.0, 2.0**-100
LEAST_CAPABILITY = (8, 9)  # of NVIDIA GPUs, from which they convert e4m3


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (..., d) and scales float32 (...) of x (..., d)."""
    x = x.float()
    most = x.abs().amax(dim=-1)  # NaN where there is one
    tiny = most < TINY
    codes = (x * torch.where(tiny, 0.0, LARGEST / most)[..., None]).to(CODES)
    scales = torch.where(tiny, 0.0, most / LARGEST)
    return codes, torch.where(most.isfinite(), scales, torch.nan)


@dataclass(frozen=True)
class Scaled:
    """A pool (..., d) kept as codes and scales, used as a tensor of float32 is: rounded where it is written to, and
    widened where it is read. Indices do not reach into the last dimension."""

    codes: Tensor  # CODES (..., d)
    scales: Tensor  # float32 (...)

    dtype = torch.float32

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    def flatten(self, first: int, last: int) -> "Scaled":
        return Scaled(self.codes.flatten(first, last), self.scales.flatten(first, last))

    def transpose(self, a: int, b: int) -> "Scaled":
        return Scaled(self.codes.transpose(a, b), self.scales.transpose(a, b))

    def unbind(self, dim: int) -> list["Scaled"]:
        return [Scaled(c, s) for c, s in zip(self.codes.unbind(dim), self.scales.unbind(dim), strict=True)]

    def __getitem__(self, at: Any) -> Tensor:
        codes = self.codes.view(torch.uint8)[at].view(CODES)  # bytes can be indexed on every device
        return codes.float() * self.scales[at][..., None]

    def __setitem__(self, at: Any, x: Tensor) -> None:
        codes, self.scales[at] = quantize(x)
        self.codes.view(torch.uint8)[at] = codes.view(torch.uint8)


def parts(pool: Tensor | Scaled) -> tuple[Tensor, Tensor | None]:
    """What a kernel takes for a pool: its elements, and its scales if it has some."""
    return (pool.codes, pool.scales) if isinstance(pool, Scaled) else (pool, None)


def check_device(device: torch.device) -> None:
    """Raises BackendError for a GPU whose kernels can't convert e4m3."""
    if device.type == "cuda" and (found := torch.cuda.get_device_capability(device)) < LEAST_CAPABILITY:
        needed, there = (".".join(map(str, c)) for c in (LEAST_CAPABILITY, found))
        raise BackendError(
            f"kv_cache_dtype: fp8 needs a GPU of compute capability {needed} for Triton kernels; {device} has {there}",
            "kv_cache_dtype: auto, or kernels: plain",
        )
