"""Building the CUDA extension where it was asked for: it is built as asked, or the build fails and says what to change.

The compilers are stand-ins that only write their output file; nothing is compiled.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = "MUSICGEN_KERNELS_CUDA_ARCHS"
COMPILER = """#!/bin/sh
echo "$0 $*" >> calls
[ "$1" = --dryrun ] && echo '#$ TOP=/toolkit' >&2
case "$*" in *sm_70*) echo "nvcc fatal   : Unsupported gpu architecture 'compute_70'" >&2; exit 1;; esac
while [ $# -gt 1 ]; do [ "$1" = -o ] && touch "$2"; shift; done
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the kernels are built on Linux only")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What `setup.py build_ext` reads, and the stand-ins."""
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    shutil.copy(ROOT / "setup.py", tmp_path)
    (tmp_path / "bin").mkdir()
    for name in ("nvcc", "c++"):
        path = tmp_path / "bin" / name
        path.write_text(COMPILER)
        path.chmod(0o755)
    return tmp_path


def _build(checkout: Path, **environment: str) -> tuple[int, str, list[str]]:
    """Exit status, what was printed, and the nvcc calls that compile."""
    (checkout / "calls").unlink(missing_ok=True)
    tools = {"PATH": f"{checkout / 'bin'}:{os.environ['PATH']}", "CC": "c++", "CXX": "c++"}
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MUSICGEN_KERNELS_")}
    command = [sys.executable, "setup.py", "build_ext"]
    done = subprocess.run(command, cwd=checkout, env=kept | tools | environment, capture_output=True, text=True)
    log = checkout / "calls"
    calls = log.read_text().splitlines() if log.exists() else []
    return done.returncode, done.stdout + done.stderr, [c for c in calls if "/nvcc" in c and "--dryrun" not in c]


def _modules(checkout: Path) -> set[str]:
    return {path.name.partition(".")[0] for path in checkout.glob("build/lib*/musicgen_kernels/*.so")}


def test_what_nvcc_rejects_fails_the_build(checkout: Path) -> None:
    code, printed, _ = _build(checkout, MUSICGEN_KERNELS_CUDA="1", MUSICGEN_KERNELS_CUDA_ARCHS="70 80")
    assert code != 0
    assert "Unsupported gpu architecture" in printed
    assert f'set {ENVIRONMENT} to those that it knows and you have (now "70 80"' in printed
    assert "_cuda" not in _modules(checkout)


@pytest.mark.parametrize("names", ["8.0", "80;90", "sm_90", "native", ""])
def test_a_name_that_is_none_is_told_before_anything_is_compiled(checkout: Path, names: str) -> None:
    code, printed, calls = _build(checkout, MUSICGEN_KERNELS_CUDA="1", MUSICGEN_KERNELS_CUDA_ARCHS=names)
    assert code != 0
    assert f"{ENVIRONMENT}: expected names such as 80 or 90a, got '{names}'" in printed
    assert not calls
    assert not _modules(checkout)


def test_suffixes_are_compiled_and_later_gpus_get_portable_ptx(checkout: Path) -> None:
    code, printed, calls = _build(checkout, MUSICGEN_KERNELS_CUDA="1", MUSICGEN_KERNELS_CUDA_ARCHS="80 100f 90a")
    assert code == 0, printed
    assert "_cuda" in _modules(checkout)
    assert len(calls) == len(list((ROOT / "csrc" / "cuda").glob("*.cu")))
    for call in calls:
        targets = [word.removeprefix("-gencode=") for word in call.split() if word.startswith("-gencode=")]
        assert targets == [
            "arch=compute_80,code=sm_80",
            "arch=compute_100f,code=sm_100f",
            "arch=compute_90a,code=sm_90a",
            "arch=compute_100,code=compute_100",
        ]


def test_a_changed_kernel_is_linked_again(checkout: Path) -> None:
    assert _build(checkout, MUSICGEN_KERNELS_CUDA="1")[0] == 0
    (module,) = checkout.glob("build/lib*/musicgen_kernels/_cuda.*")
    before = module.stat().st_mtime_ns
    source = checkout / "csrc" / "cuda" / "linear.cu"
    os.utime(source, ns=(before + 10**9, before + 10**9))
    assert _build(checkout, MUSICGEN_KERNELS_CUDA="1")[0] == 0
    assert module.stat().st_mtime_ns > before


def test_who_does_not_ask_needs_no_nvcc(checkout: Path) -> None:
    code, printed, calls = _build(checkout, MUSICGEN_KERNELS_CUDA_ARCHS="none of them")
    assert code == 0, printed
    assert not calls
    assert _modules(checkout) == {"_cpuid", "_cpu_baseline", "_cpu_avx2", "_cpu_avx512"}
