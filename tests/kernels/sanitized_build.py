"""Compiles the CPU kernels with sanitizers: as the Python module of a level, or as the driver of the thread pool.
Results are kept under build/ by a hash of sources and flags.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sysconfig
from pathlib import Path

import native_build
import pybind11

ROOT = native_build.ROOT
CPU, INCLUDE = ROOT / "csrc" / "cpu", ROOT / "csrc" / "include"
DRIVER, LEFT_OUT = (Path(__file__).resolve().parent / f"{name}.cpp" for name in ("team_driver", "left_out"))
SLOW_TO_COMPILE = ("attention.cpp", "model.cpp")
SANITIZERS = {
    "address": ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-O1", "-fsanitize=thread"],
}

Mutation = tuple[str, str, str]
"""(file under csrc/cpu or csrc/include, text, replacement) to break the code on purpose; the text occurs once."""


def module(level: str, *, whole: bool, mutation: Mutation | None = None) -> Path:
    """The module of a level under AddressSanitizer and UndefinedBehaviorSanitizer; not `whole`: without attention and
    the whole step, in a fraction of the time.
    """
    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    flags = [*_flags("address", level), f"-DMGK_MODULE=_cpu_{level}", *includes]
    paths = [path for path in native_build.SOURCES if whole or path.name not in SLOW_TO_COMPILE]
    sources = {path: path.read_text() for path in [*paths, *([] if whole else [LEFT_OUT])]}
    return _build("address", sources, flags, ["-shared"], mutation)


def driver(*, whole_step: bool, mutation: Mutation | None = None) -> Path:
    """The program of `team_driver.cpp` under ThreadSanitizer, baseline level; `whole_step`: with all kernels."""
    flags = [*_flags("thread", "baseline"), *(["-DWHOLE_STEP"] if whole_step else [])]
    paths = [DRIVER, *(sorted(CPU.glob("*.cpp")) if whole_step else [CPU / "team.cpp"])]
    return _build("thread", {path: path.read_text() for path in paths}, flags, [], mutation)


def environment() -> dict[str, str]:
    """For a process that loads `module`: the sanitizers' libraries come first."""
    names = ("libasan.so", "libubsan.so")
    found = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in names
    ]
    options = {
        "LD_PRELOAD": " ".join(found),
        "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    return {**os.environ, **options}


def without_randomisation() -> list[str]:
    """What to put before a command: sanitizers of older compilers cannot live with the widest address randomisation."""
    return ["setarch", platform.machine(), "-R"] if shutil.which("setarch") else []


def _flags(sanitizer: str, level: str) -> list[str]:
    """Those of the real build, with line numbers and -O1: the sanitizers' checks are many."""
    shipped = [flag for flag in native_build.flags(level) if flag not in ("-O3", "-g0")]
    return [*shipped, "-g1", "-fPIC", *SANITIZERS[sanitizer]]


def _build(
    sanitizer: str, sources: dict[Path, str], flags: list[str], link: list[str], mutation: Mutation | None
) -> Path:
    folder = ROOT / "build" / "sanitized" / sanitizer
    folder.mkdir(parents=True, exist_ok=True)
    if mutation is not None:
        flags = [*_mutate(sources, mutation, folder), *flags]
    flags = [*flags, f"-I{ROOT / 'csrc' / 'include'}", f"-I{CPU}"]
    headers = [path.read_text() for path in native_build.HEADERS]
    objects = []
    for path, text in sources.items():
        only_hands_over = path == native_build.BINDINGS  # addresses: nothing of it needs checking
        own = [*flags, "-O0", "-fno-sanitize=all"] if only_hands_over else flags
        objects.append(folder / f"{path.stem}-{_digest([*headers, *own, text])}.o")
        _compile(text, path, objects[-1], own)
    result = folder / f"{_digest([path.name for path in objects])}{'.so' if link else ''}"
    if not result.exists():
        _run(["g++", *link, *SANITIZERS[sanitizer], "-pthread", *map(str, objects)], result)
    return result


def _mutate(sources: dict[Path, str], mutation: Mutation, folder: Path) -> list[str]:
    """Break a source in place; for a header give the flag with which the broken one is found first."""
    name, old, new = mutation
    for path, text in sources.items():
        if path.name == name:
            sources[path] = _replace(text, old, new, name)
            return []
    text = _replace((INCLUDE / name).read_text(), old, new, name)
    first = folder / _digest([text])
    first.mkdir(exist_ok=True)
    (first / name).write_text(text)
    return [f"-I{first}"]


def _replace(text: str, old: str, new: str, name: str) -> str:
    assert text.count(old) == 1, f"{old!r} is {text.count(old)} times in {name}"
    return text.replace(old, new)


def _digest(texts: list[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def _compile(text: str, path: Path, target: Path, flags: list[str]) -> None:
    if target.exists():
        return
    source = target.with_suffix(".cpp")
    source.write_text(f'#line 1 "{path.name}"\n{text}')
    _run(["g++", *flags, "-c", str(source)], target)


def _run(command: list[str], target: Path) -> None:
    """Run a compiler whose result appears under its name only when it is whole."""
    partial = target.with_name(f"{target.name}.{os.getpid()}.part")
    done = subprocess.run([*command, "-o", str(partial)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    partial.rename(target)
