"""Each error as a status with details; nothing internal in any; no message before a failure."""

from __future__ import annotations

import asyncio

import grpc
import grpc.aio
import pytest
from musicgen_serving.errors import (
    ConflictError,
    DeadlineExceededError,
    NotFoundError,
    NotOfferedError,
    ReplicaLostError,
    SupersededError,
    TooLargeError,
    UnauthenticatedError,
)
from musicgen_serving.grpc_api.errors import to_status
from musicgen_serving.proto.musicgen.v1 import music_service_pb2 as pb
from musicgen_serving.settings import LimitSettings
from serving.fake_service import FakeService
from serving.grpc_api.harness import connected, details, spec

from musicgen.errors import (
    DeadlineTooShortError,
    EngineDeadError,
    InvalidRequestError,
    OverloadedError,
    QuotaExceededError,
    RequestCancelledError,
    WeightsError,
)

ERRORS = [
    (InvalidRequestError("an integer", "'x'", param="top_k"), "INVALID_ARGUMENT", "INVALID_REQUEST"),
    (TooLargeError("expected less, got more"), "INVALID_ARGUMENT", "TOO_LARGE"),
    (NotOfferedError("stems: not here"), "FAILED_PRECONDITION", "NOT_AVAILABLE_HERE"),
    (UnauthenticatedError("expected a key"), "UNAUTHENTICATED", "INVALID_API_KEY"),
    (NotFoundError("expected a served model"), "NOT_FOUND", "NOT_FOUND"),
    (ConflictError("expected a new id"), "ALREADY_EXISTS", "CONFLICT"),
    (QuotaExceededError("used up", retry_after_s=12.5), "RESOURCE_EXHAUSTED", "RATE_LIMIT_EXCEEDED"),
    (RequestCancelledError("cancelled by its caller"), "CANCELLED", "CANCELLED"),
    (SupersededError("a retry took over"), "CANCELLED", "SUPERSEDED"),
    (DeadlineExceededError("too late"), "DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED"),
    (DeadlineTooShortError("never by then"), "DEADLINE_EXCEEDED", "DEADLINE_TOO_SHORT"),
    (OverloadedError("later, please", retry_after_s=3.0), "UNAVAILABLE", "OVERLOADED"),
    (ReplicaLostError("gone"), "UNAVAILABLE", "TEMPORARILY_UNAVAILABLE"),
    (EngineDeadError("secret /srv/place"), "UNAVAILABLE", "TEMPORARILY_UNAVAILABLE"),
    (WeightsError("secret /srv/place"), "INTERNAL", "INTERNAL_ERROR"),
    (KeyError("secret /srv/place"), "INTERNAL", "INTERNAL_ERROR"),
]
IDS = [type(error).__name__ for error, _, _ in ERRORS]


def check(failure: grpc.aio.AioRpcError, error: BaseException, code: str, reason: str) -> None:
    """Is `failure` what `error` must look like outside?"""
    assert failure.code().name == code
    found = details(failure)
    info = found.pop("ErrorInfo")
    assert (info.domain, info.reason) == ("musicgen", reason)
    assert info.metadata["request_id"] == "mine"
    assert failure.trailing_metadata()["x-request-id"] == "mine"
    assert "secret" not in repr(failure)
    if isinstance(error, InvalidRequestError):
        (violation,) = found.pop("BadRequest").field_violations
        assert (violation.field, violation.description) == ("spec.sampling.top_k", str(error))
    if isinstance(error, QuotaExceededError):
        assert found.pop("QuotaFailure").violations[0].description == "used up"
    if isinstance(error, QuotaExceededError | OverloadedError):
        assert found.pop("RetryInfo").retry_delay.ToNanoseconds() == error.retry_after_s * 1e9
    assert not found


@pytest.mark.parametrize(("error", "code", "reason"), ERRORS, ids=IDS)
def test_a_refusal_is_a_status(error: BaseException, code: str, reason: str) -> None:
    service = FakeService(refusal=error)

    async def main() -> None:
        async with connected(service) as stub:
            with pytest.raises(grpc.aio.AioRpcError) as failure:
                await stub.Generate(pb.GenerateRequest(spec=spec(), request_id="mine"))
            check(failure.value, error, code, reason)
            call = stub.StreamGenerate(pb.StreamGenerateRequest(spec=spec(), request_id="mine"))
            with pytest.raises(grpc.aio.AioRpcError) as failure:
                await call.read()
            check(failure.value, error, code, reason)

    asyncio.run(main())
    assert service.left == service.entered == 2


@pytest.mark.parametrize("num_chunks", [0, 2])
def test_a_failure_after_the_start_is_a_status_without_finished(num_chunks: int) -> None:
    error = QuotaExceededError("used up", retry_after_s=12.5)
    service = FakeService(failure=error, num_chunks_before_failure=num_chunks)
    kinds = []

    async def main() -> None:
        async with connected(service) as stub:
            call = stub.StreamGenerate(pb.StreamGenerateRequest(spec=spec(), request_id="mine"))

            async def read_all() -> None:
                async for message in call:
                    kinds.append(message.WhichOneof("event"))

            with pytest.raises(grpc.aio.AioRpcError) as failure:
                await read_all()
            check(failure.value, error, "RESOURCE_EXHAUSTED", "RATE_LIMIT_EXCEEDED")
            assert ("x-request-id" in (await call.initial_metadata())) == (num_chunks > 0)

    asyncio.run(main())
    assert kinds == ([] if num_chunks == 0 else ["started", "audio", "audio"])
    assert service.left == 1


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"duration_s": 0.0}, "duration_s"),
        ({"duration_s": float("nan")}, "duration_s"),
        ({"duration_s": 121.0}, "duration_s"),
        ({"num_samples": 9}, "num_samples"),
        ({"prompts": ["x"] * 9}, "prompts"),
        ({"num_samples": 0}, "num_samples"),
        ({"prompts": ["x" * 2001]}, "prompts"),
        ({"seed": -1}, "seed"),
        ({"first_sample": -1}, "first_sample"),
        ({"first_sample": 32000}, "first_sample"),
        ({"extend_stride_s": 0.0}, "extend_stride_s"),
        ({"sampling": pb.SamplingOptions(top_k=-1)}, "sampling.top_k"),
        ({"sampling": pb.SamplingOptions(top_p=1.5)}, "sampling.top_p"),
        ({"sampling": pb.SamplingOptions(temperature=-1)}, "sampling.temperature"),
        ({"sampling": pb.SamplingOptions(guidance_scale=float("inf"))}, "sampling.guidance_scale"),
        ({"sampling": pb.SamplingOptions(melody_guidance=3)}, "sampling.melody_guidance"),
        ({"stems": True}, "stems"),
        ({"melody": b"no audio"}, "melody"),
        ({"melody": b""}, "melody"),
        ({"prompt_audio": b"RIFF1234WAVEjunk"}, "prompt_audio"),
    ],
    ids=str,
)
def test_bad_fields_are_named(fields: dict[str, object], param: str) -> None:
    service = FakeService()

    async def main() -> None:
        async with connected(service) as stub:
            for call in (
                stub.Generate(pb.GenerateRequest(spec=spec(**fields))),
                stub.StreamGenerate(pb.StreamGenerateRequest(spec=spec(**fields))).read(),
            ):
                with pytest.raises(grpc.aio.AioRpcError) as failure:
                    await call
                assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT
                assert details(failure.value)["BadRequest"].field_violations[0].field == f"spec.{param}"

    asyncio.run(main())
    assert service.num_given == 0
    assert service.entered == service.left
    assert service.refused == ([("invalid_request", "default")] * 2 if service.entered == 0 else []) or (
        param == "prompts" and service.refused == [("too_large", "default")] * 2
    )


def test_an_unknown_model_is_a_bad_field() -> None:
    async def main() -> None:
        async with connected(FakeService()) as stub:
            with pytest.raises(grpc.aio.AioRpcError) as failure:
                await stub.Generate(pb.GenerateRequest(spec=spec(model="nobody")))
            assert failure.value.code() is grpc.StatusCode.NOT_FOUND
            assert details(failure.value)["BadRequest"].field_violations[0].field == "spec.model"

    asyncio.run(main())


def test_the_range_of_a_seed_is_written_out() -> None:
    async def main() -> None:
        async with connected(FakeService()) as stub:
            with pytest.raises(grpc.aio.AioRpcError) as failure:
                await stub.Generate(pb.GenerateRequest(spec=spec(seed=-1)))
            assert failure.value.details() == "seed: expected 0 to 9223372036854775807, got -1"

    asyncio.run(main())


@pytest.mark.parametrize("audio_format", [pb.AUDIO_FORMAT_WAV, 77])
def test_formats_a_stream_cannot_have(audio_format: int) -> None:
    async def main() -> None:
        async with connected(FakeService()) as stub:
            request = pb.StreamGenerateRequest(spec=spec(), audio_format=audio_format)
            with pytest.raises(grpc.aio.AioRpcError) as failure:
                await stub.StreamGenerate(request).read()
            assert details(failure.value)["BadRequest"].field_violations[0].field == "audio_format"

    asyncio.run(main())


@pytest.mark.parametrize("request_id", ["x" * 200, "white space", "line\nbreak", "ünï"])
def test_a_bad_request_id_is_refused_and_not_echoed(request_id: str) -> None:
    async def main() -> None:
        async with connected(FakeService()) as stub:
            with pytest.raises(grpc.aio.AioRpcError) as failure:
                await stub.Generate(pb.GenerateRequest(spec=spec(), request_id=request_id))
            assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert details(failure.value)["BadRequest"].field_violations[0].field == "request_id"
            assert failure.value.trailing_metadata()["x-request-id"] != request_id

    asyncio.run(main())


def test_a_service_that_is_not_there_yet() -> None:
    async def main() -> None:
        def get_service() -> FakeService:
            raise OverloadedError("the service starts", retry_after_s=1.0)

        from musicgen_serving.grpc_api.server import start_server
        from musicgen_serving.proto.musicgen.v1.music_service_pb2_grpc import MusicServiceStub
        from musicgen_serving.settings import GrpcSettings
        from serving.grpc_api.harness import channel_to

        server = await start_server(get_service, GrpcSettings(port=0), LimitSettings())
        async with channel_to(server) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as failure:
                await MusicServiceStub(channel).ListModels(pb.ListModelsRequest())
            assert failure.value.code() is grpc.StatusCode.UNAVAILABLE
        await server.stop(0)

    asyncio.run(main())


def test_a_message_above_the_limit_is_refused_unread() -> None:
    service = FakeService(limits=LimitSettings(max_file_bytes=1000, max_pieces=1, max_prompt_chars=10))

    async def main() -> None:
        async with connected(service) as stub:
            with pytest.raises(grpc.aio.AioRpcError) as failure:
                await stub.Generate(pb.GenerateRequest(spec=spec(melody=b"x" * 80_000)))
            assert failure.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            with pytest.raises(grpc.aio.AioRpcError) as failure:
                await stub.Generate(pb.GenerateRequest(spec=spec(prompts=["short"], melody=b"x" * 1001)))
            assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert details(failure.value)["ErrorInfo"].reason == "TOO_LARGE"

    asyncio.run(main())
    assert service.entered == 0


def test_a_long_message_fits_into_metadata() -> None:
    error = InvalidRequestError("words", "鍵" * 5000, param="prompt")
    status = to_status(error, "mine")
    assert len(status.message.encode()) <= 600
    assert len(status.SerializeToString()) < 2500

    async def main() -> None:
        async with connected(FakeService(refusal=error)) as stub:
            with pytest.raises(grpc.aio.AioRpcError) as failure:
                await stub.Generate(pb.GenerateRequest(spec=spec()))
            assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT

    asyncio.run(main())
