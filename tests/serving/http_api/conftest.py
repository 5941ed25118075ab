"""Shared: a fake service and a client that speaks ASGI to the application, without a port."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Callable, Coroutine
from typing import Any

import httpx2
import numpy as np
import pytest
import soundfile
from musicgen_serving.http_api import create_app
from serving.http_api.fakes import FakeService

URL = "/v1/music/generations"


async def _metrics() -> bytes:
    return b"musicgen_requests_total 3\n"


class Client:
    """One call a method; each gets a fresh loop, as the application keeps nothing between calls."""

    def __init__(self, service: FakeService) -> None:
        self.service = service
        self.app = create_app(lambda: service, metrics=_metrics)

    def request(self, method: str, url: str, **options: Any) -> httpx2.Response:
        async def call() -> httpx2.Response:
            transport = httpx2.ASGITransport(app=self.app)
            async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
                return await client.request(method, url, **options)

        return asyncio.run(asyncio.wait_for(call(), 20))

    def post(self, **fields: Any) -> httpx2.Response:
        return self.request("POST", URL, json={"duration_s": 0.5, "seed": 7, **fields})


@pytest.fixture
def service() -> FakeService:
    return FakeService()


@pytest.fixture
def client(service: FakeService) -> Client:
    return Client(service)


@pytest.fixture(scope="session")
def recording() -> bytes:
    """A wav file of 0.1 s."""
    sink = io.BytesIO()
    soundfile.write(sink, np.zeros((1600, 1)), 16000, format="WAV")
    return sink.getvalue()


@pytest.fixture(scope="session")
def recording_base64(recording: bytes) -> str:
    return base64.b64encode(recording).decode()


@pytest.fixture
def run() -> Callable[[Coroutine[Any, Any, Any]], Any]:
    """Run with a limit, so that what hangs fails."""
    return lambda coroutine: asyncio.run(asyncio.wait_for(coroutine, 20))
