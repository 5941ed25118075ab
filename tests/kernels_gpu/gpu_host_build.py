"""Compiles the CUDA sources for the host: as a Python module, or as a program under a sanitizer that replays
recorded calls. Results are kept under build/ by a hash of sources and flags.
"""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pybind11

ROOT = Path(__file__).resolve().parents[2]
CUDA, HOST, BINDINGS = ROOT / "csrc" / "cuda", ROOT / "csrc" / "host_cuda", ROOT / "csrc" / "bindings"
REPLAY = Path(__file__).resolve().parent / "host_replay.cpp"
INCLUDES = [f"-I{path}" for path in (HOST, CUDA, ROOT / "csrc" / "include", BINDINGS)]
FLAGS = [
    *("-std=c++17", "-g1", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing", "-Wall", "-Wextra", "-Werror"),
    "-DMGK_HOST_CUDA",
]
SANITIZERS = {
    "none": ["-O2"],
    "address": ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-O1", "-fsanitize=thread"],
}


def module(mutation: tuple[str, str, str] | None = None) -> ModuleType:
    """The `_cuda` module whose kernels run on CPU tensors. For `mutation` see `build`."""
    path = build("none", module_too=True, mutation=mutation)
    spec = importlib.util.spec_from_file_location("_cuda", path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def build(sanitizer: str, *, module_too: bool = False, mutation: tuple[str, str, str] | None = None) -> Path:
    """Compile and link.

    Args:
        sanitizer: a key of SANITIZERS.
        module_too: the Python module instead of the replay program.
        mutation: (file in csrc/cuda, text, replacement) to break a kernel on purpose; the text must occur.

    Returns:
        The module's or the program's path.
    """
    sources = {path.name: path.read_text() for path in sorted(CUDA.glob("*.cu"))}
    main = BINDINGS / "cuda_module.cpp" if module_too else REPLAY
    folder = ROOT / "build" / "host_cuda" / sanitizer
    folder.mkdir(parents=True, exist_ok=True)
    flags = [*FLAGS, *SANITIZERS[sanitizer], *INCLUDES]
    if module_too:
        flags += [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    if mutation is not None and mutation[0] in sources:
        sources[mutation[0]] = _mutate(mutation, sources[mutation[0]])
    elif mutation is not None:
        text = _mutate(mutation, (CUDA / mutation[0]).read_text())
        first = folder / _digest([text])
        first.mkdir(exist_ok=True)
        (first / mutation[0]).write_text(text)
        flags.insert(0, f"-I{first}")
    headers = [*HOST.iterdir(), *CUDA.glob("*.h"), *BINDINGS.glob("*.h"), ROOT / "csrc/include/philox.h", main]
    texts = [path.read_text() for path in sorted(headers)] + [" ".join(flags)]
    common = _digest(texts)
    jobs = [(source, ["-x", "c++"], name.removesuffix(".cu")) for name, source in sources.items()]
    jobs += [(path.read_text(), [], path.stem) for path in (HOST / "host_cuda.cpp", main)]
    objects = [folder / f"{stem}-{_digest([common, text])}.o" for text, _, stem in jobs]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda job, target: _compile(job, target, flags), jobs, objects))
    result = folder / f"{_digest([p.name for p in objects])}{'.so' if module_too else ''}"
    if not result.exists():
        _link(objects, result, [*SANITIZERS[sanitizer], *(["-shared"] if module_too else [])])
    return result


def _mutate(mutation: tuple[str, str, str], text: str) -> str:
    name, old, new = mutation
    assert text.count(old) == 1, f"{old!r} is {text.count(old)} times in {name}"
    return text.replace(old, new)


def _digest(texts: list[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def _compile(job: tuple[str, list[str], str], target: Path, flags: list[str]) -> None:
    text, language, stem = job
    if target.exists():
        return
    source = target.with_suffix(".cpp")
    source.write_text(f'#line 1 "{stem}"\n{text}')
    partial = target.with_suffix(".part")
    _check(["g++", *flags, *language, "-c", str(source), "-o", str(partial)])
    partial.rename(target)


def _link(objects: list[Path], result: Path, flags: list[str]) -> None:
    partial = result.with_suffix(".part")
    _check(["g++", *flags, *map(str, objects), "-o", str(partial)])
    partial.rename(result)


def _check(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
