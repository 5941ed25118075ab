"""Failpoints for tests: named points at which a process can be delayed, to make races reproducible.

Inert unless the environment variable `MUSICGEN_DELAY_POINTS` is set to points and seconds, such as
`lm.prefill=0.2,codec.last=0.1`, or to `@FILE`, a file with such a line, which is read each time.
"""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

from musicgen.errors import InvalidRequestError

VARIABLE = "MUSICGEN_DELAY_POINTS"

LM_ACCEPT = "lm.accept"
"""After a request has reached a language model, before submission to the engine."""
LM_PREFILL = "lm.prefill"
"""Before each step that prefills; blocks the engine."""
LM_STEP = "lm.step"
"""Before each step; blocks the engine."""
CODEC_CALL = "codec.call"
"""Before codes are sent to a codec."""
CODEC_LAST = "codec.last"
"""Before the last codes of a piece are sent to a codec (instead of `CODEC_CALL`)."""
EDGE_SEND = "edge.send"
"""Before an ingress sends a chunk of a response."""

POINTS = frozenset({LM_ACCEPT, LM_PREFILL, LM_STEP, CODEC_CALL, CODEC_LAST, EDGE_SEND})


async def pause(point: str) -> None:
    """Sleep here, if configured."""
    if (seconds := seconds_at(point)) > 0:
        await asyncio.sleep(seconds)


def hold(point: str) -> None:
    """Block the thread here, if configured."""
    if (seconds := seconds_at(point)) > 0:
        time.sleep(seconds)


def seconds_at(point: str) -> float:
    """The delay configured for a point; 0 if none.

    Raises:
        InvalidRequestError: the variable is malformed.
    """
    text = os.environ.get(VARIABLE)
    return parse(text).get(point, 0.0) if text else 0.0


def parse(text: str) -> dict[str, float]:
    """`point=seconds,…`, or `@FILE` → seconds by point.

    Raises:
        InvalidRequestError: an unknown point, or an invalid number of seconds.
    """
    if text.startswith("@"):
        path = Path(text[1:])
        text = path.read_text().strip() if path.exists() else ""
    delays = {}
    for item in filter(None, text.split(",")):
        point, _, seconds = item.partition("=")
        try:
            delays[point] = float(seconds)
        except ValueError:
            raise InvalidRequestError("point=seconds", repr(item), param=VARIABLE) from None
        if point not in POINTS or not delays[point] >= 0:
            expected = f"point=seconds with a point of {', '.join(sorted(POINTS))}"
            raise InvalidRequestError(expected, repr(item), param=VARIABLE)
    return delays
