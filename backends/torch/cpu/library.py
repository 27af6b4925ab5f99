"""The libraries of C++ kernels, one per instruction set, and their functions."""

import ctypes
from contextlib import suppress
from pathlib import Path

import torch

FOLDER = Path(__file__).parent
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # of activations; `Dtype` of common.h
FUNCTIONS = ("linear", "unpack", "dense", "rms_norm", "act_and_mul", "rope_write_kv", "attend")


def fields(pointers: str, sizes: str, integers: str, floats: str = "") -> list[tuple[str, type]]:
    """Of a struct in the C++ sources, by their names: pointers, then int64, float, int32."""
    kinds = ((pointers, ctypes.c_void_p), (sizes, ctypes.c_int64), (floats, ctypes.c_float), (integers, ctypes.c_int32))
    return [(name, kind) for names, kind in kinds for name in names.split()]


class Kernels:
    """A library compiled for one instruction set."""

    def __init__(self, path: Path) -> None:
        """Raises OSError where it can't be loaded."""
        library = ctypes.CDLL(str(path))
        self.functions = {name: getattr(library, f"llmrs_{name}") for name in FUNCTIONS}
        for function in self.functions.values():
            function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_int32], None

    def run(self, name: str, arguments: ctypes.Structure) -> None:
        """Calls a function with torch's number of threads."""
        self.functions[name](ctypes.byref(arguments), torch.get_num_threads())


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
