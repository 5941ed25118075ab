"""What the calls answer: audio, reports, statuses of requests, models; and that a stream is the same as one answer."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io

import grpc
import grpc.aio
import numpy as np
import pytest
import soundfile
from musicgen_serving.audio_formats import levelled
from musicgen_serving.proto.musicgen.v1 import music_service_pb2 as pb
from serving.fake_service import API_KEY, FakeService, tone
from serving.grpc_api.harness import connected, spec

from musicgen.types import ChunkPolicy


def samples_of(audio: bytes, channels: int = 1) -> np.ndarray:
    return np.frombuffer(audio, "<f4").reshape(-1, channels).T


async def stream_of(stub, request: pb.StreamGenerateRequest) -> list[pb.StreamGenerateResponse]:
    return [message async for message in stub.StreamGenerate(request)]


@pytest.mark.parametrize("channels", [1, 2])
def test_stream_equals_one_answer_equals_what_was_made(channels: int) -> None:
    async def main() -> None:
        async with connected(FakeService(channels=channels)) as stub:
            wanted = spec(prompts=["happy rock", "sad jazz"], num_samples=2)
            answer = await stub.Generate(pb.GenerateRequest(spec=wanted))
            messages = await stream_of(stub, pb.StreamGenerateRequest(spec=wanted))
        assert messages[0].WhichOneof("event") == "started"
        assert messages[-1].WhichOneof("event") == "finished"
        started, finished = messages[0].started, messages[-1].finished
        assert list(started.seeds) == [7, 8, 9, 10]
        assert (started.sample_rate, started.channels, started.num_samples) == (32000, channels, 32000)
        assert finished.state == pb.GENERATION_STATE_FINISHED
        assert finished.billed_s == answer.billed_s == 4.0
        for piece in range(4):
            chunks = [m.audio for m in messages[1:-1] if m.audio.piece == piece]
            assert len(chunks) == 4
            streamed = b"".join(chunk.audio for chunk in chunks)
            offsets = np.cumsum([0, *(len(chunk.audio) // 4 // channels for chunk in chunks)])
            assert [chunk.sample_offset for chunk in chunks] == list(offsets[:-1])
            assert streamed == answer.pieces[piece].audio
            np.testing.assert_array_equal(samples_of(streamed, channels), tone(7 + piece, 32000, channels).numpy())
            for report in (finished.pieces[piece], answer.pieces[piece].report):
                assert report.checksum == hashlib.sha256(streamed).hexdigest()
                assert (report.seed, report.num_samples, report.num_frames) == (7 + piece, 32000, 50)
                assert (report.queue_s, report.prefill_s, report.decode_s, report.num_failovers) == (0.1, 0.2, 0.3, 1)

    asyncio.run(main())


def test_a_stream_goes_on_from_a_sample() -> None:
    async def main() -> None:
        async with connected(FakeService()) as stub:
            messages = await stream_of(stub, pb.StreamGenerateRequest(spec=spec(first_sample=20001)))
        rest = b"".join(m.audio.audio for m in messages)
        assert messages[1].audio.sample_offset == 20001
        np.testing.assert_array_equal(samples_of(rest), tone(7, 32000)[:, 20001:].numpy())
        assert messages[-1].finished.pieces[0].num_samples == 32000 - 20001

    asyncio.run(main())


def test_pcm_has_16_bits_of_the_same_samples() -> None:
    async def main() -> tuple[bytes, bytes, bytes]:
        async with connected(FakeService()) as stub:
            pcm = pb.AUDIO_FORMAT_PCM16LE
            wav = await stub.Generate(pb.GenerateRequest(spec=spec(), audio_format=pb.AUDIO_FORMAT_WAV))
            answer = await stub.Generate(pb.GenerateRequest(spec=spec(), audio_format=pcm))
            messages = await stream_of(stub, pb.StreamGenerateRequest(spec=spec(), audio_format=pcm))
            return answer.pieces[0].audio, b"".join(m.audio.audio for m in messages), wav.pieces[0].audio

    whole, streamed, wav = asyncio.run(main())
    assert whole == streamed
    in_file, _ = soundfile.read(io.BytesIO(wav), dtype="int16")
    np.testing.assert_array_equal(np.frombuffer(whole, "<i2"), in_file)
    np.testing.assert_allclose(in_file / 32768, tone(7, 32000)[0].numpy(), atol=1 / 32768)


@pytest.mark.parametrize("name", ["WAV", "FLAC", "MP3", "OGG", "OPUS"])
def test_files(name: str) -> None:
    async def main() -> bytes:
        async with connected(FakeService()) as stub:
            audio_format = pb.AudioFormat.Value(f"AUDIO_FORMAT_{name}")
            answer = await stub.Generate(pb.GenerateRequest(spec=spec(), audio_format=audio_format))
            return answer.pieces[0].audio

    with soundfile.SoundFile(io.BytesIO(asyncio.run(main()))) as file:
        assert file.format == {"OPUS": "OGG"}.get(name, name)
        assert "Machine-made" in file.comment
        assert file.frames / file.samplerate == pytest.approx(1.0, abs=0.1)
        samples = file.read(dtype="float32")
    if name in ("WAV", "FLAC"):
        np.testing.assert_allclose(samples, tone(7, 32000)[0].numpy(), atol=1 / 32768)


def test_all_fields_reach_the_service() -> None:
    service = FakeService()
    recording = io.BytesIO()
    soundfile.write(recording, np.zeros(3200, np.float32), 32000, format="WAV")
    content = recording.getvalue()
    sampling = pb.SamplingOptions(
        temperature=0.5, top_k=0, top_p=0.9, greedy=True, guidance_scale=2.0, melody_guidance=4.0
    )
    wanted = spec(
        prompts=["", "words"], num_samples=2, melody=content, prompt_audio=content, stems=True, duration_s=2.0,
        sampling=sampling, extend_stride_s=9.0, first_sample=5,
    )  # fmt: skip
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"

    async def main() -> None:
        async with connected(service) as stub:
            request = pb.StreamGenerateRequest(spec=wanted, request_id="mine-1", idempotency_key="once")
            async for _ in stub.StreamGenerate(request, timeout=30, metadata=(("traceparent", trace),)):
                pass
            await stub.Generate(pb.GenerateRequest(spec=pb.GenerationSpec()), metadata=(("x-request-id", "mine-2"),))

    asyncio.run(main())
    full, empty = service.requests
    assert (full.request_id, full.model, full.duration_s, full.idempotency_key) == ("mine-1", "demo", 2.0, "once")
    assert [(piece.prompt, piece.seed) for piece in full.pieces] == [(None, 7), (None, 8), ("words", 9), ("words", 10)]
    assert full.melody == full.prompt_audio == content
    assert full.stems
    assert full.first_sample == 5
    assert full.extend_stride_s == 9.0
    assert full.sampling.greedy
    assert (full.sampling.temperature, full.sampling.top_k, full.sampling.top_p) == (0.5, 0, 0.9)
    assert (full.sampling.guidance_scale, full.sampling.melody_guidance) == (2.0, 4.0)
    assert full.chunks == ChunkPolicy()
    assert full.deadline_s is not None
    assert 25 < full.deadline_s <= 30
    assert full.trace_parent == trace
    assert len(full.fingerprint) == 64
    assert (empty.request_id, empty.model, empty.duration_s, empty.chunks) == ("mine-2", "demo", 10.0, None)
    assert [piece.prompt for piece in empty.pieces] == [None]
    assert (empty.sampling.top_k, empty.sampling.temperature, empty.sampling.guidance_scale) == (250, 1.0, 3.0)
    assert (empty.melody, empty.deadline_s, empty.trace_parent, empty.fingerprint) == (None, None, None, "")


def test_request_id_comes_back_in_the_initial_metadata() -> None:
    async def main() -> None:
        async with connected(FakeService()) as stub:
            call = stub.StreamGenerate(pb.StreamGenerateRequest(spec=spec(), request_id="mine"))
            assert (await call.initial_metadata())["x-request-id"] == "mine"
            first = await call.read()
            assert first.started.request_id == "mine"
            call = stub.Generate(pb.GenerateRequest(spec=spec()))
            chosen = (await call.initial_metadata())["x-request-id"]
            assert (await call).started.request_id == chosen
            assert len(chosen) == 32

    asyncio.run(main())


def test_status_cancel_and_models() -> None:
    service = FakeService()

    async def main() -> None:
        async with connected(service) as stub:
            await stub.Generate(pb.GenerateRequest(spec=spec(), request_id="mine"))
            status = (await stub.GetGeneration(pb.GetGenerationRequest(request_id="mine"))).status
            assert status == pb.GenerationStatus(
                request_id="mine", model="demo", state=pb.GENERATION_STATE_RUNNING, audio_s=1.0, done_s=0.5, age_s=2.0
            )
            status = (await stub.CancelGeneration(pb.CancelGenerationRequest(request_id="mine"))).status
            assert status.state == pb.GENERATION_STATE_CANCELLED
            assert status.error
            models = (await stub.ListModels(pb.ListModelsRequest())).models
            assert [(m.name, m.license, m.sample_rate, m.melody, m.window_s) for m in models] == [
                ("demo", "MIT", 32000, True, 30.0)
            ]

    asyncio.run(main())
    assert service.cancelled == ["mine"]


@pytest.mark.parametrize(
    ("metadata", "known"),
    [
        ((("authorization", f"Bearer {API_KEY}"),), True),
        ((("authorization", f"bearer {API_KEY}"),), True),
        ((("x-api-key", API_KEY),), True),
        ((), False),
        ((("authorization", f"Basic {API_KEY}"),), False),
        ((("x-api-key", API_KEY + "x"),), False),
    ],
)
def test_keys(metadata: tuple[tuple[str, str], ...], known: bool) -> None:
    service = FakeService(keys=(API_KEY,))

    async def call_all() -> list[grpc.StatusCode]:
        async with connected(service) as stub:
            stream = stub.StreamGenerate(pb.StreamGenerateRequest(spec=spec()), metadata=metadata)
            with contextlib.suppress(grpc.aio.AioRpcError):
                async for _ in stream:
                    pass
            calls = (
                stub.Generate(pb.GenerateRequest(spec=spec()), metadata=metadata),
                stream,
                stub.ListModels(pb.ListModelsRequest(), metadata=metadata),
                stub.GetGeneration(pb.GetGenerationRequest(request_id="none"), metadata=metadata),
                stub.CancelGeneration(pb.CancelGenerationRequest(request_id="none"), metadata=metadata),
            )
            return [await call.code() for call in calls]

    ok, none = grpc.StatusCode.OK, grpc.StatusCode.NOT_FOUND
    assert asyncio.run(call_all()) == ([ok, ok, ok, none, none] if known else [grpc.StatusCode.UNAUTHENTICATED] * 5)
    assert service.entered == (2 if known else 0)


def test_files_say_under_what_licence_the_weights_are() -> None:
    async def main() -> None:
        async with connected(FakeService()) as stub:
            request = pb.GenerateRequest(spec=spec(model=""), audio_format=pb.AUDIO_FORMAT_FLAC)
            answer = await stub.Generate(request)
        with soundfile.SoundFile(io.BytesIO(answer.pieces[0].audio)) as file:
            assert "licence of the weights: MIT" in file.comment

    asyncio.run(main())


def test_a_loudness_is_that_of_http() -> None:
    async def main() -> None:
        async with connected(FakeService()) as stub:
            request = pb.GenerateRequest(spec=spec(loudness=-20.0))
            (piece,) = (await stub.Generate(request)).pieces
            wanted = levelled(tone(7, 32000), 32000, -20.0)
            np.testing.assert_array_equal(samples_of(piece.audio), wanted.numpy())
            assert piece.report.checksum != hashlib.sha256(piece.audio).hexdigest(), "that of the samples as made"
            for part in (
                stub.StreamGenerate(pb.StreamGenerateRequest(spec=spec(loudness=-20.0))).read(),
                stub.Generate(pb.GenerateRequest(spec=spec(loudness=-20.0, first_sample=5))),
                stub.Generate(pb.GenerateRequest(spec=spec(loudness=1.0))),
            ):
                with pytest.raises(grpc.aio.AioRpcError) as failure:
                    await part
                assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT
                assert "loudness" in str(failure.value.details())

    asyncio.run(main())
