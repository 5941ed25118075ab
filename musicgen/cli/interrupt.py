"""SIGTERM as an interrupt like Ctrl-C, so that both end a command in the same way."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Terminated(KeyboardInterrupt):
    """SIGTERM was received."""


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Raise `Terminated` in the main thread on the first SIGTERM; a second one is handled as before."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)

    def interrupt(*_: object) -> None:
        signal.signal(signal.SIGTERM, before)
        raise Terminated

    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
