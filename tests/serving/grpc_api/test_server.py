"""The port: TLS with and without certificates of clients, health, reflection, damaged messages."""

from __future__ import annotations

import asyncio
import contextlib
import random
from pathlib import Path

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from musicgen_serving.grpc_api.server import SERVICE, start_server
from musicgen_serving.proto.musicgen.v1 import music_service_pb2 as pb
from musicgen_serving.proto.musicgen.v1.music_service_pb2_grpc import MusicServiceStub
from musicgen_serving.settings import GrpcSettings, LimitSettings
from serving.certificates import make_certificates
from serving.fake_service import FakeService
from serving.grpc_api.harness import channel_to, serve, spec

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
