"""The port: TLS with and without certificates of clients, health, reflection, damaged messages."""

from __future__ import annotations

import asyncio
import contextlib
import random
import ssl
from pathlib import Path

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from musicgen_serving import watched_files
from musicgen_serving.grpc_api.server import SERVICE, start_server
from musicgen_serving.proto.musicgen.v1 import music_service_pb2 as pb
from musicgen_serving.proto.musicgen.v1.music_service_pb2_grpc import MusicServiceStub
from musicgen_serving.settings import GrpcSettings, LimitSettings
from serving.certificates import der, make_ca, make_certificate, make_certificates, put, shown, until_shown
from serving.fake_service import FakeService
from serving.grpc_api.harness import channel_to, serve, spec, until

from musicgen.errors import InvalidRequestError


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


def tls_settings(folder: Path, *, mutual: bool) -> GrpcSettings:
    return GrpcSettings(
        port=0,
        tls_certificate=folder / "server.pem",
        tls_key=folder / "server.key",
        client_ca=folder / "ca.pem" if mutual else None,
    )


def model_names(settings: GrpcSettings, credentials: grpc.ChannelCredentials | None) -> list[str]:
    async def main() -> list[str]:
        async with serve(FakeService(), settings) as server:
            if credentials is None:
                channel = channel_to(server)
            else:
                options = [("grpc.use_local_subchannel_pool", 1)]
                channel = grpc.aio.secure_channel(f"localhost:{server.port}", credentials, options=options)
            async with channel:
                answer = await MusicServiceStub(channel).ListModels(pb.ListModelsRequest(), timeout=3)
                return [model.name for model in answer.models]

    return asyncio.run(main())


@pytest.mark.parametrize("mutual", [False, True])
def test_tls(certificates: Path, mutual: bool) -> None:
    settings = tls_settings(certificates, mutual=mutual)
    ca = (certificates / "ca.pem").read_bytes()
    with_certificate = grpc.ssl_channel_credentials(
        ca, (certificates / "client.key").read_bytes(), (certificates / "client.pem").read_bytes()
    )
    assert model_names(settings, with_certificate) == ["demo"]
    if mutual:
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            model_names(settings, grpc.ssl_channel_credentials(ca))
        assert failure.value.code() is grpc.StatusCode.UNAVAILABLE
    else:
        assert model_names(settings, grpc.ssl_channel_credentials(ca)) == ["demo"]
    with pytest.raises(grpc.aio.AioRpcError):
        model_names(settings, None)


def trusting(folder: Path, ca: str, client: str) -> ssl.SSLContext:
    """What a client of gRPC shows and believes, for a look at the server's certificate."""
    context = ssl.create_default_context(cafile=str(folder / f"{ca}.pem"))
    context.load_cert_chain(folder / f"{client}.pem", folder / f"{client}.key")
    context.set_alpn_protocols(["h2"])
    return context


def channel_of(folder: Path, port: int, ca: str, client: str) -> grpc.aio.Channel:
    credentials = grpc.ssl_channel_credentials(
        *((folder / name).read_bytes() for name in (f"{ca}.pem", f"{client}.key", f"{client}.pem"))
    )
    options = [("grpc.use_local_subchannel_pool", 1)]
    return grpc.aio.secure_channel(f"localhost:{port}", credentials, options=options)


async def call(channel: grpc.aio.Channel) -> None:
    await MusicServiceStub(channel).ListModels(pb.ListModelsRequest(), timeout=3)


def test_new_files_hold_for_new_connections(
    certificates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server's certificate and the clients' authority, both of another root."""
    monkeypatch.setattr(watched_files, "LOOK_S", 0.05)
    make_ca(certificates, "ca2")
    for name in ("server2", "client2"):
        make_certificate(certificates, name, ca="ca2")
    files = ("server.pem", "server.key", "ca.pem")
    for name in files:
        put(certificates / name, tmp_path / name)

    async def main() -> None:
        async with serve(FakeService(), tls_settings(tmp_path, mutual=True)) as server:
            former = channel_of(certificates, server.port, "ca", "client")
            await call(former)
            for name in files:
                put(certificates / name.replace(".", "2."), tmp_path / name)
            trusts = trusting(certificates, "ca2", "client2")
            trusts.check_hostname, trusts.verify_mode = False, ssl.CERT_NONE  # at first it shows the other root's
            await until_shown(certificates / "server2.pem", server.port, trusts)
            async with channel_of(certificates, server.port, "ca2", "client2") as channel:
                await call(channel)
            async with channel_of(certificates, server.port, "ca2", "client") as channel:
                with pytest.raises(grpc.aio.AioRpcError):
                    await call(channel)
            await call(former)
            await former.close()

    asyncio.run(main())


@pytest.mark.parametrize(("wrong", "with_what"), [("server.key", "client.key"), ("ca.pem", "names")])
def test_files_that_cannot_be_used_change_nothing(
    certificates: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    wrong: str,
    with_what: str,
) -> None:
    monkeypatch.setattr(watched_files, "LOOK_S", 0.05)
    for name in ("server.pem", "server.key", "ca.pem"):
        put(certificates / name, tmp_path / name)

    async def main() -> None:
        async with serve(FakeService(), tls_settings(tmp_path, mutual=True)) as server:
            put(certificates / with_what, tmp_path / wrong)
            await until(lambda: "invalid TLS files" in caplog.text)
            for _ in range(3):
                trusts = trusting(certificates, "ca", "client")
                assert await shown(server.port, trusts) == der(certificates / "server.pem")
                async with channel_of(certificates, server.port, "ca", "client") as channel:
                    await call(channel)
                await asyncio.sleep(0.05)

    asyncio.run(main())
    assert len([line for line in caplog.messages if "invalid TLS files" in line]) == 1


def test_unusable_settings_are_said(certificates: Path, tmp_path: Path) -> None:
    missing = GrpcSettings(port=0, tls_certificate=tmp_path / "none.pem", tls_key=certificates / "server.key")
    broken = GrpcSettings(port=0, tls_certificate=certificates / "names", tls_key=certificates / "server.key")
    for settings in (missing, broken, GrpcSettings(host="256.0.0.1", port=0)):
        with pytest.raises(InvalidRequestError):
            asyncio.run(start_server(FakeService, settings, LimitSettings()))


def test_two_servers_share_a_port() -> None:
    async def main() -> None:
        async with serve(FakeService()) as first, serve(FakeService(), GrpcSettings(port=first.port)) as second:
            assert first.port == second.port

    asyncio.run(main())


def test_health_is_the_readiness() -> None:
    service = FakeService(ready=False)
    known = health_pb2.HealthCheckResponse

    async def main() -> None:
        async with serve(service) as server, channel_to(server) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            for name in ("", SERVICE, "demo"):
                answer = await stub.Check(health_pb2.HealthCheckRequest(service=name))
                assert answer.status == known.NOT_SERVING
            with pytest.raises(grpc.aio.AioRpcError):
                await stub.Check(health_pb2.HealthCheckRequest(service="no such model"))
            watch = stub.Watch(health_pb2.HealthCheckRequest(service=SERVICE))
            assert (await watch.read()).status == known.NOT_SERVING
            service.ready = True
            assert (await asyncio.wait_for(watch.read(), 5)).status == known.SERVING
            answer = await stub.Check(health_pb2.HealthCheckRequest(service="demo"))
            assert answer.status == known.SERVING
            service.ready = False
            assert (await asyncio.wait_for(watch.read(), 5)).status == known.NOT_SERVING
            service.ready = True
            assert (await asyncio.wait_for(watch.read(), 5)).status == known.SERVING
            stopping = asyncio.create_task(server.stop(1))
            assert (await asyncio.wait_for(watch.read(), 5)).status == known.NOT_SERVING
            watch.cancel()
            await stopping

    asyncio.run(main())


def test_reflection_knows_the_service() -> None:
    async def main() -> None:
        async with serve(FakeService()) as server, channel_to(server) as channel:
            stub = reflection_pb2_grpc.ServerReflectionStub(channel)
            asked = [
                reflection_pb2.ServerReflectionRequest(list_services=""),
                reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE),
            ]
            listed, described = [answer async for answer in stub.ServerReflectionInfo(iter(asked))]
            names = {found.name for found in listed.list_services_response.service}
            assert names == {SERVICE, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
            assert pb.DESCRIPTOR.serialized_pb in described.file_descriptor_response.file_descriptor_proto

    asyncio.run(main())


def test_damaged_messages_are_answered_and_leave_nothing_behind() -> None:
    service = FakeService(limits=LimitSettings(max_duration_s=2.0))
    rng = random.Random(5)
    melody = b"RIFF\x24\x00\x00\x00WAVEfmt \x10\x00\x00\x00" + bytes(40)
    good = pb.StreamGenerateRequest(
        spec=spec(melody=melody, sampling=pb.SamplingOptions(temperature=1.0, top_k=5)),
        request_id="a",
        idempotency_key="k",
    ).SerializeToString()
    codes: dict[grpc.StatusCode, int] = {}

    async def main() -> None:
        async with serve(service) as server, channel_to(server) as channel:
            call = channel.unary_stream(f"/{SERVICE}/StreamGenerate")
            for _ in range(400):
                content = bytearray(good)
                for _ in range(rng.randint(1, 6)):
                    where = rng.randrange(len(content))
                    choice = rng.randrange(3)
                    if choice == 0:
                        content[where] = rng.randrange(256)
                    elif choice == 1:
                        del content[where : where + rng.randint(1, 8)]
                    else:
                        content[where:where] = rng.randbytes(rng.randint(1, 8))
                    content = content or bytearray(b"\0")
                stream = call(bytes(content))
                with contextlib.suppress(grpc.aio.AioRpcError):
                    async for _ in stream:
                        pass
                code = await stream.code()
                assert "DecodeError" not in (await stream.details() or "")
                codes[code] = codes.get(code, 0) + 1
            names = await MusicServiceStub(channel).ListModels(pb.ListModelsRequest())
            assert [model.name for model in names.models] == ["demo"]

    asyncio.run(main())
    assert service.entered == service.left
    assert codes.get(grpc.StatusCode.INVALID_ARGUMENT, 0) > 100, codes
    assert set(codes) <= {grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND}
