"""The HTTP server of one ingress replica: port, TLS, limits, idle connections, drain.

Runs its own uvicorn, because Serve's HTTP proxy buffers a replica's output without backpressure from the client, has no
TLS, honours internal headers from any client, and costs two hops and CPU time. Replicas on a machine share the port.
"""

from __future__ import annotations

import asyncio
import logging
import math
import socket
import ssl

import h11
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from musicgen.errors import InvalidRequestError, OverloadedError
from musicgen_serving.certificates import Certificates, certificates_of
from musicgen_serving.errors import report
from musicgen_serving.http_api.errors import ConnectionCutError, error_response, http_report
from musicgen_serving.settings import HttpSettings
from musicgen_serving.watched_files import poll

HEAD_S = 20.0
"""Idle timeout before the first request and between requests; also the time limit for receiving a request head."""
_log = logging.getLogger(__name__)


class HttpServer:
    """A running server. Set by `start_server`."""

    def __init__(
        self, server: uvicorn.Server, port: int, serving: asyncio.Task[None], looking: asyncio.Task[None] | None
    ) -> None:
        self.port = port
        self._server, self._serving, self._looking = server, serving, looking

    async def stop(self, grace_s: float) -> None:
        """Accept no more connections, let running requests finish for `grace_s` seconds, then cancel them."""
        self._server.config.timeout_graceful_shutdown = math.ceil(grace_s)
        self._server.should_exit = True
        await self._serving
        if self._looking is not None:
            self._looking.cancel()
        if handlers := self._server.server_state.tasks:
            await asyncio.wait(handlers)


async def start_server(app: ASGIApp, settings: HttpSettings, stall_s: float) -> HttpServer:
    """Listen. Port 0 picks a free one; see the result's `port`.

    Args:
        stall_s: TCP user timeout: the kernel drops a connection whose peer acknowledges nothing for this long.
    Raises:
        InvalidRequestError: the port is unavailable, or the TLS files cannot be read or used.
    """
    certificates = certificates_of("http", settings)
    config = uvicorn.Config(
        app,
        http=_Connection,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=math.ceil(HEAD_S),
        limit_concurrency=settings.max_connections,
        ssl_certfile=settings.tls_certificate,
        ssl_keyfile=settings.tls_key,
    )
    config.load()
    if certificates is not None:
        assert config.ssl is not None
        _show_newest(config.ssl, certificates)
    logging.getLogger("uvicorn.error").addFilter(_cut_is_no_error)
    listening = _listen(settings, stall_s)
    server = uvicorn.Server(config)
    server.lifespan = config.lifespan_class(config)
    await server.startup([listening])  # not `serve`, which installs signal handlers
    port = int(listening.getsockname()[1])
    _log.info("HTTP listening on %s:%d, %s", settings.host, port, "TLS" if config.is_ssl else "plaintext")
    looking = asyncio.create_task(poll(certificates.look)) if certificates is not None else None
    return HttpServer(server, port, asyncio.create_task(_serve(server, listening)), looking)


async def _serve(server: uvicorn.Server, listening: socket.socket) -> None:
    await server.main_loop()
    await server.shutdown([listening])


def _show_newest(context: ssl.SSLContext, certificates: Certificates) -> None:
    """Present the newest certificate to each new connection, with or without SNI.

    The context of a listening socket cannot be replaced, and loading another pair into it would keep the old
    certificate alongside a new one with a different key type, e.g. RSA and EC.
    """

    def choose(connection: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
        connection.context = certificates.context

    context.sni_callback = choose


def _listen(settings: HttpSettings, stall_s: float) -> socket.socket:
    """Raises: InvalidRequestError: the address or port is unavailable."""
    listening = None
    try:
        (family, kind, proto, _, address), *_ = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM
        )
        listening = socket.socket(family, kind, proto)
        for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
            listening.setsockopt(socket.SOL_SOCKET, option, 1)
        # Inherited by accepted connections. uvicorn drops stalled readers by closing the connection, which waits until
        # the written data has been sent.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(stall_s * 1000))
        listening.bind(address)
    except OSError as error:
        if listening is not None:
            listening.close()
        got = f"{settings.host}:{settings.port}, which is unavailable"
        raise InvalidRequestError("a free port", got, param="http.port") from error
    return listening


class _Connection(H11Protocol):
    """uvicorn's connection, with a time limit on request heads and errors in the form of the API.

    h11 rather than httptools, because it bounds the size of a head (64 KiB).
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # uvicorn's own check allows one connection fewer, and refuses requests of all of them when there are too many.
        most, self.limit_concurrency = self.limit_concurrency, None
        if most is not None and len(self.connections) > most:
            _log.warning("more than %d connections; refusing new ones", most)
            self.app = _refuse
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def data_received(self, data: bytes) -> None:
        """uvicorn stops the timer at the first byte; here it runs until the head is complete."""
        self.conn.receive_data(data)
        self.handle_events()

    def send_400_response(self, msg: str) -> None:
        answer = error_response(http_report(400, msg), {"Connection": "close"})
        head = h11.Response(status_code=400, headers=answer.raw_headers, reason=b"Bad Request")
        for event in (head, h11.Data(data=bytes(answer.body)), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


async def _refuse(scope: Scope, receive: Receive, send: Send) -> None:
    """The application of a connection beyond `max_connections`."""
    error = OverloadedError("too many connections; retry later")
    await error_response(report(error), {"Connection": "close"})(scope, receive, send)


def _cut_is_no_error(record: logging.LogRecord) -> bool:
    """uvicorn logs any exception with a traceback; connections cut on purpose get one warning line."""
    cut = record.exc_info[1] if record.exc_info else None
    if isinstance(cut, ConnectionCutError):
        record.levelno, record.levelname = logging.WARNING, "WARNING"
        record.msg, record.args, record.exc_info = "connection closed: %s", (str(cut),), None
    return True
