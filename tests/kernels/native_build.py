"""What the tests of the compiled kernels know of their build: flags as setup.py gives them, libraries, compilers."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import musicgen_kernels
from musicgen_kernels import BackendUnavailableError
from musicgen_kernels.isa import load_level

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(musicgen_kernels.__file__).parent
BINDINGS = ROOT / "csrc" / "bindings" / "cpu_module.cpp"
SOURCES = [*sorted((ROOT / "csrc" / "cpu").glob("*.cpp")), BINDINGS]
HEADERS = sorted((ROOT / "csrc" / "include").glob("*.h"))


def flags(level: str) -> list[str]:
    """What setup.py gives to the compiler for a level: read from its text, for running it would build."""
    wanted = {"AVX2", "AVX512", "LEVELS", "COMMON"}
    tree = ast.parse((ROOT / "setup.py").read_text())
    parts = [
        node
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id in wanted
    ]
    values: dict[str, Any] = {}
    exec(compile(ast.Module(parts, []), "setup.py", "exec"), values)
    return [*values["COMMON"], *values["LEVELS"][level]]


def library(level: str) -> Path | None:
    """The compiled library of a level; None where it is not built."""
    return next(iter(sorted(PACKAGE.glob(f"_cpu_{level}.*.so"))), None)


def unavailable(level: str) -> str | None:
    """Why a level cannot run here; None if it can."""
    try:
        load_level(level)
    except BackendUnavailableError as error:
        return str(error)
    return None


def compiler(path: Path) -> str:
    """Which compiler made a library, from the note that it leaves in it."""
    found = re.search(rb"GCC: \([^)]*\) [\d.]+", path.read_bytes())
    return found[0].decode() if found else "unknown"
