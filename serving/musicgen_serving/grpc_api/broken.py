"""Undecodable messages: rejected with INVALID_ARGUMENT. grpc's own response would leak a server class name."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from musicgen.errors import InvalidRequestError
from musicgen_serving.checks import new_request_id
from musicgen_serving.grpc_api.call import Context
from musicgen_serving.grpc_api.errors import abort

_Behaviour = Callable[[Any, Context], Awaitable[Any]]


class BrokenMessages(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # not generic at runtime
    """Intercepts methods whose path starts with `prefix`; all of them are coroutines taking one message."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith(self._prefix):
            return handler
        parse = _total(handler.request_deserializer)
        if handler.response_streaming:
            behaviour = _checked(handler.unary_stream)
            return grpc.unary_stream_rpc_method_handler(behaviour, parse, handler.response_serializer)
        return grpc.unary_unary_rpc_method_handler(_checked(handler.unary_unary), parse, handler.response_serializer)


def _total(parse: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """`parse`, returning its error instead of raising it."""

    def safe(content: bytes) -> Any:
        try:
            return parse(content)
        except DecodeError as error:
            return error

    return safe


def _checked(behaviour: _Behaviour) -> _Behaviour:
    async def checked(message: Any, context: Context) -> Any:
        if isinstance(message, DecodeError):
            error = InvalidRequestError("a valid protobuf message", "undecodable bytes")
            await abort(context, error, new_request_id())
        return await behaviour(message, context)

    return checked
