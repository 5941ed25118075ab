"""Ports for services that somebody starts to try or to measure them."""

from __future__ import annotations

import random
import socket

FIRST, END = 20_000, 32_000
"""Below those that the system gives to whoever asks for any, such as Ray's processes while a service starts."""


def free_port() -> int:
    """A TCP port of this machine that nobody has at the moment."""
    for port in random.sample(range(FIRST, END), 100):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError(f"expected a free port of {FIRST} to {END}, got none in 100 tries")
