"""What the launchers share: checks, sizes, and where kernels can run.

Kernels take sizes that shape the code as constexpr, strides in elements, and everything that changes from step to
step as tensors on the device, so that a CUDA graph can replay a launch, and Triton compiles nothing twice.

Where kernels are chained (programmatic dependent launch, constexpr PDL, NVIDIA from sm_90 on) one may start before the
kernel ahead of it has ended, and so come over the gap between them. Every kernel so launched

- calls `gdc_wait` before it reads or writes what another kernel writes or reads, and before it returns. Only weights
  and the step's own arrays, which a copy brings, are read before. The wait ends when the kernel ahead has ended and
  its writes are seen; since that one waited too, so have all before it;
- calls `gdc_launch_dependents` after the wait. That lets the next one start, and says nothing about results.

A kernel without the attribute, such as a library's, waits for the end of the one ahead as ever, and so does a copy.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

import torch
import triton

from llmrs.core.errors import BackendError

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
POOLS = (*FLOATS, torch.float8_e4m3fn)
CHAIN: ContextVar[bool] = ContextVar("CHAIN", default=False)  # the switch of `chaining`


@triton.jit
def _nothing() -> None:
    """What `interpreted` looks at: Triton decides for each kernel as it is defined."""


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1 when this module was imported), on CPU tensors.

    There bfloat16 is silently wrong.
    """
    return not isinstance(_nothing, triton.JITFunction)


def require(kernel: str, true: bool, message: str) -> None:
    """Raises BackendError unless a kernel can do what it is asked to."""
    if not true:
        raise BackendError(f"kernel {kernel}: {message}", "kernels: plain does without Triton")


def check_rows(kernel: str, *tensors: torch.Tensor, types: tuple[torch.dtype, ...] = FLOATS) -> None:
    """All of one of the types and shape on one device, with elements of the last dimension side by side."""
    first = tensors[0]
    for t in tensors:
        require(kernel, t.dtype in types and t.dtype == first.dtype, f"types {[x.dtype for x in tensors]}")
        require(kernel, t.shape == first.shape, f"shapes {[tuple(x.shape) for x in tensors]}")
        require(kernel, t.stride(-1) == 1 and t.device == first.device, f"strides {t.stride()} on {t.device}")


def power(n: int, least: int = 1) -> int:
    """The least power of two that is at least n."""
    return max(least, 1 << max(n - 1, 0).bit_length())


def precision(dtype: torch.dtype) -> str:
    """How `tl.dot` multiplies: float32 exactly, not as TF32, which would change tokens."""
    return "ieee" if dtype == torch.float32 else "tf32"


def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@contextmanager
def chaining(on: bool) -> Iterator[None]:
    """Whether kernels that are launched, or recorded, in this block are chained where the device can."""
    token = CHAIN.set(on)
    try:
        yield
    finally:
        CHAIN.reset(token)


def chained(device: torch.device) -> bool:
    """Whether a launcher asks for programmatic dependent launch: PDL=..., launch_pdl=..."""
    return CHAIN.get() and device.type == "cuda" and not interpreted() and hopper(device)


def hopper(device: torch.device) -> bool:
    """Whether it has the copy engine, and products of what lies in shared memory; the interpreter has."""
    return device.type != "cuda" or _capability(device) >= (9, 0)


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
