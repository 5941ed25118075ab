"""Fields of a call → validated `GenerationRequest`: limits, seeds and fingerprints for idempotency.

Shared by both ingresses, so that HTTP and gRPC accept the same requests and produce the same audio. Independent of
transports and models: the service checks what depends on the model (window length, melody support).
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import re
import secrets
from dataclasses import dataclass

from musicgen.errors import InvalidRequestError
from musicgen.inputs import resolve_seeds
from musicgen.types import MAX_SEED, ChunkPolicy, SamplingParams
from musicgen_serving.admission import Tenant
from musicgen_serving.errors import TooLargeError, UnauthenticatedError
from musicgen_serving.settings import LimitSettings
from musicgen_serving.types import GenerationRequest, Piece

MAX_IDEMPOTENCY_KEY_CHARS = 255
MAX_MODEL_CHARS = 200
MAX_API_KEY_CHARS = 512
MIN_LOUDNESS_LUFS, MAX_LOUDNESS_LUFS = -70.0, 0.0
DRAWN_SEEDS = 2**52
"""Random seeds are drawn below this, so that seed + piece stays below 2^53: exact as a JavaScript number."""
_MAX_NUMBER = 1e4
"""Upper bound of numeric fields; keeps float32 arithmetic finite."""
_MAX_COUNT = 2**31 - 1
_INLINE_BYTES = 65536
REQUEST_ID_PATTERN = "[A-Za-z0-9][A-Za-z0-9._:-]{0,127}"
_TRACE_PARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


@dataclass(frozen=True, slots=True, eq=False)
class RequestFields:
    """An incoming call in plain types, not validated yet. Set by an ingress."""

    request_id: str
    model: str
    """Name of a served model; the ingress has filled in the default."""
    prompts: tuple[str | None, ...] = (None,)
    """None: no text. Each yields `num_samples` consecutive pieces."""
    duration_s: float = 10.0
    num_samples: int = 1
    seed: int | None = None
    """Piece i uses seed + i. None: derived from tenant and idempotency key if there is one, else random."""
    temperature: float = 1.0
    top_k: int = 250
    top_p: float = 0.0
    greedy: bool = False
    guidance_scale: float = 3.0
    melody_guidance: float | None = None
    melody: bytes | None = None
    """Audio file that has passed `recordings.check_recording`."""
    prompt_audio: bytes | None = None
    """As `melody`."""
    stems: bool = False
    extend_stride_s: float = 18.0
    loudness_lufs: float | None = None
    """Loudness to which the ingress normalizes whole pieces; None: no normalization."""
    chunks: ChunkPolicy | None = None
    """Chunking of a stream; None: non-streaming."""
    first_sample: int = 0
    deadline_s: float | None = None
    idempotency_key: str | None = None
    trace_parent: str | None = None


def is_request_id(text: str) -> bool:
    """Whether a caller's request id is valid: up to 128 letters, digits, '.', '_', ':' or '-'."""
    return re.fullmatch(REQUEST_ID_PATTERN, text) is not None


def new_request_id() -> str:
    return secrets.token_hex(16)


def well_formed_trace_parent(text: str | None) -> str | None:
    """The W3C traceparent if well-formed, else None: the standard says to ignore invalid ones."""
    return text if text and _TRACE_PARENT.fullmatch(text) else None


def given_key(authorization: str, x_api_key: str) -> str | None:
    """The API key of a call: `Authorization: Bearer KEY`, or `X-API-Key: KEY`; empty strings if absent.

    Raises:
        UnauthenticatedError: an unsupported scheme, or a key that is too long.
    """
    scheme, _, key = authorization.partition(" ")
    if scheme and scheme.lower() != "bearer":
        raise UnauthenticatedError("unsupported authorization scheme; use Authorization: Bearer KEY or X-API-Key: KEY")
    key = key.strip() or x_api_key.strip()
    if len(key) > MAX_API_KEY_CHARS:
        raise UnauthenticatedError("API key is too long")
    return key or None


async def checked_request(fields: RequestFields, tenant: Tenant, limits: LimitSettings) -> GenerationRequest:
    """As `build_request`, but in a thread if large recordings must be hashed, so as not to stall other streams.

    Raises: as `build_request`.
    """
    if fields.idempotency_key is None or len(fields.melody or b"") + len(fields.prompt_audio or b"") <= _INLINE_BYTES:
        return build_request(fields, tenant, limits)
    return await asyncio.to_thread(build_request, fields, tenant, limits)


def build_request(fields: RequestFields, tenant: Tenant, limits: LimitSettings) -> GenerationRequest:
    """The validated request.

    Raises:
        InvalidRequestError: a field is out of range; names the field.
        TooLargeError: a text exceeds the limits, or there is too much audio for one response.
    """
    _check_texts(fields, limits)
    _check_numbers(fields, tenant, limits)
    sampling = SamplingParams(
        greedy=fields.greedy,
        temperature=fields.temperature,
        top_k=fields.top_k,
        top_p=fields.top_p,
        guidance_scale=fields.guidance_scale,
        melody_guidance=fields.melody_guidance,
    )
    if fields.stems and fields.melody is None:
        raise InvalidRequestError("a melody with stems", "none", "send a melody or omit stems", param="stems")
    if fields.melody_guidance is not None and fields.melody is None:
        hint = "send a melody or omit melody_guidance"
        raise InvalidRequestError("a melody with melody_guidance", "none", hint, param="melody_guidance")
    texts = [prompt for prompt in fields.prompts for _ in range(fields.num_samples)]
    seeds = resolve_seeds(_first_seed(fields, tenant.name), len(texts))
    return GenerationRequest(
        request_id=fields.request_id,
        model=fields.model,
        pieces=tuple(Piece(text, seed) for text, seed in zip(texts, seeds, strict=True)),
        duration_s=float(fields.duration_s),
        sampling=sampling,
        melody=fields.melody,
        prompt_audio=fields.prompt_audio,
        stems=fields.stems,
        extend_stride_s=float(fields.extend_stride_s),
        chunks=fields.chunks,
        deadline_s=fields.deadline_s,
        first_sample=fields.first_sample,
        idempotency_key=fields.idempotency_key,
        fingerprint=_fingerprint(fields, seeds) if fields.idempotency_key is not None else "",
        trace_parent=well_formed_trace_parent(fields.trace_parent),
    )


def _check_texts(fields: RequestFields, limits: LimitSettings) -> None:
    if not is_request_id(fields.request_id):
        expected = "1 to 128 letters, digits, '.', '_', ':' or '-', starting with a letter or digit"
        raise InvalidRequestError(expected, "a malformed id", param="request_id")
    if not 0 < len(fields.model) <= MAX_MODEL_CHARS:
        got = f"{len(fields.model)} characters"
        raise InvalidRequestError(f"a model name of 1 to {MAX_MODEL_CHARS} characters", got, param="model")
    key = fields.idempotency_key
    if key is not None and not (0 < len(key) <= MAX_IDEMPOTENCY_KEY_CHARS and key.isascii() and key.isprintable()):
        expected = f"1 to {MAX_IDEMPOTENCY_KEY_CHARS} printable ASCII characters"
        raise InvalidRequestError(expected, "a malformed key", param="idempotency_key")
    if not fields.prompts:
        hint = "omit it for unconditional generation"
        raise InvalidRequestError("at least one prompt", "an empty list", hint, param="prompt")
    for prompt in fields.prompts:
        if prompt is None:
            continue
        if len(prompt) > limits.max_prompt_chars:
            message = f"prompt: expected at most {limits.max_prompt_chars} characters, got {len(prompt)}"
            raise TooLargeError(message, param="prompt")
        if any("\ud800" <= char <= "\udfff" for char in prompt):
            raise InvalidRequestError("valid Unicode", "a lone surrogate", param="prompt")


def longest_piece_s(tenant: Tenant, limits: LimitSettings) -> float:
    """Maximum duration of a piece for this tenant, in seconds."""
    return limits.max_duration_s if tenant.max_duration_s is None else min(limits.max_duration_s, tenant.max_duration_s)


def _check_numbers(fields: RequestFields, tenant: Tenant, limits: LimitSettings) -> None:
    _check_range("duration_s", fields.duration_s, 0, longest_piece_s(tenant, limits), "seconds", above=True)
    _check_range("extend_stride_s", fields.extend_stride_s, 0, _MAX_NUMBER, "seconds", above=True)
    _check_range("temperature", fields.temperature, 0, _MAX_NUMBER)
    _check_range("top_k", fields.top_k, 0, _MAX_COUNT)
    _check_range("num_samples", fields.num_samples, 1, _MAX_COUNT)
    _check_range("first_sample", fields.first_sample, 0, 2**53)
    if fields.loudness_lufs is not None:
        _check_range("loudness", fields.loudness_lufs, MIN_LOUDNESS_LUFS, MAX_LOUDNESS_LUFS, "LUFS")
        if fields.chunks is not None or fields.first_sample:
            hint = "loudness is measured over the whole piece; omit it, or omit streaming and first_sample"
            got = "a stream or first_sample"
            raise InvalidRequestError("loudness only for complete, non-streaming pieces", got, hint, param="loudness")
    if fields.deadline_s is not None and not fields.deadline_s > 0:
        raise InvalidRequestError("a deadline in the future", f"{fields.deadline_s:g} s", param="deadline_s")
    num_pieces = len(fields.prompts) * fields.num_samples
    if num_pieces > limits.max_pieces:
        expected = f"at most {limits.max_pieces} pieces (prompts × num_samples)"
        param = "num_samples" if fields.num_samples > 1 else "prompt"
        raise InvalidRequestError(expected, str(num_pieces), "send several requests", param=param)
    if fields.chunks is None and num_pieces > 1 and num_pieces * fields.duration_s > limits.max_answer_s:
        raise TooLargeError(
            f"duration_s: expected at most {limits.max_answer_s:g} s of audio in a non-streaming response "
            f"(max_answer_s), got {num_pieces} pieces of {fields.duration_s:g} s; stream them or send several requests",
            param="duration_s",
        )


def _check_range(param: str, value: float, low: float, high: float, unit: str = "", *, above: bool = False) -> None:
    """Check `low ≤ value ≤ high`, or `low < value ≤ high` if `above`; rejects NaN."""
    if (low < value if above else low <= value) and value <= high:
        return
    bounds = f"more than {low:g} and at most {_bound(high)}" if above else f"{low:g} to {_bound(high)}"
    raise InvalidRequestError(f"{bounds} {unit}".rstrip(), _shown(value), param=param)


def _bound(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


def _shown(value: float) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"a number with {len(text)} digits"


def _first_seed(fields: RequestFields, tenant: str) -> int:
    if fields.seed is not None:
        _check_range("seed", fields.seed, 0, MAX_SEED)
        return fields.seed
    if fields.idempotency_key is None:
        return secrets.randbelow(DRAWN_SEEDS)
    text = json.dumps(["musicgen seed", tenant, fields.idempotency_key])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % DRAWN_SEEDS


def _fingerprint(fields: RequestFields, seeds: list[int]) -> str:
    """SHA-256, in hex, of everything that determines the samples, but not their delivery (chunks, first sample)."""
    values: dict[str, object] = {
        "model": fields.model,
        "prompts": fields.prompts,
        "seeds": seeds,
        "greedy": fields.greedy,
        "top_k": fields.top_k,
        "stems": fields.stems,
    }
    for name in ("duration_s", "temperature", "top_p", "guidance_scale", "extend_stride_s", "loudness_lufs"):
        values[name] = _canonical(getattr(fields, name))
    values["melody_guidance"] = _canonical(fields.melody_guidance)
    for name in ("melody", "prompt_audio"):
        content: bytes | None = getattr(fields, name)
        values[name] = None if content is None else hashlib.sha256(content).hexdigest()
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _canonical(number: float | None) -> str | None:
    """The same text for equal numbers, such as 1 and 1.0, or 0.0 and -0.0."""
    assert number is None or math.isfinite(number)
    return None if number is None else (float(number) + 0.0).hex()
