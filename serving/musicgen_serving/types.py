"""The nouns of the service, whatever the transport. Each says who sets it.

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
    """One piece of music that a request asks for. Set by the edge."""

    prompt: str | None
    seed: int


@dataclass(frozen=True, slots=True, eq=False)
class GenerationRequest:
    """What a user asks for, checked and complete. Set by the edge (HTTP or gRPC)."""

    request_id: str
    model: str
    """Name of a served model."""
    pieces: tuple[Piece, ...]
    duration_s: float
    """Seconds of each piece, a prompt recording included."""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    """Its seed is not used: each piece has its own."""
    melody: bytes | None = None
    """Content of an audio file to follow, for all pieces."""
    prompt_audio: bytes | None = None
    """Content of an audio file to go on from, for all pieces."""
    stems: bool = False
    """Take drums and bass out of the melody first."""
    extend_stride_s: float = 18.0
    chunks: ChunkPolicy | None = None
    """None: the caller does not listen meanwhile; each piece comes in large chunks."""
    deadline_s: float | None = None
    """Seconds from now after which the caller has no use for the rest."""
    first_sample: int = 0
    """Give out samples from this one on: what a caller whose connection broke has already got."""
    idempotency_key: str | None = None
    """The same key of the same tenant means the same request: a repeat must have the same `fingerprint`."""
    fingerprint: str = ""
    """Hash of everything that decides the result; set with `idempotency_key`."""
    trace_parent: str | None = None
    """W3C traceparent of the caller."""

    @property
    def audio_s(self) -> float:
        """Seconds of audio that the request asks for, all pieces together: what quotas count."""
        return self.duration_s * len(self.pieces)


@dataclass(frozen=True, slots=True)
class Started:
    """The first event: the request is admitted and a language model has begun or queued it. Set by the service."""

    request_id: str
    model: str
    seeds: tuple[int, ...]
    sample_rate: int
    channels: int
    num_samples: int
    """Samples a channel that each piece will have in all (also those before `first_sample`)."""
    quoted_start_s: float
    """Seconds from admission until decoding starts, as the engine foresaw it (the latest piece's)."""


@dataclass(frozen=True, slots=True, eq=False)
class PieceAudio:
    """The next samples of one piece, in order and without gaps. Set by the pipeline."""

    piece: int
    samples: Tensor
    """`[C, N]` float32, N ≥ 1."""
    sample_offset: int
    """Sample of the piece at which these begin."""


@dataclass(frozen=True, slots=True)
class PieceReport:
    """How one piece went. Set by the pipeline."""

    piece: int
    num_samples: int
    """Samples a channel given out, those before `first_sample` not counted."""
    checksum: str
    """SHA-256, in hex, of the samples given out: little-endian float32, channels interleaved."""
    num_frames: int
    """Frames that were decoded for it."""
    queue_s: float
    prefill_s: float
    decode_s: float
    num_failovers: int
    """Times a replica was lost and another went on."""


@dataclass(frozen=True, slots=True)
class GenerationEnd:
    """The one terminal event. Set by the service."""

    request_id: str
    reason: FinishReason
    pieces: tuple[PieceReport, ...]
    billed_s: float
    """Seconds of audio that count against the tenant's allowance: what was made and had not been billed before."""
    error: BaseException | None = None
    """Why it failed or was cancelled: an error of the project, never one that names internals."""


GenerationEvent = Started | PieceAudio | GenerationEnd


@dataclass(frozen=True, slots=True)
class GenerationStatus:
    """A look at a request from outside. Set by the gatekeeper."""

    request_id: str
    model: str
    state: str
    """`running`, or the value of a `FinishReason`."""
    audio_s: float
    """Seconds asked for."""
    done_s: float
    """Seconds of audio given out so far."""
    age_s: float
    """Seconds since it was admitted."""
    error: str | None = None


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A served model, as users see it. Set by the service."""

    name: str
    license: str
    sample_rate: int
    channels: int
    melody: bool
    """Follows a melody."""
    max_duration_s: float
    """Longest piece that is accepted here."""
    window_s: float
    """Seconds that the model sees at once; longer pieces are made in overlapping windows."""
    weights: str
    """Kind of numbers of the weights."""
