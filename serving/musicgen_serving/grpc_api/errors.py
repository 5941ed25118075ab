"""Errors → gRPC statuses with google.rpc details. The public codes are those of `musicgen_serving.errors`.

Owns which details accompany which status, and the paths of fields. Independent of the service.
"""

from __future__ import annotations

from typing import Any, NoReturn

import grpc
import grpc.aio
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

from musicgen_serving.errors import ErrorReport, report
from musicgen_serving.proto.musicgen.v1 import music_service_pb2 as pb

DOMAIN = "musicgen"
DETAILS_KEY = "grpc-status-details-bin"
REQUEST_ID_KEY = "x-request-id"
_MAX_MESSAGE_BYTES = 600
"""Clients reject responses with more than 8 KiB of trailing metadata. It contains the message up to three times, once
percent-encoded at three bytes per byte."""
_PATHS = {
    **{name: name for name in pb.GenerateRequest.DESCRIPTOR.fields_by_name},
    **{name: f"spec.{name}" for name in pb.GenerationSpec.DESCRIPTOR.fields_by_name},
    **{name: f"spec.sampling.{name}" for name in pb.SamplingOptions.DESCRIPTOR.fields_by_name},
    "prompt": "spec.prompts",
}
"""Name of a field in errors → its path in the request message."""


def to_status(error: BaseException, request_id: str = "") -> status_pb2.Status:
    """`error` as clients see it, without internal details."""
    seen = report(error)
    message = seen.message.encode()[:_MAX_MESSAGE_BYTES].decode(errors="ignore")
    status = status_pb2.Status(code=grpc.StatusCode[seen.grpc_code].value[0], message=message)
    for detail in _details(seen, message, request_id):
        status.details.add().Pack(detail)
    return status


def _details(seen: ErrorReport, message: str, request_id: str) -> list[Message]:
    metadata = {"request_id": request_id} if request_id else {}
    details: list[Message] = [
        error_details_pb2.ErrorInfo(reason=seen.code.upper(), domain=DOMAIN, metadata=metadata),
    ]
    if (path := _PATHS.get(seen.param or "")) is not None:
        violation = error_details_pb2.BadRequest.FieldViolation(field=path, description=message)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if seen.grpc_code == "RESOURCE_EXHAUSTED":
        failure = error_details_pb2.QuotaFailure.Violation(subject="tenant", description=message)
        details.append(error_details_pb2.QuotaFailure(violations=[failure]))
    if seen.retry_after_s is not None:
        delay = Duration()
        delay.FromNanoseconds(round(max(0.0, seen.retry_after_s) * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    return details


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: BaseException, request_id: str) -> NoReturn:
    """End the call with the status of `error`. Always raises."""
    status = to_status(error, request_id)
    code = next(code for code in grpc.StatusCode if code.value[0] == status.code)
    trailing = ((REQUEST_ID_KEY, request_id), (DETAILS_KEY, status.SerializeToString()))
    await context.abort(code, status.message, trailing)
