"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, the thread pool under ThreadSanitizer; and
that these catch what they are for: code broken on purpose is found.

Quick: linears, norms, embedding and sampling at one level, and the pool. `slow`, for attention takes minutes to compile
this way: every test of every level, and whole steps of a model with many threads. What was compiled stays in build/.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import native_build
import pytest
import sanitized_build as build
from musicgen_kernels import isa

HERE = Path(__file__).resolve().parent
TESTS = ("attention", "dense", "sampling", "step")
RACE = 66
"""Exit status of a program in which ThreadSanitizer found a race."""

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile the kernels with sanitizers")


def run_tests(level: str, library: Path, names: tuple[str, ...], *but: str) -> subprocess.CompletedProcess[str]:
    """The kernels' tests of a level on a library, in a process of their own; stdout holds all output. `but`: pytest's
    -k, and what it chooses.
    """
    command = [sys.executable, "-m", "pytest", "-qxs", "-p", "no:cacheprovider", "-p", "sanitized_plugin"]
    variables = {**build.environment(), "MGK_SANITIZED_LEVEL": level, "MGK_SANITIZED_LIBRARY": str(library)}
    variables["PYTHONPATH"] = ":".join([str(HERE), *filter(None, sys.path)])
    command += ["--confcutdir", str(HERE), *but]  # the fixtures above this folder take long to import
    command = [*build.without_randomisation(), *command, *(str(HERE / f"test_{name}.py") for name in names)]
    return subprocess.run(
        command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=build.ROOT
    )


def run_driver(program: Path) -> subprocess.CompletedProcess[str]:
    """The driver of the thread pool."""
    variables = {"TSAN_OPTIONS": f"halt_on_error=1:exitcode={RACE}"}
    command = [*build.without_randomisation(), str(program)]
    return subprocess.run(command, env=variables, capture_output=True, text=True)


def skip_without(level: str) -> None:
    if reason := native_build.unavailable(level):
        pytest.skip(reason)


def quick_level() -> str:
    """The level whose kernels most machines run."""
    skip_without("baseline")
    return "avx2" if "avx2" in isa.supported_levels() else "baseline"


def test_linears_norms_and_sampling_are_clean() -> None:
    level = quick_level()
    library = build.module(level, whole=False)
    done = run_tests(level, library, ("dense", "sampling"), "-k", "not distribution_of_a_million")
    assert done.returncode == 0, done.stdout[-6000:]
    assert " passed" in done.stdout


def test_the_thread_pool_has_no_races() -> None:
    done = run_driver(build.driver(whole_step=False))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "255 regions\n"


UNSYNCHRONISED = {
    "the last to arrive at a barrier": (
        "team.h",
        "if (arrived_.fetch_add(1, std::memory_order_acq_rel) == num_threads_ - 1)",
        "if (arrived_.fetch_add(1, std::memory_order_relaxed) == num_threads_ - 1)",
    ),
    "the last to arrive, towards the others": (
        "team.h",
        "phase_.store(phase + 1, std::memory_order_seq_cst);",
        "phase_.store(phase + 1, std::memory_order_relaxed);",
    ),
    "a worker that takes a call": (
        "team.cpp",
        "generation_.fetch_add(1, std::memory_order_release);",
        "generation_.fetch_add(1, std::memory_order_relaxed);",
    ),
    "the caller that waits for the workers": (
        "team.cpp",
        "running_.fetch_sub(1, std::memory_order_acq_rel)",
        "running_.fetch_sub(1, std::memory_order_relaxed)",
    ),
}


@pytest.mark.parametrize("name", sorted(UNSYNCHRONISED))
def test_a_missing_synchronisation_is_caught(name: str) -> None:
    done = run_driver(build.driver(whole_step=False, mutation=UNSYNCHRONISED[name]))
    assert done.returncode == RACE, done.stdout + done.stderr
    assert "data race" in done.stderr


@pytest.mark.slow
def test_whole_steps_have_no_races() -> None:
    done = run_driver(build.driver(whole_step=True))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "291 regions\n"


@pytest.mark.slow
@pytest.mark.parametrize("level", isa.LEVELS)
def test_kernels_are_clean(level: str) -> None:
    skip_without(level)
    done = run_tests(level, build.module(level, whole=True), TESTS)
    assert done.returncode == 0, done.stdout[-6000:]
    assert " passed" in done.stdout


BROKEN = {
    "a store past the end": (
        ("sampling.cpp", "for (size_t v = n; v < s.z.size(); ++v)", "for (size_t v = n; v <= s.z.size(); ++v)"),
        "heap-buffer-overflow",
    ),
    "a shift by more than there is": (
        ("sampling.cpp", "int bit = 30;\n    for (; bit >= kLowBits", "int bit = 32;\n    for (; bit >= kLowBits"),
        "runtime error: shift exponent",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mutation", [*UNSYNCHRONISED.values(), *(mutation for mutation, _ in BROKEN.values())])
def test_what_breaks_a_kernel_is_still_in_its_source(mutation: build.Mutation) -> None:
    name, old, _ = mutation
    (path,) = (path for folder in (build.CPU, build.INCLUDE) for path in folder.glob(name))
    assert path.read_text().count(old) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(BROKEN))
def test_a_broken_kernel_is_caught(name: str) -> None:
    level = quick_level()
    mutation, complaint = BROKEN[name]
    done = run_tests(level, build.module(level, whole=False, mutation=mutation), ("sampling",))
    assert done.returncode != 0, done.stdout[-6000:]
    assert complaint in done.stdout
