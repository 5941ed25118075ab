"""Which compiled instruction-set level of the CPU kernels this process uses.

The best level that the processor offers and that was built, unless MUSICGEN_KERNELS_ISA names one. A level
never changes a result by itself within a process: results may differ between levels in the last bits, never
within one.
"""

from __future__ import annotations

import importlib
import os
from typing import cast

import numpy
import torch  # before the kernels: its OpenMP runtime must be the one that is loaded

from .errors import BackendUnavailableError
from .native import CpuModule

ENVIRONMENT = "MUSICGEN_KERNELS_ISA"
LEVELS = ("avx512", "avx2", "baseline")
_HINT = "build them with: pip install -e . --no-build-isolation (needs a C++17 compiler)"


def supported_levels() -> list[str]:
    """The levels that this processor can run, the best first.

    Raises:
        BackendUnavailableError: the native kernels are not built.
    """
    try:
        from . import _cpuid
    except ImportError as error:
        raise BackendUnavailableError("cpu", f"the native kernels are not built ({error}); {_HINT}") from None
    return _cpuid.supported_levels()


def zero_bytes(num_bytes: int) -> torch.Tensor:
    """[num_bytes] uint8 zeros, aligned to 2 MiB and in pages of that size where the system gives them.

    What is never written takes no memory: NumPy asks for zeros, and the system maps them when they are touched;
    torch would write them all.
    """
    huge = 1 << 21
    memory = torch.from_numpy(numpy.zeros(num_bytes + huge, numpy.uint8))
    start = -memory.data_ptr() % huge
    try:
        from . import _cpuid
    except ImportError:
        return memory[start : start + num_bytes]
    _cpuid.advise_huge_pages(memory.data_ptr(), memory.nbytes)
    return memory[start : start + num_bytes]


def load_level(level: str | None) -> tuple[str, CpuModule]:
    """The compiled module of a level; None: the environment's choice, or the best.

    Raises:
        BackendUnavailableError: the level is unknown, not built, or not supported by this processor.
    """
    supported = supported_levels()
    wanted = level or os.environ.get(ENVIRONMENT, "").strip() or None
    if wanted is not None:
        if wanted not in LEVELS:
            raise BackendUnavailableError(f"cpu:{wanted}", f"no such level; there are {', '.join(LEVELS)}")
        if wanted not in supported:
            raise BackendUnavailableError(f"cpu:{wanted}", f"this processor offers {', '.join(supported)}")
        supported = [wanted]
    reasons = []
    for name in supported:
        try:
            return name, cast(CpuModule, importlib.import_module(f"{__package__}._cpu_{name}"))
        except ImportError as error:
            reasons.append(f"{name}: {error}")
    raise BackendUnavailableError("cpu", f"no level could be loaded ({'; '.join(reasons)}); {_HINT}")
