"""What the launchers share: checks, sizes, and where kernels can run.

Kernels take sizes that shape the code as constexpr, strides in elements, and everything that changes from step to
step as tensors on the device, so that a CUDA graph can replay a launch, and Triton compiles nothing twice.
"""

import torch
import triton

from llmrs.core.errors import BackendError

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


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


def check_rows(kernel: str, *tensors: torch.Tensor) -> None:
    """All of one floating type and shape on one device, with elements of the last dimension side by side."""
    first = tensors[0]
    for t in tensors:
        require(kernel, t.dtype in FLOATS and t.dtype == first.dtype, f"types {[x.dtype for x in tensors]}")
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
