"""A real server of the gRPC edge on a free port, with a fake service behind it, and a stub to call it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import grpc.aio
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from musicgen_serving.grpc_api.errors import DETAILS_KEY
from musicgen_serving.grpc_api.server import GrpcServer, start_server
from musicgen_serving.proto.musicgen.v1 import music_service_pb2 as pb
from musicgen_serving.proto.musicgen.v1.music_service_pb2_grpc import MusicServiceStub
from musicgen_serving.settings import GrpcSettings
from serving.fake_service import FakeService


@asynccontextmanager
async def serve(service: FakeService, settings: GrpcSettings | None = None) -> AsyncIterator[GrpcServer]:
    server = await start_server(lambda: service, settings or GrpcSettings(port=0), service.limits)
    try:
        yield server
    finally:
        await server.stop(0)


@asynccontextmanager
async def connected(service: FakeService, *options: tuple[str, int]) -> AsyncIterator[MusicServiceStub]:
    async with serve(service) as server, channel_to(server, *options) as channel:
        yield MusicServiceStub(channel)


def channel_to(server: GrpcServer, *options: tuple[str, int]) -> grpc.aio.Channel:
    limits = [("grpc.max_receive_message_length", -1), ("grpc.use_local_subchannel_pool", 1), *options]
    return grpc.aio.insecure_channel(f"127.0.0.1:{server.port}", options=limits)


def spec(**fields: object) -> pb.GenerationSpec:
    return pb.GenerationSpec(**{"model": "demo", "prompts": ["happy rock"], "duration_s": 1.0, "seed": 7, **fields})


async def until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    """Wait until it holds."""

    async def poll() -> None:
        while not condition():
            await asyncio.sleep(0.005)

    await asyncio.wait_for(poll(), timeout_s)


def details(error: grpc.aio.AioRpcError) -> dict[str, Message]:
    """The google.rpc details of a status, by the name of their message."""
    trailing = error.trailing_metadata()
    assert trailing is not None
    status = status_pb2.Status.FromString(trailing[DETAILS_KEY])
    assert status.code == error.code().value[0]
    assert status.message == error.details()
    found = {}
    for detail in status.details:
        name = detail.TypeName().rpartition(".")[2]
        message = getattr(error_details_pb2, name)()
        assert detail.Unpack(message)
        found[name] = message
    return found
