"""Where the kernel benchmark's rows run: a backend's device, and the machine that its times are compared with."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from musicgen_kernels.isa import LEVELS

from .gpu_machine import GPU_BACKENDS, GpuMachine, refusal
from .kernel_cases import DTYPES, Target
from .machine import Machine


class Measured(Protocol):
    """What rows are measured on: a CPU at one instruction-set level, or a GPU."""

    level: str

    def stream_bytes_per_s(self) -> float: ...

    def peak_rates(self) -> dict[str, float]: ...

    def seconds_of(self, run: Callable[[], object], repeats: int, *, cold: bool = False) -> list[float]: ...


class CpuMachine(Machine):
    """The CPU at one level, with a number of threads."""

    def peak_rates(self) -> dict[str, float]:
        """Operations a second, by the names that cases give to their bounds."""
        peaks = self.peaks()
        return {"fp32": peaks.fp32, "int8": peaks.int8}

    def seconds_of(self, run: Callable[[], object], repeats: int, *, cold: bool = False) -> list[float]:
        """See the function of that name."""
        return seconds_of(run, repeats, self.flush if cold else None)


def place(backend: str, activations: str, num_threads: int) -> tuple[Target, Measured]:
    """Where a backend's rows run, and the machine that they are compared with.

    Args:
        activations: dtype by name, for a GPU; the CPU's are float32.

    Raises:
        SystemExit: the backend is unknown, or cannot run here.
    """
    name, _, level = backend.partition(":")
    if name in GPU_BACKENDS and not level:
        if reason := refusal(name):
            raise SystemExit(f"--backend {name}: {reason}")
        dtype = DTYPES[activations]
        return Target(name, "cuda", dtype), GpuMachine(dtype)
    if name != "cpu" or (level and level not in LEVELS):
        known = f"cpu, cpu:{{{','.join(LEVELS)}}}, {', '.join(GPU_BACKENDS)}"
        raise SystemExit(f"--backend: expected {known}, got {backend!r}")
    return Target(backend), CpuMachine(level or None, num_threads)


def backends(asked: str | None) -> list[str]:
    """Those asked for, comma-separated; else the CPU's and what runs on this machine's GPU."""
    if asked is not None:
        return asked.split(",")
    return ["cpu", *(name for name in GPU_BACKENDS if refusal(name) is None)]


def seconds_of(run: Callable[[], object], repeats: int, before: Callable[[], None] | None = None) -> list[float]:
    """Sorted times of `repeats` calls, after one that is not counted."""
    run()
    times = []
    for _ in range(repeats):
        if before is not None:
            before()
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return sorted(times)
