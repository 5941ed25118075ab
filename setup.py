"""Builds the CPU kernels: one extension an instruction-set level, and the probe that chooses between them. With
MUSICGEN_KERNELS_CUDA=1 and nvcc on PATH also the CUDA kernels (MUSICGEN_KERNELS_CUDA_ARCHS="80 90a" for some
architectures only); whoever asks for them gets them or an error.

The levels share their sources and differ in flags; each gets object files of its own and exports only its
module's entry point, so that no function of one level can be linked into another. Nothing is compiled for
"this machine". Without a compiler (or with MUSICGEN_KERNELS_BUILD=0) the package installs with its PyTorch
reference backend alone.
"""

from __future__ import annotations

import copy
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError, CompileError, ExecError, PlatformError

SOURCES = [*sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp")), "csrc/bindings/cpu_module.cpp"]
HEADERS = [str(path) for path in sorted(Path("csrc/include").rglob("*.h"))]
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-DMGK_LEVEL_AVX2"]
AVX512 = [
    *("-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni"),
    *("-mprefer-vector-width=512", "-DMGK_LEVEL_AVX512"),
]
LEVELS = {"baseline": [], "avx2": AVX2, "avx512": AVX512}
COMMON = [
    *("-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno"),
    *("-fno-trapping-math", "-Wall", "-Wextra", "-pthread"),
    *("-Wno-uninitialized", "-Wno-maybe-uninitialized"),  # g++ 12 warns of its own AVX-512 headers
]
LINK = ["-Wl,--version-script=csrc/bindings/exports.map", "-Wl,--as-needed", "-pthread"]
CUDA_EXTENSION = "musicgen_kernels._cuda"
CUDA_SOURCES = sorted(str(path) for path in Path("csrc/cuda").glob("*.cu"))
CUDA_HEADERS = [*sorted(str(path) for path in Path("csrc/cuda").glob("*.h")), "csrc/bindings/cuda_calls.h"]
CUDA = os.environ.get("MUSICGEN_KERNELS_CUDA") == "1"
CUDA_ARCHITECTURES = os.environ.get("MUSICGEN_KERNELS_CUDA_ARCHS", "80 86 89 90 100 120").split()
# -fmad=false: results must not depend on what a compiler contracts; the kernels say fmaf where they mean it.
NVCC = ["-std=c++17", "-O3", "-fmad=false", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Icsrc/cuda", "-Icsrc/include"]
EXTRA = os.environ.get("MUSICGEN_KERNELS_CXXFLAGS", "").split()


def extension(name: str, sources: list[str], flags: list[str]) -> Extension:
    return Extension(
        f"musicgen_kernels.{name}",
        sources,
        depends=[*HEADERS, "setup.py", "csrc/bindings/exports.map"],
        include_dirs=["csrc/include", pybind11.get_include()],
        extra_compile_args=[*COMMON, *flags, *EXTRA],
        extra_link_args=[*LINK, *EXTRA],
        language="c++",
    )


def cuda_targets() -> list[str]:
    """nvcc's arguments for every architecture, and for PTX that later GPUs can compile."""
    for name in CUDA_ARCHITECTURES or [""]:
        if re.fullmatch(r"\d+[af]?", name) is None:
            raise SystemExit(f"MUSICGEN_KERNELS_CUDA_ARCHS: expected names such as 80 or 90a, got {name!r}")
    targets = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in CUDA_ARCHITECTURES]
    # PTX of an architecture with a suffix runs on no other one.
    last = max(int(name.rstrip("af")) for name in CUDA_ARCHITECTURES)
    return [*targets, f"-gencode=arch=compute_{last},code=compute_{last}"]


def cuda_libraries() -> Path:
    """Where the toolkit keeps its libraries, told by nvcc itself: the one on PATH may be a wrapper."""
    if shutil.which("nvcc") is None:
        raise SystemExit("MUSICGEN_KERNELS_CUDA=1: nvcc is not on PATH; install NVIDIA's toolkit or unset it")
    dry_run = ["nvcc", "--dryrun", "-c", CUDA_SOURCES[0]]
    told = subprocess.run(dry_run, capture_output=True, text=True)
    top = re.search(r"TOP=(.+)", told.stderr)
    if told.returncode or top is None:
        raise SystemExit(f"MUSICGEN_KERNELS_CUDA=1: {' '.join(dry_run)} failed:\n{told.stderr}")
    return Path(top[1]) / "lib64"


def cuda_extension() -> Extension:
    cuda_targets()  # a wrong name is told before anything is compiled
    return Extension(
        CUDA_EXTENSION,
        ["csrc/bindings/cuda_module.cpp", *CUDA_SOURCES],
        depends=[*HEADERS, *CUDA_HEADERS, *CUDA_SOURCES, "setup.py", "csrc/bindings/exports.map"],
        include_dirs=["csrc/cuda", "csrc/include", pybind11.get_include()],
        extra_compile_args=[*COMMON, *EXTRA],
        extra_link_args=[*LINK, f"-L{cuda_libraries()}", "-lcudart_static", "-ldl", "-lrt"],
        language="c++",
    )


def extensions() -> list[Extension]:
    if os.environ.get("MUSICGEN_KERNELS_BUILD") == "0":
        return []
    if platform.machine().lower() not in ("x86_64", "amd64") or sys.platform != "linux":
        if CUDA:
            raise SystemExit("MUSICGEN_KERNELS_CUDA=1: the CUDA kernels are built on x86-64 Linux only; unset it")
        print("musicgen_kernels: no native kernels for this platform; the PyTorch reference will be used")
        return []
    built = [extension("_cpuid", ["csrc/bindings/cpuid_module.cpp"], [])]
    for level, flags in LEVELS.items():
        name = f"_cpu_{level}"
        built.append(extension(name, SOURCES, [*flags, f"-DMGK_MODULE={name}"]))
    if CUDA:
        built.append(cuda_extension())
    return built


class BuildPerLevel(build_ext):
    """Objects of each extension in a directory of their own; a missing compiler is told, not fatal."""

    def build_extension(self, ext: Extension) -> None:
        separate = copy.copy(self)  # extensions are built in parallel threads
        separate.build_temp = str(Path(self.build_temp) / ext.name)
        try:
            separate._compile_cuda(ext)
            build_ext.build_extension(separate, ext)
        except (CCompilerError, ExecError, PlatformError, OSError) as error:
            if ext.name == CUDA_EXTENSION:  # only where it was asked for
                raise CompileError(
                    f"MUSICGEN_KERNELS_CUDA=1: {ext.name} was not built ({error}). If nvcc does not know an "
                    f"architecture, set MUSICGEN_KERNELS_CUDA_ARCHS to those that it knows and you have "
                    f'(now "{" ".join(CUDA_ARCHITECTURES)}"; nvcc --list-gpu-arch shows them).'
                ) from error
            if os.environ.get("MUSICGEN_KERNELS_BUILD") == "1":
                raise
            print(
                f"\nmusicgen_kernels: {ext.name} was NOT built ({error}).\n"
                "The package works with its PyTorch reference backend, many times slower. To get the native\n"
                "kernels install a C++17 compiler (Debian: apt install g++) and install again;\n"
                "MUSICGEN_KERNELS_BUILD=1 makes a failed build an error.\n",
                file=sys.stderr,
            )

    def _compile_cuda(self, ext: Extension) -> None:
        """Hand an extension's .cu files to nvcc, one object with code for every architecture each."""
        Path(self.build_temp).mkdir(parents=True, exist_ok=True)
        for source in [name for name in ext.sources if name.endswith(".cu")]:
            target = str(Path(self.build_temp) / f"{Path(source).stem}.o")
            self.spawn(["nvcc", *NVCC, *cuda_targets(), "-c", source, "-o", target])
            ext.extra_objects.append(target)
        ext.sources = [name for name in ext.sources if not name.endswith(".cu")]

    def finalize_options(self) -> None:
        super().finalize_options()
        if self.parallel is None:
            self.parallel = min(len(self.extensions), os.cpu_count() or 1)

    def copy_extensions_to_source(self) -> None:
        def built(ext: Extension) -> bool:
            return (Path(self.build_lib) / self.get_ext_filename(ext.name)).exists()

        self.extensions = [ext for ext in self.extensions if built(ext)]
        super().copy_extensions_to_source()


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildPerLevel})
