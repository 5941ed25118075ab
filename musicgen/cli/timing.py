"""Stopwatch for the parts of a run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

PartName = Literal["load", "inputs", "codes", "decode", "write"]
PARTS: dict[PartName, str] = {
    "load": "load (libraries, weights)",
    "inputs": "inputs (text, melody, prompt audio)",
    "codes": "codes",
    "decode": "decode",
    "write": "write",
}
"""The parts in order of execution, with their labels in the summary."""


class Stopwatch:
    """Accumulates seconds per part; nested measurements count for the innermost part only."""

    def __init__(self) -> None:
        self.seconds: dict[PartName, float] = dict.fromkeys(PARTS, 0.0)
        self.synchronize: Callable[[], None] = lambda: None
        """Waits for an asynchronous device, so that its work is attributed to the part that launched it."""
        self._inner: list[float] = []

    @contextmanager
    def measure(self, part: PartName) -> Iterator[None]:
        start = time.perf_counter()
        self._inner.append(0.0)
        try:
            yield
        finally:
            self.synchronize()
            elapsed = time.perf_counter() - start
            self.seconds[part] += elapsed - self._inner.pop()
            if self._inner:
                self._inner[-1] += elapsed

    def watch(self, part: PartName, target: Any, *methods: str) -> Any:
        """A proxy for `target` that counts calls of it and of its `methods` as `part`."""
        return _Watched(self, part, target, methods)


class _Watched:
    def __init__(self, watch: Stopwatch, part: PartName, target: Any, methods: tuple[str, ...]) -> None:
        self._watch, self._part, self._target, self._methods = watch, part, target, methods

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._target, name)
        return self._measured(value) if name in self._methods else value

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self._measured(self._target)(*arguments, **keywords)

    def _measured(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            with self._watch.measure(self._part):
                return function(*arguments, **keywords)

        return call
