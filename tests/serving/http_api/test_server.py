"""The port: TLS, who shares it, connections that say nothing or take nothing, limits, drain."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2
import pytest
from musicgen_serving import watched_files
from musicgen_serving.http_api import create_app, server
from musicgen_serving.http_api.server import HttpServer, start_server
from musicgen_serving.settings import HttpSettings
from serving.certificates import EC, RSA, der, make_certificate, make_certificates, openssl, put, shown, until_shown
from serving.http_api.fakes import FakeService
from serving.http_api.test_connections import send_request, until

from musicgen.errors import InvalidRequestError

Run = Callable[[Coroutine[Any, Any, None]], None]
HEALTH = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"


@asynccontextmanager
async def serving(service: FakeService | None = None, **settings: object) -> AsyncIterator[HttpServer]:
    how, service = HttpSettings().model_copy(update={"port": 0, **settings}), service or FakeService()
    running = await start_server(create_app(service), how, service.limits.reader_stall_s)
    try:
        yield running
    finally:
        await running.stop(0)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


def test_tls(certificates: Path, run: Run) -> None:
    async def check() -> None:
        pair = {"tls_certificate": certificates / "server.pem", "tls_key": certificates / "server.key"}
        async with serving(**pair) as there:
            trusts = ssl.create_default_context(cafile=str(certificates / "ca.pem"))
            async with httpx2.AsyncClient(verify=trusts) as client:
                assert (await client.get(f"https://localhost:{there.port}/healthz")).json() == {"status": "ok"}
            async with httpx2.AsyncClient() as client:
                with pytest.raises(httpx2.ConnectError):
                    await client.get(f"https://localhost:{there.port}/healthz")
                with pytest.raises(httpx2.RemoteProtocolError):
                    await client.get(f"http://localhost:{there.port}/healthz")

    run(check())


@pytest.mark.parametrize(("certificate", "key"), [("none.pem", "server.key"), ("server.pem", "client.key")])
def test_files_of_tls_that_cannot_be_used(certificates: Path, run: Run, certificate: str, key: str) -> None:
    async def check() -> None:
        pair = {"tls_certificate": certificates / certificate, "tls_key": certificates / key}
        with pytest.raises(InvalidRequestError, match="readable, matching PEM files"):
            async with serving(**pair):
                pass

    run(check())


@pytest.fixture
def pair(certificates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Settings of TLS, with files that may be replaced and are looked at often."""
    monkeypatch.setattr(watched_files, "LOOK_S", 0.05)
    files = {"tls_certificate": tmp_path / "tls.crt", "tls_key": tmp_path / "tls.key"}
    put(certificates / "server.pem", files["tls_certificate"])
    put(certificates / "server.key", files["tls_key"])
    return files


@pytest.mark.parametrize("kind", [EC, RSA], ids=["of the same kind", "of another kind"])
@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_a_new_certificate_is_shown_to_new_connections(
    certificates: Path, pair: dict[str, Path], run: Run, kind: tuple[str, ...], host: str
) -> None:
    make_certificate(certificates, "renewed", kind)

    async def check() -> None:
        trusts = ssl.create_default_context(cafile=str(certificates / "ca.pem"))
        async with serving(**pair) as there:
            assert await shown(there.port, trusts, host) == der(certificates / "server.pem")
            reader, writer = await asyncio.open_connection("127.0.0.1", there.port, ssl=trusts, server_hostname=host)
            put(certificates / "renewed.pem", pair["tls_certificate"])
            put(certificates / "renewed.key", pair["tls_key"])
            await until_shown(certificates / "renewed.pem", there.port, trusts, host)
            writer.write(HEALTH)  # the connection that was there before
            assert b"200 OK" in await reader.readuntil(b'{"status":"ok"}')
            writer.close()

    run(check())


def test_a_pair_that_does_not_belong_together_is_not_shown(
    certificates: Path, pair: dict[str, Path], run: Run, caplog: pytest.LogCaptureFixture
) -> None:

    async def check() -> None:
        trusts = ssl.create_default_context(cafile=str(certificates / "ca.pem"))
        async with serving(**pair) as there:
            put(certificates / "client.pem", pair["tls_certificate"])
            await until(lambda: "invalid TLS files" in caplog.text)
            for _ in range(5):
                assert await shown(there.port, trusts) == der(certificates / "server.pem")
                await asyncio.sleep(0.05)
            put(certificates / "client.key", pair["tls_key"])
            await until_shown(certificates / "client.pem", there.port, trusts)

    run(check())
    assert len([line for line in caplog.messages if "invalid TLS files" in line]) == 1


def test_a_key_with_a_password_is_refused_and_not_asked_for_it(certificates: Path, tmp_path: Path, run: Run) -> None:
    locked = tmp_path / "locked.key"
    openssl(certificates, "ec", "-in", "server.key", "-aes256", "-passout", "pass:secret", "-out", str(locked))

    async def check() -> None:
        with pytest.raises(InvalidRequestError, match="PEM"):
            async with serving(tls_certificate=certificates / "server.pem", tls_key=locked):
                pass

    run(check())


def test_replicas_share_a_port_and_strangers_do_not(run: Run) -> None:
    async def check() -> None:
        async with serving() as first, serving(port=first.port) as second:
            assert second.port == first.port
        with socket.create_server(("127.0.0.1", 0)) as other:
            port = other.getsockname()[1]
            with pytest.raises(InvalidRequestError, match=rf"a free port.*127\.0\.0\.1:{port}"):
                async with serving(port=port):
                    pass

    run(check())


@pytest.mark.parametrize("said", [b"", HEALTH[:7], HEALTH[:-2]], ids=["nothing", "half a line", "half a head"])
def test_who_says_nothing_is_let_go(said: bytes, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HEAD_S", 1)

    async def drip(writer: asyncio.StreamWriter) -> None:
        while said:  # a byte now and then must not keep it
            writer.write(b"x")
            await asyncio.sleep(0.3)

    async def check() -> None:
        async with serving() as there:
            reader, writer = await asyncio.open_connection("127.0.0.1", there.port)
            writer.write(said)
            dripping = asyncio.create_task(drip(writer))
            with suppress(ConnectionResetError):
                assert await asyncio.wait_for(reader.read(), 10) == b""
            dripping.cancel()
            writer.close()

    run(check())


def test_a_connection_is_kept_between_requests(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HEAD_S", 1)

    async def check() -> None:
        async with serving() as there:
            reader, writer = await asyncio.open_connection("127.0.0.1", there.port)
            for _ in range(4):
                writer.write(HEALTH)
                assert b"200 OK" in await reader.readuntil(b'{"status":"ok"}')
                await asyncio.sleep(0.4)
            assert await reader.read(1) == b""  # the server, a second after the last
            writer.close()

    run(check())


def test_a_long_answer_is_no_silence(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that waits for its audio says nothing for longer than a head may take."""
    monkeypatch.setattr(server, "HEAD_S", 1)
    service = FakeService(wait_at="admission")

    async def check() -> None:
        async with serving(service) as there:
            _, writer = await send_request(there.port)
            await service.at_wait.wait()
            await asyncio.sleep(1.5)
            assert service.num_left == 0
            writer.transport.abort()

    run(check())


def test_the_kernel_gives_up_who_takes_nothing(run: Run) -> None:
    """The response is cut after `reader_stall_s`; what was written before must not hold the connection for ever."""
    service = FakeService(chunk=32000)

    async def check() -> None:
        async with serving(service) as there:
            _, writer = await send_request(there.port, duration_s=120, stream=True, response_format="f32")
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            await until(lambda: service.num_left == 1)
            assert service.num_cut_short == 1
            await until(lambda: not there._server.server_state.connections, 8)
            writer.transport.abort()

    run(check())


def test_more_connections_than_a_replica_takes(run: Run) -> None:
    async def check() -> None:
        async with serving(max_connections=2) as there:
            url = f"http://127.0.0.1:{there.port}/healthz"
            _, waiting = await asyncio.open_connection("127.0.0.1", there.port)
            async with httpx2.AsyncClient() as client, httpx2.AsyncClient() as late:
                assert (await client.get(url)).status_code == 200, "the second of two"
                refused = await late.get(url)
                assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
                assert int(refused.headers["retry-after"]) >= 1
                assert refused.headers["connection"] == "close"
                assert (await client.get(url)).status_code == 200, "those who were there stay"
                waiting.close()
                await until(lambda: len(there._server.server_state.connections) <= 1)
                assert (await late.get(url)).status_code == 200

    run(check())


def test_what_is_not_http_gets_an_error_like_all_others(run: Run) -> None:
    async def check() -> None:
        async with serving() as there:
            reader, writer = await asyncio.open_connection("127.0.0.1", there.port)
            writer.write(b"HELLO\r\n\r\n")
            head, _, body = (await reader.read()).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 400 Bad Request\r\n")
            assert json.loads(body)["error"]["code"] == "invalid_request"
            writer.close()

    run(check())


@pytest.mark.parametrize("grace_s", [5.0, 0.0])
def test_a_drain_waits_as_long_as_it_may(grace_s: float, run: Run) -> None:
    service = FakeService(wait_at="second_chunk")

    async def check() -> None:
        async with serving(service) as there:
            reader, writer = await send_request(there.port, stream=True, response_format="f32")
            await service.at_wait.wait()
            stopping = asyncio.create_task(there.stop(grace_s))
            await asyncio.sleep(0.3)
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_connection("127.0.0.1", there.port)
            service.go_on.set()
            await stopping
            content = await reader.read(-1)
            assert content.endswith(b"\r\n0\r\n\r\n") == (grace_s > 0)
            assert service.num_left == 1
            writer.close()

    run(check())
