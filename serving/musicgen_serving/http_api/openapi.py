"""The OpenAPI document: adds what FastAPI cannot infer, because request bodies are parsed by hand.

Request bodies of a generation (JSON and multipart), response types, headers, API keys; removes statuses never sent.
"""

from __future__ import annotations

import copy
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from musicgen_serving.checks import REQUEST_ID_PATTERN
from musicgen_serving.http_api.schemas import RECORDING_FIELDS, ErrorBody, GenerationBody, GenerationResult

_BODY_REF = "#/components/schemas/GenerationBody"
_FORM_REF = "#/components/schemas/GenerationForm"
_BINARY = {"schema": {"type": "string", "format": "binary"}}
_SECURITY: list[dict[str, list[str]]] = [{"BearerKey": []}, {"ApiKeyHeader": []}, {}]
_SECURITY_SCHEMES = {
    "BearerKey": {
        "type": "http",
        "scheme": "bearer",
        "description": "API key; not required if the service runs in open mode.",
    },
    "ApiKeyHeader": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}


def _error(description: str, *, retry: bool = False) -> dict[str, Any]:
    headers = {"Retry-After": {"description": "Seconds to wait before retrying.", "schema": {"type": "integer"}}}
    return {"model": ErrorBody, "description": description} | ({"headers": headers} if retry else {})


ERRORS: dict[int | str, dict[str, Any]] = {
    401: _error("Missing or invalid API key."),
    404: _error("Not found, or not visible to this API key."),
    500: _error("Internal error."),
    503: _error("Overloaded, too many connections, or temporarily unavailable.", retry=True),
}
"""Error responses of every authenticated route."""

GENERATION_RESPONSES: dict[int | str, dict[str, Any]] = ERRORS | {
    200: {
        "description": "Audio of one piece in the requested format; JSON for several pieces or if `Accept` "
        "prefers `application/json`; events with `stream_format: sse`.",
        "model": GenerationResult,
        "content": {
            "audio/wav": _BINARY,
            "audio/flac": _BINARY,
            "audio/mpeg": _BINARY,
            "audio/ogg": _BINARY,
            "audio/pcm": _BINARY,
            "text/event-stream": {"schema": {"type": "string"}},
        },
        "headers": {
            name: {"description": text, "schema": {"type": "string"}}
            for name, text in {
                "X-Request-Id": "Id of the generation.",
                "X-Seed": "Comma-separated seed of each piece.",
                "X-Sample-Rate": "Sample rate of the audio in Hz.",
                "X-Channels": "Number of audio channels.",
                "X-Num-Samples": "Samples per channel of the complete piece, at the model's sample rate.",
                "X-First-Sample": "Index of the first sample in the response.",
                "X-Checksum": "Non-streaming only: comma-separated SHA-256 of each piece's samples as generated "
                "(little-endian float32, interleaved).",
                "X-Billed-Seconds": "Non-streaming only: seconds of audio charged to the quota (generated and not "
                "charged before).",
                "X-Num-Frames": "Non-streaming only: decoded codec frames, total over all pieces.",
                "X-Queue-Seconds": "Non-streaming only: engine queue time in seconds, total over all pieces.",
                "X-Prefill-Seconds": "Non-streaming only: prefill time in seconds, total over all pieces.",
                "X-Decode-Seconds": "Non-streaming only: decode time in seconds, total over all pieces.",
                "X-Num-Failovers": "Non-streaming only: failovers to another replica, total over all pieces.",
            }.items()
        },
    },
    400: _error("Malformed request or values out of range; `param` names the first such field, the message all."),
    408: _error("Timed out while reading the request body."),
    409: _error("The request id is in use, or the Idempotency-Key was used for a different request."),
    413: _error("The body, a recording, a text or the requested audio is too large."),
    415: _error("The body is neither JSON nor multipart/form-data, or has a Content-Encoding."),
    429: _error("Quota exceeded.", retry=True),
    499: _error(
        "Before its first audio, the request was cancelled (code `cancelled`), or a retry with the same "
        "Idempotency-Key or X-Request-Id took over (`superseded`)."
    ),
    504: _error(
        "The deadline passed before the first audio (code `deadline_exceeded`), or cannot be met, so the request was "
        "not started (`deadline_too_short`): repeating it unchanged is futile."
    ),
}


EXPOSED_HEADERS = [*GENERATION_RESPONSES[200]["headers"], "X-Model", "Retry-After"]
"""Response headers that CORS exposes to browsers."""


def _header(name: str, description: str, example: str, **schema: Any) -> dict[str, Any]:
    shape = {"type": "string", **schema}
    return {"name": name, "in": "header", "required": False, "description": description, "schema": shape,
            "example": example}  # fmt: skip


GENERATION_DOCS: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": {"$ref": _BODY_REF}},
            "multipart/form-data": {"schema": {"$ref": _FORM_REF}},
        },
    },
    "parameters": [
        _header(
            "X-Request-Id",
            "Id of the generation; generated if absent. 400 if it does not have this form.",
            "my-song-17",
            pattern=f"^{REQUEST_ID_PATTERN}$",
        ),
        _header(
            "Idempotency-Key",
            "Makes retries safe: the same key identifies the same request and, without an explicit seed, yields the "
            "same audio. A retry takes over: if the earlier request still runs, it ends with code `superseded`. A "
            "retry within ten minutes of the end is charged only for audio not generated before.",
            "5f1c7a",
            minLength=1,
            maxLength=255,
        ),
        _header("traceparent", "W3C trace context.", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
    ],
}


class MusicApi(FastAPI):
    """FastAPI with the complete OpenAPI document."""

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            document = get_openapi(
                title=self.title,
                version=self.version,
                description=self.description,
                routes=self.routes,
                tags=self.openapi_tags,
            )
            self.openapi_schema = _completed(document)
        return self.openapi_schema


def _completed(document: dict[str, Any]) -> dict[str, Any]:
    for path, operations in document["paths"].items():
        for operation in operations.values():
            operation["responses"].pop("422", None)  # FastAPI's own validation error, never sent by this API
            if path.startswith("/v1/"):
                operation["security"] = _SECURITY
    components = document.setdefault("components", {})
    components["securitySchemes"] = _SECURITY_SCHEMES
    schemas = components.setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    body = GenerationBody.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas["GenerationBody"], schemas["GenerationForm"] = body, _as_form(body)
    return document


def _as_form(body: dict[str, Any]) -> dict[str, Any]:
    """The same fields as multipart: recordings are files, and null fields are omitted."""
    form = copy.deepcopy(body)
    form["title"] = "GenerationForm"
    for name, field in form["properties"].items():
        if name in RECORDING_FIELDS:
            field.pop("anyOf")
            field.update(type="string", format="binary")
        elif "anyOf" in field:
            field["anyOf"] = [kind for kind in field["anyOf"] if kind.get("type") != "null"]
    form["properties"]["prompt"]["anyOf"] = [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]
    for field in form["properties"].values():
        if field.get("default", 0) is None:
            del field["default"]
    return form
