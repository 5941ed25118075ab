"""Free ports for demos, tests and benchmarks."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator
from itertools import islice

FIRST, END = 20_000, 32_000
"""Below Linux's default ephemeral range, from which Ray's processes take ports while a service starts."""


def free_ports(count: int) -> list[int]:
    """Distinct TCP ports of this machine that are currently free."""
    found = list(islice(_untaken(), count))
    if len(found) < count:
        raise OSError(f"expected {count} free ports between {FIRST} and {END}, got {len(found)}")
    return found


def _untaken() -> Iterator[int]:
    for port in random.sample(range(FIRST, END), END - FIRST):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        yield port
