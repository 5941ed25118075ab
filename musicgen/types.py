"""Core data types.

Data flow of a request: API call → `Conditioning` → `CodesRequest` → codes `[K, T]` → samples `[C, N]`.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from musicgen.arguments import checked_bool, checked_float, checked_int, shown
from musicgen.errors import InvalidRequestError

if TYPE_CHECKING:  # the service's gatekeeper and `--help` do not import torch
    from torch import Tensor

MAX_SEED = 2**63 - 1
MIN_TEMPERATURE = 1e-4
"""Below this, scaled logits overflow or sampling is effectively greedy."""
MAX_DURATION_S = 3600.0
DEFAULT_DURATION_S = 15.0


def checked_seed(seed: object) -> int:
    return checked_int(seed, "an integer in [0, 2^63)", param="seed", low=0, high=MAX_SEED)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling parameters of one request. Validated on construction, and stored as plain int, float and bool.

    Defaults are MusicGen's. Source of the semantics: audiocraft `LMModel._sample_next_token`.
    """

    greedy: bool = False
    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = 250
    """Sample from the k most likely codes (ties included); 0: all."""
    top_p: float = 0.0
    """If > 0, nucleus (top-p) sampling; overrides `top_k`."""
    guidance_scale: float = 3.0
    """Classifier-free guidance scale; 1 turns guidance off."""
    melody_guidance: float | None = None
    """Double guidance: scale of the melody-and-text prediction relative to the melody-only one, applied before
    `guidance_scale` (audiocraft's `cfg_coef_beta`)."""
    seed: int = 0

    def __post_init__(self) -> None:
        def checked_guidance(name: str) -> float:
            scale = getattr(self, name)
            return checked_float(scale, lambda x: abs(x) < 1e4, "a finite number below 10000", param=name)

        plain = {
            "greedy": checked_bool(self.greedy, param="greedy"),
            "temperature": checked_float(
                self.temperature,
                lambda x: x == 0 or MIN_TEMPERATURE <= x < math.inf,
                f"0, or a finite number ≥ {MIN_TEMPERATURE:g}",
                "0 is greedy",
                param="temperature",
            ),
            "top_k": checked_int(self.top_k, "an integer ≥ 0", "0 turns it off", param="top_k", low=0),
            "top_p": checked_float(
                self.top_p, lambda x: 0 <= x <= 1, "a number in [0, 1]", "0 turns it off", param="top_p"
            ),
            "guidance_scale": checked_guidance("guidance_scale"),
            "melody_guidance": None if self.melody_guidance is None else checked_guidance("melody_guidance"),
            "seed": checked_seed(self.seed),
        }
        for name, value in plain.items():
            object.__setattr__(self, name, value)


@dataclass(frozen=True, slots=True)
class GenerationParams:
    """Parameters of pieces: those that `set_generation_params` sets, or those of one call. Validated on construction.

    What depends on the model is validated when they are used.
    """

    sampling: SamplingParams = field(default_factory=SamplingParams)
    """Its seed is ignored: calls take their own."""
    duration_s: float = DEFAULT_DURATION_S
    """Including an audio prompt."""
    extend_stride_s: float = 18.0
    """Between window starts in pieces longer than the model's window."""

    def __post_init__(self) -> None:
        if not isinstance(self.sampling, SamplingParams):
            raise InvalidRequestError("SamplingParams", shown(self.sampling), param="sampling")
        expected = f"a number of seconds in (0, {MAX_DURATION_S:g}]"
        duration_s = checked_float(self.duration_s, lambda x: 0 < x <= MAX_DURATION_S, expected, param="duration")
        stride_s = checked_float(
            self.extend_stride_s, lambda x: 0 < x < math.inf, "a positive number of seconds", param="extend_stride"
        )
        object.__setattr__(self, "duration_s", duration_s)
        object.__setattr__(self, "extend_stride_s", stride_s)


@dataclass(frozen=True, slots=True, eq=False)
class Conditioning:
    """Conditioning of the language model: outputs of the text encoder and the chroma extractor."""

    text: Tensor | None
    """`[L, text_dim]` text encoder states of this prompt, unpadded; None for no text."""
    chroma: Tensor | None
    """`[num_frames, num_chroma]` one-hot chroma, truncated or repeated to the model's length; None for no melody."""


@dataclass(frozen=True, slots=True)
class Window:
    """The frames that the model sees at once; see `plan_windows`."""

    start: int
    """First frame, in frames of the whole piece."""
    end: int
    """One past the last frame."""


@dataclass(frozen=True, slots=True, eq=False)
class CodesRequest:
    """One fully resolved request to the language model."""

    windows: tuple[tuple[Window, Conditioning], ...]
    """One window up to the model's maximum duration; beyond it, overlapping windows in order."""
    sampling: SamplingParams
    known_codes: Tensor | None = None
    """`[K, P]` codes that the result starts with, fewer frames than the result: a prompt, or the codes an interrupted
    request had already generated (with the windows of the original request)."""

    @property
    def num_frames(self) -> int:
        """Frames of the result, including known ones."""
        return self.windows[-1][0].end

    @property
    def num_known_frames(self) -> int:
        return 0 if self.known_codes is None else self.known_codes.shape[-1]

    def with_seed(self, seed: int) -> CodesRequest:
        """The same request with another seed."""
        return replace(self, sampling=replace(self.sampling, seed=seed))


class FinishReason(enum.Enum):
    """How a request ended. Every accepted request ends in exactly one of these ways."""

    FINISHED = "finished"
    CANCELLED = "cancelled"
    """By the caller, or because its lease expired."""
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class ChunkPolicy:
    """Chunk sizes of a stream: a small first chunk, then growing ones."""

    first_frames: int = 12
    max_frames: int = 50
    growth: float = 1.5

    def __post_init__(self) -> None:
        expected = "1 ≤ first_frames ≤ max_frames and growth ≥ 1"
        for name in ("first_frames", "max_frames"):
            frames = checked_int(getattr(self, name), f"{expected}, with an integer {name}", param="chunks", low=1)
            object.__setattr__(self, name, frames)
        growth = checked_float(self.growth, lambda x: 1 <= x < math.inf, expected, param="chunks")
        object.__setattr__(self, "growth", growth)
        if self.first_frames > self.max_frames:
            raise InvalidRequestError(expected, str(self), param="chunks")

    def next_frames(self, last_frames: int) -> int:
        """Length of the chunk after one of `last_frames` frames (0: the first)."""
        return self.first_frames if last_frames == 0 else min(self.max_frames, math.ceil(last_frames * self.growth))


@dataclass(frozen=True, slots=True, eq=False)
class EngineRequest:
    """A request to the engine, from the API or the service."""

    request_id: str
    codes: CodesRequest
    tenant: str = ""
    weight: float = 1.0
    """Fair-share weight of the tenant, relative to other tenants."""
    priority: int = 0
    """Lower values are scheduled first, regardless of weight."""
    chunks: ChunkPolicy | None = None
    """None: deliver all frames at the end (non-streaming)."""
    deadline_s: float | None = None
    """Deadline for the last frame, in seconds from submission; rejected at once if it cannot be met."""
    lease_s: float | None = None
    """Lease duration: the request is cancelled if it is not renewed for this long."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Resources used by a request."""

    num_frames: int
    """Frames generated, excluding known ones."""
    queue_s: float
    prefill_s: float
    decode_s: float


@dataclass(frozen=True, slots=True, eq=False)
class CodeChunk:
    """Frames of one request, in order and without gaps."""

    request_id: str
    codes: Tensor
    """`[K, T]` int32 on the host."""
    frame_offset: int
    """Frame of the piece at which the chunk starts."""


@dataclass(frozen=True, slots=True, eq=False)
class AudioChunk:
    """Samples of one piece, in order and without gaps."""

    samples: Tensor
    """`[C, N]` float32 on the host."""
    sample_offset: int
    """Sample of the piece at which the chunk starts."""
    sample_rate: int


@dataclass(frozen=True, slots=True, eq=False)
class EndOfRequest:
    """The terminal event of a request."""

    request_id: str
    reason: FinishReason
    usage: Usage
    error: str | None = None


EngineEvent = CodeChunk | EndOfRequest
