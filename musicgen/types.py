"""The nouns of the project. Each field says who sets it.

A request travels as: a user's call → `Conditioning` → `CodesRequest` → codes `[K, T]` → samples `[C, N]`.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from musicgen.errors import InvalidRequestError

if TYPE_CHECKING:  # the service's gatekeeper, and whoever asks for help, does without torch
    from torch import Tensor

MAX_SEED = 2**63 - 1
MIN_TEMPERATURE = 1e-4
"""Logits divided by less overflow, or differ by so much that the draw is greedy anyway."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request draws its codes. Set by the caller; checked here, once.

    Defaults are MusicGen's own. Source of the semantics: audiocraft `LMModel._sample_next_token`.
    """

    greedy: bool = False
    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = 250
    """Keep every code at least as likely as the k-th; 0 keeps all."""
    top_p: float = 0.0
    """If > 0, keep the most likely codes up to this mass, and ignore `top_k`."""
    guidance_scale: float = 3.0
    """How far to move from the unconditional towards the conditional prediction; 1 turns guidance off."""
    melody_guidance: float | None = None
    """Double guidance: how far to move from the melody-only towards the melody-and-text prediction, before
    `guidance_scale` is applied (audiocraft's `cfg_coef_beta`)."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.temperature == 0 or MIN_TEMPERATURE <= self.temperature < math.inf):
            expected = f"0, or a finite number ≥ {MIN_TEMPERATURE:g}"
            raise InvalidRequestError(expected, repr(self.temperature), "0 is greedy", param="temperature")
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 0:
            raise InvalidRequestError("an integer ≥ 0", repr(self.top_k), "0 turns it off", param="top_k")
        if not 0.0 <= self.top_p <= 1.0:
            raise InvalidRequestError("a number in [0, 1]", repr(self.top_p), "0 turns it off", param="top_p")
        for name in ("guidance_scale", "melody_guidance"):
            value = getattr(self, name)
            if value is not None and not abs(value) < 1e4:
                raise InvalidRequestError("a finite number below 10000", repr(value), param=name)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed <= MAX_SEED:
            raise InvalidRequestError("an integer in [0, 2^63)", repr(self.seed), param="seed")


@dataclass(frozen=True, slots=True, eq=False)
class Conditioning:
    """What the language model is conditioned on: the outputs of the text encoder and the chroma extractor."""

    text: Tensor | None
    """`[L, text_dim]` states of the text encoder, of this prompt alone, unpadded; None for no text."""
    chroma: Tensor | None
    """`[num_frames, num_chroma]` one-hot chroma, cut or repeated to the model's length; None for no melody."""


@dataclass(frozen=True, slots=True)
class Window:
    """Frames that the model sees at once. Set by `plan_windows`."""

    start: int
    """First frame, in frames of the whole piece."""
    end: int
    """One past the last frame."""


@dataclass(frozen=True, slots=True, eq=False)
class CodesRequest:
    """One request to the language model. Set by the API from a user's call, with everything resolved."""

    windows: tuple[tuple[Window, Conditioning], ...]
    """One window up to the model's longest duration; overlapping ones, in order, beyond it."""
    sampling: SamplingParams
    known_codes: Tensor | None = None
    """`[K, P]` codes that the result starts with, fewer frames than the result: a prompt, or, with the windows of
    the first time, what an interrupted request had already made."""

    @property
    def num_frames(self) -> int:
        """Frames of the result, known ones included."""
        return self.windows[-1][0].end

    @property
    def num_known_frames(self) -> int:
        return 0 if self.known_codes is None else self.known_codes.shape[-1]

    def with_seed(self, seed: int) -> CodesRequest:
        """The same request drawn another way."""
        return replace(self, sampling=replace(self.sampling, seed=seed))


class FinishReason(enum.Enum):
    """How a request ended. Every accepted request ends in exactly one of these."""

    FINISHED = "finished"
    CANCELLED = "cancelled"
    """Its caller, or the end of its lease, stopped it."""
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class ChunkPolicy:
    """How often a stream gets its frames: a small first chunk, then larger and larger ones."""

    first_frames: int = 12
    max_frames: int = 50
    growth: float = 1.5

    def __post_init__(self) -> None:
        if not (1 <= self.first_frames <= self.max_frames and self.growth >= 1):
            raise InvalidRequestError("1 ≤ first_frames ≤ max_frames and growth ≥ 1", str(self), param="chunks")

    def next_frames(self, last_frames: int) -> int:
        """Length of the chunk after one of `last_frames` frames (0: the first)."""
        return self.first_frames if last_frames == 0 else min(self.max_frames, math.ceil(last_frames * self.growth))


@dataclass(frozen=True, slots=True, eq=False)
class EngineRequest:
    """What the engine is asked for. Set by the API or by the service."""

    request_id: str
    codes: CodesRequest
    tenant: str = ""
    weight: float = 1.0
    """Share of a tenant, relative to the others'."""
    priority: int = 0
    """Lower goes first, whatever the shares."""
    chunks: ChunkPolicy | None = None
    """None: all frames at the end, for callers that do not listen meanwhile."""
    deadline_s: float | None = None
    """Seconds from now by which the last frame must be made; refused at once if that cannot be."""
    lease_s: float | None = None
    """Cancelled if nobody renews it for that long."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What a request took."""

    num_frames: int
    """Frames made; those that were known are not counted."""
    queue_s: float
    prefill_s: float
    decode_s: float


@dataclass(frozen=True, slots=True, eq=False)
class CodeChunk:
    """Frames of one request, in order and without gaps. Set by the engine."""

    request_id: str
    codes: Tensor
    """`[K, T]` int32 on the host."""
    frame_offset: int
    """Frame of the piece at which the chunk begins."""


@dataclass(frozen=True, slots=True, eq=False)
class AudioChunk:
    """Samples of one piece, in order and without gaps. Set by the codec."""

    samples: Tensor
    """`[C, N]` float32 on the host."""
    sample_offset: int
    """Sample of the piece at which the chunk begins."""
    sample_rate: int


@dataclass(frozen=True, slots=True, eq=False)
class EndOfRequest:
    """The one terminal event of a request."""

    request_id: str
    reason: FinishReason
    usage: Usage
    error: str | None = None


EngineEvent = CodeChunk | EndOfRequest
