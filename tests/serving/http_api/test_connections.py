"""Real connections to a real server: who leaves, who stalls, what is cut, and that the service's context is left."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import httpx2
import pytest
import soundfile
from musicgen_serving.http_api import create_app
from musicgen_serving.http_api.delivery import GenerationResponse
from musicgen_serving.http_api.generations import WholeDelivery, Wish
from musicgen_serving.http_api.server import start_server
from musicgen_serving.settings import HttpSettings
from musicgen_serving.types import GenerationRequest, Piece
from serving.http_api.conftest import URL
from serving.http_api.fakes import FakeService, checksum, samples_of

Runner = Callable[[Awaitable[None]], None]


@asynccontextmanager
async def served(service: FakeService) -> AsyncIterator[int]:
    """The port of a server."""
    any_port = HttpSettings().model_copy(update={"port": 0})
    server = await start_server(create_app(lambda: service), any_port, service.limits.reader_stall_s)
    try:
        yield server.port
    finally:
        await server.stop(1)


async def send_request(port: int, **fields: object) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**16)
    body = json.dumps({"duration_s": 0.5, "seed": 7, **fields}).encode()
    head = f"POST {URL} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    await writer.drain()
    return reader, writer


async def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("how", [{}, {"stream": True}, {"stream_format": "sse"}], ids=["whole", "audio", "sse"])
@pytest.mark.parametrize("phase", ["admission", "first_audio", "second_chunk"])
def test_who_leaves_cancels(service: FakeService, run: Runner, phase: str, how: dict[str, object]) -> None:
    if phase == "second_chunk" and not how:
        service.wait_at = "first_audio"
    else:
        service.wait_at = phase

    async def check() -> None:
        async with served(service) as port:
            _, writer = await send_request(port, **how)
            await asyncio.wait_for(service.at_wait.wait(), 5)
            assert service.num_left == 0
            writer.transport.abort()
            await until(lambda: service.num_left == 1, 2.0)
            assert service.num_cut_short == 1

    run(check())


def test_who_leaves_while_sending_cancels(service: FakeService, run: Runner) -> None:
    service.limits = service.limits.model_copy(update={"reader_stall_s": 30.0})
    service.chunk = 32000

    async def check() -> None:
        async with served(service) as port:
            reader, writer = await send_request(port, duration_s=100, stream=True, response_format="f32")
            await reader.read(1000)
            writer.transport.abort()
            await until(lambda: service.num_left == 1, 2.0)
            assert service.num_cut_short == 1
            assert service.num_chunks < 100

    run(check())


@pytest.mark.parametrize("stream", [True, False], ids=["audio", "whole"])
def test_who_reads_nothing_is_cut_off(
    stream: bool, service: FakeService, run: Runner, caplog: pytest.LogCaptureFixture
) -> None:
    service.chunk = 32000

    async def check() -> None:
        async with served(service) as port:
            _, writer = await send_request(port, duration_s=120, stream=stream, response_format="f32")
            await until(lambda: service.num_left == 1)
            assert service.num_cut_short == int(stream)
            writer.transport.abort()

    run(check())
    assert "read no data" in caplog.text
    assert [r for r in caplog.records if r.levelno >= logging.ERROR or r.exc_info] == [], "it is cut on purpose"


def test_who_reads_slowly_is_served(service: FakeService, run: Runner) -> None:
    """The whole takes longer than the stall limit; no single step does."""

    async def check() -> None:
        async with served(service) as port:
            reader, writer = await send_request(port, duration_s=25, response_format="f32")
            head = await reader.readuntil(b"\r\n\r\n")
            assert b"200 OK" in head
            began = time.monotonic()
            num_bytes = 0
            while num_bytes < 25 * 32000 * 4:
                num_bytes += len(await reader.read(2**16))
                await asyncio.sleep(0.012)
            assert time.monotonic() - began > service.limits.reader_stall_s
            writer.close()
        assert service.num_cut_short == 0

    run(check())


@pytest.mark.parametrize("format", ["mp3", "opus"])
def test_a_compressed_stream_is_heard_while_it_is_made(service: FakeService, run: Runner, format: str) -> None:
    """The service makes more than half a second only when most of that could be played."""
    service.chunk, service.wait_at = 16000, "second_chunk"

    async def check() -> None:
        content = b""
        async with served(service) as port, httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
            fields = {"duration_s": 2.0, "seed": 7, "stream": True, "response_format": format}
            async with asyncio.timeout(15), http.stream("POST", URL, json=fields) as response:
                async for part in response.aiter_bytes():
                    content += part
                    if heard_s(content) > 0.35:
                        service.go_on.set()
        assert heard_s(content) == 2.0

    run(check())


def heard_s(content: bytes) -> float:
    """Seconds that can be decoded of the beginning of a file."""
    try:
        samples, rate = soundfile.read(io.BytesIO(content))
    except soundfile.LibsndfileError:
        return 0.0
    return len(samples) / rate


@pytest.mark.parametrize("how", ["stream_fails", "stream_ends_well"])
def test_a_failed_stream_has_no_end(
    service: FakeService, run: Runner, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    service.fail_after = 2 if how == "stream_fails" else None

    async def check() -> None:
        async with served(service) as port:
            reader, writer = await send_request(port, stream=True, response_format="pcm16")
            content = b""
            if how == "stream_fails":
                content = await asyncio.wait_for(reader.read(-1), 5)  # the server closes it
            else:
                content = await asyncio.wait_for(reader.readuntil(b"\r\n0\r\n\r\n"), 5)
            assert content.startswith(b"HTTP/1.1 200")
            assert content.endswith(b"\r\n0\r\n\r\n") == (how == "stream_ends_well")
            writer.close()

    with caplog.at_level(logging.CRITICAL + 1):
        run(check())


def test_a_body_that_stops_coming(service: FakeService, run: Runner) -> None:
    async def check() -> None:
        async with served(service) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(f"POST {URL} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{{".encode())
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
            assert b" 408 " in head
            writer.close()
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(f"POST {URL} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{{".encode())
            await asyncio.sleep(0.05)
            writer.transport.abort()
            await asyncio.sleep(0.05)
        assert service.requests == []

    run(check())


def test_many_leave_at_random_moments(service: FakeService, run: Runner) -> None:
    """None is lost: as many contexts are left as were entered."""
    service.chunk = 2000

    async def one(port: int, number: int) -> None:
        how = [{}, {"stream": True}, {"stream_format": "sse"}][number % 3]
        _, writer = await send_request(port, duration_s=5, **how)
        await asyncio.sleep(0.003 * (number % 17))
        writer.transport.abort()

    async def check() -> None:
        async with served(service) as port:
            await asyncio.gather(*(one(port, number) for number in range(48)))
            await until(lambda: service.num_left == len(service.requests))
            await asyncio.sleep(0.2)
            assert service.num_left == len(service.requests)

    run(check())


def test_cancelling_the_handler_leaves_the_context(service: FakeService, run: Runner) -> None:
    """What the server does at the end of a drain."""
    service.wait_at = "first_audio"

    async def never() -> dict[str, object]:
        await asyncio.Event().wait()
        return {}

    async def no_send(message: object) -> None:
        raise AssertionError("nothing was to be sent")

    async def check() -> None:
        tenant = await service.authenticate(None)
        request = GenerationRequest("a", "demo", (Piece(None, 1),), 1.0)
        response = GenerationResponse(service, tenant, request, WholeDelivery(request, Wish("wav")))
        tasks_before = asyncio.all_tasks()
        handler = asyncio.create_task(response({}, never, no_send))  # type: ignore[arg-type]
        await service.at_wait.wait()
        handler.cancel()
        with pytest.raises(asyncio.CancelledError):
            await handler
        assert (service.num_left, service.num_cut_short) == (1, 1)
        assert asyncio.all_tasks() == tasks_before

    run(check())


def test_whole_results_arrive_over_a_socket(service: FakeService, run: Runner) -> None:
    async def check() -> None:
        async with served(service) as port:
            reader, writer = await send_request(port, response_format="f32", duration_s=10)
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            content = await reader.readexactly(10 * 32000 * 4)
            assert f"content-length: {len(content)}" in head
            assert f"x-checksum: {checksum(samples_of(7, 320000))}" in head
            assert content == samples_of(7, 320000).numpy().tobytes()
            writer.close()

    run(check())
