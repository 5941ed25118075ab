"""Exceptions that the service adds to `musicgen.errors`, and the one table that maps each to its public form.

    MusicGenError
    ├── UnauthenticatedError     missing or invalid API key
    ├── FieldError               caused by a field of the request
    │   ├── NotFoundError        no such model or request
    │   ├── NotOfferedError      this service lacks an optional feature
    │   └── TooLargeError        a body, file or text exceeds a limit
    ├── SupersededError          a retry took over; a RequestCancelledError
    ├── ConflictError            an idempotency key or request id already in use for something else
    ├── DeadlineExceededError    the caller's deadline passed
    └── ReplicaLostError         a replica died or stopped responding, and so did its replacements

`report` is total: any other exception becomes an internal error that reveals nothing about its cause.
"""

from __future__ import annotations

from dataclasses import dataclass

from musicgen.errors import (
    DeadlineTooShortError,
    EngineDeadError,
    InvalidRequestError,
    MusicGenError,
    OverloadedError,
    QuotaExceededError,
    RequestCancelledError,
    WeightsError,
)


class UnauthenticatedError(MusicGenError):
    """Missing or invalid API key."""


class FieldError(MusicGenError):
    """Caused by a field of the request.

    Args:
        param: name of the field, if it is known.
    """

    def __init__(self, message: str, *, param: str | None = None) -> None:
        self.param = param
        super().__init__(message)


class NotFoundError(FieldError):
    """Not found, or not visible to the tenant."""


class NotOfferedError(FieldError):
    """This service lacks an optional feature."""


class TooLargeError(FieldError):
    """A size limit is exceeded."""


class SupersededError(RequestCancelledError):
    """A retry of the same request took over; this attempt was cancelled."""


class ConflictError(MusicGenError):
    """The request id or idempotency key is already in use for a different request."""


class DeadlineExceededError(MusicGenError):
    """The caller's deadline passed; the request was cancelled."""


class ReplicaLostError(MusicGenError):
    """A replica was lost and the failover attempts are exhausted."""


@dataclass(frozen=True, slots=True)
class ErrorReport:
    """The public form of an error."""

    http_status: int
    type: str
    """OpenAI error type, such as `invalid_request_error`."""
    code: str
    """Stable machine-readable code, such as `rate_limit_exceeded`; in upper case, gRPC's ErrorInfo.reason."""
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
    _Row(NotOfferedError, 400, "invalid_request_error", "not_available_here", "FAILED_PRECONDITION"),
    _Row(UnauthenticatedError, 401, "authentication_error", "invalid_api_key", "UNAUTHENTICATED"),
    _Row(NotFoundError, 404, "invalid_request_error", "not_found", "NOT_FOUND"),
    _Row(ConflictError, 409, "invalid_request_error", "conflict", "ALREADY_EXISTS"),
    _Row(QuotaExceededError, 429, "rate_limit_error", "rate_limit_exceeded", "RESOURCE_EXHAUSTED"),
    _Row(SupersededError, 499, "request_cancelled", "superseded", "CANCELLED"),
    _Row(RequestCancelledError, 499, "request_cancelled", "cancelled", "CANCELLED"),
    _Row(DeadlineExceededError, 504, "timeout_error", "deadline_exceeded", "DEADLINE_EXCEEDED"),
    _Row(DeadlineTooShortError, 504, "timeout_error", "deadline_too_short", "DEADLINE_EXCEEDED"),
    _Row(OverloadedError, 503, "overloaded_error", "overloaded", "UNAVAILABLE"),
    _Row(ReplicaLostError, 503, "overloaded_error", "temporarily_unavailable", "UNAVAILABLE"),
    _Row(EngineDeadError, 503, "overloaded_error", "temporarily_unavailable", "UNAVAILABLE"),
    _Row(WeightsError, 500, "server_error", "internal_error", "INTERNAL"),
)
CLIENT_CODES = frozenset(row.code for row in _TABLE if row.http_status < 500)
"""Codes of errors caused by the caller, not by the service."""
_HIDDEN = (EngineDeadError, WeightsError)
"""Errors whose messages contain internal details."""
_INTERNAL = ErrorReport(
    500, "server_error", "internal_error", "internal error; see the server log for this request id", "INTERNAL"
)


def report(error: BaseException) -> ErrorReport:
    """The public form of `error`. Never reveals paths, replicas, keys, or causes other than the caller's."""
    for row in _TABLE:
        if isinstance(error, row.error):
            message = " ".join(str(error).split())
            if isinstance(error, _HIDDEN):
                message = (
                    "the service failed and is recovering; retry later" if row.http_status == 503 else _INTERNAL.message
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
