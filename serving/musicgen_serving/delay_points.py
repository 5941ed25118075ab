"""Named points at which a process can be made to wait, so that a race that a test looks for happens every time.

Inert unless the environment variable `MUSICGEN_DELAY_POINTS` is set: then it names points and seconds, such as
`lm.prefill=0.2,codec.last=0.1`, or `@FILE` for a file with such a line, which is read anew each time. For tests only.
"""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

from musicgen.errors import InvalidRequestError

VARIABLE = "MUSICGEN_DELAY_POINTS"

LM_ACCEPT = "lm.accept"
"""A request has come to a language model, which has not taken it yet."""
LM_PREFILL = "lm.prefill"
"""Before each step in which a request is prefilled; holds the engine."""
LM_STEP = "lm.step"
"""Before each step; holds the engine."""
CODEC_CALL = "codec.call"
"""Before codes are sent to a codec."""
CODEC_LAST = "codec.last"
"""Before the last codes of a piece are sent to a codec (then not `CODEC_CALL`)."""
EDGE_SEND = "edge.send"
"""Before an edge sends a part of an answer."""

POINTS = frozenset({LM_ACCEPT, LM_PREFILL, LM_STEP, CODEC_CALL, CODEC_LAST, EDGE_SEND})


async def pause(point: str) -> None:
    """Wait here, if so told."""
    if (seconds := seconds_at(point)) > 0:
        await asyncio.sleep(seconds)


def hold(point: str) -> None:
    """Wait here with the whole thread, if so told."""
    if (seconds := seconds_at(point)) > 0:
        time.sleep(seconds)


def seconds_at(point: str) -> float:
    """How long to wait at a point; 0 where nothing is said.

    Raises:
        InvalidRequestError: what the variable says cannot be read.
    """
    text = os.environ.get(VARIABLE)
    return parse(text).get(point, 0.0) if text else 0.0


def parse(text: str) -> dict[str, float]:
    """`point=seconds,…`, or `@FILE` → seconds by point.

    Raises:
        InvalidRequestError: an unknown point, or something that is no number of seconds.
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
            raise InvalidRequestError(f"one of {', '.join(sorted(POINTS))}, and seconds", repr(item), param=VARIABLE)
    return delays
