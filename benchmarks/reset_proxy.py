"""TCP proxy whose connections can be reset, as if the client's machine had crashed.

Forwards all bytes on one event loop in a dedicated thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading

LINGER_0 = struct.pack("ii", 1, 0)
"""Closing a socket with this option sends RST."""


class Route:
    """One proxied route; created by `ResetProxy.route`."""

    def __init__(self, loop: asyncio.AbstractEventLoop, target: tuple[str, int]) -> None:
        self.port = 0
        self._loop, self._target = loop, target
        self._server: asyncio.Server | None = None
        self._was_reset = False
        self._writers: list[asyncio.StreamWriter] = []
        self._pumps: set[asyncio.Task[None]] = set()

    def reset(self) -> None:
        """Reset both sides of every connection, and of those that still come."""
        asyncio.run_coroutine_threadsafe(self._reset(), self._loop).result(10)

    async def listen(self) -> None:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.append(writer)
        if self._was_reset:
            self._abort()
            return
        try:
            far_reader, far_writer = await asyncio.open_connection(*self._target)
        except OSError:
            writer.transport.abort()
            return
        self._writers.append(far_writer)
        if self._was_reset:  # while it was connecting
            self._abort()
            return
        for pair in ((reader, far_writer), (far_reader, writer)):
            pump = asyncio.create_task(_pump(*pair))
            self._pumps.add(pump)
            pump.add_done_callback(self._pumps.discard)

    async def _reset(self) -> None:
        self._was_reset = True
        self._abort()
        for pump in self._pumps:
            pump.cancel()

    async def close(self) -> None:
        """Stop listening. Not done by `reset`: asyncio leaks a connection that is accepted as its server closes."""
        if self._server is not None:
            self._server.close()

    def _abort(self) -> None:
        for writer in self._writers:
            sock = writer.get_extra_info("socket")
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_0)
            writer.transport.abort()


class ResetProxy:
    """Creates routes. A context manager."""

    def __enter__(self) -> ResetProxy:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="reset-proxy", daemon=True)
        self._thread.start()
        self._routes: list[Route] = []
        return self

    def __exit__(self, *_: object) -> None:
        for route in self._routes:
            route.reset()
            asyncio.run_coroutine_threadsafe(route.close(), self._loop).result(10)
        asyncio.run_coroutine_threadsafe(asyncio.sleep(0.05), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def route(self, host: str, port: int) -> Route:
        """A new route to a service."""
        route = Route(self._loop, (host, port))
        asyncio.run_coroutine_threadsafe(route.listen(), self._loop).result(10)
        self._routes.append(route)
        return route


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.close()
