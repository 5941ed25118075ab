"""What all RPCs share: authentication, request ids, mapping errors to statuses, and writes with a stall timeout.

Independent of the API's messages.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

import grpc.aio
from google.protobuf.message import Message

from musicgen.errors import MusicGenError, RequestCancelledError
from musicgen_serving import delay_points
from musicgen_serving.admission import Tenant
from musicgen_serving.checks import given_key, is_request_id, new_request_id
from musicgen_serving.errors import report
from musicgen_serving.grpc_api.errors import REQUEST_ID_KEY, abort
from musicgen_serving.service import MusicService

Context = grpc.aio.ServicerContext[Any, Any]
ServiceGetter = Callable[[], MusicService]
"""Returns the service, or raises a `MusicGenError` if it is not ready yet."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Call:
    """One authenticated call. Set by `begin`."""

    context: Context
    service: MusicService
    tenant: Tenant
    request_id: str
    """The caller's, unchecked, else a new one."""
    trace_parent: str | None
    """Unchecked."""
    deadline_s: float | None
    """Seconds from the start of the call to its deadline."""

    @contextmanager
    def counting_refusals(self) -> Iterator[None]:
        """Counts requests rejected before they reach the service."""
        try:
            yield
        except MusicGenError as error:
            self.service.count_refusal(report(error).code, self.tenant)
            raise

    async def send_request_id(self) -> None:
        """Send the initial metadata, which tells the client that the call was accepted."""
        await self.context.send_initial_metadata(((REQUEST_ID_KEY, self.request_id),))

    async def write(self, message: Message) -> None:
        """Send a message, subject to flow control.

        Raises:
            RequestCancelledError: the client has read no data for too long.
        """
        await delay_points.pause(delay_points.EDGE_SEND)
        stall_s = self.service.limits.reader_stall_s
        try:
            async with asyncio.timeout(stall_s):
                await self.context.write(message)
        except TimeoutError:
            message_text = f"client read no data for {stall_s:g} s; cancelled"
            raise RequestCancelledError(message_text) from None


@asynccontextmanager
async def begin(context: Context, get_service: ServiceGetter, request_id: str = "") -> AsyncIterator[Call]:
    """Authenticate a call. An error raised in the context ends the call with a sanitized status.

    Args:
        request_id: from the message, if it has one.
    """
    metadata = texts(context.invocation_metadata())
    chosen = request_id or metadata.get(REQUEST_ID_KEY, "")
    shown_id = chosen if is_request_id(chosen) else new_request_id()
    try:
        service = get_service()
        tenant = await service.authenticate(api_key(metadata))
        yield Call(
            context,
            service,
            tenant,
            chosen or shown_id,
            metadata.get("traceparent"),
            context.time_remaining(),
        )
    except Exception as error:
        if context.cancelled() or context.done():
            _log.info("request %s: client disconnected", shown_id)
            raise asyncio.CancelledError from error
        seen = report(error)
        level = logging.ERROR if seen.grpc_code == "INTERNAL" else logging.INFO
        _log.log(level, "request %s failed: %s", shown_id, seen.code, exc_info=level == logging.ERROR)
        await abort(context, error, shown_id)


def texts(metadata: Iterable[tuple[str, str | bytes]] | None) -> dict[str, str]:
    """The text entries of a call's metadata."""
    return {key: value for key, value in metadata or () if isinstance(value, str)}


def api_key(metadata: dict[str, str]) -> str | None:
    """The API key of a call. Raises: as `given_key`."""
    return given_key(metadata.get("authorization", ""), metadata.get("x-api-key", ""))
