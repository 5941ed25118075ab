"""The outermost layer of the HTTP edge: request ids, header hygiene, size of bodies, last resort for errors.

Ray Serve (2.60) obeys these headers of any client wherever it meets them: `x-request-timeout-seconds` and
`x-request-disconnect-disabled` (how long and whether a disconnect counts), `serve_multiplexed_model_id` (in any
spelling with `-` or `_`) and `x-session-id` (which replica is chosen), and behind HAProxy `x-serve-router-*`. They are
dropped so that nothing behind this layer ever does.
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
"""Where a request's scope has its `Share` of the bytes that this edge may hold."""
_INTERNAL_NAMES = {"x-request-timeout-seconds", "x-request-disconnect-disabled", "x-session-id"}
_INTERNAL_PREFIXES = ("x-serve-", "serve-", "x-ray-", "ray-")
_MAX_CHAR_BYTES = 12
"""A character outside the basic plane, written as two escapes in JSON."""
_SLACK_BYTES = 2**20

logger = logging.getLogger(__name__)


def max_body_bytes(limits: LimitSettings) -> int:
    """The largest body that can be a valid request: two files in base64, all prompts, and the rest."""
    texts = limits.max_pieces * limits.max_prompt_chars * _MAX_CHAR_BYTES
    return 2 * -(-limits.max_file_bytes * 4 // 3) + texts + _SLACK_BYTES


def is_internal_header(name: str) -> bool:
    """Whether Ray Serve gives the header a meaning that no client may use."""
    normal = name.lower().replace("_", "-")
    return normal in _INTERNAL_NAMES or normal.startswith(_INTERNAL_PREFIXES)


class EdgeMiddleware:
    """Wraps every request; passes on what is no HTTP.

    Args:
        limits: asked for at each request with a body, because the service may be made after the application.
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
            return  # nobody is there to answer to
        except Exception as error:
            if started:
                raise  # the server cuts the connection
            logger.exception("request %s failed", request_id)
            await error_response(report(error))(inner, receive, send_with_id)

    def _limited(self, scope: Scope, receive: Receive, share: Share) -> Receive:
        """`receive` that raises TooLargeError as soon as it is known that the body is larger than any valid one, and
        OverloadedError where this edge holds too much already."""
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
            raise TooLargeError(f"expected a body of at most {largest} bytes, got more; send shorter recordings")


def _clean(headers: Iterable[tuple[bytes, bytes]]) -> Iterable[tuple[bytes, bytes]]:
    return (item for item in headers if not is_internal_header(item[0].decode("latin-1")))
