"""What goes over HTTP, as pydantic models: the body of a request, results, errors, lists. Only shapes and their words.

Ranges that depend on the settings are checked in `musicgen_serving.checks`; the ones here are the same for everyone.
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
    """A file's content: bytes of a multipart file as they are, text as base64."""
    if not isinstance(value, str):
        return value
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("expected the content of an audio file in base64; URLs and paths are not opened") from None


Recording = Annotated[bytes | None, BeforeValidator(_content), WithJsonSchema(_BASE64_SCHEMA)]


class GenerationBody(BaseModel):
    """A request for music."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    model: str | None = Field(
        None,
        min_length=1,
        max_length=200,
        description="Name of a model, see /v1/models. Default: the first one.",
        examples=["demo"],
    )
    prompt: str | list[str | None] | None = Field(
        None,
        description="What to play, or a list of such texts. Without one, the model plays what it likes. "
        "In a multipart body the field may come several times.",
        examples=["a calm piano over soft rain", ["fast techno", "slow jazz"]],
    )
    melody: Recording = Field(
        None,
        description="A recording whose melody to follow, for models that do: wav, flac, mp3, ogg, opus or aiff. "
        "A file in a multipart body; base64 in JSON. All pieces follow it.",
    )
    prompt_audio: Recording = Field(
        None, description="A recording to go on from; it is the beginning of each piece. Sent like `melody`."
    )
    duration_s: float = Field(
        10.0, gt=0, description="Seconds of each piece, those of `prompt_audio` included.", examples=[10, 30.5]
    )
    num_samples: int = Field(
        1, ge=1, le=1000, description="Pieces for each prompt; they come next to each other.", examples=[1, 2]
    )
    seed: int | None = Field(
        None,
        ge=0,
        le=MAX_SEED,
        description="The same seed gives the same audio; piece i is drawn with seed + i. Default: derived from the "
        "Idempotency-Key if there is one, else random; the response tells it.",
        examples=[42],
    )
    temperature: float = Field(1.0, ge=0, le=1e4, description="Higher is more surprising; 0 is greedy.")
    top_k: int = Field(250, ge=0, lt=2**31, description="Draw from the k most likely codes; 0 from all.")
    top_p: float = Field(
        0.0,
        ge=0,
        le=1,
        description="If more than 0, draw from the most likely codes up to this mass; top_k is ignored.",
    )
    greedy: bool = Field(False, description="Always the most likely code.")
    guidance_scale: float = Field(
        3.0, gt=-1e4, lt=1e4, description="How closely to follow the prompt; 1 turns guidance off."
    )
    melody_guidance: float | None = Field(
        None, gt=-1e4, lt=1e4, description="With a melody: how far the text outweighs it before `guidance_scale`."
    )
    extend_stride_s: float = Field(
        18.0, gt=0, le=1e4, description="Pieces longer than the model's window move on by so many seconds at a time."
    )
    stems: bool = Field(False, description="Take drums and bass out of the melody first, where that is installed.")
    loudness: float | None = Field(
        None,
        ge=-70,
        le=0,
        description="Bring each piece to this loudness in LUFS (ITU-R BS.1770-4). Not for streams. Default: as made.",
        examples=[-14],
    )
    response_format: ResponseFormat | None = Field(
        None,
        description="Default wav, or pcm16 with `stream_format: sse`. pcm16 and f32 are samples without a file around "
        "them: little-endian, channels interleaved. wav, flac and pcm16 have 16 bits. opus is at 48 kHz. All can be "
        "streamed, ogg 2.5 s behind what is made and the others not more than 0.15 s; events carry pcm16 or f32.",
    )
    stream: bool = Field(
        False,
        description="Send the audio of one piece while it is made. A connection that breaks before the proper end of "
        "the response was a failure: what came is incomplete.",
    )
    stream_format: Literal["audio", "sse"] = Field(
        "audio",
        description="sse: server-sent events, whether `stream` is set or not: `music.generation.started`, "
        "`music.audio.delta` with base64 audio, and last one of `music.generation.done`, `.failed`, `.cancelled`.",
    )
    deadline_s: float | None = Field(
        None,
        gt=0,
        le=1e6,
        description="Seconds after which the rest is of no use: then the request is cancelled. Default: none.",
        examples=[30],
    )
    first_sample: int = Field(
        0,
        ge=0,
        le=2**53,
        description="Leave out the samples before this one, counted at the model's rate: to go on after a broken "
        "connection, with the same seed or Idempotency-Key. With the key what was made before is not charged again. "
        "The answer is a file of its own; in mp3, ogg and opus its sound is encoded anew from there, so it meets what "
        "came before only nearly.",
    )


class ErrorObject(BaseModel):
    """What went wrong."""

    message: str = Field(description="What was expected, what was got, what to do.")
    type: str = Field(examples=["invalid_request_error", "rate_limit_error"])
    param: str | None = Field(description="The field that is wrong.")
    code: str = Field(description="Stable name for programs.", examples=["invalid_request", "rate_limit_exceeded"])


class ErrorBody(BaseModel):
    """Every failure looks like this."""

    error: ErrorObject


class PieceResult(BaseModel):
    """One piece of a whole result."""

    index: int
    seed: int
    audio: str = Field(description="Base64 in the format that was asked for.")
    num_samples: int = Field(description="Samples a channel at the model's rate.")
    checksum: str = Field(
        description="SHA-256 of the samples as made: little-endian float32, channels interleaved, before loudness and "
        "format."
    )
    audio_checksum: str = Field(description="SHA-256 of the decoded `audio`.")


class UsageBody(BaseModel):
    """What a request took; of several pieces the sums."""

    billed_s: float = Field(
        description="Seconds of audio that count against the allowance: made, and not charged before."
    )
    num_frames: int
    queue_s: float
    prefill_s: float
    decode_s: float
    num_failovers: int


class GenerationResult(BaseModel):
    """A whole result as JSON."""

    id: str
    object: Literal["music.generation"] = "music.generation"
    created: int = Field(description="Unix seconds.")
    model: str
    finish_reason: str
    response_format: ResponseFormat
    sample_rate: int = Field(description="Of the audio in `data`, in Hz.")
    channels: int
    data: list[PieceResult]
    usage: UsageBody


class StatusBody(BaseModel):
    """A generation as it is now."""

    id: str
    object: Literal["music.generation"] = "music.generation"
    model: str
    status: str = Field(examples=["running", "finished", "cancelled", "failed"])
    audio_s: float = Field(description="Seconds asked for.")
    done_s: float = Field(description="Seconds given out.")
    age_s: float = Field(description="Seconds since it was admitted.")
    error: str | None = None


class ModelBody(BaseModel):
    """A served model."""

    id: str
    object: Literal["model"] = "model"
    license: str = Field(description="Of the weights.")
    sample_rate: int
    channels: int
    melody: bool = Field(description="Follows a melody.")
    max_duration_s: float
    window_s: float = Field(description="Seconds that the model sees at once.")
    weights: str


class ModelList(BaseModel):
    """The models that the caller may use."""

    object: Literal["list"] = "list"
    data: list[ModelBody]


class LiveBody(BaseModel):
    status: Literal["ok"] = "ok"


class ReadyBody(BaseModel):
    """Whether requests can be taken."""

    ready: bool
    details: dict[str, str] = Field(description="Part → `ready`, or what it waits for.")


class NotReadyBody(ReadyBody):
    error: ErrorObject
