"""The generation routes: create, get status, cancel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from fastapi import FastAPI, Request
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import Response

from musicgen.errors import InvalidRequestError, MusicGenError
from musicgen.types import ChunkPolicy
from musicgen_serving.admission import Tenant
from musicgen_serving.audio_formats import EVENT_FORMATS
from musicgen_serving.checks import RequestFields, checked_request, given_key, is_request_id
from musicgen_serving.errors import NotFoundError, report
from musicgen_serving.http_api.accept import Accepted, accepted
from musicgen_serving.http_api.body import parse_body, read_body
from musicgen_serving.http_api.delivery import Delivery, GenerationResponse, Wish
from musicgen_serving.http_api.errors import http_report, request_id_of
from musicgen_serving.http_api.middleware import REQUEST_ID_HEADER
from musicgen_serving.http_api.openapi import ERRORS, GENERATION_DOCS, GENERATION_RESPONSES
from musicgen_serving.http_api.schemas import GenerationBody, StatusBody
from musicgen_serving.http_api.sse import SseDelivery
from musicgen_serving.http_api.streams import StreamDelivery
from musicgen_serving.http_api.whole import WholeDelivery
from musicgen_serving.recordings import check_recording
from musicgen_serving.service import MusicService
from musicgen_serving.types import GenerationRequest, GenerationStatus

_PATH = "/v1/music/generations"


def api_key(headers: Headers) -> str | None:
    """The API key of a request. Raises: UnauthenticatedError: as `given_key`."""
    return given_key(headers.get("authorization", ""), headers.get("x-api-key", ""))


def add_generation_routes(app: FastAPI, get_service: Callable[[], MusicService]) -> None:
    """Add the routes; `get_service` is called for each request."""

    @app.post(
        _PATH,
        tags=["music"],
        responses=GENERATION_RESPONSES,
        openapi_extra=GENERATION_DOCS,
        operation_id="create_generation",
    )
    async def create_generation(request: Request) -> Response:
        """Generate music: one response, chunked audio (`stream`), or server-sent events (`stream_format: sse`).

        Closing the connection cancels the request.
        """
        service = get_service()
        with _counting(service):
            key = api_key(request.headers)
        tenant = await service.authenticate(key)
        with _counting(service, tenant):
            content = await read_body(request, service.limits.reader_stall_s)
            body = await parse_body(request.headers, content)
            return await _respond(service, tenant, request, body)

    @app.get(
        _PATH + "/{id}", tags=["music"], responses=ERRORS, response_model=StatusBody, operation_id="get_generation"
    )
    async def get_generation(id: str, request: Request) -> StatusBody:
        """Get the status of a generation. Its id is the X-Request-Id of the request that created it."""
        service = get_service()
        tenant = await service.authenticate(api_key(request.headers))
        return _status(await service.status(tenant, _known_form(id)))

    @app.delete(
        _PATH + "/{id}", tags=["music"], responses=ERRORS, response_model=StatusBody, operation_id="cancel_generation"
    )
    async def cancel_generation(id: str, request: Request) -> StatusBody:
        """Cancel a generation of this tenant. No effect if it has already ended."""
        service = get_service()
        tenant = await service.authenticate(api_key(request.headers))
        return _status(await service.cancel(tenant, _known_form(id)))


@contextmanager
def _counting(service: MusicService, tenant: Tenant | None = None) -> Iterator[None]:
    """Counts requests rejected before they reach the service."""
    try:
        yield
    except MusicGenError as error:
        service.count_refusal(report(error).code, tenant)
        raise
    except HTTPException as error:
        service.count_refusal(http_report(error.status_code, "").code, tenant)
        raise


async def _respond(service: MusicService, tenant: Tenant, request: Request, body: GenerationBody) -> Response:
    for param, content in (("melody", body.melody), ("prompt_audio", body.prompt_audio)):
        if content is not None:
            await check_recording(content, param, service.limits)
    model = await service.model(tenant, body.model)
    fields = _fields(body, model.name, request)
    generation = await checked_request(fields, tenant, service.limits)
    delivery = _delivery(body, generation, accepted(request.headers), model.license)
    return GenerationResponse(service, tenant, generation, delivery)


def _fields(body: GenerationBody, model: str, request: Request) -> RequestFields:
    prompts = body.prompt if isinstance(body.prompt, list) else [body.prompt]
    is_stream = body.stream or body.stream_format == "sse"
    return RequestFields(
        # An id that does not have the form was replaced for the response; the validation refuses it.
        request_id=request.headers.get(REQUEST_ID_HEADER) or request_id_of(request.scope),
        model=model,
        prompts=tuple(prompts),
        duration_s=body.duration_s,
        num_samples=body.num_samples,
        seed=body.seed,
        temperature=body.temperature,
        top_k=body.top_k,
        top_p=body.top_p,
        greedy=body.greedy,
        guidance_scale=body.guidance_scale,
        melody_guidance=body.melody_guidance,
        melody=body.melody,
        prompt_audio=body.prompt_audio,
        stems=body.stems,
        extend_stride_s=body.extend_stride_s,
        loudness_lufs=body.loudness,
        chunks=ChunkPolicy() if is_stream else None,
        first_sample=body.first_sample,
        deadline_s=body.deadline_s,
        idempotency_key=request.headers.get("idempotency-key"),
        trace_parent=request.headers.get("traceparent"),
    )


def _delivery(body: GenerationBody, generation: GenerationRequest, accept: Accepted, license: str) -> Delivery:
    """The form of the response. Raises: InvalidRequestError: an unsupported combination of options."""
    is_events = body.stream_format == "sse"
    format = body.response_format or ("pcm16" if is_events else accept.response_format or "wav")
    if is_events:
        if format not in EVENT_FORMATS:
            expected, hint = f"one of {', '.join(EVENT_FORMATS)} for events", "use one of these, or omit stream_format"
            raise InvalidRequestError(expected, format, hint, param="response_format")
        return SseDelivery(generation, Wish(format))
    if not body.stream:
        as_json = accept.wants_json or len(generation.pieces) > 1
        return WholeDelivery(generation, Wish(format, as_json, body.loudness, license))
    if len(generation.pieces) > 1:
        got, hint = f"{len(generation.pieces)}", "use stream_format: sse, or omit stream"
        raise InvalidRequestError("one piece with stream", got, hint, param="stream")
    return StreamDelivery(generation, Wish(format, license=license))


def _known_form(id: str) -> str:
    if not is_request_id(id):
        raise NotFoundError("no running or recently finished request has this id")
    return id


def _status(status: GenerationStatus) -> StatusBody:
    values: dict[str, Any] = {
        "id": status.request_id,
        "model": status.model,
        "status": status.state,
        "audio_s": status.audio_s,
        "done_s": status.done_s,
        "age_s": status.age_s,
        "error": status.error,
    }
    return StatusBody(**values)
