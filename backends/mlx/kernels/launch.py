"""How a Metal kernel is described, made and launched."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import mlx.core as mx

from llmrs.core.errors import BackendError

FLOATS = (mx.float32, mx.float16, mx.bfloat16)
Output = tuple[tuple[int, ...], mx.Dtype]
Template = dict[str, mx.Dtype | int | bool]


@dataclass(frozen=True)
class Kernel:
    """`<name>.metal` with the names of its buffers, and the files whose functions it uses.

    `exact` asks the compiler for IEEE arithmetic: no reciprocals for divisions, infinities and signed zeros kept.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    headers: tuple[str, ...] = ()
    exact: bool = False


class Kernels:
    """Kernels made by `make`, once each. By default that is mx.fast.metal_kernel, which needs a Mac to run them.

    Used by one thread, the one that owns the device.
    """

    def __init__(self, make: Callable[..., Any] | None = None) -> None:
        self._make: Callable[..., Any] = make or mx.fast.metal_kernel
        self._made: dict[Kernel, Callable[..., list[mx.array]]] = {}
        self._tried: set[Any] = set()  # kernels with their templates

    def run(
        self,
        kernel: Kernel,
        inputs: Sequence[mx.array | float],
        template: Template,
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        outputs: Sequence[Output],
    ) -> list[mx.array]:
        """The outputs, fresh arrays of the given shapes and types. `grid` counts threads."""
        shapes, dtypes = zip(*outputs, strict=True)
        variant = (kernel, *(t for t in template.items()))
        try:
            if kernel not in self._made:
                self._made[kernel] = self._compile(kernel)
            results = self._made[kernel](
                inputs=list(inputs),
                template=list(template.items()),
                grid=grid,
                threadgroup=threadgroup,
                output_shapes=list(shapes),
                output_dtypes=list(dtypes),
            )
            if variant not in self._tried:
                mx.eval(results)  # Metal compiles it now, so that what it says is said of this kernel
                self._tried.add(variant)
        except (RuntimeError, ValueError) as error:
            raise BackendError(
                f"the Metal kernel {kernel.name} can't be run: {error}", "kernels: plain does without our kernels"
            ) from error
        return results

    def _compile(self, kernel: Kernel) -> Callable[..., Any]:
        options: dict[str, Any] = {"compile_options": {"math_mode": "safe"}} if kernel.exact else {}
        return self._make(
            name=f"llmrs_{kernel.name}",
            input_names=list(kernel.inputs),
            output_names=list(kernel.outputs),
            source=source(kernel.name),
            header="".join(source(h) for h in kernel.headers),
            **options,
        )


@cache
def source(name: str) -> str:
    """A .metal file without its comments: MLX takes names that it knows in a comment for uses of them."""
    text = files(__package__).joinpath(f"{name}.metal").read_text(encoding="utf-8")
    lines = (line.partition("//")[0].rstrip() for line in text.splitlines())
    return "\n".join(line for line in lines if line) + "\n"


def check(kernel: Kernel, name: str, array: mx.array, shape: tuple[int, ...], dtypes: Sequence[mx.Dtype]) -> None:
    """Raises BackendError unless the array has this shape and one of these types.

    MLX hides strides: an array that is not row-major is copied before the kernel runs.
    """
    if tuple(array.shape) != shape:
        raise BackendError(f"{kernel.name}: {name} has shape {tuple(array.shape)}, not {shape}")
    if array.dtype not in dtypes:
        raise BackendError(f"{kernel.name}: {name} is {array.dtype}, not {' or '.join(map(str, dtypes))}")


def require(kernel: Kernel, good: bool, what: str) -> None:
    """Raises BackendError: the kernel can't do `what`."""
    if not good:
        raise BackendError(f"{kernel.name}: {what}")
