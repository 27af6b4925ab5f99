"""Describing, building and launching Metal kernels."""

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


@dataclass(frozen=True, eq=False)  # hashed in each launch, by identity
class Kernel:
    """`<name>.metal`, the names of its buffers, and its header files.

    `exact` asks the compiler for IEEE arithmetic: true divisions, infinities and signed zeros.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    headers: tuple[str, ...] = ()
    exact: bool = False


class Kernels:
    """Builds each kernel once, with `make` (default: mx.fast.metal_kernel). Used by the device's thread only."""

    def __init__(self, make: Callable[..., Any] | None = None) -> None:
        self._make: Callable[..., Any] = make or mx.fast.metal_kernel
        self._built: dict[Kernel, Callable[..., list[mx.array]]] = {}
        self._compiled: set[Any] = set()  # kernels with their templates

    def run(
        self, kernel: Kernel, inputs: Sequence[mx.array | float], template: Template, grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int], outputs: Sequence[Output],
    ) -> list[mx.array]:  # fmt: skip
        """New output arrays. `grid` counts threads. Raises BackendError if the kernel does not compile."""
        shapes, dtypes = zip(*outputs, strict=True)
        variant = (kernel, *template.items())
        try:
            if kernel not in self._built:
                self._built[kernel] = self._build(kernel)
            results = self._built[kernel](
                inputs=list(inputs), template=list(template.items()), grid=grid, threadgroup=threadgroup,
                output_shapes=list(shapes), output_dtypes=list(dtypes),
            )  # fmt: skip
            if variant not in self._compiled:
                mx.eval(results)  # compiles now, so that an error names this kernel
                self._compiled.add(variant)
        except (RuntimeError, ValueError) as error:
            message = f"the Metal kernel {kernel.name} can't be run: {error}"
            raise BackendError(message, "kernels: plain uses MLX's ops only") from error
        return results

    def _build(self, kernel: Kernel) -> Callable[..., Any]:
        options: dict[str, Any] = {"compile_options": {"math_mode": "safe"}} if kernel.exact else {}
        return self._make(
            name=f"llmrs_{kernel.name}", input_names=list(kernel.inputs), output_names=list(kernel.outputs),
            source=source(kernel.name), header="".join(map(source, kernel.headers)), **options,
        )  # fmt: skip


@cache
def source(name: str) -> str:
    """A .metal file without comments: MLX scans the source for names such as thread_position_in_grid."""
    text = files(__package__).joinpath(f"{name}.metal").read_text(encoding="utf-8")
    lines = (line.partition("//")[0].rstrip() for line in text.splitlines())
    return "\n".join(line for line in lines if line) + "\n"


def check(kernel: Kernel, name: str, array: mx.array, shape: tuple[int, ...], dtypes: Sequence[mx.Dtype]) -> None:
    """Raises BackendError unless the array has this shape and one of these dtypes.

    Strides are not checked: MLX makes inputs row-major before the launch.
    """
    if tuple(array.shape) != shape:
        raise BackendError(f"{kernel.name}: {name} has shape {tuple(array.shape)}, not {shape}")
    if array.dtype not in dtypes:
        raise BackendError(f"{kernel.name}: {name} is {array.dtype}, not {' or '.join(map(str, dtypes))}")


def require(kernel: Kernel, condition: bool, message: str) -> None:
    """Raises BackendError(message) unless the condition holds."""
    if not condition:
        raise BackendError(f"{kernel.name}: {message}")
