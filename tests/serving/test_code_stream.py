"""One piece's codes from language models that fail."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from musicgen_serving.code_stream import CodeStream
from musicgen_serving.deployments.language_model import Accepted, LanguageModelEvent
from musicgen_serving.errors import ReplicaLostError
from musicgen_serving.settings import FailoverSettings

from musicgen.errors import InternalError
from musicgen.types import (
    CodesRequest,
    Conditioning,
    EndOfRequest,
    EngineRequest,
    FinishReason,
    SamplingParams,
    Usage,
    Window,
)


class Failing:
    """Language models each of which takes the piece and ends it."""

    def __init__(self, reason: FinishReason) -> None:
        self._reason = reason
        self.num_attempts = 0

    @asynccontextmanager
    async def generate(self, request: EngineRequest) -> AsyncIterator[AsyncIterator[LanguageModelEvent]]:
        self.num_attempts += 1
        yield self._events(request.request_id)

    async def _events(self, request_id: str) -> AsyncIterator[LanguageModelEvent]:
        yield Accepted(0.0)
        yield EndOfRequest(request_id, self._reason, Usage(0, 0.0, 0.0, 0.0), "planned")


@pytest.mark.parametrize(
    ("reason", "error", "num_attempts"),
    [(FinishReason.FAILED, InternalError, 2), (FinishReason.CANCELLED, ReplicaLostError, 8)],
    ids=["it cannot compute it", "its lease ran out"],
)
def test_what_fails_alike_in_two_engines_is_not_given_to_a_third(
    reason: FinishReason, error: type[Exception], num_attempts: int
) -> None:
    """It may end each of them."""
    codes = CodesRequest(((Window(0, 8), Conditioning(None, None)),), SamplingParams())
    engines: Any = Failing(reason)
    stream = CodeStream(engines, EngineRequest("r", codes), FailoverSettings(backoff_s=0.001, max_backoff_s=0.01))

    async def take() -> None:
        async for _ in stream.events():
            pass

    with pytest.raises(error):
        asyncio.run(take())
    assert engines.num_attempts == num_attempts
