"""Devices of the kernel benchmark: a backend's target, and the machine whose limits its times are compared with."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from musicgen_kernels.isa import LEVELS

from .gpu_machine import GPU_BACKENDS, GpuMachine, refusal
from .kernel_cases import DTYPES, Target
from .machine import Machine


class Measured(Protocol):
    """A device under measurement: a CPU at one instruction-set level, or a GPU."""

    level: str

    def stream_bytes_per_s(self) -> float: ...

    def peak_rates(self) -> dict[str, float]: ...

    def seconds_of(self, run: Callable[[], object], repeats: int, *, cold: bool = False) -> list[float]: ...


class CpuMachine(Machine):
    """The CPU at one instruction-set level, with a number of threads."""

    def peak_rates(self) -> dict[str, float]:
        """Operations per second, by `Case.peak`."""
        peaks = self.peaks()
        return {"fp32": peaks.fp32, "int8": peaks.int8}

    def seconds_of(self, run: Callable[[], object], repeats: int, *, cold: bool = False) -> list[float]:
        """See `seconds_of`."""
        return seconds_of(run, repeats, self.flush if cold else None)


def place(backend: str, activations: str, num_threads: int) -> tuple[Target, Measured]:
    """The target of a backend, and the machine to compare it with.

    Args:
        activations: dtype name, for GPUs; the CPU always uses float32.

    Raises:
        SystemExit: the backend is unknown or unavailable.
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
    """The requested backends (comma-separated); else the CPU and the available GPU backends."""
    if asked is not None:
        return asked.split(",")
    return ["cpu", *(name for name in GPU_BACKENDS if refusal(name) is None)]


def seconds_of(run: Callable[[], object], repeats: int, before: Callable[[], None] | None = None) -> list[float]:
    """Sorted times of `repeats` calls, after one warm-up call."""
    run()
    times = []
    for _ in range(repeats):
        if before is not None:
            before()
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return sorted(times)
