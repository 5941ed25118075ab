"""A call whose caller leaves, whose deadline passes or reader stalls leaves the service's context once, soon."""

from __future__ import annotations

import asyncio
import time

import grpc
import grpc.aio
import pytest
from musicgen_serving.proto.musicgen.v1 import music_service_pb2 as pb
from musicgen_serving.proto.musicgen.v1.music_service_pb2_grpc import MusicServiceStub
from musicgen_serving.settings import LimitSettings
from serving.fake_service import FakeService
from serving.grpc_api.harness import channel_to, connected, serve, spec, until

PHASES = {
    "queued": FakeService(start_delay_s=60),
    "before_the_first_audio": FakeService(audio_delay_s=60),
    "between_chunks": FakeService(chunk_delay_s=60),
}
LONG = 60.0


def fresh(phase: str) -> FakeService:
    service = PHASES[phase]
    return FakeService(
        start_delay_s=service.start_delay_s, audio_delay_s=service.audio_delay_s, chunk_delay_s=service.chunk_delay_s
    )


async def reached(service: FakeService, phase: str) -> None:
    """Wait until the request is where the phase wants it."""
    await until(lambda: service.entered == 1 and service.num_given == (phase == "between_chunks"))
    await asyncio.sleep(0.05)
    assert service.left == 0


@pytest.mark.parametrize("rpc", ["Generate", "StreamGenerate"])
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("how", ["cancel", "deadline", "disconnect"])
def test_the_context_is_left_once(phase: str, rpc: str, how: str) -> None:
    service = fresh(phase)

    async def main() -> None:
        async with serve(service) as server:
            channel = channel_to(server)
            stub = MusicServiceStub(channel)
            timeout_s = 0.4 if how == "deadline" else 30.0
            request = getattr(pb, f"{rpc}Request")(spec=spec(duration_s=LONG))
            call = getattr(stub, rpc)(request, timeout=timeout_s)
            await reached(service, phase)
            if how == "cancel":
                call.cancel()
            elif how == "disconnect":
                await channel.close()
            await until(lambda: service.left == 1)
            if how == "deadline" and rpc == "Generate":
                assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            await channel.close()
            await asyncio.sleep(0.05)

    asyncio.run(main())
    assert service.entered == service.left == 1
    assert service.left_by == ["CancelledError"]


def test_a_caller_that_leaves_while_a_message_is_on_its_way() -> None:
    """Many times, at random-like moments of a stream that never waits: no context stays entered."""
    service = FakeService(chunk_s=0.02, chunk_delay_s=0.001)

    async def main() -> None:
        async with connected(service) as stub:
            for round_number in range(40):
                call = stub.StreamGenerate(pb.StreamGenerateRequest(spec=spec(duration_s=LONG)))
                for _ in range(round_number % 5):
                    await call.read()
                await asyncio.sleep(0.001 * (round_number % 7))
                call.cancel()
            await until(lambda: service.left == service.entered)

    asyncio.run(main())
    assert service.entered > 20


def test_the_deadline_reaches_the_service() -> None:
    service = FakeService()

    async def main() -> None:
        async with connected(service) as stub:
            await stub.Generate(pb.GenerateRequest(spec=spec()), timeout=12)

    asyncio.run(main())
    deadline_s = service.requests[0].deadline_s
    assert deadline_s is not None
    assert 10 < deadline_s < 12.5  # grpc rounds a deadline up on its way


def test_a_reader_that_takes_nothing_is_cut_off() -> None:
    service = FakeService(limits=LimitSettings(reader_stall_s=0.5), chunk_s=1.0)

    async def main() -> float:
        async with serve(service) as server:
            window = ("grpc.http2.lookahead_bytes", 65536), ("grpc.http2.bdp_probe", 0)
            async with channel_to(server, *window) as channel:
                call = MusicServiceStub(channel).StreamGenerate(
                    pb.StreamGenerateRequest(spec=spec(duration_s=LONG, num_samples=8))
                )
                await call.read()
                start = time.monotonic()
                await until(lambda: service.left == 1)
                return time.monotonic() - start

    assert 0.3 < asyncio.run(main()) < 3
    assert service.left_by == ["RequestCancelledError"]
    assert service.num_given < 100  # of 480: the service was not run ahead of the reader


def test_a_slow_reader_is_not_cut_off() -> None:
    service = FakeService(limits=LimitSettings(reader_stall_s=0.5), chunk_s=0.25)

    async def main() -> int:
        async with connected(service, ("grpc.http2.lookahead_bytes", 65536), ("grpc.http2.bdp_probe", 0)) as stub:
            call = stub.StreamGenerate(pb.StreamGenerateRequest(spec=spec(duration_s=5.0)))
            num_messages = 0
            async for _ in call:
                num_messages += 1
                await asyncio.sleep(0.1)
            return num_messages

    assert asyncio.run(main()) == 22


def test_stop_lets_calls_end_and_takes_no_more() -> None:
    service = FakeService(chunk_delay_s=0.1)

    async def main() -> None:
        async with serve(service) as server, channel_to(server) as channel:
            stub = MusicServiceStub(channel)
            call = stub.StreamGenerate(pb.StreamGenerateRequest(spec=spec()))
            await call.read()
            stopping = asyncio.create_task(server.stop(10))
            await asyncio.sleep(0.05)
            kinds = []
            while (message := await call.read()) is not grpc.aio.EOF:
                kinds.append(message.WhichOneof("event"))
            assert kinds == ["audio"] * 4 + ["finished"]
            await asyncio.wait_for(stopping, 5)
            with pytest.raises(grpc.aio.AioRpcError) as failure:
                await stub.ListModels(pb.ListModelsRequest())
            assert failure.value.code() is grpc.StatusCode.UNAVAILABLE

    asyncio.run(main())
    assert service.left_by == ["end"]


def test_stop_cancels_what_outlasts_the_grace() -> None:
    service = FakeService(start_delay_s=60)

    async def main() -> None:
        async with serve(service) as server, channel_to(server) as channel:
            call = MusicServiceStub(channel).Generate(pb.GenerateRequest(spec=spec()))
            await until(lambda: service.entered == 1)
            await asyncio.wait_for(server.stop(0.2), 5)
            assert await call.code() is not grpc.StatusCode.OK

    asyncio.run(main())
    assert service.left == 1
