"""Where the packages lie, and the CPU kernels, which are compiled where there is a C++ compiler; the rest is in
pyproject.toml."""

import platform
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

FOLDERS = ("core", "backends", "models", "quant", "cli")
SOURCES = Path("backends/torch/cpu")
KERNELS = "llmrs.backends.torch.cpu.kernels_"  # and the instruction set
X86 = {
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
}


class BuildKernels(build_ext):
    """Plain libraries for ctypes: one for each instruction set, for every version of Python."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def extensions() -> list[Extension]:
    if sys.platform != "linux":  # elsewhere: not tried
        return []
    sets = X86 if platform.machine() == "x86_64" else {"generic": []}
    return [
        Extension(
            KERNELS + name,
            sorted(str(p) for p in SOURCES.glob("*.cpp")),
            extra_compile_args=["-std=c++17", "-O2", "-g0", "-pthread", "-w", *flags],
            depends=[str(p) for p in SOURCES.glob("*.h")],
            optional=True,
        )
        for name, flags in sets.items()
    ]


packages = [
    "llmrs",
    "llmrs.bench",
    *(f"llmrs.{p}" for p in find_packages(".", include=[g for f in FOLDERS for g in (f, f"{f}.*")])),
]
setup(
    packages=packages,
    package_dir={"llmrs": "llmrs", **{f"llmrs.{f}": f for f in FOLDERS}},
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": Wheel},
)
