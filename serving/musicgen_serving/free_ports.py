"""Ports for services that somebody starts to try or to measure them."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator
from itertools import islice

FIRST, END = 20_000, 32_000
"""Below those that Linux, by default, gives to whoever asks for any: Ray's processes do, while a service starts."""


def free_ports(count: int) -> list[int]:
    """Different TCP ports of this machine that nobody has at the moment."""
    found = list(islice(_untaken(), count))
    if len(found) < count:
        raise OSError(f"expected {count} free ports of {FIRST} to {END}, got {len(found)}")
    return found


def _untaken() -> Iterator[int]:
    for port in random.sample(range(FIRST, END), END - FIRST):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        yield port
