"""Request message → validated `GenerationRequest`. Validation is in `musicgen_serving.checks`, shared with HTTP."""

from __future__ import annotations

from typing import Any

from google.protobuf.message import Message

from musicgen.types import ChunkPolicy
from musicgen_serving.checks import RequestFields, checked_request
from musicgen_serving.grpc_api.call import Call
from musicgen_serving.proto.musicgen.v1 import music_service_pb2 as pb
from musicgen_serving.recordings import check_recording
from musicgen_serving.types import GenerationRequest

_OPTIONAL = ("num_samples", "duration_s", "seed", "extend_stride_s", "melody", "prompt_audio")
_OPTIONAL_SAMPLING = ("temperature", "top_k", "top_p", "guidance_scale", "melody_guidance")


async def to_request(
    message: pb.GenerateRequest | pb.StreamGenerateRequest, call: Call, chunks: ChunkPolicy | None
) -> GenerationRequest:
    """The request, with the defaults documented in the .proto.

    Raises:
        InvalidRequestError, TooLargeError: a field is out of range, or a recording is invalid; names the field.
        NotFoundError, ReplicaLostError: the model is unknown or unavailable.
    """
    spec = message.spec
    fields = RequestFields(
        request_id=call.request_id,
        model=(await call.service.model(call.tenant, spec.model or None)).name,
        prompts=tuple(prompt or None for prompt in spec.prompts) or (None,),
        greedy=spec.sampling.greedy,
        stems=spec.stems,
        chunks=chunks,
        first_sample=spec.first_sample,
        loudness_lufs=loudness_lufs(spec),
        deadline_s=call.deadline_s,
        idempotency_key=message.idempotency_key or None,
        trace_parent=call.trace_parent,
        **_present(spec, _OPTIONAL),
        **_present(spec.sampling, _OPTIONAL_SAMPLING),
    )
    limits = call.service.limits
    for param in ("melody", "prompt_audio"):
        content: bytes | None = getattr(fields, param)
        if content is not None:
            await check_recording(content, param, limits)
    return await checked_request(fields, call.tenant, limits)


def loudness_lufs(spec: pb.GenerationSpec) -> float | None:
    """Loudness to which the ingress normalizes whole pieces; None: no normalization."""
    return spec.loudness if spec.HasField("loudness") else None


def _present(message: Message, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(message, name) for name in names if message.HasField(name)}
