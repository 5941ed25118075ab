"""Memory available to this process: the machine's, bounded by the container's limit if there is one."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class _Names:
    """A control group's memory files, and its reclaimable cache."""

    limit: str
    used: str
    stat: str
    cache: str


_VERSIONS = (
    _Names("memory.max", "memory.current", "memory.stat", "inactive_file"),
    _Names("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)


def available_bytes(cgroups: Path = CGROUPS) -> int:
    """Bytes that can be allocated without swapping or an OOM kill.

    The machine's value alone would exceed the limit of a container. Source of the files: the kernel's
    `admin-guide/cgroup-v2` and `cgroup-v1/memory`.
    """
    rooms = [room for names in _VERSIONS if (room := _room(cgroups, names)) is not None]
    return max(0, min([psutil.virtual_memory().available, *rooms]))


def return_freed_memory() -> None:
    """Return to the system what this process has freed; nothing where the C library offers no call for it.

    glibc keeps freed blocks of up to 32 MiB, most matrices of a model among them, for later allocations.
    """
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


def _room(cgroups: Path, names: _Names) -> int | None:
    """Bytes left in the control group; None: no limit, or no control group of this version."""
    try:
        limit = (cgroups / names.limit).read_text().strip()
        if limit == "max":
            return None
        used = int((cgroups / names.used).read_text())
        stat = dict(line.split() for line in (cgroups / names.stat).read_text().splitlines())
        return int(limit) - used + int(stat.get(names.cache, 0))
    except (OSError, ValueError):
        return None
