"""The libraries of C++ kernels, one per instruction set, and their functions."""

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # of activations; `Dtype` of common.h
FUNCTIONS = ("linear", "unpack", "dense", "rms_norm", "act_and_mul", "rope_write_kv", "attend")


def fields(pointers: str, sizes: str, integers: str, floats: str = "") -> list[tuple[str, type]]:
    """Of a struct in the C++ sources, by their names: pointers, then int64, float, int32."""
    kinds = ((pointers, ctypes.c_void_p), (sizes, ctypes.c_int64), (floats, ctypes.c_float), (integers, ctypes.c_int32))
    return [(name, kind) for names, kind in kinds for name in names.split()]


class CCall(ctypes.Structure):
    """`Call` of replay.cpp."""

    _fields_ = fields("function arguments", "", "")


Tape = list[tuple[str, ctypes.Structure, tuple[torch.Tensor, ...]]]


class Kernels:
    """A library compiled for one instruction set."""

    def __init__(self, path: Path) -> None:
        """Raises OSError where it can't be loaded."""
        library = ctypes.CDLL(str(path))
        self.functions = {name: getattr(library, f"llmrs_{name}") for name in FUNCTIONS}
        for function in self.functions.values():
            function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_int32], None
        self._replay = library.llmrs_replay
        self._replay.argtypes, self._replay.restype = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32], None
        self.local = threading.local()  # engines share a library, each in a thread of its own
        self.profiled = False  # calls are named for torch's profiler

    def run(self, name: str, arguments: ctypes.Structure, *tensors: torch.Tensor) -> None:
        """Calls a function with torch's number of threads. The arguments point to the tensors."""
        with torch.profiler.record_function(f"llmrs_{name}") if self.profiled else nullcontext():
            self.functions[name](ctypes.byref(arguments), torch.get_num_threads())
        tape: Tape | None = getattr(self.local, "tape", None)
        if tape is not None:
            tape.append((name, arguments, tensors))

    @contextmanager
    def recorded(self) -> Iterator[Tape]:
        """This thread's calls go to a list, too."""
        self.local.tape = list[Any]()
        try:
            yield self.local.tape
        finally:
            self.local.tape = None

    def calls(self, tape: Tape) -> "ctypes.Array[CCall]":
        """For `replay`, as long as the tape lives."""
        pointers = {name: ctypes.cast(function, ctypes.c_void_p).value for name, function in self.functions.items()}
        return (CCall * len(tape))(*(CCall(pointers[name], ctypes.addressof(a)) for name, a, _ in tape))

    def replay(self, calls: "ctypes.Array[CCall]") -> None:
        self._replay(calls, len(calls), torch.get_num_threads())


def libraries() -> list[Kernels]:
    """Those that run on this CPU. None were compiled where the package was built without a compiler."""
    capability = torch.backends.cpu.get_cpu_capability()  # AVX512 stands for F, BW, DQ, VL and FMA
    found = []
    for name, needs in (("avx512", ("AVX512",)), ("avx2", ("AVX512", "AVX2")), ("generic", (capability,))):
        path = FOLDER / f"kernels_{name}.so"
        if path.exists() and capability in needs:
            with suppress(OSError):
                found.append(Kernels(path))
    return found
