"""Pydantic models of HTTP bodies: requests, results, errors, lists. Schemas and their documentation only.

Limits that depend on the settings are checked in `musicgen_serving.checks`; those here are fixed.
"""

from __future__ import annotations

import base64
import binascii
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from musicgen.types import MAX_SEED

ResponseFormat = Literal["wav", "flac", "mp3", "opus", "ogg", "pcm16", "f32"]
RECORDING_FIELDS = ("melody", "prompt_audio")
_BASE64_SCHEMA = {"anyOf": [{"type": "string", "contentEncoding": "base64"}, {"type": "null"}]}


def _content(value: Any) -> Any:
    """A file's content: multipart bytes unchanged, text decoded as base64."""
    if not isinstance(value, str):
        return value
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("Input should be a base64-encoded audio file, not a URL or path") from None


Recording = Annotated[bytes | None, BeforeValidator(_content), WithJsonSchema(_BASE64_SCHEMA)]


class GenerationBody(BaseModel):
    """A generation request."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    model: str | None = Field(
        None,
        min_length=1,
        max_length=200,
        description="Model name, see /v1/models. Default: the first one.",
        examples=["demo"],
    )
    prompt: str | list[str | None] | None = Field(
        None,
        description="Text prompt, or a list of prompts. If omitted, null or empty, generation is unconditional. "
        "In a multipart body, repeat the field for several prompts.",
        examples=["a calm piano over soft rain", ["fast techno", "slow jazz"]],
    )
    melody: Recording = Field(
        None,
        description="Audio file for melody conditioning (melody models only): wav, flac, mp3, ogg, opus or aiff. "
        "A file in a multipart body, base64 in JSON. Applies to all pieces.",
    )
    prompt_audio: Recording = Field(
        None, description="Audio prompt to continue; it becomes the beginning of each piece. Encoded like `melody`."
    )
    duration_s: float = Field(
        10.0, gt=0, description="Duration of each piece in seconds, including `prompt_audio`.", examples=[10, 30.5]
    )
    num_samples: int = Field(
        1, ge=1, le=1000, description="Number of pieces per prompt, returned consecutively.", examples=[1, 2]
    )
    seed: int | None = Field(
        None,
        ge=0,
        le=MAX_SEED,
        description="The same seed yields the same audio; piece i uses seed + i. Default: derived from the "
        "Idempotency-Key if present, else random; then all seeds are below 2^53, exact in parsers that read numbers "
        "as 64-bit floats, such as JavaScript's. The response includes it.",
        examples=[42],
    )
    temperature: float = Field(1.0, ge=0, le=1e4, description="Sampling temperature; 0 is greedy.")
    top_k: int = Field(250, ge=0, lt=2**31, description="Sample from the k most likely codes; 0: from all.")
    top_p: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Nucleus sampling: if above 0, sample from the most likely codes up to this probability mass; "
        "overrides top_k.",
    )
    greedy: bool = Field(False, description="Always pick the most likely code.")
    guidance_scale: float = Field(
        3.0, gt=-1e4, lt=1e4, description="Classifier-free guidance scale; 1 disables guidance."
    )
    melody_guidance: float | None = Field(
        None,
        gt=-1e4,
        lt=1e4,
        description="Double classifier-free guidance (audiocraft's cfg_coef_beta): weight of the text relative to the "
        "melody. Requires `melody`.",
    )
    extend_stride_s: float = Field(
        18.0,
        gt=0,
        le=1e4,
        description="Stride in seconds between overlapping windows, for pieces longer than the model's window.",
    )
    stems: bool = Field(False, description="Remove drums and bass from the melody first. Not every service offers it.")
    loudness: float | None = Field(
        None,
        ge=-70,
        le=0,
        description="Normalize each piece to this loudness in LUFS (ITU-R BS.1770-4). Non-streaming only. Default: no "
        "normalization.",
        examples=[-14],
    )
    response_format: ResponseFormat | None = Field(
        None,
        description="Default: the audio type that Accept prefers, else wav; pcm16 with `stream_format: sse`. "
        "pcm16 and f32 are raw little-endian samples, channels interleaved. wav, flac and pcm16 are 16-bit; opus is at "
        "48 kHz. All formats can be streamed; encoding delays ogg by up to 2.5 s, the others by up to 0.15 s. Events "
        "carry pcm16 or f32.",
    )
    stream: bool = Field(
        False,
        description="Stream the audio of one piece while it is generated. If the connection closes before the proper "
        "end of the response, the generation failed and the audio is incomplete.",
    )
    stream_format: Literal["audio", "sse"] = Field(
        "audio",
        description="sse: server-sent events, regardless of `stream`: `music.generation.started`, "
        "`music.audio.delta` with base64 audio, and finally `music.generation.done`, `.failed` or `.cancelled`.",
    )
    deadline_s: float | None = Field(
        None,
        gt=0,
        le=1e6,
        description="Time limit in seconds; the request is cancelled when it expires, and not started if it cannot be "
        "met. Default: none.",
        examples=[30],
    )
    first_sample: int = Field(
        0,
        ge=0,
        le=2**53,
        description="Skip the samples before this one (at the model's sample rate), to resume after a lost connection "
        "with the same seed or Idempotency-Key. With the key, audio generated before is not charged again. The "
        "response is a separate file; mp3, ogg and opus are encoded afresh from there and do not join seamlessly.",
    )


class ErrorObject(BaseModel):
    """Error details."""

    message: str = Field(description="Human-readable description.")
    type: str = Field(examples=["invalid_request_error", "rate_limit_error"])
    param: str | None = Field(description="The invalid field, if any; of several, the first one in the message.")
    code: str = Field(description="Stable machine-readable code.", examples=["invalid_request", "rate_limit_exceeded"])


class ErrorBody(BaseModel):
    """Body of every error response."""

    error: ErrorObject


class PieceResult(BaseModel):
    """One piece of a non-streaming result."""

    index: int
    seed: int
    audio: str = Field(description="Base64-encoded audio in the requested format.")
    num_samples: int = Field(description="Samples per channel, at the model's sample rate.")
    checksum: str = Field(
        description="SHA-256 of the samples as generated (little-endian float32, interleaved), before loudness "
        "normalization and encoding."
    )
    audio_checksum: str = Field(description="SHA-256 of the base64-decoded `audio`.")


class UsageBody(BaseModel):
    """Resource usage, summed over all pieces."""

    billed_s: float = Field(description="Seconds of audio charged to the quota: generated and not charged before.")
    num_frames: int
    queue_s: float
    prefill_s: float
    decode_s: float
    num_failovers: int


class GenerationResult(BaseModel):
    """A non-streaming result as JSON."""

    id: str
    object: Literal["music.generation"] = "music.generation"
    created: int = Field(description="Unix time in seconds.")
    model: str
    finish_reason: str
    response_format: ResponseFormat
    sample_rate: int = Field(description="Sample rate of the audio in `data`, in Hz.")
    channels: int
    data: list[PieceResult]
    usage: UsageBody


class StatusBody(BaseModel):
    """Current status of a generation."""

    id: str
    object: Literal["music.generation"] = "music.generation"
    model: str
    status: str = Field(examples=["running", "finished", "cancelled", "failed"])
    audio_s: float = Field(description="Requested seconds of audio.")
    done_s: float = Field(description="Seconds of audio delivered so far.")
    age_s: float = Field(description="Seconds since admission.")
    error: str | None = None


class ModelBody(BaseModel):
    """A served model."""

    id: str
    object: Literal["model"] = "model"
    license: str = Field(description="Licence of the weights.")
    sample_rate: int
    channels: int
    melody: bool = Field(description="Supports melody conditioning.")
    max_duration_s: float
    window_s: float = Field(description="Context window of the model in seconds.")
    weights: str


class ModelList(BaseModel):
    """The models available to the caller."""

    object: Literal["list"] = "list"
    data: list[ModelBody]


class LiveBody(BaseModel):
    status: Literal["ok"] = "ok"


class ReadyBody(BaseModel):
    """Whether requests can be served."""

    ready: bool
    details: dict[str, str] = Field(description="Component → `ready`, or what it is waiting for.")


class NotReadyBody(ReadyBody):
    error: ErrorObject
