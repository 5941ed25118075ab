"""Error responses → the project's exceptions. Both protocols use the same error codes."""

from __future__ import annotations

import re

from musicgen.errors import (
    DeadlineTooShortError,
    InvalidRequestError,
    MusicGenError,
    OverloadedError,
    QuotaExceededError,
    RequestCancelledError,
)
from musicgen_serving.client.types import ConnectionLostError
from musicgen_serving.errors import (
    ConflictError,
    DeadlineExceededError,
    FieldError,
    NotFoundError,
    NotOfferedError,
    SupersededError,
    TooLargeError,
    UnauthenticatedError,
)

_BY_CODE: dict[str, type[MusicGenError]] = {
    "too_large": TooLargeError,
    "not_available_here": NotOfferedError,
    "invalid_api_key": UnauthenticatedError,
    "not_found": NotFoundError,
    "conflict": ConflictError,
    "cancelled": RequestCancelledError,
    "superseded": SupersededError,
    "deadline_exceeded": DeadlineExceededError,
    "deadline_too_short": DeadlineTooShortError,
}
_LATER = {
    "rate_limit_exceeded": QuotaExceededError,
    "overloaded": OverloadedError,
    "temporarily_unavailable": OverloadedError,
}
_WORDS = re.compile(r"(?:[\w.-]+: )?expected (?P<expected>.+?)(?:, got (?P<got>.+?))?(?:; (?P<hint>.+))?", re.DOTALL)


def no_response(url: str, reason: str, protocol: str) -> ConnectionLostError:
    """The error of a service that cannot be reached, or does not speak `protocol` there."""
    return ConnectionLostError(
        f"{url}: no response ({reason}); is the service running, and is this its {protocol} port?"
    )


def error_from(code: str, message: str, param: str | None = None, retry_after_s: float | None = None) -> MusicGenError:
    """The inverse of `musicgen_serving.errors.report`.

    Args:
        code: as in the HTTP error object, or a gRPC ErrorInfo's reason in lower case.
    """
    if code in _LATER:
        return _LATER[code](message, retry_after_s=retry_after_s)
    if code == "invalid_request":
        words = _WORDS.fullmatch(message)
        if words is None:
            return InvalidRequestError("a valid request", message, param=param)
        return InvalidRequestError(words["expected"], words["got"] or "", words["hint"] or "", param=param)
    kind = _BY_CODE.get(code, MusicGenError)
    return kind(message, param=param) if issubclass(kind, FieldError) else kind(message)
