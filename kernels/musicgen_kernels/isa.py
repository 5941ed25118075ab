"""Which compiled instruction-set level of the CPU kernels this process uses.

The best level that the processor offers and that was built, unless MUSICGEN_KERNELS_ISA names one. A level
never changes a result by itself within a process: results may differ between levels in the last bits, never
within one.
"""

from __future__ import annotations

import importlib
import os
from types import ModuleType

import torch  # noqa: F401  (first: its OpenMP runtime must be the one that is loaded)

from .errors import BackendUnavailableError

ENVIRONMENT = "MUSICGEN_KERNELS_ISA"
LEVELS = ("avx512", "avx2", "baseline")
_HINT = "build them with: pip install -e . --no-build-isolation (needs a C++17 compiler)"


def supported_levels() -> list[str]:
    """The levels that this processor can run, the best first.

    Raises:
        BackendUnavailableError: the native kernels are not built.
    """
    try:
        probe = importlib.import_module(f"{__package__}._cpuid")
    except ImportError as error:
        raise BackendUnavailableError("cpu", f"the native kernels are not built ({error}); {_HINT}") from None
    return list(probe.supported_levels())


def load_level(level: str | None) -> tuple[str, ModuleType]:
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
            return name, importlib.import_module(f"{__package__}._cpu_{name}")
        except ImportError as error:
            reasons.append(f"{name}: {error}")
    raise BackendUnavailableError("cpu", f"no level could be loaded ({'; '.join(reasons)}); {_HINT}")
