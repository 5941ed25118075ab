"""Errors as HTTP responses, all in the shape that OpenAI clients parse.

`{"error": {"message", "type", "param", "code"}}`, with Retry-After where a retry makes sense.
`musicgen_serving.errors.report` maps each error; this module adds HTTP-only ones: routes, methods, media types.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from musicgen_serving.errors import ErrorReport, report

RETRY_STATUSES = (429, 503)
_CODES = {
    400: "invalid_request",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "too_large",
    415: "unsupported_media_type",
}

logger = logging.getLogger(__name__)


class ConnectionCutError(Exception):
    """Aborts a response that has started, without its proper terminator, so that it never looks complete."""


def request_id_of(scope: Mapping[str, Any]) -> str:
    """The request id set by `EdgeMiddleware`."""
    return str(scope.get("musicgen.request_id", ""))


def plain_text(text: str, max_chars: int = 500) -> str:
    """Text that is safe in any response: no lone surrogates, bounded length."""
    return text[:max_chars].encode("utf-8", "replace").decode()


def error_object(outside: ErrorReport) -> dict[str, str | None]:
    """The object inside `{"error": ...}`."""
    param = None if outside.param is None else plain_text(outside.param, 100)
    return {"message": plain_text(outside.message), "type": outside.type, "param": param, "code": outside.code}


def error_response(outside: ErrorReport, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """The response for an error."""
    extra = dict(headers or {})
    if outside.http_status in RETRY_STATUSES:
        extra["Retry-After"] = str(max(1, math.ceil(outside.retry_after_s or 0)))
    if outside.http_status == 401:
        extra["WWW-Authenticate"] = "Bearer"
    return JSONResponse({"error": error_object(outside)}, outside.http_status, extra)


def http_report(status: int, message: str, param: str | None = None) -> ErrorReport:
    """An HTTP-only error."""
    return ErrorReport(status, "invalid_request_error", _CODES.get(status, "invalid_request"), message, "", param)


async def on_project_error(request: Request, error: Exception) -> Response:
    """Handler of MusicGenError; logs server-side failures."""
    outside = report(error)
    if outside.http_status >= 500:
        logger.warning("request %s failed: %s", request_id_of(request.scope), type(error).__name__)
    if outside.code == "internal_error":
        logger.error("request %s failed", request_id_of(request.scope), exc_info=error)
    return error_response(outside)


async def on_http_error(request: Request, error: Exception) -> Response:
    """Handler of HTTPException: unknown route, wrong method, wrong media type, body timeout."""
    assert isinstance(error, HTTPException)
    path = plain_text(request.url.path, 100)
    messages = {
        404: f"no route {path}; see /docs",
        405: f"method {plain_text(request.method, 20)} is not allowed for {path}; see /docs",
    }
    message = messages.get(error.status_code, str(error.detail))
    return error_response(http_report(error.status_code, message), error.headers)
