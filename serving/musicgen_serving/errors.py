"""What the service adds to the errors of `musicgen.errors`, and the one table that says how each looks outside.

    MusicGenError
    ├── UnauthenticatedError     no API key, or none that is known
    ├── ForbiddenError           the tenant may not do this
    ├── NotFoundError            no such model or request
    ├── ConflictError            an idempotency key or request id that is used for something else
    ├── TooLargeError            a body, file or text beyond the limits
    ├── DeadlineExceededError    the caller's deadline passed
    ├── ReplicaLostError         a replica died or fell silent, and so did those tried in its place
    └── InternalError            replicas that live fail, all in the same way

`report` is total: what is not in the table is an internal error without a word about its cause.
"""

from __future__ import annotations

from dataclasses import dataclass

from musicgen.errors import (
    DeadlineTooShortError,
    EngineDeadError,
    InvalidRequestError,
    MissingDependencyError,
    MusicGenError,
    OverloadedError,
    QuotaExceededError,
    RequestCancelledError,
    WeightsError,
)


class UnauthenticatedError(MusicGenError):
    """No API key was given, or it is not known."""


class ForbiddenError(MusicGenError):
    """The key is known, but may not do this."""


class NotFoundError(MusicGenError):
    """There is no such thing, or the tenant may not know of it."""


class ConflictError(MusicGenError):
    """The same id or idempotency key was used for another request."""


class TooLargeError(MusicGenError):
    """More than the service takes."""


class DeadlineExceededError(MusicGenError):
    """The caller's deadline passed; the request was cancelled."""


class ReplicaLostError(MusicGenError):
    """A replica is gone and the attempts to go on elsewhere are used up."""


class InternalError(MusicGenError):
    """Replicas that live fail in the same way, one after the other: the same request will fail again."""


@dataclass(frozen=True, slots=True)
class ErrorReport:
    """An error as clients see it."""

    http_status: int
    type: str
    """OpenAI's class of errors, such as `invalid_request_error`."""
    code: str
    """Stable name for programs, such as `rate_limit_exceeded`; gRPC's ErrorInfo.reason is its upper case."""
    message: str
    grpc_code: str
    """Name of a `grpc.StatusCode`."""
    param: str | None = None
    retry_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class _Row:
    error: type[BaseException]
    http_status: int
    type: str
    code: str
    grpc_code: str


_TABLE = (
    _Row(TooLargeError, 413, "invalid_request_error", "too_large", "INVALID_ARGUMENT"),
    _Row(InvalidRequestError, 400, "invalid_request_error", "invalid_request", "INVALID_ARGUMENT"),
    _Row(MissingDependencyError, 400, "invalid_request_error", "not_available_here", "FAILED_PRECONDITION"),
    _Row(UnauthenticatedError, 401, "authentication_error", "invalid_api_key", "UNAUTHENTICATED"),
    _Row(ForbiddenError, 403, "permission_error", "not_allowed", "PERMISSION_DENIED"),
    _Row(NotFoundError, 404, "invalid_request_error", "not_found", "NOT_FOUND"),
    _Row(ConflictError, 409, "invalid_request_error", "conflict", "ALREADY_EXISTS"),
    _Row(QuotaExceededError, 429, "rate_limit_error", "rate_limit_exceeded", "RESOURCE_EXHAUSTED"),
    _Row(RequestCancelledError, 499, "request_cancelled", "cancelled", "CANCELLED"),
    _Row(DeadlineExceededError, 504, "timeout_error", "deadline_exceeded", "DEADLINE_EXCEEDED"),
    _Row(DeadlineTooShortError, 503, "timeout_error", "deadline_too_short", "UNAVAILABLE"),
    _Row(OverloadedError, 503, "overloaded_error", "overloaded", "UNAVAILABLE"),
    _Row(ReplicaLostError, 503, "overloaded_error", "temporarily_unavailable", "UNAVAILABLE"),
    _Row(EngineDeadError, 503, "overloaded_error", "temporarily_unavailable", "UNAVAILABLE"),
    _Row(WeightsError, 500, "server_error", "internal_error", "INTERNAL"),
)
CLIENT_CODES = frozenset(row.code for row in _TABLE if row.http_status < 500)
"""Of errors that callers bring about: no fault of the service, whenever they are found."""
_HIDDEN = (EngineDeadError, WeightsError)
"""Their messages name what is inside."""
_INTERNAL = ErrorReport(
    500, "server_error", "internal_error", "internal error; the request id is in the log", "INTERNAL"
)


def report(error: BaseException) -> ErrorReport:
    """How `error` looks outside. Never names a path, a replica, a key or a cause that is not the caller's own."""
    for row in _TABLE:
        if isinstance(error, row.error):
            message = " ".join(str(error).split())
            if isinstance(error, _HIDDEN):
                message = (
                    "the service failed and recovers; retry later" if row.http_status == 503 else _INTERNAL.message
                )
            return ErrorReport(
                row.http_status,
                row.type,
                row.code,
                message,
                row.grpc_code,
                param=getattr(error, "param", None),
                retry_after_s=getattr(error, "retry_after_s", None),
            )
    return _INTERNAL
