"""Runs Metal kernels on a CPU: builds them with g++ against metal_shim.h, and checks their memory accesses.

`Kernel(msl).run(arrays, ...)` runs the kernel three times, with the threads of a threadgroup forward, reversed and
shuffled, on memory filled differently each time. Different results mean a missing barrier or a read of uninitialized
memory; elements that keep the fill value were never written. Threads report all other errors themselves.
"""

import atexit
import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
from metal_source import MetalError, Source, translate

HERE = Path(__file__).parent
COMPILER = os.environ.get("CXX", "g++")
FLAGS = (
    "-std=c++20 -O1 -fPIC -Werror=vla -ffp-contract=off -ftrivial-auto-var-init=pattern "
    "-fsanitize=bounds,shift,integer-divide-by-zero"
).split()
RUNS = ((0, 0xFF), (1, 0xA5), (2, 0x3C))  # order of the threads, fill byte


@cache
def folder() -> Path:
    """A temporary folder with the precompiled header of the shim."""
    made = Path(tempfile.mkdtemp(prefix="metalshim-"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    for header in ("metal_shim.h", "metal_threads.h", "metal_types.h"):
        shutil.copy(HERE / header, made)
    _compile("-x", "c++-header", str(made / "metal_shim.h"), "-o", str(made / "metal_shim.h.gch"))
    return made


def _compile(*arguments: str) -> None:
    done = subprocess.run([COMPILER, *FLAGS, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise MetalError(f"does not compile:\n{done.stderr[:4000]}")


PROGRAM = """#include "metal_shim.h"
namespace kernels {{
using namespace metal;
#line 1 "{name}.metal"
{body}
}}
extern "C" const char* ms_run(void** buffers, const uint64_t* bytes, const uint* grid, const uint* size,
                              int order, int fill) {{
  static const char* names[] = {{{names}}};
  for (uint i = 0; i < {count}; i++) ms::regions[i] = {{names[i], (char*)buffers[i], (char*)buffers[i] + bytes[i]}};
  return ms::run(kernels::ms_body, {count}, grid, size, order, fill);
}}
"""


@cache
def _library(program: str) -> ctypes.CDLL:
    stem = folder() / hashlib.sha256(program.encode()).hexdigest()[:20]
    stem.with_suffix(".cpp").write_text(program, encoding="utf-8")
    _compile("-c", str(stem.with_suffix(".cpp")), "-o", str(stem.with_suffix(".o")))
    # without the sanitizer's library: the shim has its own handlers
    link = [COMPILER, "-shared", str(stem.with_suffix(".o")), "-o", str(stem.with_suffix(".so"))]
    subprocess.run(link, check=True, capture_output=True)
    return ctypes.CDLL(str(stem.with_suffix(".so")))


def program(source: Source) -> str:
    names = ", ".join(f'"{b}"' for b in source.buffers)
    return PROGRAM.format(name=source.name, body=source.body, names=names, count=len(source.buffers))


class Kernel:
    """A compiled kernel. Raises MetalError for invalid MSL."""

    def __init__(self, msl: str) -> None:
        self.source = translate(msl)
        try:
            self.entry = _library(program(self.source)).ms_run
        except MetalError as error:
            raise MetalError(f"{self.source.name} {error}") from None
        self.entry.restype = ctypes.c_char_p

    def run(self, arrays: dict[str, np.ndarray], outputs: list[str], grid, threadgroup, initial=None) -> None:
        """Runs in all orders; the arrays named by `outputs` hold the results. Raises MetalError.

        Arrays are contiguous. `<name>_shape`, `<name>_strides` and `<name>_ndim` are passed if the kernel uses them.
        """
        results = []
        for order, fill in RUNS:
            for name in outputs:
                arrays[name].reshape(-1).view(np.uint8)[:] = fill
                if initial is not None:
                    arrays[name][...] = initial
            self._once(arrays, grid, threadgroup, order, fill)
            results.append(
                {n: arrays[n].reshape(-1).view(np.uint8).reshape(arrays[n].size, -1).copy() for n in outputs}
            )
        for name in outputs:
            self._compare(name, [r[name] for r in results], initial)

    def _once(self, arrays, grid, threadgroup, order: int, fill: int) -> None:
        buffers = [self._buffer(arrays, name) for name in self.source.buffers]
        pointers = (ctypes.c_void_p * len(buffers))(*(b.ctypes.data for b in buffers))
        sizes = (ctypes.c_uint64 * len(buffers))(*(b.nbytes for b in buffers))
        three = ctypes.c_uint * 3
        message = self.entry(pointers, sizes, three(*grid), three(*threadgroup), order, fill)
        if message:
            raise MetalError(f"{self.source.name}: {message.decode()}")

    def _buffer(self, arrays, name: str) -> np.ndarray:
        if name in arrays:
            return arrays[name]
        match = re.fullmatch(r"(\w+)_(shape|strides|ndim)", name)
        if not match or match[1] not in arrays:
            raise MetalError(f"{self.source.name}: no array for the buffer {name}")
        a = arrays[match[1]]
        if match[2] == "shape":
            return np.array(a.shape, np.int32)
        return (
            np.array([s // a.itemsize for s in a.strides], np.int64)
            if match[2] == "strides"
            else np.int32(a.ndim)[None]
        )

    def _compare(self, name: str, results: list[np.ndarray], initial) -> None:
        if initial is None:
            kept = np.logical_and.reduce([(r == fill).all(axis=1) for r, (_, fill) in zip(results, RUNS, strict=True)])
            if kept.any():
                where = np.flatnonzero(kept)
                raise MetalError(f"{self.source.name}: {name}[{where[0]}] and {len(where) - 1} more were never written")
        differs = np.logical_or.reduce([(r != results[0]).any(axis=1) for r in results[1:]])
        if differs.any():
            where = np.flatnonzero(differs)
            raise MetalError(
                f"{self.source.name}: {name}[{where[0]}] and {len(where) - 1} more depend on the order of the threads "
                "or on memory that was not written: a missing barrier?"
            )
