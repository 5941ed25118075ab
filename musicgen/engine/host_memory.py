"""How much memory this process may still take: the machine's, and its container's where one bounds it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil

CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class _Names:
    """Files of a control group's memory, and its cache that is given up before anybody is killed."""

    limit: str
    used: str
    stat: str
    cache: str


_VERSIONS = (
    _Names("memory.max", "memory.current", "memory.stat", "inactive_file"),
    _Names("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)


def available_bytes(cgroups: Path = CGROUPS) -> int:
    """Bytes that can be taken without anything being swapped or killed.

    The machine's figure alone would let a container with a limit take more than it has. Source of the files: the
    kernel's `admin-guide/cgroup-v2` and `cgroup-v1/memory`.
    """
    rooms = [room for names in _VERSIONS if (room := _room(cgroups, names)) is not None]
    return max(0, min([psutil.virtual_memory().available, *rooms]))


def _room(cgroups: Path, names: _Names) -> int | None:
    """What the control group leaves; None: it sets no limit, or there is none of this version."""
    try:
        limit = (cgroups / names.limit).read_text().strip()
        if limit == "max":
            return None
        used = int((cgroups / names.used).read_text())
        stat = dict(line.split() for line in (cgroups / names.stat).read_text().splitlines())
        return int(limit) - used + int(stat.get(names.cache, 0))
    except (OSError, ValueError):
        return None
