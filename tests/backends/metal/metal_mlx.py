"""A stand-in for `mx.fast.metal_kernel` that runs, on the shim, the very function that MLX generates.

Tracing a call under `mx.export_function` with `verbose=True` prints that function on file descriptor 1, on machines
without Metal too.
"""

import os
import re
import sys
import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np
from metalshim import Kernel

NUMPY = {mx.float32: np.float32, mx.int32: np.int32, mx.uint32: np.uint32, mx.int64: np.int64, mx.uint8: np.uint8}
NUMPY |= {mx.float16: np.uint16, mx.bfloat16: np.uint16, mx.uint16: np.uint16, mx.int8: np.int8, mx.bool_: np.bool_}


def to_numpy(a) -> np.ndarray:
    """The bits of an array; float16 and bfloat16 as uint16. A Python number becomes what MLX makes of it."""
    a = a if isinstance(a, mx.array) else mx.array(a)
    return np.array(a.view(mx.uint16) if a.dtype in (mx.float16, mx.bfloat16) else a, order="C")


def to_mlx(a: np.ndarray, dtype) -> mx.array:
    return mx.array(a).view(dtype) if dtype in (mx.float16, mx.bfloat16) else mx.array(a)


def printed(work) -> str:
    """What `work()` writes to file descriptor 1."""
    sys.stdout.flush()
    kept = os.dup(1)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 1)
        try:
            work()
        finally:
            os.dup2(kept, 1)
            os.close(kept)
        file.seek(0)
        return file.read().decode()


def generated(kernel, inputs, **call) -> str:
    """The function that MLX makes of a call of `kernel`, a result of mx.fast.metal_kernel."""
    with tempfile.TemporaryDirectory() as folder:
        text = printed(
            lambda: mx.export_function(
                str(Path(folder) / "traced"),
                lambda *a: kernel(inputs=list(a), verbose=True, **call),
                *map(_array, inputs),
            )
        )
    return re.search(r"```\n(.*?)```", text, re.DOTALL)[1]


def _array(a) -> mx.array:
    return a if isinstance(a, mx.array) else mx.array(a)


class Shim:
    """Makes kernels as mx.fast.metal_kernel does. `mutate` rewrites sources before they are used."""

    def __init__(self, mutate=None) -> None:
        self.mutate, self.calls, self.built = mutate, [], {}

    def __call__(self, *, name, input_names, output_names, source, header="", **options):
        if self.mutate:
            source, header = self.mutate(source), self.mutate(header)
        real = mx.fast.metal_kernel(
            name=name, input_names=input_names, output_names=output_names, source=source, header=header, **options
        )

        def call(*, inputs, output_shapes, output_dtypes, grid, threadgroup, template=None, init_value=None):
            self.calls.append(name)
            options = {"template": template} if template else {}
            msl = generated(
                real, inputs, output_shapes=output_shapes, output_dtypes=output_dtypes, grid=grid,
                threadgroup=threadgroup, **options,
            )  # fmt: skip
            kernel = self.built[msl] = self.built.get(msl) or Kernel(msl)
            arrays = dict(zip(input_names, map(to_numpy, inputs), strict=True))
            for out, shape, dtype in zip(output_names, output_shapes, output_dtypes, strict=True):
                arrays[out] = np.empty(shape, NUMPY[dtype])
            kernel.run(arrays, list(output_names), grid, threadgroup, init_value)
            return [to_mlx(arrays[o], d) for o, d in zip(output_names, output_dtypes, strict=True)]

        return call
