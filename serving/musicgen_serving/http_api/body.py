"""From the bytes of a request to a `GenerationBody`: JSON, or multipart/form-data with files.

Reads with a time limit a message, parses large bodies in a thread. Opens nothing: files come in the body or not at all.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from pydantic import ValidationError
from python_multipart.exceptions import FormParserError
from starlette.datastructures import Headers, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from musicgen.errors import InvalidRequestError
from musicgen_serving.http_api.errors import plain_text
from musicgen_serving.http_api.schemas import RECORDING_FIELDS, GenerationBody

_INLINE_BYTES = 65536
"""Parsing less is quicker than a thread."""
_MAX_FILES, _MAX_FIELDS = 4, 200


class _InMemoryParser(MultiPartParser):
    spool_max_size = 2**62  # the body is in memory already, and bounded


async def read_body(request: Request, stall_s: float) -> bytes:
    """The whole body. Raises: HTTPException 408: nothing came for `stall_s`; ClientDisconnect; TooLargeError."""
    parts: list[bytes] = []
    while True:
        try:
            async with asyncio.timeout(stall_s):
                message = await request.receive()
        except TimeoutError:
            raise HTTPException(408, f"expected the rest of the body, got nothing for {stall_s:g} s") from None
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


async def parse_body(headers: Headers, content: bytes) -> GenerationBody:
    """The fields of a request.

    Raises:
        InvalidRequestError: not JSON, not multipart, an unknown field, or a value of another type or range.
        HTTPException: 415: another media type.
    """
    kind = headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind == "application/json":
        if len(content) <= _INLINE_BYTES:
            return _from_json(content)
        return await asyncio.to_thread(_from_json, content)
    if kind == "multipart/form-data":
        if len(content) <= _INLINE_BYTES:
            return _from_form(await _form_items(headers, content))
        # In a loop of the thread's own: the parser is a coroutine, which with a body in memory waits for nothing.
        return await asyncio.to_thread(lambda: _from_form(asyncio.run(_form_items(headers, content))))
    raise HTTPException(415, "expected application/json or multipart/form-data as Content-Type, got something else")


def _from_json(content: bytes) -> GenerationBody:
    try:
        return GenerationBody.model_validate_json(content, strict=True)
    except ValidationError as error:
        raise _invalid(error) from None


def _from_form(fields: dict[str, object]) -> GenerationBody:
    try:
        return GenerationBody.model_validate(fields)
    except ValidationError as error:
        raise _invalid(error) from None


async def _form_items(headers: Headers, content: bytes) -> dict[str, object]:
    async def once() -> AsyncGenerator[bytes, None]:
        yield content

    parser = _InMemoryParser(
        headers, once(), max_files=_MAX_FILES, max_fields=_MAX_FIELDS, max_part_size=max(1, len(content))
    )
    try:
        form = await parser.parse()
    except (MultiPartException, FormParserError, ValueError, LookupError) as error:
        reason = error.message if isinstance(error, MultiPartException) else "a broken one"
        raise InvalidRequestError("a multipart/form-data body", plain_text(reason, 200)) from None
    fields: dict[str, object] = {}
    try:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile) and name not in RECORDING_FIELDS:
                expected = f"files only as {' and '.join(RECORDING_FIELDS)}"
                raise InvalidRequestError(expected, "a file", param=plain_text(name, 100))
            _put(fields, name, await value.read() if isinstance(value, UploadFile) else value)
    finally:
        await form.close()
    return fields


def _put(fields: dict[str, object], name: str, value: object) -> None:
    """Several prompts make a list; nothing else comes twice."""
    if name not in fields:
        fields[name] = value
    elif name == "prompt":
        earlier = fields[name]
        fields[name] = [*earlier, value] if isinstance(earlier, list) else [earlier, value]
    else:
        raise InvalidRequestError("each field once", "the same one again", param=plain_text(name, 100))


def _invalid(error: ValidationError) -> InvalidRequestError:
    """The first problem, without any value that was sent."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    # A union's alternatives are at the end of the place; the field is at its beginning.
    param = plain_text(str(first["loc"][0]), 100) if first["loc"] else None
    if first["type"] == "json_invalid":
        return InvalidRequestError("a JSON object", plain_text(first["msg"], 200))
    if first["type"] == "extra_forbidden":
        return InvalidRequestError("only fields of this API", "an unknown one", "see /docs", param=param)
    reason = first["msg"].removeprefix("Value error, ")
    return InvalidRequestError("a value of the documented type and range", plain_text(reason, 300), param=param)
