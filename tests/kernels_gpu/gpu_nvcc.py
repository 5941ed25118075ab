"""Compiles the CUDA sources with nvcc, flags of the real build, and reads what the kernels cost."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import gpu_cubin

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc" / "cuda"
FLAGS = ["-std=c++17", "-O3", "-fmad=false", f"-I{SOURCES}", f"-I{ROOT / 'csrc' / 'include'}"]


@functools.cache
def missing(architecture: int | None = None) -> str | None:
    """Why nothing can be compiled (for an architecture); None if it can."""
    nvcc = shutil.which("nvcc")
    if nvcc is None or shutil.which("c++filt") is None:
        return "no nvcc, or no c++filt, on PATH"
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    if architecture is not None and f"compute_{architecture}" not in known:
        return f"this nvcc does not know compute_{architecture}"
    return None


@functools.cache
def toolchain() -> str:
    """The compiler whose figures these are."""
    text = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return "nvcc " + re.findall(r"V(\d[\d.]*)", text)[0]


def variants(quick: bool) -> list[str]:
    """The sources; each is compiled whole."""
    return [path.stem for path in sorted(SOURCES.glob("*.cu"))]


def compile_variant(name: str, architecture: int) -> dict[str, dict[str, int]]:
    """Figures of the kernels of one source. Warnings are errors, and so is a division of 64-bit integers."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / f"{name}.cubin"
        target = [f"-arch=sm_{architecture}", "-cubin", "-Werror", "all-warnings"]
        command = ["nvcc", *FLAGS, *target, "-o", str(cubin), str(SOURCES / f"{name}.cu")]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
        if wide := gpu_cubin.wide_divisions(cubin):
            raise RuntimeError(f"{name}.cu divides 64-bit integers in {', '.join(map(_plain, wide))}")
        rows = gpu_cubin.read(cubin)
    return {f"{name}: {_plain(mangled)}": row for mangled, row in rows.items()}


def _plain(mangled: str) -> str:
    """The kernel's name with its template arguments only."""
    full = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout
    text = re.sub(r"\(anonymous namespace\)::|mgk::cuda::|^void ", "", full.strip())
    kind = {"0": "fp32", "1": "bf16", "2": "int8", "3": "int4"}
    text = re.sub(r"\(WeightKind\)(\d)", lambda m: kind[m[1]], text)
    return re.sub(r"\((?:int|bool)\)", "", text).split("(")[0]
