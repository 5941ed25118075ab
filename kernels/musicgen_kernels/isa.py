"""Selects the instruction-set level of the compiled CPU kernels.

The best level that was built and that the processor supports, unless MUSICGEN_KERNELS_ISA names one. Results are
bit-identical within a level, but may differ between levels in the last bits.
"""

from __future__ import annotations

import importlib
import os
from typing import cast

import numpy
import torch  # before the kernels, so that its OpenMP runtime is the one loaded

from .errors import BackendUnavailableError
from .native import CpuModule

ENVIRONMENT = "MUSICGEN_KERNELS_ISA"
LEVELS = ("avx512", "avx2", "baseline")
_HINT = "build them with: pip install -e . --no-build-isolation (needs a C++17 compiler)"


def supported_levels() -> list[str]:
    """The levels that this processor supports, best first.

    Raises:
        BackendUnavailableError: the native kernels are not built.
    """
    try:
        from . import _cpuid
    except ImportError as error:
        raise BackendUnavailableError("cpu", f"the native kernels are not built ({error}); {_HINT}") from None
    return _cpuid.supported_levels()


def zero_bytes(num_bytes: int) -> torch.Tensor:
    """[num_bytes] uint8 zeros, aligned to 2 MiB and backed by huge pages where available.

    Untouched memory is never committed: NumPy allocates lazily zeroed pages, whereas torch would write the zeros.
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
    """The compiled module of a level; None: from the environment, or the best.

    Raises:
        BackendUnavailableError: the level is unknown, not built, or not supported by this processor.
    """
    supported = supported_levels()
    wanted = level or os.environ.get(ENVIRONMENT, "").strip() or None
    if wanted is not None:
        if wanted not in LEVELS:
            raise BackendUnavailableError(f"cpu:{wanted}", f"no such level; use one of {', '.join(LEVELS)}")
        if wanted not in supported:
            raise BackendUnavailableError(f"cpu:{wanted}", f"this processor supports only {', '.join(supported)}")
        supported = [wanted]
    reasons = []
    for name in supported:
        try:
            return name, cast(CpuModule, importlib.import_module(f"{__package__}._cpu_{name}"))
        except ImportError as error:
            reasons.append(f"{name}: {error}")
    raise BackendUnavailableError("cpu", f"no level could be loaded ({'; '.join(reasons)}); {_HINT}")
