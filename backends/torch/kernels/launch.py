"""Shared by the launchers: argument checks, device capabilities, PDL.

Sizes that shape the code are constexpr; strides count elements; whatever changes from step to step is a tensor on the
device, so that a CUDA graph can replay a launch and Triton compiles nothing twice.

PDL (programmatic dependent launch, sm_90+, constexpr PDL): a kernel may start before its predecessor ends, which hides
the launch gap. Each such kernel

- calls `gdc_wait` before it reads or writes data of other kernels, and before it returns. Only weights and the step's
  input arrays, which a copy fills, are read earlier. The wait ends when the predecessor has ended and its writes are
  visible; the predecessor waited as well, so this covers all kernels before it;
- calls `gdc_launch_dependents` after the wait: the next kernel may start. This says nothing about results.

A kernel launched without PDL (cuBLAS, say) waits for the end of its predecessor as usual, and so does a copy.
"""

from functools import cache

import torch
import triton
import triton.language as tl

from llmrs.core.errors import BackendError

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
KV_DTYPES = (*FLOATS, torch.float8_e4m3fn)


@triton.jit
def _probe() -> None:
    """Tells `interpreted` what Triton makes of a kernel."""


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1 at import), on CPU tensors.

    The interpreter's bfloat16 is silently wrong.
    """
    return not isinstance(_probe, triton.JITFunction)


@triton.jit
def pdl_wait(PDL: tl.constexpr):
    """With PDL: waits for the writes of all kernels before, then lets the next one start."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


def check(kernel: str, condition: bool, message: str) -> None:
    """Raises BackendError unless the kernel supports its arguments."""
    if not condition:
        raise BackendError(f"kernel {kernel}: {message}", "kernels: plain runs torch's own ops")


def check_tensors(kernel: str, *tensors: torch.Tensor, dtypes: tuple[torch.dtype, ...] = FLOATS) -> None:
    """Same dtype (one of `dtypes`), shape and device, last dimension contiguous. Raises BackendError."""
    first = tensors[0]
    for t in tensors:
        check(kernel, t.dtype in dtypes and t.dtype == first.dtype, f"types {[x.dtype for x in tensors]}")
        check(kernel, t.shape == first.shape, f"shapes {[tuple(x.shape) for x in tensors]}")
        check(kernel, t.stride(-1) == 1 and t.device == first.device, f"strides {t.stride()} on {t.device}")


def next_power_of_2(n: int, minimum: int = 1) -> int:
    return max(minimum, 1 << max(n - 1, 0).bit_length())


def dot_precision(dtype: torch.dtype) -> str:
    """`input_precision` of `tl.dot`: exact float32, since TF32 would change tokens."""
    return "ieee" if dtype == torch.float32 else "tf32"


def num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def has_tma(device: torch.device) -> bool:
    """Whether kernels can load through TMA, as on sm_90 and later; the interpreter can."""
    return device.type != "cuda" or _capability(device) >= (9, 0)


def has_async_mma(device: torch.device) -> bool:
    """Whether a warp group multiplies from shared memory (wgmma, tcgen05), with room for large tiles."""
    return device.type != "cuda" or 9 <= _capability(device)[0] < 12


def supports_pdl(device: torch.device) -> bool:
    return device.type == "cuda" and not interpreted() and _capability(device) >= (9, 0)


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
