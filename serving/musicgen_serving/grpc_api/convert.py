"""Service events and values → proto messages, and samples → bytes.

Owns the response fields; `requests` owns those of requests. Independent of RPC handling.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from musicgen.audio_encode import changed_sampling, generation_metadata
from musicgen.errors import InvalidRequestError
from musicgen.types import FinishReason, SamplingParams
from musicgen_serving.audio_formats import encode_raw, encode_whole, levelled
from musicgen_serving.proto.musicgen.v1 import music_service_pb2 as pb
from musicgen_serving.types import GenerationEnd, GenerationStatus, ModelInfo, PieceAudio, PieceReport, Started

MAX_CHUNK_SAMPLES = 2**17
"""Maximum samples, over all channels, in one message: 512 KiB, well below the 4 MiB default limit of clients."""
_RAW_FORMATS = {pb.AUDIO_FORMAT_F32LE: "f32", pb.AUDIO_FORMAT_PCM16LE: "pcm16"}
_FORMATS = {
    **_RAW_FORMATS,
    pb.AUDIO_FORMAT_WAV: "wav",
    pb.AUDIO_FORMAT_FLAC: "flac",
    pb.AUDIO_FORMAT_MP3: "mp3",
    pb.AUDIO_FORMAT_OGG: "ogg",
    pb.AUDIO_FORMAT_OPUS: "opus",
}
"""Format names used by the encoders."""
_STATES = {
    "running": pb.GENERATION_STATE_RUNNING,
    FinishReason.FINISHED.value: pb.GENERATION_STATE_FINISHED,
    FinishReason.CANCELLED.value: pb.GENERATION_STATE_CANCELLED,
    FinishReason.FAILED.value: pb.GENERATION_STATE_FAILED,
}


def checked_format(audio_format: pb.AudioFormat, *, stream: bool) -> pb.AudioFormat:
    """The format; F32LE if unspecified.

    Raises:
        InvalidRequestError: an unknown format, or a file format for a stream.
    """
    if audio_format == pb.AUDIO_FORMAT_UNSPECIFIED:
        return pb.AUDIO_FORMAT_F32LE
    known = _RAW_FORMATS if stream else _FORMATS
    if audio_format not in known:
        names = ", ".join(pb.AudioFormat.Name(value) for value in known)
        got = pb.AudioFormat.Name(audio_format) if audio_format in pb.AudioFormat.values() else str(int(audio_format))
        raise InvalidRequestError(f"one of {names}", got, param="audio_format")
    return audio_format


def file_bytes(
    audio_format: pb.AudioFormat,
    sampling: SamplingParams,
    started: Started,
    license: str,
    loudness_lufs: float | None,
    samples: Tensor,
    piece: int,
) -> bytes:
    """Encode a whole piece `[C, N]` in any format, optionally normalized in loudness. File tags mark it as
    AI-generated and name the licence of the weights. Slow for compressed formats."""
    settings = changed_sampling(sampling)
    tags = generation_metadata(started.model, started.seeds[piece], settings=settings, license=license)
    samples = levelled(samples, started.sample_rate, loudness_lufs)
    return encode_whole(samples, started.sample_rate, _FORMATS[audio_format], tags)


def from_started(started: Started) -> pb.GenerationStarted:
    return pb.GenerationStarted(
        request_id=started.request_id,
        model=started.model,
        seeds=started.seeds,
        sample_rate=started.sample_rate,
        channels=started.channels,
        num_samples=started.num_samples,
        quoted_start_s=started.quoted_start_s,
    )


def from_audio(event: PieceAudio, audio_format: pb.AudioFormat) -> Iterator[pb.AudioChunk]:
    """Split one event into messages of bounded size."""
    channels, num_samples = event.samples.shape
    step = max(1, MAX_CHUNK_SAMPLES // channels)
    for start in range(0, num_samples, step):
        yield pb.AudioChunk(
            piece=event.piece,
            sample_offset=event.sample_offset + start,
            audio=encode_raw(event.samples[:, start : start + step], _RAW_FORMATS[audio_format]),
        )


def from_report(report: PieceReport, seed: int) -> pb.PieceReport:
    return pb.PieceReport(
        seed=seed,
        num_samples=report.num_samples,
        checksum=report.checksum,
        num_frames=report.num_frames,
        queue_s=report.queue_s,
        prefill_s=report.prefill_s,
        decode_s=report.decode_s,
        num_failovers=report.num_failovers,
    )


def from_end(end: GenerationEnd, seeds: Sequence[int]) -> pb.GenerationFinished:
    return pb.GenerationFinished(
        pieces=[from_report(report, seeds[report.piece]) for report in sorted(end.pieces, key=lambda r: r.piece)],
        billed_s=end.billed_s,
        state=_STATES[end.reason.value],
    )


def from_status(status: GenerationStatus) -> pb.GenerationStatus:
    return pb.GenerationStatus(
        request_id=status.request_id,
        model=status.model,
        state=_STATES[status.state],
        audio_s=status.audio_s,
        done_s=status.done_s,
        age_s=status.age_s,
        error=status.error,
    )


def from_model(model: ModelInfo) -> pb.ModelInfo:
    return pb.ModelInfo(
        name=model.name,
        license=model.license,
        sample_rate=model.sample_rate,
        channels=model.channels,
        melody=model.melody,
        max_duration_s=model.max_duration_s,
        window_s=model.window_s,
        weights=model.weights,
    )
