"""The client over gRPC."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

from musicgen.errors import MusicGenError
from musicgen_serving.client.base import Client
from musicgen_serving.client.errors import error_from, no_response
from musicgen_serving.client.types import (
    Chunk,
    Event,
    Generated,
    MusicRequest,
    Report,
    Retries,
    Start,
    Tls,
    from_bytes,
)
from musicgen_serving.errors import DeadlineExceededError, TooLargeError
from musicgen_serving.proto.musicgen.v1 import music_service_pb2 as pb
from musicgen_serving.proto.musicgen.v1.music_service_pb2_grpc import MusicServiceStub
from musicgen_serving.types import GenerationStatus, ModelInfo

T = TypeVar("T")
_DETAILS_KEY = "grpc-status-details-bin"
_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
)
_OPTIONAL = ("melody", "prompt_audio", "extend_stride_s")
_SAMPLING = ("temperature", "top_k", "top_p", "guidance_scale", "melody_guidance")
_STATES = {
    pb.GENERATION_STATE_RUNNING: "running",
    pb.GENERATION_STATE_FINISHED: "finished",
    pb.GENERATION_STATE_CANCELLED: "cancelled",
    pb.GENERATION_STATE_FAILED: "failed",
}


class GrpcClient(Client):
    """A client of `musicgen.v1.MusicService`.

    Args:
        target: `host:port`.
        tls: None: plaintext.
        timeout_s: deadline of each attempt; None: no deadline.
    """

    def __init__(
        self,
        target: str,
        api_key: str | None = None,
        *,
        tls: Tls | None = None,
        timeout_s: float | None = None,
        retries: Retries | None = None,
    ) -> None:
        super().__init__(retries)
        self._url = f"{'grpc' if tls is None else 'grpcs'}://{target}"
        self._timeout_s = timeout_s
        self._metadata = (("authorization", f"Bearer {api_key}"),) if api_key else ()
        if tls is None:
            self._channel = grpc.insecure_channel(target, options=_OPTIONS)
        else:
            self._channel = grpc.secure_channel(target, _credentials(tls), options=_OPTIONS)
        self._stub = MusicServiceStub(self._channel)

    def cancel(self, request_id: str) -> GenerationStatus:
        request = pb.CancelGenerationRequest(request_id=request_id)
        return _status(self._call(self._stub.CancelGeneration, request).status)

    def status(self, request_id: str) -> GenerationStatus:
        request = pb.GetGenerationRequest(request_id=request_id)
        return _status(self._call(self._stub.GetGeneration, request).status)

    def models(self) -> list[ModelInfo]:
        return [_model(model) for model in self._call(self._stub.ListModels, pb.ListModelsRequest()).models]

    def close(self) -> None:
        self._channel.close()

    @contextmanager
    def _own_errors(self) -> Iterator[None]:
        try:
            yield
        except grpc.RpcError as error:
            raise _error(error, self._url) from error

    def _call(self, method: Callable[..., T], request: Any) -> T:
        with self._own_errors():
            return method(request, timeout=self._timeout_s, metadata=self._metadata)

    def _whole(self, request: MusicRequest) -> Generated:
        message = pb.GenerateRequest(
            spec=_spec(request, 0), request_id=request.request_id or "", idempotency_key=request.idempotency_key
        )
        answer = self._call(self._stub.Generate, message)
        start, (piece,) = _start(answer.started), answer.pieces
        samples = from_bytes(piece.audio, start.channels)
        report = _report(piece.report, answer.billed_s)
        return Generated(samples, start.sample_rate, start.seed, start.model, start.request_id, report)

    def _events(self, request: MusicRequest, first_sample: int) -> Generator[Event, None, None]:
        message = pb.StreamGenerateRequest(
            spec=_spec(request, first_sample),
            request_id=request.request_id or "",
            idempotency_key=request.idempotency_key,
        )
        channels = 1
        call: Any = self._stub.StreamGenerate(message, timeout=self._timeout_s, metadata=self._metadata)
        try:
            with self._own_errors():
                for answer in call:
                    kind = answer.WhichOneof("event")
                    if kind == "started":
                        channels = answer.started.channels
                        yield _start(answer.started)
                    elif kind == "audio":
                        yield Chunk(from_bytes(answer.audio.audio, channels), answer.audio.sample_offset)
                    elif kind == "finished":
                        yield _report(answer.finished.pieces[0], answer.finished.billed_s)
        finally:
            call.cancel()


def _credentials(tls: Tls) -> grpc.ChannelCredentials:
    files = (tls.ca, tls.key, tls.certificate)
    return grpc.ssl_channel_credentials(*(None if file is None else file.read_bytes() for file in files))


def _spec(request: MusicRequest, first_sample: int) -> pb.GenerationSpec:
    sampling = {name: getattr(request, name) for name in _SAMPLING if getattr(request, name) is not None}
    optional = {name: getattr(request, name) for name in _OPTIONAL if getattr(request, name) is not None}
    return pb.GenerationSpec(
        model=request.model or "",
        prompts=[request.prompt] if request.prompt else [],
        stems=request.stems,
        duration_s=request.duration_s,
        seed=request.seed,
        sampling=pb.SamplingOptions(greedy=request.greedy, **sampling),
        first_sample=first_sample,
        **optional,
    )


def _error(error: Any, url: str) -> MusicGenError:
    """The exception for a failed call; only statuses sent by the service have details."""
    code, message = error.code(), error.details() or ""
    found = _details(error)
    if "ErrorInfo" in found:
        violations = found["BadRequest"].field_violations if "BadRequest" in found else ()
        retry_after_s = found["RetryInfo"].retry_delay.ToNanoseconds() / 1e9 if "RetryInfo" in found else None
        param = _param(violations[0].field) if violations else None
        return error_from(found["ErrorInfo"].reason.lower(), message, param, retry_after_s)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceededError("the request timed out")
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return TooLargeError(f"the message exceeds a size limit ({message})")
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.INTERNAL):
        return no_response(url, _reason(message), "gRPC")
    return MusicGenError(f"unexpected status {code.name} ({message})")


def _reason(message: str) -> str:
    """grpc's message without its nested causes and addresses."""
    return re.split(r" \(|: \[", re.sub(r".*last error: \w+: (?:\w+:\S+: )?", "", message))[0]


def _param(path: str) -> str:
    """The name of a field as in `MusicRequest`."""
    name = path.rpartition(".")[2]
    return "prompt" if name == "prompts" else name


def _details(error: Any) -> dict[str, Any]:
    found = {}
    for key, value in error.trailing_metadata() or ():
        if key != _DETAILS_KEY:
            continue
        try:
            details = status_pb2.Status.FromString(value).details
            for detail in details:
                name = detail.TypeName().rpartition(".")[2]
                message = getattr(error_details_pb2, name, None)
                if message is not None:
                    found[name] = message.FromString(detail.value)
        except DecodeError:
            return {}
    return found


def _start(started: pb.GenerationStarted) -> Start:
    return Start(
        started.request_id,
        started.model,
        started.seeds[0],
        started.sample_rate,
        started.channels,
        started.num_samples,
    )


def _report(report: pb.PieceReport, billed_s: float) -> Report:
    return Report(
        report.num_samples,
        report.checksum,
        report.num_frames,
        report.queue_s,
        report.prefill_s,
        report.decode_s,
        report.num_failovers,
        billed_s,
    )


def _status(status: pb.GenerationStatus) -> GenerationStatus:
    return GenerationStatus(
        status.request_id,
        status.model,
        _STATES.get(status.state, "unknown"),
        status.audio_s,
        status.done_s,
        status.age_s,
        status.error if status.HasField("error") else None,
    )


def _model(model: pb.ModelInfo) -> ModelInfo:
    return ModelInfo(
        model.name,
        model.license,
        model.sample_rate,
        model.channels,
        model.melody,
        model.max_duration_s,
        model.window_s,
        model.weights,
    )
