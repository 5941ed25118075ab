"""Transport-independent data types of the service.

An HTTP body or a proto message → `GenerationRequest` → events: `Started`, then `PieceAudio` of each piece in order,
then one `GenerationEnd`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from musicgen.types import ChunkPolicy, FinishReason, SamplingParams

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Piece:
    """One requested piece of music. Set by the ingress."""

    prompt: str | None
    seed: int


@dataclass(frozen=True, slots=True, eq=False)
class GenerationRequest:
    """A validated request. Set by the ingress (HTTP or gRPC)."""

    request_id: str
    model: str
    """Name of a served model."""
    pieces: tuple[Piece, ...]
    duration_s: float
    """Duration of each piece, including the audio prompt."""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    """Its seed is not used: each piece has its own."""
    melody: bytes | None = None
    """Audio file for melody conditioning of all pieces."""
    prompt_audio: bytes | None = None
    """Audio prompt that all pieces continue."""
    stems: bool = False
    """Remove drums and bass from the melody first."""
    extend_stride_s: float = 18.0
    chunks: ChunkPolicy | None = None
    """None: non-streaming; each piece comes in large chunks."""
    deadline_s: float | None = None
    """Deadline in seconds from now."""
    first_sample: int = 0
    """First sample to deliver; a client that resumes already has the earlier ones."""
    idempotency_key: str | None = None
    """Identifies the request within its tenant: a retry must have the same `fingerprint`."""
    fingerprint: str = ""
    """Hash of everything that determines the result; set with `idempotency_key`."""
    trace_parent: str | None = None
    """W3C traceparent of the caller."""

    @property
    def audio_s(self) -> float:
        """Requested seconds of audio, total over all pieces; the amount that quotas count."""
        return self.duration_s * len(self.pieces)


@dataclass(frozen=True, slots=True)
class Started:
    """The first event: the request is admitted and running or queued at a language model. Set by the service."""

    request_id: str
    model: str
    seeds: tuple[int, ...]
    sample_rate: int
    channels: int
    num_samples: int
    """Samples per channel of each complete piece, including those before `first_sample`."""
    quoted_start_s: float
    """The engine's estimate of seconds from admission to the start of decoding (of the last piece)."""


@dataclass(frozen=True, slots=True, eq=False)
class PieceAudio:
    """The next samples of one piece, in order and without gaps. Set by the pipeline."""

    piece: int
    samples: Tensor
    """`[C, N]` float32, N ≥ 1."""
    sample_offset: int
    """Index of the first of these samples within the piece."""


@dataclass(frozen=True, slots=True)
class PieceReport:
    """Statistics of one piece. Set by the pipeline."""

    piece: int
    num_samples: int
    """Delivered samples per channel, not counting those before `first_sample`."""
    checksum: str
    """SHA-256, in hex, of the delivered samples: little-endian float32, channels interleaved."""
    num_frames: int
    """Decoded frames."""
    queue_s: float
    prefill_s: float
    decode_s: float
    num_failovers: int
    """Failovers to another replica."""


@dataclass(frozen=True, slots=True)
class GenerationEnd:
    """The terminal event. Set by the service."""

    request_id: str
    reason: FinishReason
    pieces: tuple[PieceReport, ...]
    billed_s: float
    """Seconds of audio charged to the tenant's quota: generated and not billed before."""
    error: BaseException | None = None
    """Why it failed or was cancelled: a `MusicGenError` without internal details."""


GenerationEvent = Started | PieceAudio | GenerationEnd


@dataclass(frozen=True, slots=True)
class GenerationStatus:
    """Public status of a request. Set by the gatekeeper."""

    request_id: str
    model: str
    state: str
    """`running`, or the value of a `FinishReason`."""
    audio_s: float
    """Requested seconds of audio."""
    done_s: float
    """Seconds of audio delivered so far."""
    age_s: float
    """Seconds since admission."""
    error: str | None = None


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """Public properties of a served model. Set by the service."""

    name: str
    license: str
    sample_rate: int
    channels: int
    melody: bool
    """Supports melody conditioning."""
    max_duration_s: float
    """Maximum duration of a piece."""
    window_s: float
    """Context window in seconds; longer pieces are generated in overlapping windows."""
    weights: str
    """Weight data type."""
