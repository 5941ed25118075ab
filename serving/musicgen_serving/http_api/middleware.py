"""The outermost layer of the HTTP ingress: request ids, header filtering, body size limits, last-resort error handling.

Ray Serve (2.60) honours these headers from any client: `x-request-timeout-seconds` and
`x-request-disconnect-disabled` (timeouts and disconnect handling), `serve_multiplexed_model_id` (spelled with `-` or
`_`) and `x-session-id` (replica selection), and behind HAProxy `x-serve-router-*`. They are dropped here so that
clients cannot control Serve's internals.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from musicgen_serving.budget import Budget, Share
from musicgen_serving.checks import is_request_id, new_request_id
from musicgen_serving.errors import TooLargeError, report
from musicgen_serving.http_api.errors import error_response, request_id_of
from musicgen_serving.settings import LimitSettings

REQUEST_ID_HEADER = "X-Request-Id"
SHARE = "musicgen.share"
"""Scope key of a request's `Share` of this ingress replica's memory budget."""
_INTERNAL_NAMES = {"x-request-timeout-seconds", "x-request-disconnect-disabled", "x-session-id"}
_INTERNAL_PREFIXES = ("x-serve-", "serve-", "x-ray-", "ray-")
_MAX_CHAR_BYTES = 12
"""A character outside the Basic Multilingual Plane, as two JSON escapes."""
_SLACK_BYTES = 2**20

logger = logging.getLogger(__name__)


def max_body_bytes(limits: LimitSettings) -> int:
    """Size of the largest valid request: two files in base64, all prompts, and some slack."""
    texts = limits.max_pieces * limits.max_prompt_chars * _MAX_CHAR_BYTES
    return 2 * -(-limits.max_file_bytes * 4 // 3) + texts + _SLACK_BYTES


def is_internal_header(name: str) -> bool:
    """Whether Ray Serve would act on the header; clients must not be able to set it."""
    normal = name.lower().replace("_", "-")
    return normal in _INTERNAL_NAMES or normal.startswith(_INTERNAL_PREFIXES)


class EdgeMiddleware:
    """Wraps every HTTP request; passes other scopes through.

    Args:
        limits: called for each request with a body, because the service may be created after the application.
    """

    def __init__(self, app: ASGIApp, limits: Callable[[], LimitSettings]) -> None:
        self._app = app
        self._limits = limits
        self._budget = Budget(lambda: limits().edge_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID_HEADER, "")
        request_id = given if is_request_id(given) else new_request_id()
        with self._budget.share() as share:
            headers = list(_clean(scope["headers"]))
            inner = {**scope, "headers": headers, "musicgen.request_id": request_id, SHARE: share}
            await self._answer(inner, receive, send)

    async def _answer(self, inner: Scope, receive: Receive, send: Send) -> None:
        request_id = request_id_of(inner)
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = request_id
            await send(message)

        try:
            await self._app(inner, self._limited(inner, receive, inner[SHARE]), send_with_id)
        except ClientDisconnect:
            return  # nobody to respond to
        except Exception as error:
            if started:
                raise  # the server closes the connection
            logger.exception("request %s failed", request_id)
            await error_response(report(error))(inner, receive, send_with_id)

    def _limited(self, scope: Scope, receive: Receive, share: Share) -> Receive:
        """`receive` that raises TooLargeError as soon as the body is known to exceed the limit, and OverloadedError if
        this ingress replica's memory budget is exhausted."""
        num_bytes = 0
        length = Headers(scope=scope).get("content-length", "0")
        announced = int(length) if length.isascii() and length.isdigit() and len(length) < 20 else 0

        async def limited() -> Message:
            nonlocal num_bytes
            if max(num_bytes, announced):
                self._check_size(max(num_bytes, announced))
            message = await receive()
            if message["type"] == "http.request" and message.get("body"):
                num_bytes += len(message["body"])
                self._check_size(num_bytes)
                share.take(len(message["body"]))
            return message

        return limited

    def _check_size(self, num_bytes: int) -> None:
        largest = max_body_bytes(self._limits())
        if num_bytes > largest:
            raise TooLargeError(f"expected a body of at most {largest} bytes; send shorter recordings")


def _clean(headers: Iterable[tuple[bytes, bytes]]) -> Iterable[tuple[bytes, bytes]]:
    return (item for item in headers if not is_internal_header(item[0].decode("latin-1")))
