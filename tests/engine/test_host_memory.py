"""What an engine takes for its pages is bounded by the container's limit too, and taken only as it is used."""

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from musicgen.engine import host_memory
from musicgen.engine.host_memory import available_bytes, return_freed_memory

GIB = 2**30


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture(autouse=True)
def large_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = psutil.virtual_memory()._replace(available=100 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)


def test_without_a_container_it_is_what_the_machine_has(tmp_path: Path) -> None:
    assert available_bytes(tmp_path) == 100 * GIB


def test_a_limit_counts_less_what_is_used_but_for_cache(tmp_path: Path) -> None:
    files = {"memory.max": f"{8 * GIB}\n", "memory.current": f"{3 * GIB}\n"}
    stat = {"memory.stat": f"anon {GIB}\ninactive_file {2 * GIB}\nactive_file {GIB}\n"}
    assert available_bytes(write(tmp_path, files | stat)) == 7 * GIB


def test_version_1(tmp_path: Path) -> None:
    files = {
        "memory/memory.limit_in_bytes": str(8 * GIB),
        "memory/memory.usage_in_bytes": str(3 * GIB),
        "memory/memory.stat": f"inactive_file 0\ntotal_inactive_file {GIB}\n",
    }
    assert available_bytes(write(tmp_path, files)) == 6 * GIB


@pytest.mark.parametrize("limit", ["max", str(2**63 - 4096), "what?"])
def test_no_limit(tmp_path: Path, limit: str) -> None:
    files = {"memory.max": limit, "memory.current": "1000", "memory.stat": "inactive_file 0\n"}
    assert available_bytes(write(tmp_path, files)) == 100 * GIB


def test_a_container_that_is_full_has_nothing_left(tmp_path: Path) -> None:
    files = {"memory.max": str(GIB), "memory.current": str(2 * GIB), "memory.stat": "inactive_file 0\n"}
    assert available_bytes(write(tmp_path, files)) == 0


def test_pages_take_memory_when_they_are_written() -> None:
    """In a process of its own, whose memory nobody else gives back meanwhile."""
    code = """
import psutil
from musicgen_kernels import new_kv_store
held = lambda: psutil.Process().memory_info().rss
before = held()
store = new_kv_store(num_layers=2, num_pages=4096, num_heads=4)
assert store.k[1, 4095].eq(0).all()
print(store.num_bytes, held() - before, end=" ")
store.k.fill_(1)
print(held() - before)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    num_bytes, untouched, half_written = map(int, run.stdout.split())
    assert num_bytes == 2 * 2 * 4096 * 4 * 16 * 64 * 2
    assert untouched < num_bytes / 4
    assert half_written > num_bytes * 0.45


def test_freed_blocks_go_back_to_the_system() -> None:
    """In a process of its own. Every second block stays, so that the heap cannot shrink by itself."""
    code = """
import ctypes, psutil
from musicgen.engine.host_memory import return_freed_memory
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
held = lambda: psutil.Process().memory_info().rss
blocks = [libc.malloc(2**16) for _ in range(1000)]
for block in blocks:
    ctypes.memset(block, 1, 2**16)
before = held()
for block in blocks[::2]:
    libc.free(block)
return_freed_memory()
print(before - held())
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(run.stdout) > 0.8 * 500 * 2**16


def test_a_c_library_that_cannot_return_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory.ctypes, "CDLL", lambda _: object())
    return_freed_memory()
