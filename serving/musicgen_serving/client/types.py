"""What goes into and comes out of the client, the same for both protocols."""

from __future__ import annotations

import secrets
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from musicgen.errors import MusicGenError

Samples = NDArray[np.float32]
DRAWN_SEEDS = 2**31
"""Seeds are drawn below this, so that they are short enough to type."""


class ConnectionLostError(MusicGenError):
    """The service cannot be reached, or a connection ended before its answer did, also after further attempts."""


class BrokenAnswerError(MusicGenError):
    """An answer is not what the service's API promises, or its audio does not have the checksum it came with."""


@dataclass(frozen=True, slots=True)
class Retries:
    """How often and when to try again. Attempts are counted from the last sample that came."""

    max_attempts: int = 6
    first_backoff_s: float = 0.2
    """Before the second attempt; doubled after each."""
    max_backoff_s: float = 10.0
    max_wait_s: float = 60.0
    """A service that asks for a longer pause is not asked again."""


@dataclass(frozen=True, slots=True)
class Tls:
    """Files in PEM."""

    ca: Path | None = None
    """Who signs the service's certificate; None: whom this machine trusts."""
    certificate: Path | None = None
    """What the client shows, with `key`."""
    key: Path | None = None


@dataclass(frozen=True, slots=True, eq=False)
class MusicRequest:
    """One piece to make. None: the service's default. Meanings and ranges are the API's."""

    prompt: str | None = None
    model: str | None = None
    melody: bytes | None = None
    """Content of an audio file."""
    prompt_audio: bytes | None = None
    """Content of an audio file."""
    stems: bool = False
    duration_s: float = 10.0
    seed: int = field(default_factory=lambda: secrets.randbelow(DRAWN_SEEDS))
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    greedy: bool = False
    guidance_scale: float | None = None
    melody_guidance: float | None = None
    extend_stride_s: float | None = None
    request_id: str | None = None
    """Name for `cancel` and `status`; None: the service chooses."""
    idempotency_key: str = field(default_factory=lambda: uuid.uuid4().hex)


@dataclass(frozen=True, slots=True)
class Start:
    """What a piece will be."""

    request_id: str
    model: str
    seed: int
    sample_rate: int
    channels: int
    num_samples: int


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """The next samples of a piece."""

    samples: Samples
    """`[C, N]`."""
    sample_offset: int


@dataclass(frozen=True, slots=True)
class Report:
    """How a piece went, as far as the connection that ended it saw it."""

    num_samples: int
    """Samples that this connection brought."""
    checksum: str
    """SHA-256, in hex, of those: little-endian float32, channels interleaved."""
    num_frames: int
    queue_s: float
    prefill_s: float
    decode_s: float
    billed_s: float


@dataclass(frozen=True, slots=True, eq=False)
class Generated:
    """A whole piece."""

    samples: Samples
    """`[C, N]`, full scale ±1."""
    sample_rate: int
    seed: int
    model: str
    request_id: str
    report: Report


Event = Start | Chunk | Report


def from_bytes(content: bytes, channels: int) -> Samples:
    """Interleaved little-endian float32 → `[C, N]`.

    Raises:
        BrokenAnswerError: no whole number of samples.
    """
    if channels < 1 or len(content) % (4 * channels):
        raise BrokenAnswerError(f"expected whole samples of {channels} channels, got {len(content)} bytes")
    return np.frombuffer(content, "<f4").astype(np.float32, copy=False).reshape(-1, channels).T


def to_bytes(samples: Samples) -> bytes:
    """`[C, N]` → what checksums are made of."""
    return np.ascontiguousarray(samples.T).astype("<f4", copy=False).tobytes()
