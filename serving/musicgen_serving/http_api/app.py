"""The FastAPI application: all routes over one `MusicService`. Independent of Ray."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from enum import Enum
from importlib import metadata
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response

from musicgen.errors import MusicGenError, OverloadedError
from musicgen_serving.errors import report
from musicgen_serving.http_api.errors import error_object, error_response, on_http_error, on_project_error
from musicgen_serving.http_api.generations import add_generation_routes, api_key
from musicgen_serving.http_api.middleware import EdgeMiddleware
from musicgen_serving.http_api.openapi import ERRORS, EXPOSED_HEADERS, MusicApi
from musicgen_serving.http_api.schemas import LiveBody, ModelBody, ModelList, NotReadyBody, ReadyBody
from musicgen_serving.service import MusicService, Readiness
from musicgen_serving.settings import LimitSettings
from musicgen_serving.types import ModelInfo

Metrics = Callable[[], Awaitable[bytes]]
_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_DESCRIPTION = """Generate music from text and melodies.

Every error has the form `{"error": {"message", "type", "param", "code"}}`. The HTTP status is sent once the first
audio is available; a stream that ends without a proper terminator was interrupted, and its audio is incomplete."""

logger = logging.getLogger(__name__)


def create_app(
    service: MusicService | Callable[[], MusicService],
    *,
    metrics: Metrics | None = None,
    cors_origins: Sequence[str] = (),
) -> MusicApi:
    """The application.

    Args:
        service: the service, or a getter called per request, so that the application can be built and pickled first.
        metrics: returns the text of `/metrics` in Prometheus format; None: no such route.
        cors_origins: origins whose pages may call the API from a browser.
    """
    get_service: Callable[[], MusicService] = service if callable(service) else lambda: service

    def limits() -> LimitSettings:
        return get_service().limits

    app = MusicApi(
        title="musicgen-serve",
        version=_version(),
        description=_DESCRIPTION,
        redirect_slashes=False,
    )
    app.add_middleware(EdgeMiddleware, limits=limits)
    if cors_origins:  # outermost: must also cover errors, and answer preflights before authentication
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(cors_origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=EXPOSED_HEADERS,
            max_age=3600,
        )
    app.add_exception_handler(MusicGenError, on_project_error)
    app.add_exception_handler(HTTPException, on_http_error)
    add_generation_routes(app, get_service)
    _add_model_routes(app, get_service)
    _add_operations_routes(app, get_service, metrics)
    return app


def _version() -> str:
    try:
        return metadata.version("musicgen-serve")
    except metadata.PackageNotFoundError:
        return "0"


def _add_model_routes(app: FastAPI, get_service: Callable[[], MusicService]) -> None:
    tags: list[str | Enum] = ["models"]

    @app.get("/v1/models", tags=tags, response_model=ModelList, responses=_without(404), operation_id="list_models")
    async def list_models(request: Request) -> ModelList:
        """List the models available to this API key, the default one first."""
        service = get_service()
        tenant = await service.authenticate(api_key(request.headers))
        return ModelList(data=[_model(info) for info in await service.models(tenant)])

    @app.get("/v1/models/{id}", tags=tags, response_model=ModelBody, responses=ERRORS, operation_id="get_model")
    async def get_model(id: str, request: Request) -> ModelBody:
        """Get one model."""
        service = get_service()
        tenant = await service.authenticate(api_key(request.headers))
        return _model(await service.model(tenant, id))


def _add_operations_routes(app: FastAPI, get_service: Callable[[], MusicService], metrics: Metrics | None) -> None:
    tags: list[str | Enum] = ["operations"]

    @app.head("/healthz", include_in_schema=False)
    @app.get("/healthz", tags=tags, response_model=LiveBody, operation_id="live")
    async def live() -> LiveBody:
        """Liveness: the process responds."""
        return LiveBody()

    not_ready: dict[int | str, dict[str, Any]] = {
        503: {"model": NotReadyBody, "description": "Not ready; `details` lists what is missing."}
    }

    @app.head("/readyz", include_in_schema=False)
    @app.get("/readyz", tags=tags, response_model=ReadyBody, responses=not_ready, operation_id="ready")
    async def ready() -> Response:
        """Readiness: requests can be served."""
        return _readiness(await _look(get_service))

    if metrics is not None:
        text: dict[int | str, dict[str, Any]] = {
            200: {
                "content": {"text/plain": {"schema": {"type": "string"}}},
                "description": "Metrics in Prometheus text format.",
            }
        }

        @app.head("/metrics", include_in_schema=False)
        @app.get("/metrics", tags=tags, response_class=Response, responses=text, operation_id="metrics")
        async def get_metrics() -> Response:
            """Metrics for Prometheus."""
            return Response(await metrics(), headers={"Content-Type": _METRICS_TYPE})


async def _look(get_service: Callable[[], MusicService]) -> Readiness:
    try:
        return await get_service().readiness()
    except Exception:  # a service that cannot be queried is not ready
        logger.warning("the service's readiness could not be determined", exc_info=True)
        return Readiness(False, {})


def _readiness(readiness: Readiness) -> Response:
    body = {"ready": readiness.ready, "details": readiness.details}
    if readiness.ready:
        return JSONResponse(body)
    outside = report(OverloadedError("the service is not ready yet; see details"))
    headers = {"Retry-After": error_response(outside).headers["Retry-After"]}
    return JSONResponse(body | {"error": error_object(outside)}, outside.http_status, headers)


def _model(info: ModelInfo) -> ModelBody:
    return ModelBody(
        id=info.name,
        license=info.license,
        sample_rate=info.sample_rate,
        channels=info.channels,
        melody=info.melody,
        max_duration_s=info.max_duration_s,
        window_s=info.window_s,
        weights=info.weights,
    )


def _without(status: int) -> dict[int | str, dict[str, Any]]:
    return {key: value for key, value in ERRORS.items() if key != status}
