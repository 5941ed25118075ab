"""Both edges on free ports, in a thread, over one fake service, and proxies that cut connections."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

from musicgen_serving.grpc_api import server as grpc_server
from musicgen_serving.http_api import server as http_server
from musicgen_serving.http_api.app import create_app
from musicgen_serving.settings import GrpcSettings, HttpSettings
from serving.fake_service import FakeService


@dataclass
class Cuts:
    """How the proxies treat connections."""

    after_bytes: list[int] = field(default_factory=list)
    """Each entry cuts one connection, once so many bytes have gone to the client."""
    num_connections: int = 0


@dataclass
class Running:
    service: FakeService
    grpc_url: str
    http_url: str
    cuts: Cuts

    def url(self, protocol: str) -> str:
        return self.grpc_url if protocol == "grpc" else self.http_url


@contextmanager
def running(service: FakeService, cuts: Cuts | None = None) -> Iterator[Running]:
    """The edges. With `cuts`, the URLs are those of proxies before them."""
    loop = asyncio.new_event_loop()
    ready, stop = threading.Event(), asyncio.Event()
    found: list[Running] = []

    async def main() -> None:
        async with _edges(service) as (grpc_port, http_port):
            if cuts is not None:
                async with _proxy(grpc_port, cuts) as grpc_proxy, _proxy(http_port, cuts) as http_proxy:
                    found.append(_running(service, grpc_proxy, http_proxy, cuts))
                    ready.set()
                    await stop.wait()
            else:
                found.append(_running(service, grpc_port, http_port, Cuts()))
                ready.set()
                await stop.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(main()), name="edges")
    thread.start()
    try:
        assert ready.wait(20)
        yield found[0]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(20)
        assert not thread.is_alive()
        loop.close()


def _running(service: FakeService, grpc_port: int, http_port: int, cuts: Cuts) -> Running:
    return Running(service, f"grpc://127.0.0.1:{grpc_port}", f"http://127.0.0.1:{http_port}", cuts)


@asynccontextmanager
async def _edges(service: FakeService) -> AsyncIterator[tuple[int, int]]:
    grpc = await grpc_server.start_server(lambda: service, GrpcSettings(port=0), service.limits)
    any_port = HttpSettings().model_copy(update={"port": 0})
    http = await http_server.start_server(create_app(service), any_port, service.limits.reader_stall_s)
    try:
        yield grpc.port, http.port
    finally:
        await http.stop(1)
        await grpc.stop(0)


@asynccontextmanager
async def _proxy(port: int, cuts: Cuts) -> AsyncIterator[int]:
    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, limit: int | None) -> None:
        num_bytes = 0
        with contextlib.suppress(OSError):
            while content := await reader.read(4096):
                num_bytes += len(content)
                if limit is not None and num_bytes > limit:
                    break
                writer.write(content)
                await writer.drain()

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        cuts.num_connections += 1
        limit = cuts.after_bytes.pop(0) if cuts.after_bytes else None
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", port)
        ways = [asyncio.create_task(copy(reader, up_writer, None)), asyncio.create_task(copy(up_reader, writer, limit))]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.wait(ways)
            for end in (writer, up_writer):
                end.transport.abort()

    server = await asyncio.start_server(forward, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in asyncio.all_tasks():
            if getattr(task.get_coro(), "__name__", "") == "forward" and task is not asyncio.current_task():
                task.cancel()
        await asyncio.sleep(0.05)
