"""Strangers, and too much at once: refused, and what strangers send is not taken in."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import grpc.aio
import pytest
from musicgen_serving.grpc_api import broken
from musicgen_serving.proto.musicgen.v1 import music_service_pb2 as pb
from musicgen_serving.proto.musicgen.v1.music_service_pb2_grpc import MusicServiceStub
from musicgen_serving.settings import GrpcSettings, LimitSettings
from serving.fake_service import API_KEY, FakeService
from serving.grpc_api.harness import channel_to, connected, details, serve, spec, until

KEY = (("x-api-key", API_KEY),)
CHARS = 200_000


async def failure_of(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await call
    return failure.value


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each message that was taken in."""
    found: list[int] = []
    total = broken._total

    def noted(parse: Any) -> Any:
        def parsed(content: bytes) -> Any:
            found.append(len(content))
            return total(parse)(content)

        return parsed

    monkeypatch.setattr(broken, "_total", noted)
    return found


@pytest.mark.parametrize(
    "metadata", [(), (("x-api-key", "no"),), (("authorization", "Basic abc"), *KEY)], ids=["none", "wrong", "scheme"]
)
def test_what_strangers_send_is_not_taken_in(metadata: tuple[tuple[str, str], ...], taken: list[int]) -> None:
    service = FakeService(keys=(API_KEY,))

    async def main() -> None:
        async with connected(service) as stub:
            request = pb.GenerateRequest(spec=spec(melody=bytes(3_000_000)))
            failure = await failure_of(stub.Generate(request, metadata=(*metadata, ("x-request-id", "mine"))))
            assert failure.code() is grpc.StatusCode.UNAUTHENTICATED
            info: Any = details(failure)["ErrorInfo"]
            assert (info.reason, info.metadata["request_id"]) == ("INVALID_API_KEY", "mine")
            stream = stub.StreamGenerate(pb.StreamGenerateRequest(spec=spec()), metadata=metadata)
            assert (await failure_of(stream.read())).code() is grpc.StatusCode.UNAUTHENTICATED
            assert taken == []
            await stub.Generate(pb.GenerateRequest(spec=spec()), metadata=KEY)
            await stub.Generate(pb.GenerateRequest(spec=spec()), metadata=(("authorization", f"bearer {API_KEY}"),))

    asyncio.run(main())
    assert len(taken) == 2
    assert len(service.requests) == 2


def test_no_more_calls_than_the_settings_say() -> None:
    service = FakeService(start_delay_s=60)

    async def main() -> None:
        settings = GrpcSettings(port=0, max_concurrent_calls=2)
        async with serve(service, settings) as server, channel_to(server) as channel:
            stub = MusicServiceStub(channel)
            running = [asyncio.ensure_future(stub.Generate(pb.GenerateRequest(spec=spec()))) for _ in range(2)]
            await until(lambda: service.entered == 2)
            failure = await failure_of(stub.ListModels(pb.ListModelsRequest()))
            assert failure.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            for call in running:
                call.cancel()

    asyncio.run(main())


def test_large_requests_together_are_refused_with_a_time_to_retry() -> None:
    limits = LimitSettings(edge_bytes=3 * CHARS, max_prompt_chars=CHARS)
    service = FakeService(limits=limits, start_delay_s=60)

    async def main() -> None:
        async with connected(service) as stub:
            wanted = spec(prompts=["x" * CHARS], duration_s=0.01)
            running = [
                asyncio.ensure_future(stub.Generate(pb.GenerateRequest(spec=wanted))),
                asyncio.ensure_future(stub.StreamGenerate(pb.StreamGenerateRequest(spec=wanted)).read()),
            ]
            await until(lambda: service.entered == 2)
            failure = await failure_of(stub.Generate(pb.GenerateRequest(spec=wanted)))
            assert failure.code() is grpc.StatusCode.UNAVAILABLE
            retry: Any = details(failure)["RetryInfo"]
            assert retry.retry_delay.ToSeconds() >= 1
            assert service.refused == [("overloaded", "default")]
            for call in running:
                call.cancel()
            await until(lambda: service.left == 2)
            service.start_delay_s = 0.0
            await stub.Generate(pb.GenerateRequest(spec=wanted))

    asyncio.run(main())


def test_a_whole_answer_counts_too() -> None:
    service = FakeService(limits=LimitSettings(edge_bytes=2 * 32000 * 8), audio_delay_s=60)

    async def main() -> None:
        async with connected(service) as stub:
            running = asyncio.ensure_future(stub.Generate(pb.GenerateRequest(spec=spec(duration_s=1.5))))
            await until(lambda: service.entered == 1)
            await asyncio.sleep(0.05)
            failure = await failure_of(stub.Generate(pb.GenerateRequest(spec=spec(duration_s=1.0))))
            assert failure.code() is grpc.StatusCode.UNAVAILABLE
            running.cancel()

    asyncio.run(main())


@pytest.mark.parametrize("name", ["x" * 201, "x" * 100_000])
def test_a_model_has_a_name_of_bounded_length(name: str) -> None:
    async def main() -> None:
        async with connected(FakeService()) as stub:
            failure = await failure_of(stub.Generate(pb.GenerateRequest(spec=spec(model=name))))
            violations: Any = details(failure)["BadRequest"]
            assert violations.field_violations[0].field == "spec.model"

    asyncio.run(main())
