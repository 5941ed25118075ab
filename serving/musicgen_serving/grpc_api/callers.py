"""Authenticates callers before their message is received, so that unauthenticated clients cannot make the server buffer
data."""

from __future__ import annotations

import logging
from typing import Any

import grpc
import grpc.aio

from musicgen_serving.checks import is_request_id, new_request_id
from musicgen_serving.errors import UnauthenticatedError, report
from musicgen_serving.grpc_api.call import Context, ServiceGetter, api_key, texts
from musicgen_serving.grpc_api.errors import REQUEST_ID_KEY, abort

_log = logging.getLogger(__name__)


class KnownCallers(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # not generic at runtime
    """Intercepts methods whose path starts with `prefix`. Must be the first interceptor."""

    def __init__(self, prefix: str, get_service: ServiceGetter) -> None:
        self._prefix, self._get_service = prefix, get_service

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        if handler_call_details.method.startswith(self._prefix):
            metadata = texts(handler_call_details.invocation_metadata)
            try:
                await self._authenticate(metadata)
            except Exception as error:
                return _refusal(error, metadata.get(REQUEST_ID_KEY, ""))
        return await continuation(handler_call_details)

    async def _authenticate(self, metadata: dict[str, str]) -> None:
        service = self._get_service()
        try:
            key = api_key(metadata)
        except UnauthenticatedError as error:
            service.count_refusal(report(error).code)
            raise
        await service.authenticate(key)


def _refusal(error: Exception, given_id: str) -> grpc.RpcMethodHandler[Any, Any]:
    """A handler that ends the call with the status of `error`. It is declared as client-streaming, because grpc would
    otherwise receive the request message before calling it."""
    request_id = given_id if is_request_id(given_id) else new_request_id()
    seen = report(error)
    level = logging.ERROR if seen.grpc_code == "INTERNAL" else logging.INFO
    _log.log(level, "request %s failed: %s", request_id, seen.code, exc_info=error if level == logging.ERROR else None)

    async def refuse(messages: Any, context: Context) -> None:
        await abort(context, error, request_id)

    return grpc.stream_stream_rpc_method_handler(refuse)
