"""Reads a cubin with NVIDIA's cuobjdump and nvdisasm, which come with Triton's wheel."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import triton

BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_WIDTHS = {"128": 128, "64": 64, "U8": 8, "S8": 8, "U16": 16, "S16": 16, "": 32, "256": 256}


def read(cubin: Path) -> dict[str, dict[str, int]]:
    """Figures of each kernel of a cubin, by its (mangled) name.

    registers a thread; spill_bytes a thread (stack and local memory); shared_bytes a block, static only;
    widest_load_bits of all loads from global memory, asynchronous copies to shared memory included.
    """
    usage = _run("cuobjdump", "--dump-resource-usage", str(cubin))
    result = {}
    for name, line in re.findall(r"Function (\S+?):\s*\n\s*(REG:.*)", usage):
        figures = dict(re.findall(r"(\w+):(\d+)", line))
        result[name] = {
            "registers": int(figures["REG"]),
            "spill_bytes": int(figures["STACK"]) + int(figures["LOCAL"]),
            "shared_bytes": int(figures["SHARED"]),
            "widest_load_bits": 0,
        }
    for name, body in _functions(_run("nvdisasm", "-c", str(cubin))).items():
        if name in result:
            result[name]["widest_load_bits"] = max(map(_width, _LOADS.findall(body)), default=0)
    return result


def wide_divisions(cubin: Path) -> list[str]:
    """The (mangled) names of the kernels that divide 64-bit integers: a subroutine of some hundred instructions."""
    functions = _functions(_run("nvdisasm", "-c", str(cubin)))
    return [name for name, body in functions.items() if _WIDE_DIVISION.search(body)]


_WIDE_DIVISION = re.compile(r"\bCALL\b.*_(?:div|rem)_[su]64\b")
_LOADS = re.compile(r"\b(?:LDG|LDGSTS)\.E((?:\.\w+)*)")


def _width(suffixes: str) -> int:
    return max((_WIDTHS[s] for s in suffixes.split(".") if s in _WIDTHS and s), default=32)


def _functions(listing: str) -> dict[str, str]:
    parts = re.split(r"^\.text\.(\S+):\s*$", listing, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([BIN / tool, *arguments], check=True, capture_output=True, text=True).stdout
