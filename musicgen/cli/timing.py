"""How long the parts of the work took. Knows nothing of what they do."""

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
"""The parts, in the order in which they happen, and what they are called in the summary."""


class Stopwatch:
    """Adds up the seconds of each part; a part measured within another counts for the inner one only."""

    def __init__(self) -> None:
        self.seconds: dict[PartName, float] = dict.fromkeys(PARTS, 0.0)
        self.synchronize: Callable[[], None] = lambda: None
        """Waits for the device; set when it works on its own, so that its work counts where it was started."""
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
        """Something that acts as `target` and measures calls of its `methods`, and of itself, as `part`."""
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
